"""What a conversion is going to do, in words. Read next: `into.py`."""

from collections.abc import Iterable, Iterator, Sequence

from vocojax.config import Config
from vocojax.weights import into, leaves, out_of


def describe_into(plan: into.Plan) -> str:
  """Every tensor that is read, and the parameter it becomes."""
  rows = [
    (*_published(leaf), f"-> {leaf.path}", str(leaf.shape), leaf.dtype.name)
    for leaf in plan.leaves
  ]
  lines = list(_table(rows))
  if plan.ignored:
    lines += ["", "Left aside:", *_table(plan.ignored)]
  if plan.random:
    lines += ["", "Drawn at random:", *plan.random]
  return "\n".join([*lines, "", summary_into(plan), *plan.notes])


def summary_into(plan: into.Plan) -> str:
  """The whole in a line."""
  tensors = sum(len(leaf.names) for leaf in plan.leaves)
  return (
    f"{tensors} tensors -> {len(plan.leaves)} parameters, "
    f"{plan.nbytes / 1e9:.2f} GB; {_model(plan.config)}"
  )


def describe_out(plan: out_of.Plan) -> str:
  """Every parameter, and the tensors it becomes."""
  by_path: dict[str, list[out_of.Published]] = {}
  for tensor in plan.tensors:
    by_path.setdefault(tensor.path, []).append(tensor)
  rows = []
  for path, tensors in by_path.items():
    name, number = _names([t.name for t in tensors])
    shape, dtype = str(tensors[0].shape), tensors[0].dtype.name
    rows.append((path, f"-> {name}", number, shape, dtype))
  return "\n".join([*_table(rows), "", summary_out(plan)])


def summary_out(plan: out_of.Plan) -> str:
  """The whole in a line."""
  return (
    f"{len({t.path for t in plan.tensors})} parameters -> "
    f"{len(plan.tensors)} tensors of layout {plan.layout}, "
    f"{plan.nbytes / 1e9:.2f} GB; {_model(plan.loaded.config)}"
  )


def _model(config: Config) -> str:
  llm, compressor = config.model.llm, config.model.compressor
  return (
    f"{llm.num_hidden_layers} layers of width {llm.hidden_size}, compressor "
    f"{compressor.name}, prompt layout {config.prompt.layout}"
  )


def _published(leaf: leaves.Leaf) -> tuple[str, ...]:
  """Name, number, shape and dtype of what a parameter is read from."""
  if isinstance(leaf, leaves.Tensors):
    stored = leaf.tensors[0]
  elif isinstance(leaf, leaves.VocabularyTensor):
    stored = leaf.tensor
  else:
    return "(random)", "", "", ""
  return *_names(leaf.names), str(stored.shape), stored.dtype.name


def _names(names: Sequence[str]) -> tuple[str, str]:
  """A name for all layers, and how many they are."""
  if len(names) == 1:
    return names[0], ""
  return names[0].replace(".0.", ".*."), f"x {len(names)}"


def _table(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
  """Lines with columns of equal width."""
  rows = list(rows)
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for row in rows:
    cells = (x.ljust(n) for x, n in zip(row, widths, strict=True))
    yield "  ".join(cells).rstrip()
