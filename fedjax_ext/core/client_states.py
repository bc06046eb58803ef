"""A bank of per-client state that survives a kill.

Rows live in numbered slots, in memory or in files; `index [C]` says which slot
a client's row is in, -1 if it has none yet. A write takes a free slot and never
one that a kept checkpoint's index refers to. A checkpoint therefore only needs
the index, and a killed run finds every row that its last checkpoint names.

Axis letters: C clients in the population, K' rows of a request.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_ext.core import validate

PyTree = Any

# First rows are made so many at a time, by one compiled program.
NEW_ROWS = 8


class _Slots:
  """The rows themselves: one array or file per leaf, [capacity, ...]."""

  def __init__(
    self,
    template: PyTree,
    directory: pathlib.Path | None,
    num_clients: int,
  ):
    self.num_clients = num_clients
    leaves, self.structure = jax.tree.flatten(template)
    self.shapes = [tuple(leaf.shape) for leaf in leaves]
    self.dtypes = [np.dtype(leaf.dtype) for leaf in leaves]
    self.directory = directory
    self.capacity = 0
    self.free: list[int] = []
    self.pins: dict[int, np.ndarray] = {}  # checkpoint -> its slots
    self.newest = 0  # version of the handle that may write
    self.arrays = [
      np.empty((0, *shape), dtype)
      for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
    ]
    if directory is not None:
      directory.mkdir(parents=True, exist_ok=True)
      self._map(self._capacity_on_disk())

  def _path(self, leaf: int) -> pathlib.Path:
    return self.directory / f'rows_{leaf}.bin'

  def _row_bytes(self, leaf: int) -> int:
    size = int(np.prod(self.shapes[leaf], dtype=np.int64))
    return max(size * self.dtypes[leaf].itemsize, 1)

  def _capacity_on_disk(self) -> int:
    sizes = [
      self._path(i).stat().st_size // self._row_bytes(i)
      if self._path(i).exists()
      else 0
      for i in range(len(self.shapes))
    ]
    return min(sizes, default=0)

  def _map(self, capacity: int) -> None:
    self.capacity = capacity
    if not capacity:
      return
    self.arrays = [
      np.memmap(
        self._path(i), self.dtypes[i], 'r+', shape=(capacity, *self.shapes[i])
      )
      for i in range(len(self.shapes))
    ]

  def _grow(self, minimum: int) -> None:
    ample = self.capacity + max(self.capacity // 2, 64)
    # Beyond one slot a client: what a round writes before it frees what it
    # replaces, and rows that checkpoints hold on to.
    enough = max(self.num_clients, 64)
    if self.capacity < enough:
      ample = min(ample, enough)
    else:
      ample = self.capacity + enough // 32
    capacity = max(minimum, ample)
    if self.directory is None:
      for i, old in enumerate(self.arrays):
        new = np.empty((capacity, *self.shapes[i]), self.dtypes[i])
        new[: self.capacity] = old[: self.capacity]
        self.arrays[i] = new
      first, self.capacity = self.capacity, capacity
    else:
      for i in range(len(self.shapes)):
        try:
          self._path(i).touch()
          with self._path(i).open('r+b') as file:
            # Reserves the space: a full disk is an error here, in one place,
            # instead of a crash on a later write to mapped memory.
            os.posix_fallocate(file.fileno(), 0, capacity * self._row_bytes(i))
        except OSError as error:
          raise OSError(
            error.errno, error.strerror, str(self._path(i))
          ) from error
      first = self.capacity
      self._map(capacity)
    self.free.extend(range(capacity - 1, first - 1, -1))

  def take(self, count: int) -> np.ndarray:
    """Free slots [count], no longer free."""
    if len(self.free) < count:
      self._grow(self.capacity + count - len(self.free))
    return np.array([self.free.pop() for _ in range(count)], np.int64)

  def release(self, slots: np.ndarray) -> None:
    """Frees slots that no checkpoint holds."""
    held = self.held()
    self.free.extend(
      int(s) for s in slots if s >= 0 and not (held.size and held[s])
    )

  def held(self) -> np.ndarray:
    """bool [capacity]: slots that kept checkpoints refer to."""
    held = np.zeros(self.capacity, bool)
    for slots in self.pins.values():
      held[slots] = True
    return held

  def flush(self) -> None:
    for array in self.arrays:
      if isinstance(array, np.memmap):
        array.flush()


@dataclasses.dataclass(frozen=True)
class ClientStates:
  """A handle on a bank; `scatter` returns the next handle.

  The next handle shares its slots, so use each handle until its `scatter` only;
  a second `scatter` of one handle is refused.

  Attributes:
    index: int64 [C], slot by client, -1 where the row is still to be made.
  """

  index: np.ndarray
  _slots: _Slots
  _initial: Callable[[jax.Array], PyTree]
  _version: int = 0

  @property
  def num_clients(self) -> int:
    """C, a scalar."""
    return len(self.index)

  def gather(self, clients: np.ndarray) -> PyTree:
    """Rows of clients int [K'] (-1 reads as client 0): leaves [K', ...]."""
    clients = np.maximum(np.asarray(clients, np.int64), 0)
    slots = self.index[clients]
    missing = np.flatnonzero(slots < 0)
    rows = [
      np.array(array[np.maximum(slots, 0)])
      if self._slots.capacity
      else np.empty((len(clients), *array.shape[1:]), array.dtype)
      for array in self._slots.arrays
    ]
    if len(missing):
      size = min(NEW_ROWS, self.num_clients)
      for some in np.split(missing, range(size, len(missing), size)):
        padded = np.zeros(size, np.int32)
        padded[: len(some)] = clients[some]
        fresh = jax.tree.leaves(self._initial(padded))
        for row, new in zip(rows, fresh, strict=True):
          row[some] = np.asarray(new)[: len(some)]
    return jax.tree.unflatten(self._slots.structure, rows)

  def scatter(self, clients: np.ndarray, rows: PyTree) -> 'ClientStates':
    """Writes rows (leaves [K', ...]) of distinct clients [K']; -1 is skipped.

    Raises:
      OSError: the disk is full; the rows of this handle are still whole.
      InvalidInput: this handle is not the newest one.
    """
    validate.check(
      self._version == self._slots.newest,
      'Expected the newest ClientStates handle in scatter, got one whose '
      'successor exists.',
    )
    clients = np.asarray(clients, np.int64)
    real = np.flatnonzero(clients >= 0)
    slots = self._slots.take(len(real))
    for array, new in zip(
      self._slots.arrays, jax.tree.leaves(rows), strict=True
    ):
      array[slots] = np.asarray(new)[real]
    index = self.index.copy()
    index[clients[real]] = slots
    self._slots.release(self.index[clients[real]])
    self._slots.newest += 1
    return dataclasses.replace(self, index=index, _version=self._slots.newest)

  def snapshot(self, checkpoint: int) -> np.ndarray:
    """Flushes the rows and pins them for a checkpoint; returns index [C]."""
    self._slots.flush()
    before = self._slots.held()
    self._slots.pins[checkpoint] = self.index[self.index >= 0]
    before &= ~self._slots.held()
    self._slots.free.extend(np.flatnonzero(before).tolist())
    return self.index

  def keep(self, checkpoints: Mapping[int, np.ndarray] | set[int]) -> None:
    """Unpins all but these checkpoints ({number: index [C]} or numbers).

    With indices, as after a restart, pins are set anew and every slot that
    neither they nor this handle refer to is free.
    """
    slots = self._slots
    before = slots.held()
    if isinstance(checkpoints, Mapping):
      slots.pins = {n: i[i >= 0] for n, i in checkpoints.items()}
    else:
      slots.pins = {n: p for n, p in slots.pins.items() if n in checkpoints}
    used = slots.held()
    used[self.index[self.index >= 0]] = True
    if isinstance(checkpoints, Mapping):
      slots.free = np.flatnonzero(~used)[::-1].tolist()
    else:
      slots.free.extend(np.flatnonzero(before & ~used).tolist())

  def check_index(self, index: np.ndarray) -> None:
    """Raises InvalidInput unless an index [C] fits this bank's rows."""
    largest = index.max(initial=-1)
    validate.check(
      index.shape == self.index.shape and largest < self._slots.capacity,
      f'Expected a client state index for {self.num_clients} clients and '
      f'{self._slots.capacity} stored rows, got {len(index)} clients and slot '
      f'{largest}.',
    )

  def restore(
    self, index: np.ndarray, checkpoints: Mapping[int, np.ndarray]
  ) -> 'ClientStates':
    """The handle of a checkpoint.

    Args:
      index: int64 [C], as `snapshot` returned it.
      checkpoints: {number: index [C]} of all checkpoints that stay.

    Raises:
      InvalidInput: the index does not fit this bank.
    """
    index = np.asarray(index, np.int64)
    for one in (index, *checkpoints.values()):
      self.check_index(one)
    self._slots.newest += 1
    restored = dataclasses.replace(
      self, index=index, _version=self._slots.newest
    )
    restored.keep(checkpoints)
    return restored


def make_client_states(
  init_client: Callable[[jax.Array, jax.Array], PyTree],
  *,
  num_clients: int,
  key: jax.Array,
  directory: str | os.PathLike | None = None,
) -> ClientStates:
  """Makes an empty bank; rows appear when clients first take part.

  Args:
    init_client: (key, client number) -> a row, both scalars; pure.
    num_clients: C.
    key: scalar key; client c's row is init_client(fold_in(key, c), c).
    directory: where the rows live; None keeps them in memory.

  Raises:
    InvalidInput: num_clients < 1.
  """
  validate.at_least('num_clients', num_clients, 1)

  def first_row(key: jax.Array, number: jax.Array) -> PyTree:
    return init_client(jax.random.fold_in(key, number), number)

  template = jax.eval_shape(first_row, key, jnp.int32(0))
  path = None if directory is None else pathlib.Path(directory)
  return ClientStates(
    np.full(num_clients, -1, np.int64),
    _Slots(template, path, num_clients),
    # The key is an argument: runs of all seeds share the compiled program.
    functools.partial(jax.jit(jax.vmap(first_row, (None, 0))), key),
  )
