"""The main job: trains a recommender with a Llama inside. `python train_llama.py --help` lists every flag."""

import sys

from efficientids.__main__ import run
from efficientids.train import main

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
