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
import email.message
import hashlib
import http.client
import itertools
import json
import pathlib
import re
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tqdm

from vocojax.core import files, journal, lock
from vocojax.errors import UserError, one_line

T = TypeVar("T")

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
_MAX_REPLY = 2**22  # bytes; a verdict after much thought has 100,000
_LONGEST_VERDICT = 100_000  # characters
_SHOWN = 200  # characters of what a server says
# So many characters of the key in a row are not printed or stored.
_KEY_PIECE = 8
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
    api_key: sent as bearer token if not empty, to `url` alone; never printed or
      stored.
    attempts: how often one answer is asked about at most.
    timeout: seconds of one call, from its start to the end of the reply.
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
    _check_url(server.url)
    files.refuse_surrogates(server.model, "--judge_model", JudgeError)
    if not re.fullmatch("[!-~]*", server.api_key):
      raise JudgeError(
        "JUDGE_API_KEY",
        "white space or characters beyond ASCII, perhaps a line end",
        "neither",
        "set it without them",
      )
    self._server = server
    self._cache = cache
    self._lock = threading.Lock()
    self._opener = urllib.request.build_opener(_NoRedirects)
    self._verdicts: dict[str, Verdict] = {}
    self._temperatures: tuple[float, ...] | None = _TEMPERATURES
    self._complaint = ""  # the last reply that could not be used
    self.calls = self.cached = self.retries = self.malformed = 0
    self.refused = 0
    self._gives_verdicts = False  # on some of the cases that are asked about
    self._read_cache()  # before the first call is paid for

  def _read_cache(self) -> None:
    self._journal = journal.Journal(self._cache, JudgeError)
    for where, entry in self._journal.entries:
      key, verdict = _read_verdict(where, entry)
      self._verdicts[key] = verdict

  def verdicts(
    self, cases: Sequence[tuple[str, str, str]]
  ) -> list[Verdict | None]:
    """One verdict for each (question, truth, prediction).

    None is for an answer on which the judge said nothing that can be read, as
    often as it was asked, or which the server would not judge.

    Raises:
      JudgeError: the server refuses, fails too often, or gave no verdict on any
        answer. What was judged until then is kept.
      UserError: another process adds verdicts to the file.
    """
    with lock.held(self._cache.parent, "judging"):
      self._read_cache()  # there may be more by now
      return self._ask_for_new(cases)

  def _ask_for_new(
    self, cases: Sequence[tuple[str, str, str]]
  ) -> list[Verdict | None]:
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
      self._journal.flush()
    found = [self._verdicts.get(key) for key in keys]
    if keys and not any(found):
      raise self._error(f"no verdict; the last reply was {self._complaint}")
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
        self._complaint = self._quote(reply)

  def _error(self, reason: str) -> JudgeError:
    return JudgeError(
      f"judge {self._server.model} at {self._server.url}",
      reason,
      "verdicts",
      "check URL, model and key and run the same command again; verdicts so "
      f"far are in {self._cache}",
    )

  def _quote(self, text: str) -> str:
    """The beginning of what a server says, in one line."""
    # It may be long, and white space for the most part.
    return one_line(self._without_key(text[: 100 * _SHOWN]))[:_SHOWN]

  def _without_key(self, text: str) -> str:
    """What a server says, which may echo the key or a part of it."""
    key, hidden = self._server.api_key, bytearray(len(text))
    size = min(len(key), _KEY_PIECE)
    for i in range(len(key) - size + 1 if key else 0):
      at = text.find(piece := key[i : i + size])
      while at >= 0:
        hidden[at : at + size] = b"*" * size
        at = text.find(piece, at + 1)
    return "".join(
      "***" if is_hidden else "".join(c for _, c in group)
      for is_hidden, group in itertools.groupby(
        zip(hidden, text, strict=True), lambda pair: pair[0]
      )
    )

  def _keep(self, key: str, verdict: Verdict, reply: str) -> None:
    entry = {"key": key, "model": self._server.model}
    entry["reply"] = self._without_key(reply)
    with self._lock:
      self._journal.add(entry | dataclasses.asdict(verdict))
      self._verdicts[key] = verdict
      self._gives_verdicts = True

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
      except _Status as e:
        reason, passing = str(e), e.code in _PASSING or e.code >= 500
        after = e.headers.get("Retry-After", "")
        if e.code == 400 and e.is_about_temperature and temperatures:
          # Some judges have only their own. Other calls may be under way.
          self._temperatures, passing, after = None, True, ""
        elif e.code in _REFUSALS:
          raise _Refused(reason) from e
      except (OSError, http.client.HTTPException, _NoReply) as e:
        cause = e.reason if isinstance(e, urllib.error.URLError) else e
        reason = self._quote(str(cause)) or type(cause).__name__
        passing, after = True, ""
      if not passing or attempt == self._server.attempts:
        raise self._error(f"{reason}, in attempt {attempt}")
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
    content = _within(self._server.timeout, lambda: self._send(request))
    try:
      reply = files.parse_json(content, "", dict, JudgeError)
      message = reply["choices"][0]["message"]
      return str(message["content"] or "")
    except (JudgeError, LookupError, TypeError) as e:
      said = self._quote(content.decode(errors="replace"))
      raise _NoReply(f"no chat completion: {said}") from e

  def _send(self, request: urllib.request.Request) -> bytes:
    """What a server replies.

    Raises:
      _Status: it is no success.
      _NoReply: it is too long.
      OSError, http.client.HTTPException: there is no reply.
    """
    try:
      with self._opener.open(request, timeout=self._server.timeout) as reply:
        content = reply.read(_MAX_REPLY + 1)
    except urllib.error.HTTPError as e:
      with e:
        content = e.read(_MAX_REPLY).decode(errors="replace")
      words = [e.reason, content]
      if 300 <= e.code < 400:
        to = e.headers.get("Location", "nowhere")
        words = [f"a redirect to {to}, which is not followed"]
      said = " ".join(filter(None, map(self._quote, words)))
      about = "temperature" in content[: 100 * _SHOWN]
      raise _Status(e.code, said, e.headers, about) from e
    if len(content) > _MAX_REPLY:
      raise _NoReply(f"a reply of more than {_MAX_REPLY:,} bytes")
    return content


def _read_verdict(where: str, entry: dict[str, Any]) -> tuple[str, Verdict]:
  """Key and verdict of a line that was kept.

  Raises:
    JudgeError: it has none.
  """
  try:
    key = files.get_field(entry, "key", str, where, JudgeError)
    right = files.get_field(entry, "right", bool, where, JudgeError)
    score = files.get_field(entry, "score", int, where, JudgeError)
    date = files.get_field(entry, "date", str, where, JudgeError)
    if not 0 <= score <= 5:
      raise JudgeError(f"{where}: field score", str(score), "0 to 5", "")
  except JudgeError as e:
    raise JudgeError(e.where, e.got, e.expected, "delete the line") from e
  return key, Verdict(right, score, date)


def _check_url(url: str) -> None:
  """Whether `url` can be asked, and holds no secret: it stands in results.

  Raises:
    JudgeError: it is not, or does.
  """
  has_secret = any(c in url for c in "@?#")
  try:
    parts = urllib.parse.urlsplit(url)
    _ = parts.port  # read only now
    host = (parts.hostname or "").encode("idna")
  except ValueError:
    host = b""
  is_url = re.fullmatch("https?://[!-~]+", url, re.IGNORECASE) and host
  if has_secret or not is_url:
    raise JudgeError(
      "--judge_url",
      "a URL with a user, a query or a fragment" if has_secret else repr(url),
      "one such as http://localhost:8000/v1",
      "correct it; a key belongs in the variable JUDGE_API_KEY",
    )


def _within(seconds: float, function: Callable[[], T]) -> T:
  """What `function` returns, unless that takes longer.

  A server that sends a byte now and then would never exceed the timeout of a
  socket. The thread that waits for it is left behind.

  Raises:
    _NoReply: it takes longer.
  """
  future: concurrent.futures.Future[T] = concurrent.futures.Future()

  def run() -> None:
    try:
      future.set_result(function())
    except BaseException as e:
      future.set_exception(e)

  threading.Thread(target=run, daemon=True).start()
  try:
    return future.result(seconds)
  except TimeoutError as e:
    raise _NoReply(f"no whole reply in {seconds:g} s") from e


class _NoRedirects(urllib.request.HTTPRedirectHandler):
  """Takes a redirect for the failure it is: it would get the key, too."""

  def redirect_request(self, req, fp, code, msg, headers, newurl) -> None:
    return None


class _Status(Exception):
  """The server replied with a status that is no success, and said why."""

  def __init__(
    self,
    code: int,
    said: str,
    headers: email.message.Message,
    is_about_temperature: bool,
  ):
    super().__init__(f"HTTP {code} {said}")
    self.code, self.headers = code, headers
    self.is_about_temperature = is_about_temperature


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
  if len(literal) > _LONGEST_VERDICT:
    return None
  try:
    found = json.loads(literal)
  except (ValueError, RecursionError):
    try:
      found = ast.literal_eval(literal)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
      return None
  try:
    first = re.match(r"\W*(yes|no|true|false)\b", str(found["pred"]).lower())
    score = float(found["score"])
  except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
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
