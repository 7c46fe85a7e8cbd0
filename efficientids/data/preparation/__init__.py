"""From a source to a data set folder: read, encode, order, filter, split, report; `prepare.py` has the stages."""
