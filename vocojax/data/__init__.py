"""Records, images, prompts and batches. Read next: sources.py, pipeline.py."""
