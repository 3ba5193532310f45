"""Answers many requests at once: continuous batching over fixed slots.

The host half: which request is in which slot. The device half is programs.py.
Read next: requests.py, programs.py.

A request takes a free slot, its prompt is read (prefill), and then every step
reads one token of every slot and chooses the next (decode). A slot whose answer
ends is given to the next request while the others go on.
"""

import collections
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Float32

from vocojax.config import Config
from vocojax.data import prompt
from vocojax.errors import UserError
from vocojax.inference.cache import CacheOrigin, VocoCache, concatenate
from vocojax.inference.fingerprint import model_fingerprint
from vocojax.inference.programs import Programs, Rows
from vocojax.inference.requests import (
  ImageLike,
  Job,
  Request,
  Result,
  Room,
  as_list,
  prepare,
  read_image,
)
from vocojax.inference.unseen import Unseen
from vocojax.models import layers
from vocojax.models.cache import ImageKeyValues, TextCache
from vocojax.models.vlm import VisionLanguageModel

_SMALLEST_BUCKET = 16  # prompts are padded to it times a power of 2


class Engine:
  """A model with a fixed number of slots for requests.

  A result never depends on what else the engine is doing: in float32 on CPU it
  is the same to the bit.

  Attributes:
    tokenizer: of the checkpoint.
    origin: what its caches are made with, and what caches it takes.
    slots: requests answered at the same time.
    max_images: images of one request.
    max_text_length: tokens of a prompt and its answer together.
    compress_batch: images compressed by one call of the program.
    num_image_tokens: tokens that it makes of an image.
    num_voco_tokens: how many of them, the last, may be cut off; 0 where it has
      another compressor.
    num_patches: patches as which it sees an image.
  """

  def __init__(
    self,
    config: Config,
    model: VisionLanguageModel,
    params,
    tokenizer: transformers.PreTrainedTokenizerFast,
    *,
    slots: int = 8,
    max_images: int = 1,
    max_text_length: int = 512,
    compress_batch: int = 8,
    prefill_rows: int = 1,
  ):
    """Allocates the slots; programs are compiled when first needed.

    Args:
      config: of the checkpoint.
      model: its shape and layout.
      params: as `model.init` returns them, on any devices.
      tokenizer: of the checkpoint.
      slots: a decoding step computes all of them, busy or not.
      max_images: every row has room for the tokens of so many images.
      max_text_length: every row has room for so many tokens of text.
      compress_batch: images compressed at a time.
      prefill_rows: prompts read at a time.

    Raises:
      UserError: a size is too small.
    """
    for name, size, least in (
      ("slots", slots, 1),
      ("max_images", max_images, 0),
      ("max_text_length", max_text_length, 1),
      ("compress_batch", compress_batch, 1),
      ("prefill_rows", prefill_rows, 1),
    ):
      if size < least:
        raise UserError(name, f"{size}", f"at least {least}", "set it to more")
    layout = prompt.LAYOUTS[config.prompt.layout]
    self.tokenizer = tokenizer
    self.origin = CacheOrigin(
      model_fingerprint(model, params, config.data.pad_to_square),
      f"{layout.name}/{layout.version}",
    )
    self.slots = slots
    self.max_images = max_images
    self.max_text_length = max_text_length
    self.compress_batch = compress_batch
    self.num_image_tokens = len(model.stream.visible)
    compressor = model.config.compressor
    self.num_voco_tokens = (
      compressor.num_voco_tokens if compressor.name == "voco" else 0
    )
    self.num_patches = model.config.vision.num_patches
    self._room = Room(
      tokenizer,
      layout,
      config.prompt.strip_newlines,
      model.config.llm.vocab_size,
      self.origin,
      max_images,
      self.num_image_tokens,
      max_text_length,
    )
    self._unseen = Unseen(tokenizer, config.data.max_images)
    self._pad_to_square = config.data.pad_to_square
    self._prefill_rows = prefill_rows
    self._model = model
    self._dtype = jnp.dtype(model.config.dtype)
    self._image_slots = max_images * self.num_image_tokens
    params = jax.tree.map(jnp.asarray, params)
    llm = params["llm"] | {"layers": layers.unstack(params["llm"]["layers"])}
    self._params = params | {"llm": llm}
    self._cache_sharding = cache_sharding(llm, slots, model)
    self._programs = Programs(model, self._cache_sharding)
    self._mesh = functools.partial(layers.mesh_of, llm["norm"]["scale"])
    self._positions = functools.cache(
      lambda num_images, k: model.stream_of(k).positions(num_images)
    )
    self._cache = self._empty_cache()
    self._busy = False
    self._clear()

  def _empty_cache(self) -> TextCache:
    c = self._model.config.llm
    S = self._image_slots + self.max_text_length
    shape = (self.slots, c.num_key_value_heads, S, c.head_dim)
    keys, values = (
      [
        jnp.zeros(shape, self._dtype, device=self._cache_sharding)
        for _ in range(c.num_hidden_layers)
      ]
      for _ in range(2)
    )
    return TextCache(keys, values)

  def _clear(self) -> None:
    """Takes all requests out of the slots."""
    self._jobs: list[Job | None] = [None] * self.slots
    self._rows = Rows.empty(self.slots)
    self._tokens = np.zeros(self.slots, np.int32)

  @property
  def num_compilations(self) -> int:
    """Programs compiled so far; constant after `warm_up`."""
    return self._programs.num_compilations

  def warm_up(self) -> None:
    """Compiles now what `generate` and `compress` would compile later."""
    size = self._model.config.vision.image_size
    pixels = np.zeros((self.compress_batch, size, size, 3), np.uint8)
    with self._mesh():
      jax.block_until_ready(self._programs.compress(self._params, pixels))
    length = 0
    while length < self.max_text_length:
      length = self._bucket(length + 1)
      self._prefill([], length)
    self._decode()

  def compress(self, images: ImageLike | Sequence[ImageLike]) -> VocoCache:
    """Turns one or several images into a cache.

    Raises:
      UserError: there is no image.
      DataError: one of them is not an image, or too large.
    """
    size = self._model.config.vision.image_size
    read = [
      read_image(image, size, self._pad_to_square) for image in as_list(images)
    ]
    if not read:
      raise UserError("images", "none", "at least one", "give an image")
    batch = self.compress_batch
    return concatenate(
      [self._compress(read[i : i + batch]) for i in range(0, len(read), batch)]
    )

  def _compress(self, read: list[tuple[np.ndarray, str]]) -> VocoCache:
    """One batch of pixels and hashes."""
    pixels = np.stack([pixels for pixels, _ in read])
    padding = self.compress_batch - len(read)
    pixels = np.pad(pixels, ((0, padding), *[(0, 0)] * 3))
    with self._mesh():
      found = jax.device_get(self._programs.compress(self._params, pixels))
    return VocoCache(
      found.keys[:, : len(read)],
      found.values[:, : len(read)],
      None,
      None,
      self.origin,
      tuple(digest for _, digest in read),
    )

  def ask(
    self,
    question: str,
    images: VocoCache | ImageLike | Sequence[ImageLike] | None = None,
    **request_fields,
  ) -> str:
    """The answer to one question.

    Args:
      question: about the images, if there are any.
      images: a cache, or one or several images.
      **request_fields: of `Request`.

    Raises:
      UserError: it cannot be answered.
    """
    request = Request([(question, None)], images, **request_fields)
    [result] = self.run([request])
    return result.text

  def run(self, requests: Iterable[Request]) -> list[Result]:
    """All results, in the order of the requests; see `generate`."""
    found = dict(self.generate(requests))
    return [found[index] for index in range(len(found))]

  def generate(
    self, requests: Iterable[Request]
  ) -> Iterator[tuple[int, Result]]:
    """Results as they come, each with the number of its request, from 0.

    Requests are taken from the iterable when there are slots for them.

    Raises:
      UserError: a request cannot be answered, as `check` would say.
      RuntimeError: the engine is in the middle of another `generate`.
    """
    if self._busy:
      raise RuntimeError("the engine is already generating; finish that first")
    self._busy = True
    self._clear()
    try:
      waiting = enumerate(requests)
      while True:
        yield from self._admit(waiting)
        if not any(self._jobs):
          return
        tokens = self._decode()
        for slot in self._taken():
          yield from self._push(slot, tokens[slot])
    finally:  # also where the caller stops half-way
      # At the end of Python, when the globals of this module may be gone.
      self._jobs = [None] * self.slots
      self._busy = False

  def check(self, request: Request) -> None:
    """Whether a request can be answered.

    Raises:
      UserError: it cannot.
    """
    images = request.images
    if images is not None and not isinstance(images, VocoCache):
      images = self.compress(images)
    prepare(request, images, 0, self._room)

  def foretell(self, requests: Sequence[Request]) -> Float32[np.ndarray, "N V"]:
    """Probabilities of the first token of each answer, whatever its sampling.

    Raises:
      UserError: a request cannot be answered.
    """
    jobs = self._prepare(list(enumerate(requests)))
    found = np.zeros(
      (len(jobs), self._model.config.llm.padded_vocab_size), np.float32
    )
    for length, part in self._parts(list(enumerate(jobs))):
      with self._mesh():
        rows = self._programs.foretell(
          self._params, *self._lay([job for _, job in part], length)
        )
      found[[i for i, _ in part]] = np.asarray(rows)[: len(part)]
    return found

  def _prepare(self, pairs: Sequence[tuple[int, Request]]) -> list[Job]:
    """Numbered requests to jobs; their images are compressed together."""
    images: list[ImageLike] = []
    counts = []
    for _, request in pairs:
      raw = request.images
      if raw is None or isinstance(raw, VocoCache):
        counts.append(0)
      else:
        counts.append(len(as_list(raw)))
        images += as_list(raw)
    made = self.compress(images) if images else None
    jobs, first = [], 0
    for (index, request), count in zip(pairs, counts, strict=True):
      cache = request.images if isinstance(request.images, VocoCache) else None
      if made is not None and count:
        cache = made.select(range(first, first + count))
        first += count
      try:
        jobs.append(prepare(request, cache, index, self._room))
      except UserError as e:
        raise e.within(f"request {index}") from e
      self._unseen.note(request.turns, cache.num_images if cache else 0)
    return jobs

  def _taken(self) -> list[int]:
    return [slot for slot, job in enumerate(self._jobs) if job is not None]

  def _bucket(self, length: int) -> int:
    """The length that a prompt is padded to."""
    bucket = _SMALLEST_BUCKET
    while bucket < length:
      bucket *= 2
    return min(bucket, self.max_text_length)

  def _admit(
    self, waiting: Iterator[tuple[int, Request]]
  ) -> Iterator[tuple[int, Result]]:
    """Fills the free slots; yields answers of a single token."""
    while free := [slot for slot, job in enumerate(self._jobs) if job is None]:
      jobs = self._prepare(list(itertools.islice(waiting, len(free))))
      if not jobs:
        return
      taken = list(zip(free, jobs, strict=False))
      for slot, job in taken:
        self._jobs[slot] = job
      for length, part in self._parts(taken):
        tokens = self._prefill(part, length)
        for (slot, _), token in zip(part, tokens, strict=False):
          yield from self._push(slot, token)

  def _parts(
    self, numbered: list[tuple[int, Job]]
  ) -> Iterator[tuple[int, list[tuple[int, Job]]]]:
    """Jobs that are read together, and the length of their padded prompts."""
    groups = collections.defaultdict(list)
    for number, job in numbered:
      groups[self._bucket(len(job.prompt_ids))].append((number, job))
    for length, group in groups.items():
      for i in range(0, len(group), self._prefill_rows):
        yield length, group[i : i + self._prefill_rows]

  def _prefill(self, group: list[tuple[int, Job]], length: int) -> list[int]:
    """Reads prompts, padded to `length`, into slots; their first tokens."""
    *prompts, lengths, rows = self._lay([job for _, job in group], length)
    target = np.full(self._prefill_rows, self.slots, np.int32)  # goes nowhere
    for row, (slot, job) in enumerate(group):
      target[row] = slot
      self._rows.slot[slot] = rows.slot[row] + len(job.prompt_ids)
      self._rows.position[slot] = rows.position[row] + len(job.prompt_ids)
      self._rows.sampling.start(slot, job.request.sampling)
    with self._mesh():
      tokens, self._cache = self._programs.prefill(
        self._params, self._cache, *prompts, lengths, target, rows
      )
    return np.asarray(tokens).tolist()

  def _lay(self, jobs: list[Job], length: int):
    """Images and their positions, prompts and lengths, and where rows begin."""
    c = self._model.config.llm
    R, C = self._prefill_rows, self._image_slots
    shape = (c.num_hidden_layers, R, C, c.num_key_value_heads, c.head_dim)
    keys, values = np.zeros((2, *shape), self._dtype)
    positions = np.zeros((R, C), np.int32)
    ids = np.zeros((R, length), np.int32)
    lengths = np.ones(R, np.int32)
    rows = Rows.empty(R)
    for row, job in enumerate(jobs):
      count = job.num_image_tokens
      if job.cache is not None:
        images = job.cache.dequantize(self._dtype.name)
        keys[:, row, :count] = images.keys.reshape(shape[0], count, *shape[3:])
        values[:, row, :count] = images.values.reshape(
          shape[0], count, *shape[3:]
        )
        positions[row, :count], rows.position[row] = self._positions(
          job.cache.num_images, job.cache.num_voco_tokens
        )
      ids[row, : len(job.prompt_ids)] = job.prompt_ids
      lengths[row] = len(job.prompt_ids)
      rows.slot[row] = count
      rows.sampling.start(row, job.request.sampling)
    return ImageKeyValues(keys, values), positions, ids, lengths, rows

  def _decode(self) -> list[int]:
    """One step of all slots; their next tokens."""
    with self._mesh():
      tokens, self._cache = self._programs.decode(
        self._params, self._cache, self._tokens, self._rows
      )
    # Only now, since the program may be reading these very arrays.
    chosen = np.asarray(tokens).tolist()
    for slot in self._taken():
      self._rows.slot[slot] += 1
      self._rows.position[slot] += 1
    return chosen

  def _push(self, slot: int, token: int) -> Iterator[tuple[int, Result]]:
    """Gives a slot its next token; yields its result if that is the last."""
    job = self._jobs[slot]
    assert job is not None
    self._tokens[slot] = token
    self._rows.sampling.count[slot] += 1
    result = job.push(token)
    if result is not None:
      self._jobs[slot] = None
      self._rows.slot[slot] = self._rows.position[slot] = 0
      self._rows.sampling.temperature[slot] = 0
      yield job.index, result


def cache_sharding(
  llm_params, slots: int, model: VisionLanguageModel
) -> Sharding:
  """Rows over the data and fsdp axes, heads over tensor, where they divide."""
  sharding = llm_params["norm"]["scale"].sharding
  if not isinstance(sharding, NamedSharding):
    return sharding
  mesh = sharding.mesh
  rows = math.prod(mesh.shape[axis] for axis in layers.BATCH_AXES)
  heads = model.config.llm.num_key_value_heads
  return NamedSharding(
    mesh,
    PartitionSpec(
      layers.BATCH_AXES if slots % rows == 0 else None,
      "tensor" if heads % mesh.shape["tensor"] == 0 else None,
    ),
  )
