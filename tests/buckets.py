"""Buckets of servers on this machine, which gs:// and s3:// lead to.

That of Google's JSON API is as much of it as gcsfs, TensorStore and
google-cloud-storage use; that of S3 is moto's. Read next: `test_bucket.py`.
"""

import contextlib
import http.server
import importlib.util
import itertools
import json
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator

import pytest

BUCKET = "bucket"


class Bucket(http.server.ThreadingHTTPServer):
  """Objects by name: content and generation."""

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.objects: dict[str, tuple[bytes, int]] = {}
    self.uploads: dict[str, tuple[str, bytearray]] = {}  # under way
    self.counter = itertools.count(1)
    self.lock = threading.Lock()

  def handle_error(self, request, client_address) -> None:
    """Is silent about who hangs up, as gcsfs does when it knows enough."""
    if not isinstance(sys.exception(), ConnectionError):
      super().handle_error(request, client_address)

  def put(self, name: str, content: bytes) -> dict:
    self.objects[name] = content, next(self.counter)
    return self.describe(name)

  def describe(self, name: str) -> dict:
    content, generation = self.objects[name]
    return {
      "kind": "storage#object",
      "name": name,
      "bucket": BUCKET,
      "size": str(len(content)),
      "generation": str(generation),
      "metageneration": "1",
      "contentType": "application/octet-stream",
      "timeCreated": "2026-01-01T00:00:00.000Z",
      "updated": "2026-01-01T00:00:00.000Z",
    }


@contextlib.contextmanager
def serve_gs() -> Iterator[dict[str, str]]:
  """Serves gs://bucket; yields the environment that programs find it by."""
  if importlib.util.find_spec("gcsfs") is None:  # its import reads variables
    pytest.skip("needs pip install gcsfs")
  with Bucket() as bucket:
    thread = threading.Thread(target=bucket.serve_forever, daemon=True)
    thread.start()
    host = f"http://127.0.0.1:{bucket.server_port}"
    try:
      yield {
        "STORAGE_EMULATOR_HOST": host,
        "TENSORSTORE_GCS_HTTP_URL": host,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "GOOGLE_CLOUD_PROJECT": "project",
        "FSSPEC_GCS_TOKEN": "anon",
        # It would ask by gRPC what kind of bucket this is.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
      }
    finally:
      bucket.shutdown()
      thread.join()


@contextlib.contextmanager
def serve_s3() -> Iterator[dict[str, str]]:
  """Serves s3://bucket; yields the environment that programs find it by."""
  pytest.importorskip(
    "moto.server", reason="needs pip install 'moto[s3]' flask flask-cors"
  )
  with subprocess.Popen(
    [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    log = process.stderr
    assert log
    while "Running on " not in (line := log.readline()):
      assert process.poll() is None
    reader = threading.Thread(target=log.read)  # it logs each request
    reader.start()
    try:
      endpoint = line.split()[-1]
      subprocess.run(
        ["curl", "-fsX", "PUT", f"{endpoint}/{BUCKET}"], check=True
      )
      yield {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
      }
    finally:
      process.kill()
      reader.join()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  server: Bucket

  def log_message(self, *args):
    """Nothing."""

  def _handle(self) -> None:
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    body = self._body()
    path = re.fullmatch(
      r"/((?:upload/|download/)?)storage/v1/b/([^/]+)(/o(?:/([^/]+))?)?/*"
      r"(?:/rewriteTo/b/[^/]+/o/([^/]+))?",
      url.path,
    )
    if not path or path[2] != BUCKET:
      return self._answer(404, {"error": {"code": 404, "message": url.path}})
    name = urllib.parse.unquote(path[4] or "")
    with self.server.lock:
      if path[1] == "upload/":
        return self._upload(query, body)
      if not path[3]:
        return self._answer(200, {"kind": "storage#bucket", "name": BUCKET})
      if not name:
        return self._answer(200, self._list(query))
      if name not in self.server.objects:
        return self._answer(404, {"error": {"code": 404, "message": name}})
      content, generation = self.server.objects[name]
      wanted = query.get("ifGenerationMatch", str(generation))
      if wanted != str(generation):
        return self._answer(412, {"error": {"code": 412, "message": name}})
      if self.command == "DELETE":
        del self.server.objects[name]
        return self._answer(204, b"")
      if path[5]:
        made = self.server.put(urllib.parse.unquote(path[5]), content)
        return self._answer(200, {"done": True, "resource": made})
      if path[1] == "download/" or query.get("alt") == "media":
        return self._media(content, generation)
      return self._answer(200, self.server.describe(name))

  def _body(self) -> bytes:
    if self.headers.get("Transfer-Encoding") != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length") or 0))
    body = b""
    while size := int(self.rfile.readline(), 16):
      body += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return body

  do_GET = do_POST = do_PUT = do_DELETE = _handle

  def _upload(self, query: dict, body: bytes) -> None:
    kind, name = query["uploadType"], query.get("name")
    if kind == "resumable" and "upload_id" not in query:
      number = str(next(self.server.counter))
      name = name or json.loads(body)["name"]
      self.server.uploads[number] = name, bytearray()
      host = self.headers["Host"]
      to = f"http://{host}{self.path.split('?')[0]}?uploadType=resumable"
      return self._answer(200, {}, {"Location": f"{to}&upload_id={number}"})
    if kind == "resumable":
      name, content = self.server.uploads[query["upload_id"]]
      content += body
      if self.headers.get("Content-Range", "").endswith("/*"):
        sent = {"Range": f"bytes=0-{len(content) - 1}"}
        return self._answer(308, b"", sent)
      body = bytes(content)
    elif kind == "multipart":
      mark = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
      assert mark
      _, about, body, _ = re.split(
        rb"\r?\n?--" + re.escape(mark[1].encode()), body
      )
      name = json.loads(re.split(rb"\r?\n\r?\n", about, maxsplit=1)[1])["name"]
      body = re.split(rb"\r?\n\r?\n", body, maxsplit=1)[1]
    assert name
    there = self.server.objects.get(name, (b"", 0))[1]
    if query.get("ifGenerationMatch", str(there)) != str(there):
      return self._answer(412, {"error": {"code": 412, "message": name}})
    return self._answer(200, self.server.put(name, body))

  def _list(self, query: dict) -> dict:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    first, end = query.get("startOffset", ""), query.get("endOffset")
    items, prefixes = [], set()
    for name in sorted(self.server.objects):
      if not name.startswith(prefix) or name < first or (end and name >= end):
        continue
      rest = name[len(prefix) :]
      if delimiter and delimiter in rest:
        prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
      else:
        items.append(self.server.describe(name))
    return {"items": items, "prefixes": sorted(prefixes)}

  def _media(self, content: bytes, generation: int) -> None:
    headers = {
      "X-Goog-Generation": str(generation),
      "X-Goog-Stored-Content-Length": str(len(content)),
      "Content-Type": "application/octet-stream",
    }
    asked = re.fullmatch(
      r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "bytes=0-"
    )
    assert asked
    if not asked[1]:
      start, end = max(0, len(content) - int(asked[2])), len(content)
    else:
      start = int(asked[1])
      end = min(len(content), int(asked[2] or len(content)) + 1)
    if "Range" not in self.headers:
      return self._answer(200, content, headers)
    if start >= len(content):
      return self._answer(416, b"", headers)
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
    return self._answer(206, content[start:end], headers)

  def _answer(
    self, status: int, body: dict | bytes, headers: dict[str, str] | None = None
  ) -> None:
    headers = dict(headers or {})
    if isinstance(body, dict):
      headers["Content-Type"] = "application/json"
      body = json.dumps(body).encode()
    self.send_response(status)
    for key, value in (headers | {"Content-Length": str(len(body))}).items():
      self.send_header(key, value)
    self.end_headers()
    self.wfile.write(body)
