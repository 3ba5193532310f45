"""A language model as judge of free answers. Read next: video_qa.py.

Video-ChatGPT has GPT-3.5 compare each answer with the truth and reply with a
Python dictionary: yes or no, and a score. This asks any server that speaks
OpenAI's chat protocol for the same, in words of its own, so figures are not
comparable letter for letter; between judges, published figures differ by 7 to
30 points anyway. Hence the name of the judge and the dates of its verdicts are
in every result, and verdicts are kept on disk: each is paid for once.
"""

import ast
import concurrent.futures
import dataclasses
import datetime
import hashlib
import http.client
import json
import os
import pathlib
import re
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

import tqdm

from vocojax.errors import UserError

_SYSTEM = (
  "You grade answers to questions about videos. You are given a question, the "
  "correct answer, and the answer of a student, and you decide whether the "
  "student's answer means the same as the correct one. Judge the meaning and "
  "not the wording: a synonym or a paraphrase of the correct answer is right, "
  "and a detail that the correct answer does not have is no fault."
)
_USER = (
  "Question: {question}\nCorrect answer: {answer}\n"
  "Student's answer: {prediction}\n\n"
  "Is the student's answer right, yes or no, and how well does it match, as a "
  "whole number from 0 (not at all) to 5 (perfectly)? Reply with nothing but a "
  "Python dictionary with the keys 'pred', 'yes' or 'no', and 'score', the "
  "number, such as {{'pred': 'no', 'score': 1}}."
)
# Statuses that may go away by themselves, beside those of 500 and more.
_PASSING = (408, 409, 425, 429)
# Of the first try and of further ones: at 0, a reply that cannot be read would
# come again.
_TEMPERATURES = (0.0, 1.0)
_LONGEST_WAIT = 60.0  # seconds between two attempts
# Statuses by which a server refuses one request, such as a content filter, and
# how many before the first verdict mean that it refuses all.
_REFUSALS = (400, 413, 422)
_MOST_REFUSED = 10


class JudgeError(UserError):
  """The judge cannot be asked, or what it said before cannot be read."""


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the judge says of one answer.

  Attributes:
    right: whether the answer is.
    score: 0 to 5.
    date: day of the verdict, UTC, as YYYY-MM-DD.
  """

  right: bool
  score: int
  date: str


@dataclasses.dataclass(frozen=True)
class Server:
  """Where the judge is and how patient to be.

  Attributes:
    url: base of the API, such as http://localhost:8000/v1.
    model: name of the judge at that server.
    api_key: sent as bearer token if not empty; never written anywhere.
    attempts: how often one answer is asked about at most.
    timeout: seconds of one call.
    first_wait: seconds before the second attempt, doubled before each more.
    concurrency: calls under way at a time.
  """

  url: str
  model: str
  api_key: str = dataclasses.field(default="", repr=False)
  attempts: int = 8
  timeout: float = 300.0
  first_wait: float = 1.0
  concurrency: int = 8


class Judge:
  """Asks the judge, and remembers.

  Attributes:
    calls: requests sent.
    cached: verdicts found on disk.
    retries: calls that failed and were repeated.
    malformed: replies that are no verdict.
    refused: answers that the server would not judge.
  """

  def __init__(self, server: Server, cache: pathlib.Path):
    """Reads the verdicts in the file `cache`, which is made if not there.

    Raises:
      JudgeError: the URL or the key is none, or the file holds something else
        or cannot be written.
    """
    if not _is_url(server.url):
      raise JudgeError(
        f"judge: URL {server.url!r}, expected one such as "
        "http://localhost:8000/v1"
      )
    if not re.fullmatch("[!-~]*", server.api_key):
      raise JudgeError(
        "judge: API key: found white space or characters beyond ASCII, perhaps "
        "a line end; expected neither, set JUDGE_API_KEY without them"
      )
    self._server = server
    self._cache = cache
    self._lock = threading.Lock()
    self._verdicts: dict[str, Verdict] = {}
    self._temperatures: tuple[float, ...] | None = _TEMPERATURES
    self._complaint = ""  # the last reply that could not be used
    self.calls = self.cached = self.retries = self.malformed = 0
    self.refused = 0
    self._gives_verdicts = False  # on some of the cases that are asked about
    try:
      cache.parent.mkdir(parents=True, exist_ok=True)
      cache.open("a").close()
    except OSError as e:  # now, and not after the first call that is paid for
      raise JudgeError(
        f"{cache}: verdicts cannot be kept there ({e.strerror}); give a folder "
        "that can be written"
      ) from e
    self._read_cache()

  def _read_cache(self) -> None:
    content = self._cache.read_bytes()
    whole = content.rpartition(b"\n")[0]
    for number, line in enumerate(whole.splitlines(), 1):
      try:
        entry = json.loads(line)
        verdict = Verdict(entry["right"], entry["score"], entry["date"])
        self._verdicts[entry["key"]] = verdict
      except (ValueError, KeyError, TypeError) as e:
        raise JudgeError(
          f"{self._cache}:{number}: no verdict ({e!r}); delete the line"
        ) from e
    if whole and len(content) > len(whole) + 1:  # a crash cut the last line
      os.truncate(self._cache, len(whole) + 1)
    elif not whole:
      os.truncate(self._cache, 0)

  def verdicts(
    self, cases: Sequence[tuple[str, str, str]]
  ) -> list[Verdict | None]:
    """One verdict for each (question, truth, prediction).

    None is for an answer on which the judge said nothing that can be read, as
    often as it was asked, or which the server would not judge.

    Raises:
      JudgeError: the server refuses, fails too often, or gave no verdict on any
        answer. What was judged until then is kept.
    """
    keys = [self._key(case) for case in cases]
    new = {
      key: case
      for key, case in zip(keys, cases, strict=True)
      if key not in self._verdicts
    }
    known = len(dict.fromkeys(keys)) - len(new)
    self.cached += known
    self._gives_verdicts = known > 0
    pool = concurrent.futures.ThreadPoolExecutor(self._server.concurrency)
    try:
      futures = [pool.submit(self._judge, *item) for item in new.items()]
      for future in tqdm.tqdm(
        concurrent.futures.as_completed(futures),
        desc=f"verdicts of {self._server.model}",
        total=len(futures),
        mininterval=1 if sys.stderr.isatty() else 20,
        disable=not futures,
      ):
        future.result()
    finally:
      pool.shutdown(cancel_futures=True)
    found = [self._verdicts.get(key) for key in keys]
    if keys and not any(found):
      raise self._error(f"no verdict, the last reply was {self._complaint!r}")
    return found

  def describe(self, verdicts: Sequence[Verdict | None]) -> dict[str, Any]:
    """Who judged and when, and how it went, for the result."""
    dates = sorted(v.date for v in verdicts if v)
    return {
      "model": self._server.model,
      "url": self._server.url,
      "prompt": {"system": _SYSTEM, "user": _USER},
      "temperatures": self._temperatures,
      "first_verdict": dates[0] if dates else None,
      "last_verdict": dates[-1] if dates else None,
      "calls": self.calls,
      "cached": self.cached,
      "retries": self.retries,
      "malformed": self.malformed,
      "refused": self.refused,
      "without_verdict": list(verdicts).count(None),
    }

  def _key(self, case: tuple[str, str, str]) -> str:
    # The same name at another server may be another model.
    asked = [self._server.url, self._server.model, _messages(case)]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

  def _judge(self, key: str, case: tuple[str, str, str]) -> None:
    for attempt in range(self._server.attempts):
      try:
        reply = self._ask(case, min(attempt, 1))
      except _Refused as e:
        with self._lock:
          self.refused += 1
          self._complaint = str(e)
          if self.refused >= _MOST_REFUSED and not self._gives_verdicts:
            raise self._error(str(e)) from e
        return
      found = parse_verdict(reply)
      if found:
        self._keep(key, Verdict(*found, _today()), reply)
        return
      with self._lock:
        self.malformed += 1
        self._complaint = reply[:200]

  def _error(self, reason: str) -> JudgeError:
    return JudgeError(
      f"judge {self._server.model} at {self._server.url}: {reason}; check URL, "
      f"model and key and run again, verdicts so far are in {self._cache}"
    )

  def _keep(self, key: str, verdict: Verdict, reply: str) -> None:
    entry = {"key": key, "model": self._server.model, "reply": reply}
    line = json.dumps(entry | dataclasses.asdict(verdict)) + "\n"
    with self._lock:
      self._verdicts[key] = verdict
      self._gives_verdicts = True
      with self._cache.open("a", encoding="utf-8") as file:
        file.write(line)

  def _ask(self, case: tuple[str, str, str], further: int) -> str:
    """The judge's reply to the first (0) or a further (1) question for it.

    Waits and repeats where that may help.
    """
    wait = self._server.first_wait
    for attempt in range(1, self._server.attempts + 1):
      with self._lock:
        self.calls += 1
        temperatures = self._temperatures
      temperature = temperatures[further] if temperatures else None
      try:
        return self._call(case, temperature)
      except urllib.error.HTTPError as e:
        said = " ".join(e.read(1000).decode(errors="replace").split())
        e.close()
        reason = f"HTTP {e.code} {e.reason} {said[:200]}".rstrip()
        passing = e.code in _PASSING or e.code >= 500
        after = e.headers.get("Retry-After", "")
        if e.code == 400 and "temperature" in said and temperatures:
          # Some judges have only their own. Other calls may be under way.
          self._temperatures, passing, after = None, True, ""
        elif e.code in _REFUSALS:
          raise _Refused(reason) from e
      except (OSError, http.client.HTTPException, _NoReply) as e:
        reason, passing, after = str(e) or type(e).__name__, True, ""
      if not passing or attempt == self._server.attempts:
        raise self._error(f"{reason} in attempt {attempt}")
      with self._lock:
        self.retries += 1
      asked_for = float(after) if after.isdecimal() else 0.0
      time.sleep(min(max(wait, asked_for), _LONGEST_WAIT))
      wait *= 2
    raise AssertionError("unreachable")

  def _call(self, case: tuple[str, str, str], temperature: float | None) -> str:
    body: dict[str, Any] = {
      "model": self._server.model,
      "messages": _messages(case),
    }
    if temperature is not None:
      body["temperature"] = temperature
    headers = {"Content-Type": "application/json"}
    if self._server.api_key:
      headers["Authorization"] = f"Bearer {self._server.api_key}"
    request = urllib.request.Request(
      self._server.url.rstrip("/") + "/chat/completions",
      json.dumps(body).encode(),
      headers,
    )
    with urllib.request.urlopen(request, timeout=self._server.timeout) as reply:
      content = reply.read()
    try:
      message = json.loads(content)["choices"][0]["message"]
      return str(message["content"] or "")
    except (ValueError, LookupError, TypeError) as e:
      raise _NoReply(f"no chat completion: {content[:80]!r}") from e


def _is_url(text: str) -> bool:
  try:
    parts = urllib.parse.urlsplit(text)
    _ = parts.port  # read only now
  except ValueError:
    return False
  return parts.scheme in ("http", "https") and bool(parts.hostname)


class _NoReply(Exception):
  """The server sent something else than a chat completion."""


class _Refused(Exception):
  """The server would not take this request."""


def parse_verdict(reply: str) -> tuple[bool, int] | None:
  """Whether the answer is right, and its score; None for no verdict.

  A verdict is a dictionary literal with 'pred', which begins with yes or no,
  and 'score', 0 to 5, whose fraction is dropped as Video-ChatGPT drops it.
  Words around it, which there would be asked again, are overlooked, and so is
  what a judge thinks aloud; of several the last counts.
  """
  said = reply.rpartition("</think>")[2]
  if "<think>" in said:  # and never came to an end
    return None
  for literal in reversed(re.findall(r"\{[^{}]*\}", said)):
    if found := _parse_literal(literal):
      return found
  return None


def _parse_literal(literal: str) -> tuple[bool, int] | None:
  try:
    found = json.loads(literal)
  except ValueError:
    try:
      found = ast.literal_eval(literal)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
      return None
  try:
    first = re.match(r"\W*(yes|no|true|false)\b", str(found["pred"]).lower())
    score = float(found["score"])
  except (ValueError, LookupError, TypeError, OverflowError):
    return None
  if not first or not 0 <= score <= 5:
    return None
  return first[1] in ("yes", "true"), int(score)


def _messages(case: tuple[str, str, str]) -> list[dict[str, str]]:
  question, answer, prediction = case
  user = _USER.format(question=question, answer=answer, prediction=prediction)
  return [
    {"role": "system", "content": _SYSTEM},
    {"role": "user", "content": user},
  ]


def _today() -> str:
  return datetime.datetime.now(datetime.UTC).date().isoformat()
