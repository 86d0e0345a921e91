"""One loop for every method and every objective; `train.py` is where to start reading."""
