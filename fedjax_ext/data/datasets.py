"""From columns to what an experiment needs: splits, participants, parts.

Axis letters: C clients, M rows, Y classes.
"""

import dataclasses
import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_ext.core import Part, validate
from fedjax_ext.core.plans import ramp
from fedjax_ext.data.columns import Columns, StoredClients
from fedjax_ext.data.federated_data import (
  FederatedData,
  SegmentRows,
  from_assignment,
  from_segments,
)
from fedjax_ext.data.partition import Partitioner
from fedjax_ext.data.skew import Skew
from fedjax_ext.data.splits import (
  check_fraction,
  choose_clients,
  client_mask,
  sample_clients,
  stratified_mask,
)


@dataclasses.dataclass(frozen=True)
class FederatedDataset:
  """Federated data with its splits and the parts to report on.

  Attributes:
    name: of the data set.
    splits: views by name over the same clients and columns: 'train', and
      'validation', 'test', 'test_<column>_<value>' where asked for.
    participating: client numbers that training may sample, int64 [C'].
    parts: what evaluation reports on, by name.
    num_classes: Y.
  """

  name: str
  splits: Mapping[str, FederatedData]
  participating: np.ndarray
  parts: Mapping[str, Part]
  num_classes: int

  @property
  def features(self) -> Mapping[str, np.ndarray]:
    """The shared columns, {name: [M, ...]}."""
    return self.splits['train'].features


class Assigned(NamedTuple):
  """Views of the columns over the same clients; only train is always there."""

  train: FederatedData
  validation: FederatedData | None
  test: FederatedData | None


def make_dataset(
  columns: Columns,
  *,
  partition: Partitioner | None = None,
  num_clients: int = 100,
  skew: Skew | None = None,
  test_fraction: float = 0.2,
  test_owner: str = 'pooled',
  validation_fraction: float = 0.0,
  unparticipating_fraction: float = 0.0,
  group_column: str = '',
  eval_clients: int = 0,
  seed: int = 0,
) -> FederatedDataset:
  """Assigns clients and splits.

  Test rows are those with split 1. Without a split column, `test_fraction` of
  the rows becomes test: of each natural client, or stratified by label. Where
  the partition is made here and `test_owner` is 'pooled', all test rows go to
  one client named 'test' that never trains; with 'clients' they are partitioned
  like, and together with, the train rows, for personalised models.

  Clients with train rows participate, except for the
  `unparticipating_fraction` of them that is held out and reported as its own
  part. `validation_fraction` of every client's train rows becomes validation.

  Parts: 'train' and 'validation' (participating clients), 'unparticipating'
  (held-out clients, on their test rows, else validation, else train rows),
  'test' (the test rows of all other clients), and 'test_<column>_<value>' for
  each value of the group column. A source may bring validation clients of its
  own: 'validation' is then about them; a partition made here leaves them out.

  Args:
    columns: the source.
    partition: (label [N], *, num_clients, seed) -> owner [N], see
      `partition.PARTITIONERS`; None takes the source's natural clients.
    num_clients: C of a partition made here.
    skew: (image [M, ...], owner [M], *, num_clients, seed) -> image [M, ...],
      see `skew.SKEWS`: features that differ by client. A pooled test set is
      left alone.
    test_fraction: used without a split column.
    test_owner: 'pooled' or 'clients', for a partition made here.
    validation_fraction: of each client's train rows.
    unparticipating_fraction: of the clients that have train rows.
    group_column: an integer column by which test rows are reported apart.
    eval_clients: each part is reported on at most so many of its clients, a
      random choice that is the same in every evaluation; 0 takes all.
    seed: seed of all of these choices.

  Raises:
    InvalidInput: a column is absent or a number cannot be met.
  """
  validate.at_least('num_clients', num_clients, 1)
  validate.one_of('test_owner', test_owner, ('pooled', 'clients'))
  check_fraction('test_fraction', test_fraction)
  check_fraction('validation_fraction', validation_fraction)
  check_fraction('unparticipating_fraction', unparticipating_fraction)
  seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(6)]
  assigned = assign_clients(
    columns,
    partition=partition,
    num_clients=num_clients,
    skew=skew,
    test_fraction=test_fraction,
    test_owner=test_owner,
    seeds=seeds,
  )
  train, validation, test = assigned
  splits = {'train': train}
  if validation_fraction > 0:
    validate.check(
      validation is None,
      f'Expected validation_fraction=0 for {columns.name}, which has '
      f'validation rows, got validation_fraction={validation_fraction}.',
    )
    chosen = client_mask(train, fraction=validation_fraction, seed=seeds[2])
    splits['train'] = train.filter(~chosen)
    splits['validation'] = train.filter(chosen)
  dataset = _with_parts(
    columns,
    splits,
    validation,
    test,
    unparticipating_fraction=unparticipating_fraction,
    group_column=group_column,
    seed=seeds[3],
  )
  return limit_parts(dataset, eval_clients, seed=seeds[5])


def limit_parts(
  dataset: FederatedDataset, eval_clients: int, *, seed: int
) -> FederatedDataset:
  """Reports on at most so many clients of each part, always the same.

  Parts about the same clients are about the same ones afterwards; 0 takes all.
  """
  validate.at_least('eval_clients', eval_clients, 0)
  if not eval_clients:
    return dataset
  parts = {
    name: part._replace(
      clients=sample_clients(part.clients, eval_clients, seed=seed)
    )
    for name, part in dataset.parts.items()
  }
  return dataclasses.replace(dataset, parts=parts)


def assign_clients(
  columns: Columns,
  *,
  partition: Partitioner | None,
  num_clients: int,
  skew: Skew | None,
  test_fraction: float,
  test_owner: str,
  seeds: Sequence[int],
) -> Assigned:
  """Gives rows to clients, natural ones or made; views of the source's splits.

  Args:
    columns: the source.
    partition: see `make_dataset`, as are all others.
    num_clients: C of a partition made here.
    skew: images that differ by client.
    test_fraction: used without a split column.
    test_owner: 'pooled' or 'clients'.
    seeds: of the test rows, the partition, and at index 4 the skew.
  """
  if partition is not None:
    assigned = _made_clients(
      columns, partition, num_clients, test_fraction, test_owner, seeds
    )
  elif isinstance(columns.client, StoredClients):
    assigned = _stored_clients(columns, test_fraction, seeds[0])
  else:
    assigned = _natural_clients(columns, test_fraction, seeds[0])
  if skew is None:
    return assigned
  made = assigned.train.num_clients if partition is None else num_clients
  return _skewed(assigned, skew, made, seeds[4])


def fingerprint_splits(dataset: FederatedDataset) -> str:
  """SHA-256 (hex) over who owns which row in which split, and who takes part.

  Rows of an array are hashed whole, of stored clients by their first rows.
  """
  digest = hashlib.sha256(np.asarray(dataset.participating).tobytes())
  for name, view in dataset.splits.items():
    rows = view.rows
    rows = rows.starts if isinstance(rows, SegmentRows) else rows
    digest.update(name.encode())
    digest.update(np.asarray(view.offsets).tobytes())
    digest.update(np.asarray(rows).tobytes())
  return digest.hexdigest()


def _with_parts(
  columns: Columns,
  splits: dict[str, FederatedData],
  validation: FederatedData | None,
  test: FederatedData | None,
  *,
  unparticipating_fraction: float,
  group_column: str,
  seed: int,
) -> FederatedDataset:
  """Decides who participates and what is reported."""
  participating = np.flatnonzero(
    sum(view.sizes() for view in splits.values()) > 0
  )
  validate.check(len(participating) > 0, 'Expected train rows, got none.')
  held_out = choose_clients(
    participating, fraction=unparticipating_fraction, seed=seed
  )
  participating = np.setdiff1d(participating, held_out)
  validate.check(
    len(participating) > 0,
    'Expected unparticipating_fraction to leave a client for training, got '
    f'unparticipating_fraction={unparticipating_fraction}.',
  )
  parts = {name: Part(participating, name) for name in splits}
  if len(held_out):
    tests_them = test is not None and test.sizes(held_out).sum() > 0
    split = 'test' if tests_them else list(splits)[-1]
    parts['unparticipating'] = Part(held_out, split)
  more = {} if validation is None else {'validation': validation}
  if test is not None and test.num_examples:
    more |= _test_splits(test, group_column)
  for name, view in more.items():
    splits[name] = view
    tested = np.setdiff1d(np.flatnonzero(view.sizes() > 0), held_out)
    if len(tested):
      parts[name] = Part(tested, name)
  return FederatedDataset(
    columns.name, splits, participating, parts, columns.num_classes
  )


def _made_clients(
  columns: Columns,
  partition: Partitioner,
  num_clients: int,
  test_fraction: float,
  test_owner: str,
  seeds: Sequence[int],
) -> Assigned:
  """Clients that a partitioner makes."""
  is_test = _given_or(columns, test_fraction, seeds[0])
  pooled = test_owner == 'pooled'
  mine = np.flatnonzero(~is_test) if pooled else np.arange(len(is_test))
  kept_out = _stored_rows(columns, 'validation')
  mine = mine[~kept_out[mine]]
  owner = np.full(len(is_test), num_clients, np.int64)
  owner[kept_out] = -1  # the source's validation rows train nobody
  made = np.asarray(
    partition(
      _labels(columns)[mine],
      num_clients=num_clients,
      seed=seeds[1],
      **_asked_for(partition, columns, mine),
    )
  )
  _check_owners(made, len(mine), num_clients)
  owner[mine] = made
  client_ids = np.array([*map(str, range(num_clients)), 'test'])
  return _split_by_test(columns, owner, client_ids, is_test)


class _Rows(Mapping):
  """Some rows of columns, {name: [N, ...]}, read when asked for."""

  def __init__(self, features: Mapping[str, np.ndarray], rows: np.ndarray):
    self._features, self._rows = features, rows

  def __getitem__(self, name: str) -> np.ndarray:
    return np.asarray(self._features[name][self._rows])

  def __contains__(self, name: object) -> bool:  # reads nothing
    return name in self._features

  def __iter__(self) -> Iterator[str]:
    return iter(self._features)

  def __len__(self) -> int:
    return len(self._features)


def _asked_for(
  partition: Partitioner, columns: Columns, rows: np.ndarray
) -> dict[str, Any]:
  """What a partitioner takes besides labels: columns, natural clients [N]."""
  takes = inspect.signature(partition).parameters
  given: dict[str, Any] = {}
  if 'features' in takes:
    given['features'] = _Rows(columns.features, rows)
  if 'client' in takes:
    given['client'] = _natural_owner(columns, rows)
  return given


def _natural_owner(columns: Columns, rows: np.ndarray) -> np.ndarray | None:
  """The natural client of each row, int64 [N]; None without clients."""
  client = columns.client
  if client is None:
    return None
  if not isinstance(client, StoredClients):
    return np.unique(client, return_inverse=True)[1][rows]
  owner = np.full(len(next(iter(columns.features.values()))), -1, np.int64)
  for starts, sizes in client.segments.values():
    owner[np.repeat(starts, sizes) + ramp(sizes)] = np.repeat(
      np.arange(len(starts)), sizes
    )
  return owner[rows]


def _split_by_test(
  columns: Columns,
  owner: np.ndarray,
  client_ids: np.ndarray,
  is_test: np.ndarray,
) -> Assigned:
  everything = from_assignment(columns.features, owner, client_ids=client_ids)
  of_test = is_test[everything.rows]
  return Assigned(everything.filter(~of_test), None, everything.filter(of_test))


def _skewed(
  assigned: Assigned, skew: Skew, num_clients: int, seed: int
) -> Assigned:
  """Replaces the images by ones that differ by client.

  A pooled test set belongs to none of the `num_clients` and stays as it is.
  """
  features = assigned.train.features
  validate.check(
    'image' in features,
    f'Expected a feature "image" to skew, got {sorted(features)}.',
  )
  owner = np.full(len(features['image']), -1, np.int64)
  for view in assigned:
    if view is not None:
      owner[np.asarray(view.rows)] = view.owners()
  owner[owner >= num_clients] = -1
  image = skew(features['image'], owner, num_clients=num_clients, seed=seed)
  features = dict(features, image=image)
  return Assigned(
    *(v and dataclasses.replace(v, features=features) for v in assigned)
  )


def _labels(columns: Columns) -> np.ndarray:
  """The labels int [M], read whole."""
  validate.check(
    'label' in columns.features,
    f'Expected a column "label" in {columns.name} to partition or split by, '
    f'got {sorted(columns.features)}.',
  )
  return np.asarray(columns.features['label'])


def _given_or(columns: Columns, fraction: float, seed: int) -> np.ndarray:
  """Test rows by the split column, else a stratified choice; bool [M]."""
  if columns.split is not None:
    return np.asarray(columns.split) == 1
  is_test = _stored_rows(columns, 'test')
  if is_test.any():
    return is_test
  return stratified_mask(_labels(columns), fraction=fraction, seed=seed)


def _stored_rows(columns: Columns, split: str) -> np.ndarray:
  """Rows of a split that the source brings with its clients; bool [M]."""
  rows = np.zeros(len(next(iter(columns.features.values()))), bool)
  if isinstance(columns.client, StoredClients):
    starts, sizes = columns.client.segments.get(split, np.zeros((2, 0), int))
    rows[np.repeat(starts, sizes) + ramp(sizes)] = True
  return rows


def _check_owners(owner: np.ndarray, size: int, num_clients: int) -> None:
  """Checks what a partitioner returned."""
  validate.check(
    owner.shape == (size,) and owner.dtype.kind in 'iu',
    f'Expected the partition to return {size} integers, got '
    f'{owner.dtype}{list(owner.shape)}.',
  )
  low, high = owner.min(initial=0), owner.max(initial=0)
  validate.check(
    low >= 0 and high < num_clients,
    f'Expected the partition to return owners in 0..{num_clients - 1}, got '
    f'{low}..{high}.',
  )


def _natural_clients(
  columns: Columns, test_fraction: float, seed: int
) -> Assigned:
  """The clients of the client column [M]."""
  validate.check(
    columns.client is not None,
    f'Expected a client column in {columns.name} for its natural clients, got '
    f'columns {sorted(columns.features)}.',
  )
  client_ids, owner = np.unique(columns.client, return_inverse=True)
  if columns.split is not None:
    is_test = np.asarray(columns.split) == 1
  else:
    data = from_assignment(columns.features, owner, client_ids=client_ids)
    is_test = np.zeros(len(owner), bool)
    is_test[data.rows] = client_mask(data, fraction=test_fraction, seed=seed)
  return _split_by_test(columns, owner, client_ids, is_test)


def _stored_clients(
  columns: Columns, test_fraction: float, seed: int
) -> Assigned:
  """The clients of a source that keeps them together: O(C) memory.

  Only a split that the source does not have itself takes a row number for each
  example.
  """
  stored: StoredClients = columns.client
  views = {
    split: from_segments(
      columns.features, starts, sizes, client_ids=stored.client_ids
    )
    for split, (starts, sizes) in stored.segments.items()
  }
  train, test = views['train'], views.get('test')
  if test is None and test_fraction > 0:
    chosen = client_mask(train, fraction=test_fraction, seed=seed)
    train, test = train.filter(~chosen), train.filter(chosen)
  return Assigned(train, views.get('validation'), test)


def _test_splits(
  test: FederatedData, group_column: str
) -> dict[str, FederatedData]:
  splits = {'test': test}
  if group_column:
    validate.check(
      group_column in test.features and test.features[group_column].ndim == 1,
      f'Expected group_column to be a column [M] of {sorted(test.features)}, '
      f'got group_column={group_column}.',
    )
    group = np.asarray(test.features[group_column][np.asarray(test.rows)])
    for value in np.unique(group):
      splits[f'test_{group_column}_{value}'] = test.filter(group == value)
  return splits
