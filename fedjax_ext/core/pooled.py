"""Evaluation of one shared model: full batches over all examples, in one pass.

A client's examples in one piece are a group; metrics are summed by group. Where
columns are placed on the devices, one compiled call does it all. Where they are
streamed, chunks of steps bring their examples, and memory does not grow with
their number.

Axis letters: G groups, N examples of all groups, D devices, S steps, B examples
in a batch.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from fedjax_ext.core.algorithm import Predictor
from fedjax_ext.core.client_states import ClientStates
from fedjax_ext.core.features import CHUNK_BYTES, Features
from fedjax_ext.core.layout import CLIENTS, Layout, bucket
from fedjax_ext.core.parts import Piece, Scores
from fedjax_ext.core.plans import ClientRows
from fedjax_ext.core.programs import Batch, StepInfo

PyTree = Any
Sums = dict[str, tuple[jax.Array, jax.Array]]


class _Examples:
  """The examples of groups, one after another, by position in 0..N-1.

  Attributes:
    num_groups: G.
    first: the first group of each piece, int [pieces].
    size: N.
  """

  def __init__(self, pieces: Sequence[Piece]):
    """The clients of each piece in turn."""
    self._views = [piece.view for piece in pieces]
    counts = [len(piece.clients) for piece in pieces]
    self._starts = np.concatenate(
      [np.asarray(piece.view.offsets[piece.clients]) for piece in pieces]
    )
    sizes = np.concatenate([piece.sizes(piece.clients) for piece in pieces])
    self._ends = np.cumsum(sizes)
    self._view = np.repeat(np.arange(len(counts)), counts)
    self.num_groups = len(sizes)
    self.first = np.cumsum([0, *counts[:-1]]).tolist()
    self.size = int(self._ends[-1]) if len(sizes) else 0

  def rows(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Feature rows and groups, int64 [n] each, from position `first` on.

    Fewer than `count` at the end.
    """
    position = np.arange(first, min(first + count, self.size))
    group = np.searchsorted(self._ends, position, side='right')
    back = self._ends[group] - position  # distance to the end of the group
    sizes = np.diff(self._ends, prepend=0)
    at = self._starts[group] + sizes[group] - back
    rows = np.empty(len(position), np.int64)
    for i, view in enumerate(self._views):
      mine = self._view[group] == i
      rows[mine] = view.rows[at[mine]]
    return rows, group


def pooled_scorer(
  predictor: Predictor,
  data: Mapping[str, ClientRows],
  pieces: Sequence[Piece],
  features: Features,
  layout: Layout,
  batch_size: int,
  seed: int,
) -> Callable:
  """Compiles the pass.

  Args:
    predictor: of one shared model.
    data: splits by name, not used.
    pieces: what to score.
    features: the columns.
    layout: devices.
    batch_size: B.
    seed: not used.

  Returns:
    (server_state, states) -> {metric: (sum [K'], weight [K'])} of each piece.
  """
  del data, seed
  examples = _Examples(pieces)
  num_groups = bucket(examples.num_groups)
  streamed = features.placed is None
  placed = (
    () if streamed else list(_chunks(examples, features, layout, batch_size))
  )

  @jax.jit
  def run(params: PyTree, arrays: PyTree, fixed: PyTree) -> Sums:
    return jax.shard_map(
      functools.partial(
        _run_device, predictor.metrics, layout, num_groups, streamed
      ),
      mesh=layout.mesh,
      in_specs=(P(), P(CLIENTS) if streamed else P(), P(CLIENTS)),
      out_specs=P(),
      check_vma=False,
    )(params, arrays, fixed)

  add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))

  def score(server_state: PyTree, states: ClientStates | None) -> list[Scores]:
    del states
    params = layout.replicate(predictor.shared(server_state))
    sums = None
    chunks = placed or _chunks(examples, features, layout, batch_size)
    for arrays, fixed in chunks:
      part = run(params, arrays, fixed)
      sums = part if sums is None else add(sums, part)
      if streamed:  # or chunks would pile up on the devices
        jax.block_until_ready(sums)
    sums = jax.tree.map(np.asarray, sums)
    return [
      {
        name: (s[first : first + size], w[first : first + size])
        for name, (s, w) in sums.items()
      }
      for first, piece in zip(examples.first, pieces, strict=True)
      for size in [len(piece.clients)]
    ]

  return score


def _chunks(
  examples: _Examples, features: Features, layout: Layout, batch_size: int
) -> Iterator[tuple[PyTree, tuple[jax.Array, ...]]]:
  """Deals examples out to devices, steps and batches, of one shape a chunk.

  One chunk where features are placed, with S bucketed, so that other numbers of
  examples share a compiled program; else as many as it takes for each to read
  about CHUNK_BYTES. Steps of padding are not run.

  Yields:
    What to gather from, {name: [M, ...]} or, streamed, {name: [D, S*B, ...]};
    and (rows of that int32 [D, S, B], group int32 [D, S, B], mask bool
    [D, S, B], number of the step int32 [D, S], steps to run int32 [D]).
  """
  devices = layout.num_devices
  a_step = devices * batch_size
  steps = max(-(-examples.size // a_step), 1)
  if features.placed is not None:
    steps = bucket(steps)
  else:
    most = CHUNK_BYTES // max(a_step * features.row_bytes, 1)
    steps = min(steps, max(most, 1))
  shape = (devices, steps, batch_size)
  within = np.arange(steps * batch_size).reshape(steps, batch_size)
  for first in range(0, max(examples.size, 1), steps * a_step):
    rows, groups = examples.rows(first, steps * a_step)
    needed = -(-len(rows) // a_step)

    def deal(x: np.ndarray) -> np.ndarray:
      """[n] as [D, S, B], the needed steps of each device first."""
      x = np.pad(x, (0, needed * a_step - len(x)))
      x = x.reshape(devices, needed, batch_size)
      return np.pad(x, ((0, 0), (0, steps - needed), (0, 0)))

    mask = deal(np.ones(len(rows), bool))
    rows, groups = deal(rows.astype(np.int32)), deal(groups.astype(np.int32))
    number = np.arange(steps, dtype=np.int32) + first // a_step
    number = np.broadcast_to(number, shape[:2])
    count = np.full(devices, needed, np.int32)
    if features.placed is not None:
      arrays, local = dict(features.placed), rows
    else:
      arrays = layout.shard(_read(features, rows, layout))
      local = np.broadcast_to(within.astype(np.int32), shape)
    yield arrays, layout.shard((local, groups, mask, number, count))


def _read(
  features: Features, rows: np.ndarray, layout: Layout
) -> dict[str, np.ndarray]:
  """Rows int [D, S, B] of this process's devices: {name: [D, S*B, ...]}."""
  read = features.read(rows[layout.local].reshape(-1))
  result = {}
  for name, values in read.items():
    shape = (len(rows), rows[0].size, *values.shape[1:])
    result[name] = np.zeros(shape, values.dtype)
    result[name][layout.local] = values.reshape(-1, *shape[1:])
  return result


def _run_device(
  metrics: Callable,
  layout: Layout,
  num_groups: int,
  streamed: bool,
  params: PyTree,
  arrays: PyTree,
  fixed: tuple[jax.Array, ...],
) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Sums by group [G] of one device's batches."""
  mine = lambda tree: jax.tree.map(lambda x: x[0], tree)  # shard of axis D
  rows, groups, mask, number, needed = mine(fixed)
  arrays = mine(arrays) if streamed else arrays

  def values(s: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    data = jax.tree.map(lambda x: x[rows[s]], arrays)
    return metrics(params, Batch(data, mask[s], evaluation_info(number[s])))

  zeros = jax.tree.map(
    lambda t: jnp.zeros(num_groups), jax.eval_shape(values, jnp.int32(0))
  )

  def body(s: jax.Array, sums: PyTree) -> PyTree:
    result = {}
    for name, (value, weight) in values(s).items():
      total_sum, total_weight = sums[name]
      weight = jnp.where(mask[s], weight, 0).astype(total_weight.dtype)
      value = jnp.where(weight == 0, 0, value * weight).astype(total_sum.dtype)
      result[name] = (
        total_sum.at[groups[s]].add(value),
        total_weight.at[groups[s]].add(weight),
      )
    return result

  sums = lax.fori_loop(0, needed, body, zeros)
  return layout.sum_devices(sums)


def evaluation_info(step: jax.Array) -> StepInfo:
  """A step of an evaluation, number `step` (a scalar): phase and epoch 0."""
  return StepInfo(
    jax.random.fold_in(jax.random.key(0), step),
    step,
    jnp.int32(0),
    jnp.int32(0),
    jnp.bool(False),
  )
