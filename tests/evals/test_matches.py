"""What counts as a match, and what is said of long answers."""

import pytest

from vocojax.evals import matches

PAIRS = (  # true answer, prediction, whether they are one when normalised
  ("red", "red", True),
  ("Yes, it is.", "yes it is", True),
  ("two dogs", "The 2 dogs", True),
  ("a red ball", "red ball .", True),
  ("red", "blue", False),
  ("red ball", "ball red", False),
  ("no", "", False),
)


def test_matches_beyond_the_exact_ones():
  found = matches.summary([{"answer": a, "prediction": b} for a, b, _ in PAIRS])
  assert found == {
    "normalized_accuracy": 4 / 7,
    "normalized_correct": 4,
    "median_answer_words": 2,  # of 1, 3, 2, 3, 1, 2, 1
  }


@pytest.mark.parametrize(
  ("words", "said"), [(1.0, ""), (3.0, ""), (3.5, "3.5")]
)
def test_long_answers_are_no_measure(words, said):
  note = matches.note_on_length(words)
  assert bool(note) == bool(said)
  assert said in note
