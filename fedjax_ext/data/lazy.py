"""Columns that are read from disk when their rows are asked for.

A lazy column behaves like the array [M, ...] that it stands for: it has a
shape, a dtype and a length, and indexing it with rows reads them. Columns of
one reader share a read: asking for `image` and then for `label` of the same
rows decodes the records once. A read of more than 256 MB (a whole column, say)
is made in pieces of 64 MB, in ascending order, so that memory holds one piece
of the other features and hardly a record is decoded twice.

Axis letters: C clients, M rows, N rows asked for.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_ext.core import validate

Records = dict[str, np.ndarray]
_LARGEST_READ, _PIECE = 1 << 28, 1 << 26  # bytes of all features together


class RecordType(NamedTuple):
  """Shape of one record's feature (without the row axis) and its dtype."""

  shape: tuple[int, ...]
  dtype: np.dtype


class Reader:
  """Reads rows of all features of one source; remembers the last answer.

  Safe to use from several threads, which wait for each other.

  Attributes:
    types: {name: RecordType}.
    num_rows: M.
  """

  def __init__(
    self,
    read: Callable[[np.ndarray], Records],
    types: Mapping[str, RecordType],
    num_rows: int,
  ):
    """Wraps a function.

    Args:
      read: rows int64 [N], any order and repeats -> {name: [N, ...]}.
      types: what it returns, by name.
      num_rows: M.
    """
    self.types = dict(types)
    self.num_rows = num_rows
    self._read = read
    self._last: tuple[np.ndarray, Records] | None = None
    self._lock = threading.Lock()  # plans are made in a thread of their own

  def read(self, rows: np.ndarray, *, remember: bool = True) -> Records:
    """Reads rows.

    Args:
      rows: int64 [N], any order and repeats.
      remember: keep the answer, for the next call with the same rows.

    Returns:
      {name: [N, ...]}; shared where remembered, so not to be changed.

    Raises:
      InvalidInput: a row is out of range or a record is not of its type.
    """
    rows = np.asarray(rows, np.int64)
    with self._lock:
      if self._last is not None and np.array_equal(self._last[0], rows):
        return self._last[1]
      if not remember:
        return self._fetch(rows)
      self._last = None  # freed before the next one is made
      self._last = rows.copy(), self._fetch(rows)
      return self._last[1]

  def _fetch(self, rows: np.ndarray) -> Records:
    if len(rows):
      validate.check(
        rows.min() >= 0 and rows.max() < self.num_rows,
        f'Expected rows in 0..{self.num_rows - 1}, got '
        f'{rows.min()}..{rows.max()}.',
      )
    records = self._read(rows) if len(rows) else {}
    return {n: self._typed(n, records.get(n), rows) for n in self.types}

  @property
  def row_bytes(self) -> int:
    """Bytes of one row of all features, a scalar."""
    return sum(
      int(np.prod(t.shape)) * np.dtype(t.dtype).itemsize
      for t in self.types.values()
    )

  def _typed(
    self, name: str, values: np.ndarray | None, rows: np.ndarray
  ) -> np.ndarray:
    shape, dtype = self.types[name]
    if not len(rows):
      return np.zeros((0, *shape), dtype)
    got = None if values is None else np.shape(values)
    validate.check(
      got == (len(rows), *shape),
      f'Expected records of feature {name!r} with shape {list(shape)}, got '
      f'{"none" if got is None else list(got[1:])} in rows {rows[0]} to '
      f'{rows[-1]}.',
    )
    return np.asarray(values, dtype)


class LazyColumn:
  """One feature of a `Reader`, like an array [M, ...].

  Attributes:
    shape: (M, ...).
    dtype: of its values.
  """

  def __init__(self, reader: Reader, name: str):
    """The feature `name` of a reader of M rows."""
    self._reader, self._name = reader, name
    shape, dtype = reader.types[name]
    self.shape = (reader.num_rows, *shape)
    self.dtype = np.dtype(dtype)

  @property
  def ndim(self) -> int:
    """Number of axes, a scalar."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Number of values, a scalar."""
    return int(np.prod(self.shape))

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: Any) -> np.ndarray:
    """Values of the rows [...] (integers, a slice or a mask [M]), copied."""
    if isinstance(rows, slice):
      rows = np.arange(*rows.indices(len(self)))
    validate.check(
      not isinstance(rows, tuple),
      f'Expected rows of {self._name!r}, got {rows}.',
    )
    if isinstance(rows, int) and not -len(self) <= rows < len(self):
      raise IndexError(f'Row {rows} of {len(self)}.')  # ends a plain iteration
    rows = np.asarray(rows)
    if rows.dtype == bool:
      validate.check(
        rows.shape == self.shape[:1],
        f'Expected a mask [{len(self)}], got shape {list(rows.shape)}.',
      )
      rows = np.flatnonzero(rows)
    validate.check(
      rows.dtype.kind in 'iu' or not rows.size,
      f'Expected rows to be integers, got {rows.dtype}.',
    )
    rows = rows.astype(np.int64)
    flat = np.where(rows < 0, rows + len(self), rows).reshape(-1)
    values = self._take(flat)
    return values.reshape((*rows.shape, *self.shape[1:]))

  def _take(self, rows: np.ndarray) -> np.ndarray:
    """Values of the rows int64 [N], read at once or in ascending pieces."""
    row_bytes = max(1, self._reader.row_bytes)
    if len(rows) * row_bytes <= _LARGEST_READ:
      return self._reader.read(rows)[self._name].copy()
    values = np.empty((len(rows), *self.shape[1:]), self.dtype)
    piece = max(1, _PIECE // row_bytes)
    order = np.argsort(rows, kind='stable')
    for start in range(0, len(rows), piece):
      where = order[start : start + piece]
      values[where] = self._reader.read(rows[where], remember=False)[self._name]
    return values

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    return self[:].astype(dtype or self.dtype, copy=False)


def lazy_columns(reader: Reader) -> dict[str, LazyColumn]:
  """All columns of a reader of M rows, {name: LazyColumn}."""
  return {name: LazyColumn(reader, name) for name in reader.types}


def check_records(
  records: Mapping[str, np.ndarray], *, where: str, num_classes: int = 0
) -> None:
  """Checks values {name: [N, ...]}: labels in range, floats finite.

  Args:
    records: `label`, if there is one, is int [N].
    where: for messages, e.g. 'client f0000_14 of train.sqlite'.
    num_classes: Y; labels are 0..Y-1. 0 asks for labels >= 0 only.

  Raises:
    InvalidInput: a value is wrong; the message says which and where.
  """
  for name, values in records.items():
    if values.dtype.kind == 'f':
      validate.check(
        np.isfinite(values).all(),
        f'Expected finite values in feature {name!r} of {where}, got NaN or '
        'infinity.',
      )
  label = records.get('label', np.zeros(0, int))
  bad = label[(label < 0) | ((label >= num_classes) & (num_classes > 0))]
  if len(bad):
    largest = str(num_classes - 1) if num_classes else ''
    raise validate.InvalidInput(
      f'Expected label of {where} in 0..{largest}, got {bad[0]}.'
    )


def client_reader(
  read_client: Callable[[int], Mapping[str, np.ndarray]],
  offsets: np.ndarray,
  types: Mapping[str, RecordType],
  *,
  client_ids: np.ndarray | None = None,
  source: str = '',
  num_classes: int = 0,
) -> Reader:
  """A reader of records that are stored client by client.

  Args:
    read_client: number of a client in the file's order -> {name: [n, ...]}.
    offsets: int64 [C+1]; client c has rows offsets[c]:offsets[c+1].
    types: of the records; other features that `read_client` returns are left
      out.
    client_ids: [C], for messages.
    source: name of the file, for messages.
    num_classes: Y, see `check_records`, which every client passes when read.
  """

  def read_checked(c: int) -> Records:
    where = f'client {c if client_ids is None else client_ids[c]}'
    where += f' of {source}' if source else ''
    read = read_client(c)
    size = int(offsets[c + 1] - offsets[c])
    for name, t in types.items():
      got = np.shape(read[name]) if name in read else None
      validate.check(
        got == (size, *t.shape),
        f'Expected feature {name!r} of {where} with shape '
        f'{[size, *t.shape]}, got {"none" if got is None else list(got)}.',
      )
    records = {name: np.asarray(read[name]) for name in types}
    check_records(records, where=where, num_classes=num_classes)
    return records

  def read(rows: np.ndarray) -> Records:
    owner = np.searchsorted(offsets, rows, side='right') - 1
    order = np.argsort(owner, kind='stable')
    clients, first = np.unique(owner[order], return_index=True)
    result = _empty(len(rows), types)
    for c, where in zip(clients, np.split(order, first[1:]), strict=True):
      records = read_checked(int(c))
      for name in types:
        result[name][where] = records[name][rows[where] - offsets[c]]
    return result

  return Reader(read, types, int(offsets[-1]))


def _empty(count: int, types: Mapping[str, RecordType]) -> Records:
  return {n: np.empty((count, *t.shape), t.dtype) for n, t in types.items()}


def concatenate(readers: Sequence[Reader]) -> Reader:
  """Readers one after another, over the features that all of them have.

  Raises:
    InvalidInput: a feature's type differs between them.
  """
  validate.at_least('number of readers', len(readers), 1)
  if len(readers) == 1:
    return readers[0]
  names = [n for n in readers[0].types if all(n in r.types for r in readers)]
  for name in names:
    found = {
      f'{np.dtype(t.dtype)}{list(t.shape)}'
      for t in (reader.types[name] for reader in readers)
    }
    validate.check(
      len(found) == 1,
      f'Expected feature {name!r} of one type, got {sorted(found)}.',
    )
  types = {name: readers[0].types[name] for name in names}
  bounds = np.concatenate([[0], np.cumsum([r.num_rows for r in readers])])

  def read(rows: np.ndarray) -> Records:
    part = np.searchsorted(bounds, rows, side='right') - 1
    result = _empty(len(rows), types)
    for i in np.unique(part):
      where = np.flatnonzero(part == i)
      records = readers[i].read(rows[where] - bounds[i], remember=False)
      for name in names:
        result[name][where] = records[name]
    return result

  return Reader(read, types, int(bounds[-1]))


def map_records(
  reader: Reader,
  function: Callable[[Records], Records],
  types: Mapping[str, RecordType],
) -> Reader:
  """A reader whose records are a function of another's, batch by batch.

  Args:
    reader: of M rows.
    function: {name: [N, ...]} -> {name: [N, ...]}, row by row.
    types: of what the function returns.
  """
  return Reader(
    lambda rows: function(reader.read(rows, remember=False)),
    types,
    reader.num_rows,
  )
