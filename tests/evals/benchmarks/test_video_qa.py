"""Video questions, with and without a judge.

The judge is a server of this test that speaks OpenAI's protocol and does what
each test scripts.
"""

import contextlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest

from tests import disks
from tests.fields import raises
from vocojax.errors import DataError
from vocojax.evals.benchmarks import registry
from vocojax.evals.benchmarks.judge import (
  Judge,
  JudgeError,
  Server,
  parse_verdict,
)


class Stub:
  """Replies to the n-th call about an answer with the n-th line of its script.

  A line is the judge's reply, an HTTP status, bytes to send as they are, or
  both.
  """

  def __init__(self, script):
    self.script = script
    self.requests, self.headers, self.times = [], [], []
    self.running = self.most_running = 0
    self.gate = threading.Barrier(1)  # how many calls wait for each other
    self.pause = 0.0  # seconds that every call takes
    self.more_headers = {}  # of every reply
    self.reason = None  # in the line of every status
    self.drip = ""  # what comes byte by byte, for ever
    self.gets = []  # paths that were asked for, which a judge never does
    self.closed = False
    self._lock = threading.Lock()
    stub = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        if stub.drip:
          self.pour(stub.drip)
          return
        status, content = stub.reply(body, dict(self.headers))
        self.send_response(status, stub.reason)
        for name, value in stub.more_headers.items():
          self.send_header(name, value)
        if status == 429:
          self.send_header("Retry-After", "1")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # it has enough
          self.wfile.write(content)

      def do_GET(self):
        stub.gets.append(self.path)

      def pour(self, part):
        start = {"status": "HTTP/1.1 2", "header": "HTTP/1.1 200 OK\r\nX: "}
        whole = "HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"
        self.wfile.write(start.get(part, whole).encode())
        with contextlib.suppress(ConnectionError):
          while not stub.closed:
            self.wfile.write(b"0")
            time.sleep(0.05)

      def log_message(self, *args):
        pass

    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
    self._thread = threading.Thread(
      target=self._server.serve_forever, args=(0.01,)
    )
    self._thread.start()

  def close(self):
    self.closed = True
    self._server.shutdown()
    self._server.server_close()
    self._thread.join()

  def reply(self, body, headers):
    said = re.search("Student's answer: (.*)", body["messages"][1]["content"])[
      1
    ]
    with self._lock:
      self.running += 1
      self.most_running = max(self.running, self.most_running)
    time.sleep(self.pause)
    self.gate.wait(timeout=10)
    with self._lock:
      self.running -= 1
      self.times.append(time.monotonic())
      self.requests.append((said, body))
      self.headers.append(headers)
      lines = self.script[said]
      count = sum(earlier == said for earlier, _ in self.requests)
      line = lines[min(count, len(lines)) - 1]
    if isinstance(line, tuple):
      return line
    if isinstance(line, int):
      return line, b"scripted"
    if isinstance(line, bytes):
      return 200, line
    message = {"role": "assistant", "content": line}
    return 200, json.dumps({"choices": [{"message": message}]}).encode()


@pytest.fixture
def serve():
  stubs = []

  def start(script):
    stubs.append(Stub(script))
    return stubs[-1]

  yield start
  for stub in stubs:
    stub.close()


YES, NO = "{'pred': 'yes', 'score': 5}", "{'pred': 'no', 'score': 0}"


def make_judge(stub, tmp_path, **fields):
  fields = {"attempts": 3, "first_wait": 0.01, "concurrency": 2} | fields
  return Judge(Server(stub.url, "stub-1", **fields), tmp_path / "j.jsonl")


def case(said):
  return ("what is it ?", "a dog", said)


@pytest.mark.parametrize(
  ("reply", "expected"),
  [
    ("{'pred': 'yes', 'score': 4.8}", (True, 4)),  # the fraction is dropped
    ('{"pred": "No", "score": 2}', (False, 2)),
    ("{'pred': 'yes', 'score': '3'}", (True, 3)),
    ("```python\n{'pred': 'yes', 'score': 5}\n```", (True, 5)),
    ("{'pred': 'yes', 'score': 6}", None),
    ("{'pred': 'yes', 'score': -1}", None),
    ("{'pred': 'yes', 'score': 5.5}", None),
    ("{'pred': 'yes', 'score': nan}", None),
    ("{'pred': 'yes', 'score': 'nan'}", None),
    ("{'pred': 'maybe', 'score': 3}", None),
    ("{'pred': True, 'score': 3}", (True, 3)),
    ('{"pred": false, "score": 3}', (False, 3)),
    ("{'pred': 'Yes.', 'score': 5}", (True, 5)),
    ("{'pred': 'no, a cat', 'score': 1}", (False, 1)),
    ("{'pred': 'nothing', 'score': 1}", None),
    ("{'pred': 'no', 'score': 0} Note: {'yes'}", (False, 0)),
    ("{'pred': 'yes', 'score': 5} or {'pred': 'no', 'score': 1}", (False, 1)),
    ("<think>{'pred': 'yes', 'score': 5}? But", None),
    ("<think>{'pred': 'yes', 'score': 5}?</think>\nI pass", None),
    (
      "<think>as {'pred': 'yes', 'score': 5}</think>{'pred': 'no', 'score': 1}",
      (False, 1),
    ),
    ("{'pred': 'yes', 'score': 1" + "0" * 400 + "}", None),
    ("{'pred': 'yes'}", None),
    ("{'pred': 'yes', 'score': None}", None),
    ("{'pred': 'yes', 'score': [3]}", None),
    ("{'pred', 'score'}", None),
    ("yes, 5", None),
    ("{'pred': 'yes', 'score': __import__('os').getpid()}", None),
    ("{" * 10_000 + "}" * 10_000, None),
    ("{'pred': 'yes', 'score': " + "-" * 100_000 + "1}", None),
    ("{'pred': 'yes', 'score': 5", None),
    ('{"pred": "yes", "score": 5, "x": ' + "[" * 5000 + "]" * 5000 + "}", None),
    ('{"pred": "yes", "score": ' + "9" * 5000 + "}", None),
    ("{'pred': 'yes', 'score': 5, 'x': '" + "y" * 200_000 + "'}", None),
    ("", None),
  ],
)
def test_verdicts_are_read(reply, expected):
  assert parse_verdict(reply) == expected


def test_what_is_sent(serve, tmp_path):
  stub = serve({"a puppy": [YES]})
  judge = make_judge(stub, tmp_path, api_key="secret")
  (verdict,) = judge.verdicts([case("a puppy")])
  assert (verdict.right, verdict.score) == (True, 5)
  ((_, body),) = stub.requests
  assert sorted(body) == ["messages", "model", "temperature"]
  assert body["model"] == "stub-1" and body["temperature"] == 0
  system, user = body["messages"]
  assert (system["role"], user["role"]) == ("system", "user")
  for part in (
    "what is it ?",
    "a dog",
    "a puppy",
    "{'pred': 'no', 'score': 1}",
  ):
    assert part in user["content"]
  assert stub.headers[0]["Authorization"] == "Bearer secret"
  described = judge.describe([verdict])
  prompt = described["prompt"]
  assert prompt["system"] == system["content"]
  question, answer, prediction = case("a puppy")
  assert user["content"] == prompt["user"].format(
    question=question, answer=answer, prediction=prediction
  )
  kept = (tmp_path / "j.jsonl").read_text()
  entry = json.loads(kept)
  assert (entry["model"], entry["reply"]) == ("stub-1", YES)
  assert "secret" not in kept + json.dumps(described) + repr(judge._server)


def test_failures_are_repeated(serve, tmp_path):
  stub = serve(
    {
      "busy": [500, 503, YES],
      "html": [b"<html>", b'{"error": 1}', NO],
      "fine": [YES],
    }
  )
  judge = make_judge(stub, tmp_path)
  found = judge.verdicts([case("busy"), case("html"), case("fine")])
  assert [v.right for v in found] == [True, False, True]
  assert (judge.calls, judge.retries, judge.malformed) == (7, 4, 0)


def test_waits_grow_and_the_server_may_ask_for_more(serve, tmp_path):
  stub = serve({"busy": [500, 500, 429, YES]})
  judge = make_judge(stub, tmp_path, attempts=4, first_wait=0.1)
  judge.verdicts([case("busy")])
  one, two, three, four = stub.times
  assert 0.1 <= two - one and 0.2 <= three - two and 1 <= four - three


def test_as_many_calls_at_a_time_as_allowed(serve, tmp_path):
  stub = serve({name: [YES] for name in "abcdef"})
  stub.gate, stub.pause = threading.Barrier(3), 0.1
  judge = make_judge(stub, tmp_path, concurrency=3)
  assert all(judge.verdicts([case(name) for name in "abcdef"]))
  assert stub.most_running == 3


def test_replies_that_are_no_verdict_are_asked_again(serve, tmp_path):
  stub = serve({"odd": ["well...", "{'pred': 'yes', 'score': 9}", YES]})
  judge = make_judge(stub, tmp_path)
  (verdict,) = judge.verdicts([case("odd")])
  assert verdict.right and judge.malformed == 2 and judge.calls == 3
  # At temperature 0 the same reply would come for ever.
  assert [body["temperature"] for _, body in stub.requests] == [0, 1, 1]


def test_second_run_calls_nobody(serve, tmp_path):
  stub = serve({"right": [YES], "wrong": [NO], "never": ["?"], "new": [YES]})
  cases = [case("right"), case("wrong"), case("right")]
  first = make_judge(stub, tmp_path)
  verdicts = first.verdicts(cases)
  assert (first.calls, first.cached) == (2, 0)  # the same twice: one call
  second = make_judge(stub, tmp_path)
  assert second.verdicts(cases) == verdicts
  assert (second.calls, second.cached) == (0, 2) and len(stub.requests) == 2
  # What has no verdict is not kept; it is asked again.
  assert second.verdicts([case("never"), cases[0]]) == [None, verdicts[0]]
  assert second.calls == second.malformed == 3
  # Another judge has its own verdicts.
  other = Judge(Server(stub.url, "stub-2"), tmp_path / "j.jsonl")
  other.verdicts([case("right")])
  assert other.calls == 1
  # And the same name elsewhere is another judge.
  elsewhere = serve({"right": [NO]})
  judge = make_judge(elsewhere, tmp_path)
  assert not judge.verdicts([case("right")])[0].right and judge.calls == 1


def test_crash_loses_one_verdict_at_most(serve, tmp_path):
  stub = serve({"one": [YES], "two": [NO]})
  make_judge(stub, tmp_path).verdicts([case("one"), case("two")])
  path = tmp_path / "j.jsonl"
  whole = path.read_text()
  for length in (len(whole) - 20, 10):
    path.write_text(whole[:length])
    judge = make_judge(stub, tmp_path)
    found = judge.verdicts([case("one"), case("two")])
    assert [v.right for v in found] == [True, False]
    assert judge.calls == (1 if length > 10 else 2)
    assert sorted(path.read_text()) == sorted(whole)
  path.write_text("{}\n" + whole)
  with raises(JudgeError, "j.jsonl:1: field key", "nothing", fix="delete"):
    make_judge(stub, tmp_path)


@pytest.mark.parametrize(
  ("change", "where", "got"),
  [
    ({"score": 7}, ": field score", "7"),
    ({"score": True}, ": field score", "True"),
    ({"right": 1}, ": field right", "1"),
    ({"date": None}, ": field date", "None"),
    ({"key": ["k"]}, ": field key", "['k']"),
    ({"score": float("nan")}, "", "NaN"),
    ({"reply": "\ud800"}, "", "half of a surrogate pair"),
  ],
)
def test_lines_that_are_no_verdict(serve, tmp_path, change, where, got):
  stub = serve({"one": [YES]})
  make_judge(stub, tmp_path).verdicts([case("one")])
  path = tmp_path / "j.jsonl"
  entry = json.loads(path.read_text())
  path.write_text(json.dumps(entry | change) + "\n")
  with raises(JudgeError, f"j.jsonl:1{where}", got, fix="delete the line"):
    make_judge(stub, tmp_path)


def test_server_that_refuses_is_asked_once(serve, tmp_path):
  stub = serve({"one": [YES], "two": [401]})
  judge = make_judge(stub, tmp_path, concurrency=1)
  with raises(JudgeError, stub.url, "HTTP 401 ", fix="check URL") as e:
    judge.verdicts([case("one"), case("two")])
  assert e.value.got.endswith(", in attempt 1")
  assert judge.calls == 2
  again = make_judge(stub, tmp_path)
  assert again.verdicts([case("one")])[0].right and again.calls == 0


def test_refusing_one_answer_does_not_end_the_judging(serve, tmp_path):
  filtered = (400, b'{"error": {"message": "content\n filter"}}')
  stub = serve({"bad": [filtered], "long": [413], "fine": [YES]})
  judge = make_judge(stub, tmp_path, concurrency=1)
  cases = [case("bad"), case("long"), case("fine")]
  found = judge.verdicts(cases)
  assert found[:2] == [None, None] and found[2].right
  assert (judge.calls, judge.refused, judge.retries) == (3, 2, 0)
  assert judge.describe(found)["without_verdict"] == 2
  # With no verdict at all there is no score, and the message says why.
  with raises(JudgeError, stub.url, "no verdict; ") as e:
    make_judge(stub, tmp_path).verdicts(cases[:1])
  assert 'HTTP 400 Bad Request {"error": {"message": "content' in e.value.got
  stub.script["?"] = ["I cannot say"]
  with raises(JudgeError, got="no verdict; the last reply was I cannot say"):
    make_judge(stub, tmp_path).verdicts([case("?")])


def test_a_server_that_refuses_all_is_not_asked_for_ever(serve, tmp_path):
  names = [f"answer {i}" for i in range(50)]
  stub = serve({name: [422] for name in names})
  stub.script["of another benchmark"] = [YES]
  judge = make_judge(stub, tmp_path)
  judge.verdicts([case("of another benchmark")])
  with raises(JudgeError, got="HTTP 422"):
    judge.verdicts([case(name) for name in names])
  assert 10 <= judge.calls < 20
  # Those that are left when all others have a verdict may all be refused.
  stub.script["fine"] = [YES]
  judge.verdicts([case("fine")])
  cases = [case(name) for name in ("fine", *names)]
  assert judge.verdicts(cases)[1:] == [None] * 50


def test_a_judge_that_takes_no_temperature(serve, tmp_path):
  said = b'{"error": {"message": "%s temperature does not support 0"}}'
  fixed = (400, said % (b"x" * 300))  # more than is shown of it
  stub = serve({"one": [fixed, "?", YES], "two": [NO]})
  judge = make_judge(stub, tmp_path, concurrency=1)
  found = judge.verdicts([case("one"), case("two")])
  assert [v.right for v in found] == [True, False]
  sent = [body.get("temperature") for _, body in stub.requests]
  assert sent == [0, None, None, None]
  assert judge.describe(found)["temperatures"] is None


def test_calls_under_way_when_the_temperature_is_refused(serve, tmp_path):
  fixed = (400, b'{"error": {"message": "temperature does not support 0"}}')
  names = "abcdef"
  stub = serve({name: [fixed, YES] for name in names})
  stub.gate = threading.Barrier(len(names))  # all are sent before a reply
  judge = make_judge(stub, tmp_path, concurrency=len(names))
  assert all(judge.verdicts([case(name) for name in names]))
  assert judge.refused == 0


@pytest.mark.parametrize(
  "url",
  [
    *("localhost:80", "http://[::1/v1", "http://here:port/v1", "http:///v1"),
    *("ftp://here/v1", "http://h\u00e9re/v1", "http://here/v 1", ""),
    "http://" + "a" * 70 + "/v1",
  ],
)
def test_judge_needs_a_url(tmp_path, url):
  with raises(JudgeError, "--judge_url", repr(url), "http://localhost:8000"):
    Judge(Server(url, "m"), tmp_path / "j.jsonl")


def test_a_model_whose_name_is_no_text(tmp_path):
  """As a command line of other bytes than UTF-8 gives it."""
  with raises(JudgeError, "--judge_model", "half of a surrogate pair"):
    Judge(Server("http://here/v1", "m\udcff"), tmp_path / "j.jsonl")


@pytest.mark.parametrize(
  "url",
  [
    *("http://secret@here/v1", "http://me:secret@here/v1"),
    *("http://here/v1?key=secret", "http://here/v1#secret", "secret@here"),
  ],
)
def test_a_url_with_a_secret_is_not_printed(tmp_path, url):
  with raises(JudgeError, "--judge_url", fix="JUDGE_API_KEY") as e:
    Judge(Server(url, "m"), tmp_path / "j.jsonl")
  assert "secret" not in str(e.value)
  assert not list(tmp_path.iterdir())


KEY = "sk-live-0123456789abcdefghij"


def assert_without_key(text):
  """No eight characters of the key in a row."""
  for i in range(len(KEY) - 7):
    assert KEY[i : i + 8] not in text, text


def test_a_redirect_is_not_followed(serve, tmp_path):
  """It would take the key to another host."""
  for status in (301, 302, 303, 307, 308):
    other = serve({"one": [YES]})
    stub = serve({"one": [status]})
    to = f"{other.url}/chat/completions?key={KEY}"
    stub.more_headers = {"Location": to}
    judge = make_judge(stub, tmp_path, api_key=KEY)
    with raises(JudgeError, stub.url, f"HTTP {status} a redirect to") as e:
      judge.verdicts([case("one")])
    assert other.requests == other.gets == []
    assert len(stub.requests) == 1
    assert f"{other.url}/chat/completions?key=***" in e.value.got
    assert_without_key(str(e.value))


@pytest.mark.parametrize("status", [200, 400, 401, 403, 422, 500])
@pytest.mark.parametrize(
  "body",
  [
    '{"error": "Incorrect API key: %s."}',
    "Bearer %s",
    # Cut by the limit of what is shown, and hidden behind white space.
    "x" * 185 + "%s",
    " " * 980 + "%s",
  ],
)
def test_a_key_that_is_echoed_is_masked(serve, tmp_path, status, body):
  stub = serve({"one": [(status, (body % KEY).encode())]})
  judge = make_judge(stub, tmp_path, api_key=KEY, attempts=2)
  with raises(JudgeError, stub.url) as e:
    judge.verdicts([case("one")])
  assert_without_key(str(e.value))
  assert_without_key((tmp_path / "j.jsonl").read_text())


def test_a_key_in_a_status_or_a_verdict_is_masked(serve, tmp_path):
  stub = serve({"one": [401], "two": [f"{YES} {KEY}"]})
  stub.reason = f"Not {KEY}"
  judge = make_judge(stub, tmp_path, api_key=KEY)
  with raises(JudgeError, stub.url, "HTTP 401 Not *** scripted") as e:
    judge.verdicts([case("one")])
  assert_without_key(str(e.value))
  (verdict,) = judge.verdicts([case("two")])
  assert verdict.right
  kept = (tmp_path / "j.jsonl").read_text()
  assert json.loads(kept)["reply"] == f"{YES} ***"
  assert_without_key(kept + json.dumps(judge.describe([verdict])))


def test_replies_are_of_a_limited_size(serve, tmp_path):
  long = b'{"choices": [{"message": {"content": "' + b" " * 2**23
  stub = serve({"one": [long, (401, b" " * 2**23)], "two": [long]})
  judge = make_judge(stub, tmp_path, attempts=2)
  with raises(JudgeError, stub.url, "HTTP 401"):
    judge.verdicts([case("one")])
  assert (judge.calls, judge.retries) == (2, 1)
  with raises(JudgeError, got="a reply of more than 4,194,304 bytes, in att"):
    make_judge(stub, tmp_path, attempts=1).verdicts([case("two")])


@pytest.mark.parametrize("part", ["status", "header", "body"])
def test_a_reply_that_drips_is_given_up(serve, tmp_path, part):
  """Each byte comes in time, and the reply would take for ever."""
  stub = serve({"one": [YES]})
  stub.drip = part
  judge = make_judge(stub, tmp_path, attempts=2, timeout=0.5)
  started = time.monotonic()
  with raises(JudgeError, stub.url, "no whole reply in 0.5 s, in attempt 2"):
    judge.verdicts([case("one")])
  assert 1 < time.monotonic() - started < 5


def test_hostile_json_of_a_judge(serve, tmp_path):
  bodies = [
    b"[" * 100_000,
    b'{"choices": ' + b"9" * 5000 + b"}",
    b'{"choices": {"0": 1}}',
    b'{"choices": [{"message": "content"}]}',
    b'{"choices": [{"message": {"content": "\\ud800"}}]}',
    b"\xff\xfe",
    b"3",
  ]
  stub = serve({"one": [*bodies, YES]})
  judge = make_judge(stub, tmp_path, attempts=len(bodies) + 1, first_wait=0.0)
  (verdict,) = judge.verdicts([case("one")])
  assert verdict.right and judge.retries == len(bodies)


def test_one_process_judges_at_a_time(serve, tmp_path):
  stub = serve({"one": [YES], "two": [NO]})
  judge = make_judge(stub, tmp_path)
  second = (
    "import pathlib, sys; from vocojax.evals.benchmarks import judge as j\n"
    "judge = j.Judge(j.Server(sys.argv[1], 'stub-1'), "
    "pathlib.Path(sys.argv[2]))\n"
    "try: print(judge.verdicts([('what is it ?', 'a dog', sys.argv[3])]))\n"
    "except j.UserError as e: print(e)"
  )
  command = [sys.executable, "-c", second, stub.url, str(tmp_path / "j.jsonl")]

  def other(said):
    return subprocess.run(
      [*command, said], capture_output=True, text=True, check=True
    ).stdout

  stub.pause = 5.0
  thread = threading.Thread(target=judge.verdicts, args=([case("one")],))
  thread.start()
  try:
    assert other("two").startswith(
      f"{tmp_path}: got judging by process {os.getpid()} on "
    )
  finally:
    thread.join()
  stub.pause = 0.0
  assert "right=False" in other("two")
  # What the other one found is not asked for again.
  calls = len(stub.requests)
  assert all(judge.verdicts([case("one"), case("two")]))
  assert len(stub.requests) == calls


def test_a_full_disk_keeps_whole_verdicts(serve, tmp_path):
  names = [f"answer {i}" for i in range(20)]
  stub = serve({name: [f"{YES} {'x' * 10_000}"] for name in names})
  with disks.mounted(tmp_path / "disk", "128k") as disk:
    judge = make_judge(stub, disk)
    with raises(JudgeError, "j.jsonl", "No space left", fix="free some space"):
      judge.verdicts([case(name) for name in names])
    kept = (disk / "j.jsonl").read_text()
    assert kept.endswith("\n") and 3 < len(kept.splitlines()) < 20
    calls = len(stub.requests)
    disks.remount(disk, "size=2M")
    assert all(make_judge(stub, disk).verdicts([case(name) for name in names]))
    assert len(stub.requests) < calls + 20
    assert (disk / "j.jsonl").read_text().startswith(kept)


@pytest.mark.parametrize("key", ["secret\n", "se cret", "sécret"])
def test_a_key_that_no_header_can_hold_is_not_printed(tmp_path, key):
  with raises(JudgeError, "JUDGE_API_KEY", "white space") as e:
    Judge(Server("http://here/v1", "m", key), tmp_path / "j.jsonl")
  assert "cret" not in str(e.value)


def test_where_verdicts_cannot_be_kept(serve, tmp_path):
  stub = serve({})
  (tmp_path / "file").write_text("")
  (tmp_path / "j.jsonl").mkdir()
  (tmp_path / "pipe").mkdir()
  os.mkfifo(tmp_path / "pipe" / "j.jsonl")
  for folder in ("file", "file/more", "", "pipe"):
    with raises(JudgeError, "j.jsonl", fix="choose another place"):
      make_judge(stub, tmp_path / folder)


def test_server_that_stays_away_is_given_up(serve, tmp_path):
  stub = serve({"one": [503]})
  judge = make_judge(stub, tmp_path)
  got = "HTTP 503 Service Unavailable scripted, in attempt 3"
  with raises(JudgeError, stub.url, got):
    judge.verdicts([case("one")])
  stub._server.server_close()
  with raises(JudgeError, stub.url, "Connection refused, in attempt 3"):
    judge.verdicts([case("one")])


def video_folder(folder):
  entries = [
    {"id": i, "video_id": f"video{i}", "question": f"q{i} ?", "answer": answer}
    for i, answer in enumerate(("dog", "two", "run"))
  ]
  folder.json("test_qa.json", entries)
  folder.images("video/video0.mp4", "video/video1.MKV", "video/video2.webm")
  return folder


def test_video_questions_without_a_judge(folder, tmp_path):
  video_folder(folder)
  for name in ("msvd_qa", "msrvtt_qa"):
    bench = registry.open_benchmark(name, folder.path)
    assert (bench.name, bench.headline) == (name, "match")
    questions = list(bench.questions())
    assert [q.prompt for q in questions] == ["q0 ?", "q1 ?", "q2 ?"]
    assert questions[1].video == folder.path / "video/video1.MKV"
    assert questions[1].images == ()
    said = {"1": "The 2.", "0": "It is a dog.", "2": "running"}
    # "2" equals "two"; "dog" stands in the first; "run" is no word of the last.
    assert dict(bench.score(said)) == pytest.approx(
      {"match": 100 / 3, "contains": 200 / 3}
    )
    assert bench.write_submission(said, tmp_path) == []
  (folder.path / "video/video1.MKV").unlink()
  with raises(DataError, "video1", "no such video", ".webm", "LLaMA-VID"):
    list(bench.questions())


@pytest.mark.parametrize("name", ["/dev/zero", "../video/video0", "a\0b"])
def test_a_video_is_inside_its_folder(folder, name):
  entry = {"id": 1, "question": "?", "answer": "a", "video_id": name}
  folder.json("test_qa.json", [entry])
  bench = registry.open_benchmark("msvd_qa", folder.path)
  with raises(DataError, "question 1", repr(name), "a path inside"):
    list(bench.questions())
  folder.json("test_qa.json", [entry | {"video_id": ["x"]}])
  with raises(DataError, "record 0: field video_id", "['x']"):
    registry.open_benchmark("msvd_qa", folder.path)
  folder.json("test_qa.json", [entry | {"video_id": "a" * 5000}])
  bench = registry.open_benchmark("msvd_qa", folder.path)
  with raises(DataError, "question 1", "aaa"):
    list(bench.questions())


def test_judged_video_benchmark(folder, serve, tmp_path):
  stub = serve({"puppy": [500, YES], "a cat": ["{'pred':'no','score':2.9}"]})
  stub.script["?"] = ["I cannot say"]
  video_folder(folder)
  said = {"0": "puppy", "1": "a cat", "2": "?"}
  for calls, cached in ((6, 0), (3, 2)):  # "?" is asked three times, each time
    judge = make_judge(stub, tmp_path)
    bench = registry.open_benchmark("msvd_qa", folder.path, judge)
    assert bench.headline == "judge_accuracy"
    scores = dict(bench.score(said))
    assert scores["judge_accuracy"] == pytest.approx(100 / 3)
    assert scores["judge_score"] == pytest.approx(7 / 3)
    assert scores["match"] == 0
    judged = bench.judged
    assert (judged["calls"], judged["cached"]) == (calls, cached)
    assert judged["model"] == "stub-1" and judged["url"] == stub.url
    assert judged["malformed"] == 3 and judged["without_verdict"] == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", judged["first_verdict"])


def test_activitynet_pairs_by_position(folder):
  questions = [
    {"question_id": f"x_{i}", "video_name": f"n{i}", "question": f"q{i}"}
    for i in range(2)
  ]
  answers = [
    {"question_id": f"x_{i}", "answer": a, "type": 3}
    for i, a in enumerate(("yes", "no"))
  ]
  folder.json("test_q.json", questions)
  folder.json("test_a.json", answers)
  folder.images("all_test/v_n0.mp4", "all_test/v_n1.mov")
  bench = registry.open_benchmark("activitynet_qa", folder.path)
  found = list(bench.questions())
  assert [q.video.name for q in found] == ["v_n0.mp4", "v_n1.mov"]
  assert [q.reference["answer"] for q in found] == ["yes", "no"]
  assert dict(bench.score({"x_0": "Yes.", "x_1": "maybe"}))["match"] == 50
  folder.json("test_a.json", answers[::-1])
  got = "an answer to question 'x_1'"
  with raises(DataError, "test_a.json: record 0", got, "to 'x_0'"):
    registry.open_benchmark("activitynet_qa", folder.path)
  folder.json("test_a.json", answers[:1])
  with raises(DataError, "test_a.json", "1 answers", "2, one for each"):
    registry.open_benchmark("activitynet_qa", folder.path)
