"""vocojax: vision-language models that read an image as k VoCo tokens, in JAX.

Read next: configs/easyvqa_1tok.py, then models/masks.py.
"""

__version__ = "0.1.0"
