"""The main job: trains a recommender with a Llama inside. `python train_llama.py --help` lists every flag."""

import sys

from efficientids.__main__ import start

if __name__ == "__main__":
    sys.exit(start("train", sys.argv[1:]))
