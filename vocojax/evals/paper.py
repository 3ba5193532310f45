"""What VoCo-LLaMA's authors published, arXiv 2406.12275. Read next: tables.py.

Scores are those of a 7B on 336-pixel images of 576 patches unless said
otherwise. Retention is in percent; `AVERAGES` are the published means.
"""

# Benchmarks of evals/benchmarks/, and the paper's names of them.
BENCHMARKS = {
  "gqa": "GQA",
  "mmbench": "MMB",
  "mme": "MME",
  "pope": "POPE",
  "seed": "SEED",
  "scienceqa": "SQA-I",
  "vqav2": "VQAv2",
}
SWEEP_BENCHMARKS = ("mmbench", "gqa", "vqav2", "seed")
VIDEO_BENCHMARKS = {
  "msvd_qa": "MSVD-QA",
  "msrvtt_qa": "MSRVTT-QA",
  "activitynet_qa": "ActivityNet-QA",
}

# Table 1. Method: its score on each of `BENCHMARKS`. The upper bound is trained
# with VoCo tokens that hide nothing; the lower one is the same weights.
METHODS = {
  "upper": (61.1, 64.0, 1487.2, 85.0, 57.9, 66.5, 77.7),
  "voco": (57.0, 58.8, 1323.3, 81.4, 53.7, 65.4, 72.3),
  "avgpool": (52.9, 55.5, 1210.3, 79.1, 50.3, 62.2, 65.0),
  "qformer": (51.1, 51.7, 1079.7, 77.3, 47.2, 62.7, 63.4),
  "lower": (37.7, 22.3, 617.3, 53.9, 36.9, 60.7, 41.2),
}
AVERAGES = {"voco": 83.7, "avgpool": 64.1, "qformer": 57.2}

# Table 2. Number of VoCo tokens: score on each of `SWEEP_BENCHMARKS`, average.
SWEEP = {
  128: ((61.0, 59.8, 76.9, 59.1), 97.7),
  64: ((60.5, 60.4, 75.4, 56.3), 93.7),
  32: ((59.4, 60.2, 75.3, 56.2), 92.6),
  16: ((58.6, 59.4, 75.4, 56.2), 91.3),
  8: ((58.7, 59.2, 75.3, 56.3), 91.3),
  4: ((60.4, 58.4, 74.5, 56.0), 90.4),
  2: ((60.1, 57.7, 73.5, 55.0), 87.8),
  1: ((58.8, 57.0, 72.3, 53.7), 83.8),
}

# Table 4. Trained with 32 tokens, used with so many: `SWEEP_BENCHMARKS`.
CUT_FROM = 32
CUT = {
  32: (59.4, 60.2, 75.3, 56.2),
  16: (58.3, 58.9, 74.9, 55.8),
  4: (59.7, 58.0, 73.5, 55.2),
  1: (57.9, 56.1, 71.2, 53.0),
}

# Table 7, one A100. Way to ask: cached tokens, cache in MB, CUDA time in ms of
# a question, TFLOP. The length of its text is not published.
EFFICIENCY = {
  "none": (0, 0.0, 440.5, 9.6),
  "full": (576, 302.4, 154.9, 1.2),
  "voco": (1, 0.525, 134.0, 0.5),
}

# Table 8. (image side, tokens a frame): accuracy and score by GPT-3.5, on each
# of `VIDEO_BENCHMARKS`.
VIDEO = {
  (224, 2): ((72.3, 3.9), (61.1, 3.5), (47.9, 3.4)),
  (336, 2): ((72.6, 3.9), (61.2, 3.5), (47.9, 3.4)),
  (224, 8): ((73.4, 3.9), (62.0, 3.5), (48.5, 3.4)),
  (336, 8): ((73.5, 3.9), (62.3, 3.5), (48.6, 3.4)),
}
