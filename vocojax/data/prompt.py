"""Prompt layouts: how a conversation becomes ids and labels, piece by piece.

A layout has a name and a version, both stored in checkpoints, because weights
only make sense with the layout they were trained on. Read next: pipeline.py.

  image stream   <s> stream_prefix [patches] stream_suffix [VoCo tokens]
  text stream    image_opening Q question_end answer_start A </s>
                 question_start Q question_end answer_start A </s> ...

Every piece is tokenised by itself and labelled as it is laid down, so a label
never depends on counting the tokens of a longer text again. Pieces meet at a
space, at `:` or at `</s>`, where no token of a LLaMA vocabulary reaches across.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from typing import Literal

import transformers

from vocojax.errors import DataError, OddRecord, shorten

IGNORE = -100  # label of a token that is not trained
IMAGE_MARKER = "<image>"

Turn = tuple[str, str | None]  # question, answer


@dataclasses.dataclass(frozen=True)
class Layout:
  """The fixed text of a prompt.

  Attributes:
    name: key of `LAYOUTS`, and of `config.prompt.layout`.
    version: counts up whenever the ids it gives change.
    stream_prefix: between `<s>` and the patches, of every image; tokenised as
      the beginning of a text.
    stream_suffix: between the patches and the VoCo tokens; tokenised as the
      beginning of a text.
    cut_at_image: whether the text stream is tokenised as a text of its own, as
      LLaVA does by cutting its text at the image, or as a continuation.
    image_opening: before the first question of a conversation with images.
    text_opening: the same of a conversation without images, after `<s>`;
      tokenised as the beginning of a text.
    question_start: before every later question; None leaves out all questions
      and what is around them.
    question_end: after every question.
    answer_start: before every answer.
    answer_end: after every answer; None is `</s>`.
    system_end: after the text of a system turn, which stands before the first
      question; None is no place for one.
  """

  name: str
  version: int
  stream_prefix: str
  stream_suffix: str
  cut_at_image: bool
  image_opening: str
  text_opening: str
  question_start: str | None
  question_end: str
  answer_start: str
  answer_end: str | None
  system_end: str | None = None

  def stamp(self) -> dict[str, str | int]:
    """What a checkpoint stores of it."""
    return {"name": self.name, "version": self.version}


# The system text of the original, which says "of the image" in conversations
# without one, too.
_VOCO_SYSTEM = (
  "A chat between a curious user and an artificial intelligence assistant of "
  "the image. The assistant gives helpful, detailed, and polite answers to "
  "the user's questions. "
)
_VICUNA_SYSTEM = _VOCO_SYSTEM.replace(" of the image", "")

LAYOUTS = {
  layout.name: layout
  for layout in (
    # Token for token what VoCo-LLaMA trains on (train_compress.py, and
    # conv_templates "voco_conv_vicuna_v1", commit 3b6e14d).
    Layout(
      name="voco_v1",
      version=1,
      stream_prefix="",
      stream_suffix="\n",
      cut_at_image=False,
      image_opening="\n" + _VOCO_SYSTEM + "USER: ",
      text_opening=_VOCO_SYSTEM + "USER: ",
      question_start="USER: ",
      question_end=" ASSISTANT:",
      answer_start=" ",
      answer_end=None,
    ),
    # LLaVA-1.5 (conv_templates "vicuna_v1", commit c121f04): the system text
    # stands before the image, so it belongs to the image stream.
    Layout(
      name="vicuna_v1",
      version=1,
      stream_prefix=_VICUNA_SYSTEM + "USER: ",
      stream_suffix="",
      cut_at_image=True,
      image_opening="\n",
      text_opening=_VICUNA_SYSTEM + "USER: ",
      question_start="USER: ",
      question_end=" ASSISTANT:",
      answer_start=" ",
      answer_end=None,
    ),
    # LLaVA's alignment of the projector (conv_templates "plain"): a caption
    # right after the patches, and no </s>.
    Layout(
      name="plain",
      version=1,
      stream_prefix="",
      stream_suffix="",
      cut_at_image=True,
      image_opening="",
      text_opening="",
      question_start=None,
      question_end="",
      answer_start="",
      answer_end="\n",
    ),
    # A bare question and answer, for models that know one task.
    Layout(
      name="qa_v1",
      version=1,
      stream_prefix="",
      stream_suffix="",
      cut_at_image=False,
      image_opening="",
      text_opening="",
      question_start="",
      question_end="",
      answer_start=" ",
      answer_end=None,
      system_end=" ",
    ),
  )
}


def stream_ids(
  layout: Layout, tokenizer: transformers.PreTrainedTokenizerFast
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Ids of the image stream before the patches, and between them and VoCo."""
  prefix = _tokenize(tokenizer, layout.stream_prefix, continues=False)
  suffix = _tokenize(tokenizer, layout.stream_suffix, continues=False)
  return (tokenizer.bos_token_id, *prefix), tuple(suffix)


def encode(
  layout: Layout,
  tokenizer: transformers.PreTrainedTokenizerFast,
  turns: Sequence[Turn],
  num_images: int,
  strip_newlines: Literal["original", "none"],
) -> tuple[list[int], list[int]]:
  """Ids and labels of a conversation's text stream.

  Labels are `IGNORE` except on the answers and what ends each. They are not
  shifted: `labels[i]` is `ids[i]` where it is trained.

  Args:
    layout: one of `LAYOUTS`.
    tokenizer: from `load_tokenizer`.
    turns: questions and answers. The last answer may be None: the ids then
      end where the model is to begin its answer.
    num_images: how many images stand in front of the conversation. Without
      one it begins with `<s>`.
    strip_newlines: 'original' deletes all newlines of the questions and
      answers of a conversation with images, as the released code does.

  Raises:
    DataError: the last answer is None in a layout without questions, or the
      questions have a `<image>` too many or too few.
  """
  questions = place_images([question for question, _ in turns], num_images)
  has_image = num_images > 0
  ids: list[int] = []
  labels: list[int] = []

  def lay(tokens, trained):
    ids.extend(tokens)
    labels.extend(tokens if trained else [IGNORE] * len(tokens))

  if not has_image:
    lay([tokenizer.bos_token_id], trained=False)
  continues = has_image and not layout.cut_at_image
  strip = has_image and strip_newlines == "original"
  start = layout.image_opening if has_image else layout.text_opening
  for i, (question, (_, answer)) in enumerate(
    zip(questions, turns, strict=True)
  ):
    if layout.question_start is not None:
      text = start + _strip(question, strip) + layout.question_end
      lay(_tokenize(tokenizer, text, continues), trained=False)
      start, continues = layout.question_start, True
    if answer is None:
      _check_open(layout, i, len(turns))
      break
    text = layout.answer_start + _strip(answer, strip)
    text += layout.answer_end or ""
    lay(_tokenize(tokenizer, text, continues), trained=True)
    continues = True
    if layout.answer_end is None:
      lay([tokenizer.eos_token_id], trained=True)
  return ids, labels


def _check_open(layout: Layout, turn: int, num_turns: int) -> None:
  """Whether a turn may be left without an answer."""
  if turn + 1 < num_turns:
    raise ValueError(f"turn {turn} of {num_turns} has no answer")
  if layout.question_start is None:
    raise DataError(
      f"prompt layout {layout.name!r}",
      "a question to be answered",
      "captions only, as the layout leaves out questions",
      "choose another, such as --layout=vicuna_v1",
    )


def check_markers(
  questions: Sequence[str], num_images: int, where: str = "question"
) -> int:
  """The number of `<image>` in questions: that of the images, or 0.

  Raises:
    DataError: it is another; an OddRecord if there are no images.
  """
  found = sum(question.count(IMAGE_MARKER) for question in questions)
  if found in (0, num_images):
    return found
  got, fix = f"{found} {IMAGE_MARKER}", "give the images, or correct the text"
  if not num_images:
    expected = "none, as there is no image"
    raise OddRecord(where, got, expected, fix, kind="marker")
  expected = f"{num_images}, as there are images, or none"
  raise DataError(where, got, expected, fix)


def place_images(questions: Sequence[str], num_images: int) -> list[str]:
  """Questions as they are read after the images.

  Images stand in front of all text, in the order of their markers. Where
  nothing but white space is between the markers, they are left out, as LLaVA
  does. Where there is text, the first becomes "image 1" and so on, so that the
  text still says which image is meant.

  Example:
    >>> place_images(["<image>\\nWhat?"], 1)
    ['What?']
    >>> place_images(["Before: <image> After: <image> What changed?"], 2)
    ['Before: image 1 After: image 2 What changed?']

  Raises:
    DataError: as `check_markers`.
  """
  if not check_markers(questions, num_images):
    return list(questions)
  marked = [question for question in questions if IMAGE_MARKER in question]
  between = marked[0].split(IMAGE_MARKER)[1:-1]
  if len(marked) == 1 and not any(map(str.strip, between)):
    return [
      q.replace(IMAGE_MARKER, "").strip() if q in marked else q
      for q in questions
    ]
  number = itertools.count(1)
  return [
    re.sub(IMAGE_MARKER, lambda _: f"image {next(number)}", question)
    for question in questions
  ]


def _strip(text: str, strip_newlines: bool) -> str:
  return text.replace("\n", "") if strip_newlines else text


def _tokenize(
  tokenizer: transformers.PreTrainedTokenizerFast, text: str, continues: bool
) -> list[int]:
  """Ids of `text` alone; what looks like a special token in it is plain text.

  LLaMA's tokenizer puts a space before whatever it is given (but for some
  texts that begin with one, if it was made from a tokenizer.model). Where
  `text` continues another, that space must not be there. A newline in front
  shields `text` from it, since no LLaMA token spans a newline; its ids then
  come off.
  """
  if not text:
    return []
  shield = _shield(tokenizer)
  if len(shield) < 2:  # nothing is put in front by this tokenizer
    return _plain(tokenizer, text)
  ids = _plain(tokenizer, "\n" + ("" if continues else " ") + text)
  if ids[: len(shield)] != shield:
    raise DataError(
      f"tokenizer {tokenizer.name_or_path}",
      f"one token of a newline and the text after it, {shorten(text, 20)}",
      "them apart, as in LLaMA's",
      "use another tokenizer",
    )
  return ids[len(shield) :]


@functools.lru_cache(maxsize=4)
def _shield(tokenizer: transformers.PreTrainedTokenizerFast) -> list[int]:
  return _plain(tokenizer, "\n")


def _plain(
  tokenizer: transformers.PreTrainedTokenizerFast, text: str
) -> list[int]:
  # Straight to the Rust half: the Python half takes eight times as long.
  backend = tokenizer.backend_tokenizer
  if not backend.encode_special_tokens:
    backend.encode_special_tokens = True
  return backend.encode(text, add_special_tokens=False).ids
