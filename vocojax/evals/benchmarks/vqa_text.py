"""How the VQA challenge makes two spellings of an answer equal.

The official evaluation (GT-Vision-Lab/VQA, vqaEval.py) cleans punctuation,
number words, articles and contractions. Its submission server does more, and
LLaVA does that before it hands in (EvalAIAnswerProcessor). The order of the
steps, and their oddities, are part of the rule. Read next: vqav2.py.
"""

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_GROUPS = re.compile(r"\d,+\d")
# Every period that no digit follows: "2.5" keeps its own, "5." does not.
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # the official code passes a flag where the count belongs
_ARTICLES = ("a", "an", "the")
_NUMBERS = {
  word: str(number)
  for number, word in enumerate(
    "zero one two three four five six seven eight nine ten".split()
  )
} | {"none": "0"}

# Words with apostrophes that are recognised with one of them left out. Forms
# of "I" are not among them: the official table has them in upper case, which
# no lowered word equals. Neither are "well" and its like, being words.
_CONTRACTED = """
  ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
  hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd
  it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
  not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
  shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
  someone'll someone's something'd something'd've something'll that's there'd
  there'd've there're there's they'd they'd've they'll they're they've 'twas
  wasn't we'd've we've weren't what'll what're what's what've when's where'd
  where's where've who'd who'd've who'll who's who've why'll why're why's won't
  would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
  you're you've
""".split()


def _spellings() -> dict[str, str]:
  spellings: dict[str, str] = {
    word[: match.start()] + word[match.end() :]: word
    for word in _CONTRACTED
    for match in re.finditer("'", word)
  }
  spellings["somebody'd"] = "somebodyd"  # the wrong way round, officially
  return spellings


_CONTRACTIONS = _spellings()


def submitted(answer: str) -> str:
  """An answer as it is handed in: all steps, lower case.

  >>> submitted("The Two dogs, I dont know.")
  "2 dogs i don't know"
  """
  answer = answer.lower().replace(",", "").replace("?", "")
  answer = answer.replace("'s", " 's")
  return plain_words(punctuation(one_line(answer)))


def one_line(text: str) -> str:
  """`text` with spaces for newlines and tabs, none at its ends."""
  return text.replace("\n", " ").replace("\t", " ").strip()


def punctuation(text: str) -> str:
  """Takes punctuation out.

  A mark vanishes where it stands beside a space anywhere in the text, or where
  the text has a number such as 1,000; otherwise it becomes a space. Colons and
  apostrophes stay.
  """
  grouped = _DIGIT_GROUPS.search(text) is not None
  result = text
  for mark in _PUNCTUATION:
    beside_space = f"{mark} " in text or f" {mark}" in text
    result = result.replace(mark, "" if beside_space or grouped else " ")
  return _PERIOD.sub("", result, count=_MAX_PERIODS)


def plain_words(text: str) -> str:
  """Lower case, digits for number words, no articles, whole contractions."""
  words = [_NUMBERS.get(word, word) for word in text.lower().split()]
  words = [word for word in words if word not in _ARTICLES]
  return " ".join(_CONTRACTIONS.get(word, word) for word in words)
