"""Federated data: columns of examples, and which client owns which row.

A data set of a million clients is two arrays and its columns, not a million
objects. Everything that reorders data (partitioners, splits, long tails)
returns views: other rows over the same columns.

Axis letters: C clients, N examples of a view, M rows of the columns.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedjax_ext.core import validate


class SegmentRows:
  """The rows of clients that own one stretch of rows each, without an [N].

  Indexing it with positions gives rows, as the array [N] that it stands for.
  """

  def __init__(self, starts: np.ndarray, offsets: np.ndarray):
    """First row int64 [C] of each client, and the view's offsets [C+1]."""
    self.starts, self.offsets = starts, offsets

  def __len__(self) -> int:
    return int(self.offsets[-1])

  def __getitem__(self, positions: Any) -> np.ndarray:
    if isinstance(positions, slice):
      positions = np.arange(*positions.indices(len(self)))
    positions = np.asarray(positions)
    if positions.dtype == bool:
      positions = np.flatnonzero(positions)
    owner = np.searchsorted(self.offsets, positions, side='right') - 1
    return self.starts[owner] + positions - self.offsets[owner]

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    return self[:].astype(dtype or np.int64)


@dataclasses.dataclass(frozen=True)
class FederatedData:
  """An immutable view of columnar data by client.

  Attributes:
    client_ids: [C], each client's name (numbers or text), unique.
    offsets: int64 [C+1]; client c owns positions offsets[c]:offsets[c+1].
    rows: int64 [N], the row of the columns at every position; an array or
      `SegmentRows`.
    features: {name: [M, ...]}, arrays, memory maps or lazy columns.
  """

  client_ids: np.ndarray
  offsets: np.ndarray
  rows: 'np.ndarray | SegmentRows'
  features: Mapping[str, np.ndarray]

  def __post_init__(self):
    validate.check(
      len(self.offsets) == len(self.client_ids) + 1,
      f'Expected offsets of length C+1={len(self.client_ids) + 1}, got '
      f'{len(self.offsets)}.',
    )
    validate.check(
      self.offsets[0] == 0 and self.offsets[-1] == len(self.rows),
      f'Expected offsets from 0 to N={len(self.rows)}, got '
      f'{self.offsets[0]} to {self.offsets[-1]}.',
    )

  @property
  def num_clients(self) -> int:
    """C, a scalar."""
    return len(self.client_ids)

  @property
  def num_examples(self) -> int:
    """N, a scalar."""
    return len(self.rows)

  def sizes(self, clients: np.ndarray | None = None) -> np.ndarray:
    """Examples of the given clients [K], or of all [C]."""
    if clients is None:
      return np.diff(self.offsets)
    clients = np.asarray(clients)
    return np.asarray(self.offsets[clients + 1] - self.offsets[clients])

  def client_rows(self, client: int) -> np.ndarray:
    """Rows of one client, int64 [n]."""
    return np.asarray(
      self.rows[self.offsets[client] : self.offsets[client + 1]]
    )

  def client(self, client: int) -> dict[str, np.ndarray]:
    """One client's examples {name: [n, ...]}, copied."""
    rows = self.client_rows(client)
    return {name: np.asarray(x[rows]) for name, x in self.features.items()}

  def owners(self) -> np.ndarray:
    """The client number at every position, int64 [N]."""
    return np.repeat(np.arange(self.num_clients), self.sizes())

  def filter(self, keep: np.ndarray) -> 'FederatedData':
    """The view of the positions where the mask bool [N] is True.

    Clients keep their numbers, also those left without examples.
    """
    keep = np.asarray(keep, bool)
    counts = np.bincount(self.owners()[keep], minlength=self.num_clients)
    return dataclasses.replace(
      self, offsets=_offsets(counts), rows=np.asarray(self.rows)[keep]
    )


def _offsets(counts: np.ndarray) -> np.ndarray:
  return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def from_assignment(
  features: Mapping[str, np.ndarray],
  owner: np.ndarray,
  *,
  client_ids: np.ndarray,
  rows: np.ndarray | None = None,
) -> FederatedData:
  """Gives rows to clients; a client's rows keep their order.

  Args:
    features: {name: [M, ...]}.
    owner: client number of each row, int [N], -1 for rows that nobody owns.
    client_ids: [C].
    rows: the rows [N] that `owner` speaks of, default 0..M-1.

  Raises:
    InvalidInput: columns differ in length, or an owner is out of range.
  """
  lengths = {name: len(x) for name, x in features.items()}
  validate.check(
    len(set(lengths.values())) == 1,
    f'Expected features of one length, got {lengths}.',
  )
  owner = np.asarray(owner, np.int64)
  if rows is None:
    rows = np.arange(next(iter(lengths.values())))
  rows = np.asarray(rows, np.int64)
  validate.check(
    len(rows) == len(owner),
    f'Expected {len(rows)} owners, got {len(owner)}.',
  )
  validate.check(
    owner.max(initial=-1) < len(client_ids) and owner.min(initial=0) >= -1,
    f'Expected owners in -1..{len(client_ids) - 1}, got '
    f'{owner.min(initial=0)}..{owner.max(initial=-1)}.',
  )
  owned = np.flatnonzero(owner >= 0)
  order = owned[np.argsort(owner[owned], kind='stable')]
  counts = np.bincount(owner[owned], minlength=len(client_ids))
  return FederatedData(
    np.asarray(client_ids), _offsets(counts), rows[order], dict(features)
  )


def from_segments(
  features: Mapping[str, np.ndarray],
  starts: np.ndarray,
  sizes: np.ndarray,
  *,
  client_ids: np.ndarray,
) -> FederatedData:
  """Clients that own one stretch of rows each: two numbers a client.

  Args:
    features: {name: [M, ...]}.
    starts: each client's first row, int64 [C].
    sizes: each client's number of rows, int64 [C].
    client_ids: [C].
  """
  offsets = _offsets(np.asarray(sizes, np.int64))
  rows = SegmentRows(np.asarray(starts, np.int64), offsets)
  return FederatedData(np.asarray(client_ids), offsets, rows, dict(features))


def from_client_column(
  features: Mapping[str, np.ndarray], client: np.ndarray
) -> FederatedData:
  """Groups rows by a column [M] of client names, in ascending name order."""
  client_ids, owner = np.unique(np.asarray(client), return_inverse=True)
  return from_assignment(features, owner, client_ids=client_ids)
