"""From columns to what an experiment needs: splits, participants, parts.

Axis letters: C clients, M rows, Y classes.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from fedjax_ext.core import Part, validate
from fedjax_ext.data.columns import Columns
from fedjax_ext.data.federated_data import FederatedData, from_assignment
from fedjax_ext.data.partition import dirichlet_partition, iid_partition
from fedjax_ext.data.splits import (
  check_fraction,
  choose_clients,
  client_mask,
  stratified_mask,
)

PARTITIONS = ('client', 'iid', 'dirichlet')


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


def make_dataset(
  columns: Columns,
  *,
  partition: str,
  num_clients: int = 100,
  alpha: float = 0.5,
  min_examples: int = 1,
  test_fraction: float = 0.2,
  test_owner: str = 'pooled',
  validation_fraction: float = 0.0,
  unparticipating_fraction: float = 0.0,
  group_column: str = '',
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
  each value of the group column.

  Args:
    columns: the source.
    partition: 'client' (the natural one), 'iid' or 'dirichlet' (over labels).
    num_clients: C of a partition made here.
    alpha: concentration of the Dirichlet partition.
    min_examples: smallest client of the Dirichlet partition.
    test_fraction: used without a split column.
    test_owner: 'pooled' or 'clients', for a partition made here.
    validation_fraction: of each client's train rows.
    unparticipating_fraction: of the clients that have train rows.
    group_column: an integer column by which test rows are reported apart.
    seed: seed of all of these choices.

  Raises:
    InvalidInput: a column is absent or a number cannot be met.
  """
  validate.one_of('partition', partition, PARTITIONS)
  validate.at_least('num_clients', num_clients, 1)
  validate.one_of('test_owner', test_owner, ('pooled', 'clients'))
  check_fraction('test_fraction', test_fraction)
  check_fraction('validation_fraction', validation_fraction)
  check_fraction('unparticipating_fraction', unparticipating_fraction)
  seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(4)]
  if partition == 'client':
    assigned = _natural_clients(columns, test_fraction, seeds[0])
  else:
    is_test = _given_or(columns, test_fraction, seeds[0])
    mine = np.flatnonzero(
      ~is_test if test_owner == 'pooled' else np.ones_like(is_test)
    )
    label = columns.features['label'][mine]
    made = (
      iid_partition(len(mine), num_clients=num_clients, seed=seeds[1])
      if partition == 'iid'
      else dirichlet_partition(
        label,
        num_clients=num_clients,
        alpha=alpha,
        min_examples=min_examples,
        seed=seeds[1],
      )
    )
    owner = np.full(len(is_test), num_clients, np.int64)
    owner[mine] = made
    assigned = np.array([*map(str, range(num_clients)), 'test']), owner, is_test
  client_ids, owner, is_test = assigned
  everything = from_assignment(columns.features, owner, client_ids=client_ids)
  of_test = is_test[everything.rows]
  train, test = everything.filter(~of_test), everything.filter(of_test)
  splits = {'train': train}
  if validation_fraction > 0:
    chosen = client_mask(train, fraction=validation_fraction, seed=seeds[2])
    splits['train'] = train.filter(~chosen)
    splits['validation'] = train.filter(chosen)
  participating = np.flatnonzero(train.sizes() > 0)
  validate.check(len(participating) > 0, 'Expected train rows, got none.')
  held_out = choose_clients(
    participating, fraction=unparticipating_fraction, seed=seeds[3]
  )
  participating = np.setdiff1d(participating, held_out)
  validate.check(
    len(participating) > 0,
    'Expected unparticipating_fraction to leave a client for training, got '
    f'unparticipating_fraction={unparticipating_fraction}.',
  )
  parts = {name: Part(participating, name) for name in splits}
  if len(held_out):
    tests_them = test.sizes(held_out).sum() > 0
    split = 'test' if tests_them else list(splits)[-1]
    parts['unparticipating'] = Part(held_out, split)
  if test.num_examples:
    for name, view in _test_splits(test, group_column).items():
      splits[name] = view
      tested = np.setdiff1d(np.flatnonzero(view.sizes() > 0), held_out)
      parts[name] = Part(tested, name)
  return FederatedDataset(
    columns.name, splits, participating, parts, columns.num_classes
  )


def _given_or(columns: Columns, fraction: float, seed: int) -> np.ndarray:
  """Test rows by the split column, else a stratified choice; bool [M]."""
  if columns.split is not None:
    return np.asarray(columns.split) == 1
  return stratified_mask(
    columns.features['label'], fraction=fraction, seed=seed
  )


def _natural_clients(
  columns: Columns, test_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The client column's (client_ids [C], owner [M], is_test [M])."""
  validate.check(
    columns.client is not None,
    f'Expected a client column in {columns.name} for partition=client, got '
    f'columns {sorted(columns.features)}.',
  )
  client_ids, owner = np.unique(columns.client, return_inverse=True)
  if columns.split is not None:
    return client_ids, owner, np.asarray(columns.split) == 1
  data = from_assignment(columns.features, owner, client_ids=client_ids)
  is_test = np.zeros(len(owner), bool)
  is_test[data.rows] = client_mask(data, fraction=test_fraction, seed=seed)
  return client_ids, owner, is_test


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
    group = np.asarray(test.features[group_column])[test.rows]
    for value in np.unique(group):
      splits[f'test_{group_column}_{value}'] = test.filter(group == value)
  return splits
