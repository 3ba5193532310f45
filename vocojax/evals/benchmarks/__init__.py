"""The ten benchmarks: questions in, official scores out. Read next: base.py.

One file per family; registry.py has them by name. Nothing here knows a model:
a benchmark gives questions, and reads what was answered from a mapping of
question id to text. Official rules are followed with their quirks, each named
where it is; what LLaVA-1.5's evaluation does decides where they differ.
"""
