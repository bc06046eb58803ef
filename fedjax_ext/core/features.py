"""Columns of examples on the devices: placed once, or streamed wave by wave.

Columns that fit a budget are copied to every device once and gathered there.
Others stay where they are (memory maps, files) and every wave brings a table of
just the rows that its clients use, each device its own.

Axis letters: M rows of the columns, R rows of a table, D devices, S steps, L
lanes, B examples in a batch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.core.layout import Layout, bucket
from fedjax_ext.core.memory_maps import expect_random_access, read_rows
from fedjax_ext.core.plans import Plan

# An evaluation on streamed columns reads about so many bytes at a time.
CHUNK_BYTES = 1 << 26


class Column(Protocol):
  """What features need of a column: an array, a memory map, a lazy column.

  Attributes:
    shape: (M, ...).
    dtype: of its values.
  """

  shape: tuple[int, ...]
  dtype: np.dtype

  def __getitem__(self, rows: Any) -> np.ndarray:
    """The rows int64 [R] -> [R, ...]."""


class Table(NamedTuple):
  """What one wave gathers its batches from.

  Attributes:
    plan: the wave; its `example` [D, S, L, B] counts rows of `arrays`.
    arrays: {name: [M, ...]} whole on every device, or {name: [D, R, ...]}.
    sharded: which of the two.
    sent: the plan on the devices, once `send` put it there.
  """

  plan: Plan
  arrays: dict[str, Any]
  sharded: bool
  sent: Plan | None = None

  def send(self, layout: Layout) -> 'Table':
    """Starts the way of the plan and of sharded arrays to the devices."""
    if self.sent is not None:
      return self
    arrays = layout.shard(self.arrays) if self.sharded else self.arrays
    return self._replace(arrays=arrays, sent=layout.shard(self.plan))


@dataclasses.dataclass(frozen=True)
class Features:
  """Numeric columns for batches; text columns stay out.

  Attributes:
    columns: {name: [M, ...]} on the host or on disk.
    placed: {name: [M, ...]} on the devices; None if they are streamed.
  """

  columns: Mapping[str, Column]
  placed: Mapping[str, jax.Array] | None

  @property
  def types(self) -> dict[str, jax.ShapeDtypeStruct]:
    """One row's shape [...] and dtype, by name."""
    return {
      name: jax.ShapeDtypeStruct(x.shape[1:], _device_dtype(x.dtype))
      for name, x in self.columns.items()
    }

  @property
  def row_bytes(self) -> int:
    """Bytes of one row of all columns, a scalar."""
    return sum(
      int(np.prod(t.shape)) * np.dtype(t.dtype).itemsize
      for t in self.types.values()
    )

  def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Rows int64 [R] as they go to a device: {name: [R, ...]}."""
    return {
      n: _for_device(n, read_rows(x, rows)) for n, x in self.columns.items()
    }

  def table(self, plan: Plan, devices: np.ndarray) -> Table:
    """The rows that a wave needs, on the host if they are streamed.

    Args:
      plan: the wave.
      devices: bool [D], for which of them to read.
    """
    if self.placed is not None:
      return Table(plan, dict(self.placed), sharded=False)
    example = np.zeros_like(plan.example)
    used = []
    for d, (rows, count) in enumerate(
      zip(plan.example, plan.count, strict=True)
    ):
      real = count > 0
      unique, where = np.unique(rows[real], return_inverse=True)
      example[d][real] = where.reshape(-1, rows.shape[-1])
      used.append(unique)
    arrays = self._read_each(used, devices)
    return Table(plan._replace(example=example), arrays, sharded=True)

  def _read_each(
    self, rows: list[np.ndarray], devices: np.ndarray
  ) -> dict[str, np.ndarray]:
    """Each device's rows, padded alike: {name: [D, R, ...]}.

    Those of other devices than `devices` [D] stay zeros.
    """
    most = bucket(max(*(len(r) for r in rows), 1))
    rows = [r if d else r[:0] for r, d in zip(rows, devices, strict=True)]
    together = self.read(np.concatenate(rows).astype(np.int64))
    ends = np.cumsum([len(r) for r in rows])
    result = {}
    for name, values in together.items():
      shape = (len(rows), most, *values.shape[1:])
      result[name] = np.zeros(shape, values.dtype)
      for d, part in enumerate(np.split(values, ends[:-1])):
        result[name][d, : len(part)] = part
    return result


def _device_dtype(dtype: np.dtype) -> np.dtype:
  """64-bit numbers become 32-bit ones unless jax runs with 64 bits."""
  return jax.dtypes.canonicalize_dtype(dtype)


def _for_device(name: str, values: np.ndarray) -> np.ndarray:
  """Casts values [R, ...] of a column to the type that devices use."""
  dtype = _device_dtype(values.dtype)
  if dtype != values.dtype and dtype.kind in 'iu' and values.size:
    limits = np.iinfo(dtype)
    validate.check(
      limits.min <= values.min() and values.max() <= limits.max,
      f'Expected feature {name!r} to fit into {dtype}, got values from '
      f'{values.min()} to {values.max()}.',
    )
  return np.asarray(values, dtype)


def place_features(
  features: Mapping[str, Column],
  layout: Layout,
  *,
  memory_gb: float = np.inf,
) -> Features:
  """Decides where numeric features {name: [M, ...]} live, and places them.

  Arrays and memory maps that take at most `memory_gb` together are copied to
  every device, once; else, or where a column is only readable by rows, they
  are streamed. Columns of text stay out.

  Args:
    features: by name.
    layout: devices.
    memory_gb: budget on each device, in 2^30 bytes.

  Raises:
    InvalidInput: an integer does not fit into 32 bits.
  """
  validate.at_least('data_memory_gb', memory_gb, 0)
  numeric = {n: x for n, x in features.items() if x.dtype.kind in 'biuf'}
  unplaced = Features(numeric, None)
  rows = max((len(x) for x in numeric.values()), default=0)
  fits = rows * unplaced.row_bytes <= memory_gb * 2**30
  if not fits or not all(isinstance(x, np.ndarray) for x in numeric.values()):
    for column in numeric.values():
      expect_random_access(column)
    return unplaced
  placed = layout.replicate({n: _for_device(n, x) for n, x in numeric.items()})
  return Features(numeric, placed)
