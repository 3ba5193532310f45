"""What kind of question a data set of ours asks, judged by its words."""


def category(source: str, question: str, answer: str) -> str:
  """The kind of a question.

  Args:
    source: as in `config.data.source`.
    question: as it was asked.
    answer: the truth.
  """
  if source == "grid_vqa":
    return _of_grid(question)
  if answer in ("yes", "no"):
    return "yes/no"
  if source != "easy_vqa":
    return "other"
  return "color" if "color" in question else "shape"


def _of_grid(question: str) -> str:
  if question.startswith("how many"):
    return "count"
  if question.startswith("is there"):
    return "existence"
  if question.startswith("are there"):
    return "comparison"
  attribute = question.split()[1]
  return attribute if " in row " in question else f"{attribute} of a neighbour"
