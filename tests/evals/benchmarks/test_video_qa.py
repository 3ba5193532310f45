"""Video questions, with and without a judge.

The judge is a server of this test that speaks OpenAI's protocol and does what
each test scripts.
"""

import http.server
import json
import re
import threading
import time

import pytest

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
    self._lock = threading.Lock()
    stub = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        status, content = stub.reply(body, dict(self.headers))
        self.send_response(status)
        if status == 429:
          self.send_header("Retry-After", "1")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

      def log_message(self, *args):
        pass

    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
    self._thread = threading.Thread(
      target=self._server.serve_forever, args=(0.01,)
    )
    self._thread.start()

  def close(self):
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
  with pytest.raises(JudgeError, match=r"j.jsonl:1: no verdict \(KeyError"):
    make_judge(stub, tmp_path)


def test_server_that_refuses_is_asked_once(serve, tmp_path):
  stub = serve({"one": [YES], "two": [401]})
  judge = make_judge(stub, tmp_path, concurrency=1)
  words = r"judge stub-1 at http.*: HTTP 401 .* in attempt 1; check"
  with pytest.raises(JudgeError, match=words):
    judge.verdicts([case("one"), case("two")])
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
  words = r'judge stub-1 .*: no verdict, .*HTTP 400 .*"content filter"'
  with pytest.raises(JudgeError, match=words):
    make_judge(stub, tmp_path).verdicts(cases[:1])
  stub.script["?"] = ["I cannot say"]
  with pytest.raises(JudgeError, match=r"no verdict, .* 'I cannot say'"):
    make_judge(stub, tmp_path).verdicts([case("?")])


def test_a_server_that_refuses_all_is_not_asked_for_ever(serve, tmp_path):
  names = [f"answer {i}" for i in range(50)]
  stub = serve({name: [422] for name in names})
  stub.script["of another benchmark"] = [YES]
  judge = make_judge(stub, tmp_path)
  judge.verdicts([case("of another benchmark")])
  with pytest.raises(JudgeError, match="HTTP 422"):
    judge.verdicts([case(name) for name in names])
  assert 10 <= judge.calls < 20
  # Those that are left when all others have a verdict may all be refused.
  stub.script["fine"] = [YES]
  judge.verdicts([case("fine")])
  cases = [case(name) for name in ("fine", *names)]
  assert judge.verdicts(cases)[1:] == [None] * 50


def test_a_judge_that_takes_no_temperature(serve, tmp_path):
  fixed = (400, b'{"error": {"message": "temperature does not support 0"}}')
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
  "url", ["localhost:80", "http://[::1/v1", "http://here:port/v1", "http:///v1"]
)
def test_judge_needs_a_url(tmp_path, url):
  with pytest.raises(JudgeError, match=r"URL '.*', expected .*http:"):
    Judge(Server(url, "m"), tmp_path / "j.jsonl")


@pytest.mark.parametrize("key", ["secret\n", "se cret", "sécret"])
def test_a_key_that_no_header_can_hold_is_not_printed(tmp_path, key):
  with pytest.raises(JudgeError, match=r"API key: found .* JUDGE_API_") as e:
    Judge(Server("http://here/v1", "m", key), tmp_path / "j.jsonl")
  assert "cret" not in str(e.value)


def test_where_verdicts_cannot_be_kept(serve, tmp_path):
  stub = serve({})
  (tmp_path / "file").write_text("")
  (tmp_path / "j.jsonl").mkdir()
  for folder in (tmp_path / "file", tmp_path / "file" / "more", tmp_path):
    with pytest.raises(JudgeError, match=r"j.jsonl: verdicts cannot be kept"):
      make_judge(stub, folder)


def test_server_that_stays_away_is_given_up(serve, tmp_path):
  stub = serve({"one": [503]})
  judge = make_judge(stub, tmp_path)
  with pytest.raises(JudgeError, match=r"HTTP 503 .* in attempt 3"):
    judge.verdicts([case("one")])
  stub._server.server_close()
  with pytest.raises(JudgeError, match=r"refused.* in attempt 3"):
    judge.verdicts([case("one")])


def video_folder(folder):
  entries = [
    {"id": i, "video_id": f"video{i}", "question": f"q{i} ?", "answer": answer}
    for i, answer in enumerate(("dog", "two", "run"))
  ]
  folder.json("test_qa.json", entries)
  folder.images("video/video0.mp4", "video/video1.mkv", "video/video2.avi")
  return folder


def test_video_questions_without_a_judge(folder, tmp_path):
  video_folder(folder)
  for name in ("msvd_qa", "msrvtt_qa"):
    bench = registry.open_benchmark(name, folder.path)
    assert (bench.name, bench.headline) == (name, "match")
    questions = list(bench.questions())
    assert [q.prompt for q in questions] == ["q0 ?", "q1 ?", "q2 ?"]
    assert questions[1].video == folder.path / "video/video1.mkv"
    assert questions[1].images == ()
    said = {"1": "The 2.", "0": "It is a dog.", "2": "running"}
    # "2" equals "two"; "dog" stands in the first; "run" is no word of the last.
    assert dict(bench.score(said)) == pytest.approx(
      {"match": 100 / 3, "contains": 200 / 3}
    )
    assert bench.write_submission(said, tmp_path) == []
  (folder.path / "video/video1.mkv").unlink()
  with pytest.raises(DataError, match=r"video1: no such video, neither .mp4"):
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
  with pytest.raises(DataError, match="answers question x_1, expected x_0"):
    registry.open_benchmark("activitynet_qa", folder.path)
  folder.json("test_a.json", answers[:1])
  with pytest.raises(DataError, match="found 1 answers, expected 2"):
    registry.open_benchmark("activitynet_qa", folder.path)
