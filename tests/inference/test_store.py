"""The store under use, damage and murder; see store.py and blobs.py."""

import os
import pathlib
import random
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import logging

from tests import buckets, disks, runs
from tests.inference.stored import ORIGIN, digest, make, same
from vocojax.errors import CacheError
from vocojax.inference.blobs import Blobs
from vocojax.inference.cache import (
  CacheOrigin,
  VocoCache,
  from_bytes,
)
from vocojax.inference.store import CacheStore


def path_of(folder, name, k=1) -> pathlib.Path:
  return folder / CacheStore.key(ORIGIN, k, digest(name))


def names_in(store, names):
  """Those of the names that are in the store, without using them."""
  there = store.hashes(ORIGIN, 1)
  return [name for name in names if digest(name) in there]


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def url(request, tmp_path):
  if request.param == "s3":
    return request.getfixturevalue("s3_url")
  return {
    "folder": f"{tmp_path}/a folder/é",
    "file": f"file://{tmp_path}/x",
    "memory": f"memory://{tmp_path}",
  }[request.param]


@pytest.fixture
def s3_url(monkeypatch):
  """A bucket of a server on this machine that speaks S3."""
  with buckets.serve_s3() as env:
    for name, value in env.items():
      monkeypatch.setenv(name, value)
    yield "s3://bucket/some/where"


@pytest.fixture
def warned(monkeypatch):
  """Warnings of absl's log, one string each."""
  found = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *args: found.append(text % args)
  )
  return found


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 256 KiB of its own."""
  with disks.mounted(tmp_path / "disk", "256k") as folder:
    yield folder


def test_round_trip_everywhere(url):
  cache = make("abc", k=2)
  kinds = [cache, cache.dequantize("bfloat16"), cache.quantize()]
  with CacheStore(url) as store:
    assert store.hashes(ORIGIN, 2) == set() and store.ls() == []
    assert store.get(ORIGIN, 2, digest("a")) is None
    for kind in kinds:  # the last writer's stays
      store.put(kind)
      found = store.get_many(ORIGIN, 2, [digest(x) for x in "cxac"])
      assert found[1] is None
      for i, x in ((0, 2), (2, 0), (3, 2)):
        assert same(found[i], kind.select([x]))
    assert store.hashes(ORIGIN, 2) == {digest(x) for x in "abc"}
  with CacheStore(url + "/") as again:
    assert same(again.get(ORIGIN, 2, digest("b")), kinds[-1].select([1]))
    sizes = dict(again.verify())
    entries = again.ls()
    assert sizes == {entry.key: entry.nbytes for entry in entries}
    assert {e.image_hash for e in entries} == set(cache.image_hashes)
    assert {(e.origin, e.num_voco_tokens) for e in entries} == {(ORIGIN, 2)}
    now = time.time()
    assert all(now - 300 < entry.last_used <= now for entry in entries)
    assert again.gc(0).num_removed == 3
    assert again.ls() == []


def test_an_entry_is_for_one_model_layout_k_and_image(tmp_path):
  store = CacheStore(str(tmp_path))
  others = [
    CacheOrigin("b" * 64, ORIGIN.layout),
    CacheOrigin(ORIGIN.model_fingerprint, "voco_v1/2"),
    CacheOrigin(ORIGIN.model_fingerprint, "qa_v1/1"),
  ]
  made = [make("a", k=k) for k in (1, 2, 12)]
  made += [make("a", origin=origin) for origin in others]
  for cache in made:
    args = cache.origin, cache.num_voco_tokens, digest("a")
    assert store.get(*args) is None
    store.put(cache)
  for cache in made:
    args = cache.origin, cache.num_voco_tokens, digest("a")
    assert same(store.get(*args), cache)
    assert store.hashes(*args[:2]) == {digest("a")}
  assert store.get(ORIGIN, 1, digest("b")) is None
  with pytest.raises(ValueError, match="does not name an image"):
    store.get(ORIGIN, 1, "../../etc/passwd")


def test_thousands(tmp_path):
  """benchmarks/cache_store.py has 20,000."""
  names = range(1000)
  cache = make(names)
  with CacheStore(str(tmp_path)) as store:
    store.put(cache)
  with CacheStore(str(tmp_path)) as store:
    found = store.get_many(ORIGIN, 1, cache.image_hashes)
    assert all(same(x, cache.select([i])) for i, x in enumerate(found))
    assert len(list(store.verify())) == len(store.ls()) == 1000


def small_entry() -> bytes:
  keys, values = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 1, 2))
  return VocoCache(
    keys.astype(np.float32),
    values.astype(np.float32),
    None,
    None,
    ORIGIN,
    (digest("x"),),
  ).to_bytes()


def test_every_flipped_bit_is_found():
  good = small_entry()
  assert from_bytes(good, "x").image_hashes == (digest("x"),)
  for i in range(len(good)):
    for bit in range(8):
      bad = bytearray(good)
      bad[i] ^= 1 << bit
      with pytest.raises(CacheError):
        from_bytes(bytes(bad), "x")


def test_damage_is_reported_and_removed(tmp_path, warned):
  """One byte flipped, at each position in turn; and other damage."""
  store, path = CacheStore(str(tmp_path)), path_of(tmp_path, "x")
  path.parent.mkdir(parents=True)
  good = small_entry()
  flip = random.Random(0).randrange
  damaged = [
    good[:i] + bytes([good[i] ^ (1 << flip(8))]) + good[i + 1 :]
    for i in range(len(good))
  ]
  damaged += [b"", b"text", good[:-1], good[: len(good) // 2], good + b"\0"]
  for bad in damaged:
    path.write_bytes(bad)
    warned.clear()
    assert store.get(ORIGIN, 1, digest("x")) is None
    [line] = warned
    assert line.startswith(f"{tmp_path}: {path.relative_to(tmp_path)}: ")
    assert "compressed again when it is needed" in line and "\n" not in line
    assert not path.exists()
  path.write_bytes(good)
  assert store.get(ORIGIN, 1, digest("x")) is not None


def test_verify_finds_what_is_damaged_or_foreign(tmp_path, warned):
  store = CacheStore(str(tmp_path))
  store.put(make("abcde"))
  bad = bytearray(path_of(tmp_path, "a").read_bytes())
  bad[-1] ^= 1
  path_of(tmp_path, "a").write_bytes(bad)
  # Sound, but another image's; and of another k.
  path_of(tmp_path, "b").write_bytes(path_of(tmp_path, "c").read_bytes())
  store.put(make("d", k=2))
  path_of(tmp_path, "d").write_bytes(path_of(tmp_path, "d", 2).read_bytes())
  # Nobody's business.
  path_of(tmp_path, "c").with_name("notes.txt").write_text("mine")
  (tmp_path / "readme").write_text("mine")
  found = dict(store.verify())
  expected = {CacheStore.key(ORIGIN, 1, digest(x)) for x in "abd"}
  assert {key for key, size in found.items() if size is None} == expected
  assert len(found) == 6 and len(warned) == 3
  assert sum("got another image or model" in line for line in warned) == 2
  assert names_in(store, "abcde") == ["c", "e"]
  assert not [key for key, size in store.verify() if size is None]
  assert store.gc(0).num_kept == 0
  rest = {p.name for p in tmp_path.rglob("*") if p.is_file()}
  assert rest == {"notes.txt", "readme"}


def test_what_is_no_file_is_not_waited_for(tmp_path, warned):
  """Pipes, links to pipes and devices, folders; and names of any bytes."""
  store = CacheStore(str(tmp_path))
  store.put(make("abcdef"))
  os.mkfifo(tmp_path / "pipe")
  for name in "abcd":
    path_of(tmp_path, name).unlink()
  os.mkfifo(path_of(tmp_path, "a"))
  path_of(tmp_path, "b").symlink_to(tmp_path / "pipe")
  path_of(tmp_path, "c").symlink_to("/dev/zero")
  path_of(tmp_path, "d").mkdir()
  folder = os.fsencode(path_of(tmp_path, "a").parent)
  pathlib.Path(os.fsdecode(folder + b"/\xff\xfe")).write_bytes(b"x")
  os.mkfifo(path_of(tmp_path, "e").with_name("x.__lock"))
  path_of(tmp_path, "e").with_name("y.__lock").mkdir()
  store.close()
  uses = tmp_path / "vocojax-uses" / "1"
  for path in uses.iterdir():  # or `ls` need not look at the entries
    path.unlink()
  os.mkfifo(uses / ("0" * 32))
  (uses / ("1" * 32)).symlink_to("/dev/zero")
  pathlib.Path(os.fsdecode(os.fsencode(uses) + b"/\xff")).write_bytes(b"x")
  store = CacheStore(str(tmp_path))
  assert {e.image_hash for e in store.ls()} == {digest("e"), digest("f")}
  assert store.gc().num_kept == 2
  found = store.get_many(ORIGIN, 1, [digest(x) for x in "ae"])
  assert found[0] is None and same(found[1], make("e"))
  # The damaged ones are removed, but for the folder.
  damaged = {key for key, size in store.verify() if size is None}
  names = {digest(x) for x in "bc"}
  assert {key.rpartition("/")[2] for key in damaged} == names
  assert sum("got no file, expected a file" in line for line in warned) == 3
  for name in "abc":
    assert not os.path.lexists(path_of(tmp_path, name))
  assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
  store.put(make("abc"))
  assert names_in(store, "abcef") == list("abcef")


def test_names_of_a_foreign_cache_stay_in_the_store(tmp_path):
  origin = CacheOrigin(ORIGIN.model_fingerprint, "../../../../x/1")
  with pytest.raises(ValueError, match="does not name an image"):
    CacheStore(str(tmp_path / "a" / "store")).put(make("x", origin=origin))
  assert not list(tmp_path.iterdir())


def test_damage_that_is_replaced_meanwhile_is_not_removed(tmp_path):
  store, blobs = CacheStore(str(tmp_path)), Blobs(str(tmp_path))
  key = CacheStore.key(ORIGIN, 1, digest("a"))
  blobs.write({key: b"damaged"})
  [(_, _, version)] = blobs.read([key])
  store.put(make("a"))
  blobs.delete_version(key, version)
  assert names_in(store, "a") == ["a"]
  [(_, _, version)] = blobs.read([key])
  blobs.delete_version(key, version)
  assert names_in(store, "a") == []


def test_least_recently_used_go_first(url):
  """Uses are known across processes, here: objects that were closed."""
  one = len(make("a").to_bytes())
  with CacheStore(url) as store:
    store.put(make("abcd"))
    assert store.gc().num_removed == 0
  with CacheStore(url) as store:
    store.get(ORIGIN, 1, digest("a"))
  with CacheStore(url) as store:
    store.put(make("e"))
    store.get(ORIGIN, 1, digest("c"))
    # From the last: c e a d b.
    assert store.gc(5 * one).num_removed == 0
    found = store.gc(4 * one)
    assert (found.num_kept, found.bytes_kept) == (4, 4 * one)
    assert (found.num_removed, found.bytes_removed) == (1, one)
    assert names_in(store, "abcde") == ["a", "c", "d", "e"]
  with CacheStore(url) as store:
    assert [e.image_hash for e in store.ls()] == [digest(x) for x in "cead"]
    assert store.gc(3 * one - 1).num_kept == 2
    assert names_in(store, "abcde") == ["c", "e"]
    assert store.gc(0).num_kept == 0


def test_a_limited_store_never_grows_beyond_it(tmp_path):
  one = len(make("a").to_bytes())
  store = CacheStore(str(tmp_path), max_bytes=10 * one)
  for first in range(0, 40, 4):
    store.put(make(range(first, first + 4)))
    store.get(ORIGIN, 1, digest(0))
    there = names_in(store, range(40))
    assert len(there) <= 10
    assert set(there) >= {0, *range(first, first + 4)}
  store.put(make(range(100, 200)))  # many at once
  there = names_in(store, range(200))
  assert len(there) <= 10 and there[-1] == 199
  assert store.gc().num_kept == len(there)
  with pytest.raises(CacheError) as e:
    store.put(make("x", k=20))
  assert e.value.where == str(tmp_path)
  assert e.value.expected == "at most 26,080 in all"


def test_entries_of_killed_writers_count_as_just_used(tmp_path):
  one = len(make("a").to_bytes())
  with CacheStore(str(tmp_path)) as store:
    store.put(make("ab"))
  for path in (tmp_path / "vocojax-uses").rglob("*"):
    if path.is_file():
      path.unlink()
  with CacheStore(str(tmp_path)) as store:
    store.put(make("cd"))
    entries = {e.image_hash: e for e in store.ls()}
    assert [entries[digest(x)].last_used is None for x in "abcd"] == [
      True,
      True,
      False,
      False,
    ]
    assert {e.nbytes for e in entries.values()} == {one}
    assert store.gc(3 * one).num_kept == 3
    assert names_in(store, "abcd") == ["a", "b", "d"]


def test_damaged_uses_are_forgotten(tmp_path, warned):
  with CacheStore(str(tmp_path)) as store:
    store.put(make("ab"))
  for content in (
    b"",
    b"[1]",
    b'{"a": 1}',
    b'{"a": [1, "x"]}',
    b'{"a": [1]}',
    b'{"a": "12"}',
    b'{"a": [1, 2, 3]}',
    b'{"a": [true, 2]}',
    b'{"a": [1, 1e300]}',
    b'{"a": [-1, 1]}',
    b'{"a": [Infinity, 1]}',
    b'{"a": [1, NaN]}',
    b'{"a": ' + b"[" * 100_000,
    b'{"a": [' + b"9" * 5000 + b", 1]}",
    b"\xff\xfe",
  ):
    for path in (tmp_path / "vocojax-uses" / "1").iterdir():
      path.write_bytes(content)
    warned.clear()
    with CacheStore(str(tmp_path)) as store:
      assert store.gc().num_kept == 2
    assert "damaged, so some uses are forgotten" in warned[0]


def test_uses_are_put_together(tmp_path, monkeypatch):
  folder = tmp_path / "vocojax-uses" / "1"
  for name in "abcdefgh":
    with CacheStore(str(tmp_path)) as store:
      store.put(make(name))
  assert len(list(folder.iterdir())) == 8
  with CacheStore(str(tmp_path)) as store:
    order = [e.image_hash for e in store.ls()]
    assert order == [digest(x) for x in "hgfedcba"]
    store.gc()
  assert len(list(folder.iterdir())) == 1
  with CacheStore(str(tmp_path)) as store:
    assert [e.image_hash for e in store.ls()] == order
  # A store with a limit does so by itself; a long process has many files.
  monkeypatch.setattr("vocojax.inference.store._USES_FILES", 3)
  monkeypatch.setattr("vocojax.inference.uses._MAX_COUNT", 1)
  one = len(make("a").to_bytes())
  with CacheStore(str(tmp_path), max_bytes=6 * one) as store:
    for i in range(20):
      store.put(make([i]))
      assert len(list(folder.iterdir())) <= 6
    assert names_in(store, range(20)) == list(range(14, 20))


WRITER = """
import random, sys
from tests.inference import stored
from vocojax.inference.store import CacheStore
store = CacheStore(sys.argv[1])
me = int(sys.argv[2])
"""
KILLED = """
# Files of 4 MB: most of the time one of them is half written.
for i in range(10**6):
  store.put(stored.make([f"{me} {i}"], k=2000))
  print(i, flush=True)
"""
BUSY = """
rng = random.Random(me)
written = []

def check(name, found):
  assert found is None or stored.same(found, stored.make([name])), name

print("ready", flush=True)
sys.stdin.readline()
for i in range(60):
  name = f"shared {rng.randrange(10)}" if i % 3 else f"own {me} {i}"
  store.put(stored.make([name]))
  written.append(name)
  name = rng.choice(written)
  found = store.get(stored.ORIGIN, 1, stored.digest(name))
  assert found is not None, f"{name} was there and is not"
  check(name, found)
  name = f"own {(me + 1) % 4} {3 * rng.randrange(20)}"
  check(name, store.get(stored.ORIGIN, 1, stored.digest(name)))
  if me == 0 and i % 20 == 19:
    store.gc()
"""


def start_writer(code, folder, number):
  return subprocess.Popen(
    [sys.executable, "-c", WRITER + code, str(folder), str(number)],
    cwd=runs.ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_killed_writers_lose_at_most_one_entry(tmp_path, warned):
  wait = random.Random(0).uniform
  processes = [start_writer(KILLED, tmp_path, n) for n in range(4)]
  done = []
  for process in processes:
    assert process.stdout.readline() == "0\n", process.stderr.read()
    time.sleep(wait(0.02, 0.3))
    process.kill()
    done.append(1 + len(process.stdout.read().split()))
    process.communicate()
  leftovers = list(tmp_path.rglob("*.__lock"))
  with CacheStore(str(tmp_path)) as store:
    there = store.hashes(ORIGIN, 2000)
    for n, count in enumerate(done):
      names = [f"{n} {i}" for i in range(count + 2)]
      # All whose write was over, perhaps the next, and no other.
      assert [digest(x) in there for x in names[:count]] == [True] * count
      assert digest(names[count + 1]) not in there
      for name in names[: count + 1]:
        found = store.get(ORIGIN, 2000, digest(name))
        if digest(name) in there:
          assert same(found, make([name], k=2000))
    assert not warned
    sizes = [size for _, size in store.verify()]
    assert len(sizes) == len(there) and None not in sizes
    assert store.gc().num_leftovers == len(leftovers)
  assert not list(tmp_path.rglob("*.__lock"))


def test_four_processes_write_and_read(tmp_path):
  processes = [start_writer(BUSY, tmp_path, n) for n in range(4)]
  for process in processes:
    assert process.stdout.readline() == "ready\n", process.stderr.read()
  for process in processes:
    print("go", file=process.stdin, flush=True)
  for process in processes:
    _, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, "")
  store = CacheStore(str(tmp_path))
  own = [f"own {n} {i}" for n in range(4) for i in range(0, 60, 3)]
  shared = [f"shared {i}" for i in range(10)]
  assert names_in(store, own + shared) == own + shared
  assert len(list(store.verify())) == len(store.ls()) == len(own + shared)
  assert store.gc().num_leftovers == 0


LOCKING = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.readline()
"""


def test_unfinished_files_of_the_living_stay(tmp_path):
  store = CacheStore(str(tmp_path))
  store.put(make("a"))
  dead, living = (
    path_of(tmp_path, x).with_name(f"{digest(x)}.__lock") for x in "ab"
  )
  dead.write_text("half")
  process = subprocess.Popen(
    [sys.executable, "-c", LOCKING, str(living)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "locked\n"
  assert names_in(store, "ab") == ["a"]
  assert store.gc().num_leftovers == 1
  assert living.exists() and not dead.exists()
  process.communicate("")
  assert store.gc().num_leftovers == 1
  assert names_in(store, "ab") == ["a"]


def test_full_disk(small_disk):
  folder = small_disk
  store = CacheStore(str(folder / "store"))
  with pytest.raises(CacheError) as error:
    store.put(make(range(200)))
  assert error.value.where == f"{folder}/store"
  assert error.value.got == "no space left"
  assert f"gc --store={folder}/store --max_bytes=N" in error.value.fix
  assert not list(folder.rglob("*.__lock"))
  there = names_in(store, range(200))
  assert 10 < len(there) < 100
  sizes = [size for _, size in store.verify()]
  assert len(sizes) == len(there) and None not in sizes
  disks.remount(folder, "size=8m")
  store.put(make(range(200)))
  assert names_in(store, range(200)) == list(range(200))


def test_read_only_store(small_disk, warned):
  folder = small_disk
  with CacheStore(str(folder)) as store:
    store.put(make("ab"))
  path_of(folder, "b").write_bytes(b"damaged")
  disks.remount(folder, "ro")
  with CacheStore(str(folder)) as store:
    assert same(store.get(ORIGIN, 1, digest("a")), make("a"))
    assert store.get(ORIGIN, 1, digest("b")) is None
    assert len(warned) == 2 and "not removed" in warned[1]
    for write in (lambda: store.put(make("c")), lambda: store.gc(0)):
      with pytest.raises(CacheError) as e:
        write()
      assert e.value.where == str(folder)
      assert e.value.got == "Read-only file system"
    warned.clear()
  assert len(warned) == 1 and "will not know what was used" in warned[0]


@pytest.mark.parametrize(
  ("url", "where", "got"),
  [
    ("", "--store", "''"),
    ("http://x/y", "--store", "'http://x/y'"),
    ("s4://x", "--store", "'s4://x'"),
    ("s3://", "--store", "'s3://' (Invalid S3 bucket name: \"\")"),
    ("gs://A/b", "--store", "'gs://A/b' (Invalid GCS bucket name: \"A\")"),
    (
      "file://x/y",
      "--store",
      "'file://x/y' (file: URIs do not support authority: \"x\")",
    ),
    (__file__, __file__, "a file"),
    ("~nosuchuser/x", "~nosuchuser/x", "a user that does not exist"),
  ],
)
def test_wrong_url(url, where, got):
  with pytest.raises(CacheError) as e:
    CacheStore(url)
  assert (e.value.where, e.value.got) == (where, got)


def test_folder_that_cannot_be_made():
  store = CacheStore("/proc/x/y")
  assert store.ls() == [] and store.gc().num_kept == 0
  with pytest.raises(CacheError) as e:
    store.put(make("a"))
  assert e.value.where == "/proc/x/y"
  assert e.value.got == (
    "NOT_FOUND: Failed to create directory: No such file or directory"
  )


def test_a_store_that_is_to_be_read_is_there(tmp_path, url):
  """In a bucket it may be empty: there is no folder of it."""
  if not url.startswith(("memory", "s3")):
    with pytest.raises(CacheError) as e:
      CacheStore(url).require()
    assert (e.value.where, e.value.got) == (url, "no such folder")
  store = CacheStore(url)
  store.put(make("a"))
  store.gc(0)
  store.require()


def test_missing_bucket(s3_url):
  store = CacheStore("s3://another/x")
  for use in (store.ls, lambda: store.put(make("a"))):
    with pytest.raises(CacheError) as e:
      use()
    assert "NoSuchBucket" in e.value.got


@pytest.fixture(scope="module")
def program(tmp_path_factory):
  forks = runs.Forks(
    tmp_path_factory.mktemp("program"), "vocojax.store", arguments=True
  )
  yield forks.run
  forks.close()


def test_program(program, tmp_path):
  with CacheStore(str(tmp_path)) as store:
    store.put(make("abc"))
    store.put(make("d", k=2))
  used = {e.image_hash: e.nbytes for e in store.ls()}
  flag = f"--store={tmp_path}"
  status, out, err = program("ls", flag)
  lines = out.splitlines()
  assert (status, err, len(lines)) == (0, "", 7)
  assert [line.split()[0] for line in lines[:4]] == list(used)
  one, two = used[digest("a")], used[digest("d")]
  assert f" {two:,} bytes  used 2" in lines[0]
  assert lines[4:] == [
    f"model aaaaaaaaaaaa, layout voco_v1/1, k = 2: 1 image, {two:,} bytes",
    f"model aaaaaaaaaaaa, layout voco_v1/1, k = 1: 3 images, {3 * one:,} bytes",
    f"{tmp_path}: 4 images, {3 * one + two:,} bytes",
  ]
  path_of(tmp_path, "b").write_bytes(b"damaged")
  status, out, err = program(flag, "verify")
  size = 2 * one + two
  assert status == 1 and f"k1/{digest('b')}: got " in err
  assert out == f"{tmp_path}: 3 images, {size:,} bytes sound, 1 damaged\n"
  status, out, err = program("gc", flag, f"--max_bytes={one + two}")
  assert (status, err) == (0, "")
  assert out == (
    f"{tmp_path}: removed 1 image, {one:,} bytes and 0 unfinished files; kept "
    f"2 images, {one + two:,} bytes\n"
  )


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ([], "action: got nothing, expected ls, verify or gc. "),
    (["show"], "action: got 'show', expected ls, verify or gc. "),
    (["ls", "--max_bytes=1"], "--max_bytes: got the action ls, expected gc. "),
    (["ls", "--store=STORE/absent"], "STORE/absent: got no such folder, "),
    (["verify", "--store=STORE/absent"], "STORE/absent: got no such folder, "),
    (["gc", "--store=STORE/absent"], "STORE/absent: got no such folder, "),
    (["ls", "--store=~nosuchuser/x"], "~nosuchuser/x: got a user that does "),
    (["ls", "--store=STORE/\udcff"], "--store: got half of a surrogate pair "),
  ],
)
def test_program_mistakes(program, tmp_path, arguments, words):
  arguments = [x.replace("STORE", str(tmp_path)) for x in arguments]
  status, out, err = program(f"--store={tmp_path}", *arguments)
  assert (status, out, err.count("\n")) == (2, "", 1), err
  assert err.startswith(f"error: {words.replace('STORE', str(tmp_path))}")
