"""LLaVA's and VoCo-LLaMA's way from a conversation to ids and labels.

Written anew from a description of their algorithm: one long string, cut at the
special tokens and at `<image>`, and labels found by tokenising its parts again
and counting. Nothing of vocojax is used. Read next: `test_layouts.py`.
"""

import json
import pathlib
import re

import tokenizers
from tokenizers import normalizers

IGNORE = -100
IMAGE = -200
BOS, EOS, VOCO = 1, 2, 32000
SPECIAL = {"<unk>": 0, "<s>": BOS, "</s>": EOS, "<voco>": VOCO}

VICUNA = (
  "A chat between a curious user and an artificial intelligence assistant. "
  "The assistant gives helpful, detailed, and polite answers to the user's "
  "questions."
)
VOCO_VICUNA = (
  "A chat between a curious user and an artificial intelligence assistant of "
  "the image. The assistant gives helpful, detailed, and polite answers to the "
  "user's questions."
)


class SlowTokenizer:
  """The slow LLaMA tokenizer with legacy=False.

  Only the first stretch of a text gets a space in front; what follows a
  special token does not.
  """

  def __init__(self, folder: pathlib.Path):
    content = json.loads((folder / "tokenizer.json").read_text())
    self._pieces = tokenizers.Tokenizer.from_str(json.dumps(content))
    self._pieces.normalizer = normalizers.Replace(" ", "▁")

  def __call__(self, text: str) -> list[int]:
    ids = [BOS]
    for i, part in enumerate(re.split("(<unk>|<s>|</s>|<voco>)", text)):
      if part in SPECIAL:
        ids.append(SPECIAL[part])
      elif part:
        part = "▁" + part if i == 0 else part
        ids += self._pieces.encode(part, add_special_tokens=False).ids
    return ids


def tokenizer_image_token(text: str, tokenizer: SlowTokenizer) -> list[int]:
  """Pieces between images tokenised apart, one BOS in all."""
  first, *others = (tokenizer(piece) for piece in text.split("<image>"))
  ids = list(first)
  for piece in others:
    ids += [IMAGE, *piece[1:]]
  return ids


def image_to_front(text: str) -> str:
  if "<image>" not in text:
    return text
  text = text.replace("<image>", "").strip()
  return f"<image>\n{text}".strip()


def conversation_text(system: str, turns) -> str:
  """Style TWO: separated by a space and by </s> in turn."""
  text = system + " "
  for question, answer in turns:
    text += f"USER: {question} ASSISTANT:"
    if answer is not None:
      text += f" {answer}</s>"
  return text


def preprocess_v1(text: str, tokenizer: SlowTokenizer):
  """Ids, and labels by counting the tokens of every round."""
  ids = tokenizer_image_token(text, tokenizer)
  labels = list(ids)
  labels[0] = IGNORE
  at = 1
  for i, turn in enumerate(text.split("</s>")):
    if not turn:
      break
    asked, _ = turn.split(" ASSISTANT: ")
    length = len(tokenizer_image_token(turn, tokenizer))
    asked = tokenizer_image_token(asked + " ASSISTANT: ", tokenizer)
    instruction = len(asked) - 2
    if i:  # 'USER' is one id after </s>, two at the beginning of a text
      length, instruction = length - 1, instruction - 1
    labels[at : at + instruction] = [IGNORE] * instruction
    at += length
  assert at == len(ids), "tokenization mismatch: LLaVA drops the sample"
  return ids, labels


def vicuna_v1(turns, tokenizer: SlowTokenizer):
  turns = [(image_to_front(q), a and image_to_front(a)) for q, a in turns]
  return preprocess_v1(conversation_text(VICUNA, turns), tokenizer)


def voco_v1(turns, k: int, tokenizer: SlowTokenizer):
  """The original's string: image and VoCo first, all newlines deleted."""
  turns = [(image_to_front(q), a and image_to_front(a)) for q, a in turns]
  text = conversation_text(VOCO_VICUNA, turns)
  if "<image>" in text:
    text = text.replace("<image>", "").replace("\n", "")
    text = "<image>\n" + "<voco>" * k + "\n" + text
  ids, labels = preprocess_v1(text, tokenizer)
  return ids, labels


def preprocess_plain(turns, tokenizer: SlowTokenizer):
  ((_, caption),) = turns
  ids = tokenizer_image_token(f"<image>{caption}\n", tokenizer)
  masked = len(tokenizer_image_token("<image>", tokenizer))
  return ids, [IGNORE] * masked + ids[masked:]
