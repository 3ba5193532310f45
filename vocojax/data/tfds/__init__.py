"""TFDS builders: data sets turned into ArrayRecord files."""
