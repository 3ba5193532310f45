"""When answers match, and what a share of matches means. Next: answers.py."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from vocojax.evals.benchmarks.vqa_text import submitted

FEW_WORDS = 3  # of longer answers few wordings match, however right


def summary(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Matches beyond the exact ones, and how long the true answers are.

  Answers match if they are one as the VQA challenge spells them: lower case,
  without punctuation and articles, with digits for number words.
  """
  pairs = [(p["answer"], p["prediction"]) for p in predictions]
  correct = sum(submitted(a) == submitted(b) for a, b in pairs)
  return {
    "normalized_accuracy": correct / len(pairs),
    "normalized_correct": correct,
    "median_answer_words": float(
      statistics.median(len(answer.split()) for answer, _ in pairs)
    ),
  }


def note_on_length(median_words: float) -> str:
  """What matches mean where true answers are long; '' where they are short."""
  if median_words <= FEW_WORDS:
    return ""
  return (
    f"half of the true answers have {median_words:g} words or more, and right "
    "answers in other words count as wrong: matches of texts this long are no "
    "measure of quality; read the predictions, or have them judged"
  )
