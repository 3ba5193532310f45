"""Looks after a store of compressed images.

  python -m vocojax.store ls --store=URL
  python -m vocojax.store verify --store=URL
  python -m vocojax.store gc --store=URL --max_bytes=20_000_000_000

`ls` lists the images, the last used first. `verify` reads them all and removes
what is damaged (exit status 1 if anything was). `gc` removes what killed
programs left behind and, with --max_bytes, the least recently used images until
the rest fits. All may run while the store is in use. Read next:
inference/store.py.
"""

import collections
import sys
import time

import tqdm
from absl import flags, logging

from vocojax import cli
from vocojax.errors import UserError, shorten
from vocojax.inference.store import CacheStore, Entry

_STORE = flags.DEFINE_string(
  "store", None, "Folder, or URL file://, gs:// or s3://.", required=True
)
_MAX_BYTES = flags.DEFINE_integer(
  "max_bytes", None, "For gc: size that the store is cut to.", lower_bound=0
)


def main(words: list[str]) -> int | None:
  logging.set_verbosity(logging.WARNING)
  actions = {"ls": _ls, "verify": _verify, "gc": _gc}
  if len(words) != 1 or words[0] not in actions:
    found = shorten(" ".join(words)) if words else "nothing"
    raise UserError("action", found, "ls, verify or gc", "write one of them")
  if _MAX_BYTES.value is not None and words != ["gc"]:
    raise UserError(
      "--max_bytes", f"the action {words[0]}", "gc", "leave it out"
    )
  with CacheStore(_STORE.value) as store:
    store.require()
    return actions[words[0]](store)


def _ls(store: CacheStore) -> None:
  entries = store.ls()
  sizes = collections.defaultdict(list)
  for entry in entries:
    sizes[_group(entry)].append(entry.nbytes)
    used = "unknown" if entry.last_used is None else _time(entry.last_used)
    print(f"{entry.image_hash}  {entry.nbytes:>11,} bytes  used {used}")
  for group, nbytes in sizes.items():
    print(f"{group}: {_count(len(nbytes), sum(nbytes))}")
  if len(sizes) != 1:
    total = _count(len(entries), sum(entry.nbytes for entry in entries))
    print(f"{store.url}: {total}")


def _verify(store: CacheStore) -> int:
  sound, nbytes, damaged = 0, 0, []
  entries = tqdm.tqdm(
    store.verify(),
    desc="verified",
    unit="image",
    mininterval=1 if sys.stderr.isatty() else 20,
    dynamic_ncols=True,
  )
  for key, size in entries:
    if size is None:
      damaged.append(key)
    else:
      sound, nbytes = sound + 1, nbytes + size
  print(f"{store.url}: {_count(sound, nbytes)} sound, {len(damaged)} damaged")
  return 1 if damaged else 0


def _gc(store: CacheStore) -> None:
  found = store.gc(_MAX_BYTES.value)
  print(
    f"{store.url}: removed {_count(found.num_removed, found.bytes_removed)} "
    f"and {found.num_leftovers} unfinished files; kept "
    f"{_count(found.num_kept, found.bytes_kept)}"
  )


def _group(entry: Entry) -> str:
  return (
    f"model {entry.origin.model_fingerprint[:12]}, layout "
    f"{entry.origin.layout}, k = {entry.num_voco_tokens}"
  )


def _count(images: int, nbytes: int) -> str:
  return f"{images:,} image{'' if images == 1 else 's'}, {nbytes:,} bytes"


def _time(seconds: float) -> str:
  return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


if __name__ == "__main__":
  cli.run(main, __doc__, arguments=True)
