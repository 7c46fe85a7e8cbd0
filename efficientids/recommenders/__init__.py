"""The systems behind one contract (`base.py`), by the name that `--recommender` and `model.json` use."""
