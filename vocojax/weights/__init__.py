"""Published weights in and out of checkpoints. Read first: hf.py."""
