"""Long-tailed data with balanced tests, pooled and local: generic and personal.

The union of the clients' train examples is long-tailed; a generic model is
tested on balanced examples, a personal one on examples in the proportions of
its client.

Xiao, Chen, Liu, Wang, Feng, Yue, Peng, Zheng and Liu, "FedLoGe: joint local and
generic federated learning under long-tailed data", 2024,
https://arxiv.org/abs/2401.08977. Splits follow its official code.

Axis letters: C clients, N examples, Y classes.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from fedjax_ext.core import Part, validate
from fedjax_ext.data.columns import Columns
from fedjax_ext.data.datasets import (
  FederatedDataset,
  assign_clients,
  limit_parts,
)
from fedjax_ext.data.federated_data import FederatedData, from_assignment
from fedjax_ext.data.partition import Partitioner, count_classes
from fedjax_ext.data.skew import Skew
from fedjax_ext.data.splits import client_mask, stratified_mask

GROUPS = ('head', 'middle', 'tail')


def long_tail_counts(
  *, largest: float, num_classes: int, imbalance: float
) -> np.ndarray:
  """Examples of each class, int(largest * imbalance^(y / (Y - 1))).

  Cao et al., "Learning imbalanced datasets with label-distribution-aware margin
  loss", 2019, https://arxiv.org/abs/1906.07413.

  Args:
    largest: examples of class 0, a scalar.
    num_classes: Y.
    imbalance: smallest over largest class, in (0, 1].

  Returns:
    int64 [Y], falling.
  """
  validate.at_least('num_classes', num_classes, 2)
  check_imbalance(imbalance)
  exponent = np.arange(num_classes) / (num_classes - 1.0)
  return np.array([int(largest * imbalance**e) for e in exponent], np.int64)


def check_imbalance(imbalance: float) -> None:
  """Checks the scalar 0 < imbalance <= 1; raises InvalidInput."""
  validate.check(
    0 < imbalance <= 1,
    f'Expected 0 < imbalance <= 1, got imbalance={imbalance}.',
  )


def long_tail_rows(
  label: np.ndarray,
  *,
  imbalance: float,
  largest: int = 0,
  seed: int | None = None,
) -> np.ndarray:
  """Rows of a long-tailed choice, ascending.

  Args:
    label: int [N], of classes 0..Y-1.
    imbalance: smallest over largest class.
    largest: examples of class 0; 0 takes N / Y.
    seed: of the choice; None takes the first rows of each class.

  Returns:
    int64 [N'].

  Raises:
    InvalidInput: a class has fewer examples than it should keep.
  """
  pool = np.bincount(label)
  counts = long_tail_counts(
    largest=largest or len(label) / len(pool),
    num_classes=len(pool),
    imbalance=imbalance,
  )
  short = np.flatnonzero(pool < counts)
  if len(short):
    y = short[0]
    raise validate.InvalidInput(
      f'Expected {counts[y]} train examples of class {y} for '
      f'imbalance={imbalance}, got {pool[y]}; `largest` sets that of class 0.'
    )
  rng = None if seed is None else np.random.default_rng(seed)
  chosen = []
  for y, count in enumerate(counts):
    rows = np.flatnonzero(label == y)
    chosen.append((rows if rng is None else rng.permutation(rows))[:count])
  return np.sort(np.concatenate(chosen))


def proportional_counts(counts: np.ndarray, *, size: int) -> np.ndarray:
  """Local test examples, int(size * n_cy / n); int64 [C, Y] of counts [C, Y].

  Rounded down: a class with one train example may get none.
  """
  return (counts / max(counts.sum(), 1) * size).astype(np.int64)


def group_classes(
  counts: np.ndarray, *, shares: Sequence[float] = (75.0, 95.0)
) -> np.ndarray:
  """The group of every class, by cumulative share: 0 head, 1 middle, 2 tail.

  Classes by falling count (ties by number); the head ends with the class in
  whose interval (low, high] of cumulative percent lies the first share, the
  middle with that of the second. Not the usual rule of >100 and <20 examples.

  Args:
    counts: int [Y].
    shares: percent at which head and middle end.

  Returns:
    int64 [Y].
  """
  counts = np.asarray(counts, np.float64)
  group = np.full(len(counts), 2, np.int64)
  if counts.sum() == 0:
    return group
  order = np.argsort(-counts, kind='stable')
  share = np.cumsum(counts[order]) / counts.sum() * 100
  # Cumulative sums of whole counts; a share of exactly 95 % belongs here.
  share = np.round(share, 9)
  ends = [int(np.searchsorted(share, s, side='left')) for s in shares]
  group[order[: ends[1] + 1]] = 1
  group[order[: ends[0] + 1]] = 0
  return group


def long_tail(
  columns: Columns,
  *,
  partition: Partitioner | None = None,
  num_clients: int = 100,
  skew: Skew | None = None,
  imbalance: float = 1.0,
  largest: int = 0,
  nested: bool = False,
  groups: bool = True,
  test_fraction: float = 0.2,
  validation_fraction: float = 0.0,
  eval_clients: int = 0,
  seed: int = 0,
) -> FederatedDataset:
  """Long-tailed clients with a balanced test set, and local tests drawn of it.

  Parts: 'test' (all test rows, pooled) and 'test_head', 'test_middle',
  'test_tail' by the groups of the local tests' sums; 'local_test', a test set
  of each client with its train classes' proportions, clients overlapping, and
  'local_test_head', ... by the client's own groups; 'train', and 'validation'
  of the clients' train rows where asked for. Means over clients of 'local_test'
  are those over all clients with test examples.

  Args:
    columns: with a label.
    partition: (label [N], *, num_clients, seed) -> owner [N].
    num_clients: C.
    skew: as for `make_dataset`.
    imbalance: smallest over largest class of the train rows kept; 1 without
      `largest` keeps all.
    largest: train rows of class 0 to keep; 0 takes the mean over classes.
    groups: also report classes in groups, as said above.
    nested: keep the first rows of each class, not a random choice.
    test_fraction: of the rows, each class by its share, where the source has
      no split.
    validation_fraction: of each client's train rows.
    eval_clients: as for `make_dataset`.
    seed: seed of all choices.

  Raises:
    InvalidInput: the source has no labels, or a class too few examples.
  """
  validate.check(
    partition is not None,
    'Expected a partition made here for long-tailed data, got client.',
  )
  check_imbalance(imbalance)
  seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(9)]
  validate.check(
    'label' in columns.features,
    f'Expected a column "label" in {columns.name}, got '
    f'{sorted(columns.features)}.',
  )
  label = np.asarray(columns.features['label'])
  if columns.split is None:
    split = stratified_mask(label, fraction=test_fraction, seed=seeds[0])
    split = split.astype(np.int8)
  else:
    split = np.asarray(columns.split)
  train_rows, test_rows = np.flatnonzero(split == 0), np.flatnonzero(split == 1)
  if imbalance < 1 or largest:
    kept = long_tail_rows(
      label[train_rows],
      imbalance=imbalance,
      largest=largest,
      seed=None if nested else seeds[6],
    )
    train_rows = train_rows[kept]
  rows = np.concatenate([train_rows, test_rows])
  chosen = dataclasses.replace(
    columns,
    features={n: np.asarray(x[rows]) for n, x in columns.features.items()},
    split=split[rows],
    client=None,
  )
  assigned = assign_clients(
    chosen,
    partition=partition,
    num_clients=num_clients,
    skew=skew,
    test_fraction=0.0,
    test_owner='pooled',
    seeds=seeds,
  )
  train, test = assigned.train, assigned.test
  label = np.asarray(chosen.features['label'])
  local = local_tests(
    label,
    train,
    test,
    num_classes=columns.num_classes,
    seed=seeds[7],
  )
  splits = {'train': train}
  if validation_fraction:
    held = client_mask(train, fraction=validation_fraction, seed=seeds[2])
    splits |= {'train': train.filter(~held), 'validation': train.filter(held)}
  splits |= {'test': test, 'local_test': local}
  participating = np.flatnonzero(splits['train'].sizes() > 0)
  who = lambda view: np.flatnonzero(view.sizes() > 0)
  parts = {name: Part(who(view), name) for name, view in splits.items()}
  if groups:
    for split, masks in _by_group(label, test, local, columns.num_classes):
      for name, only in masks.items():
        clients = who(splits[split].filter(only))
        parts[f'{split}_{name}'] = Part(clients, split, only)
  dataset = FederatedDataset(
    columns.name,
    splits,
    participating,
    {name: part for name, part in parts.items() if len(part.clients)},
    columns.num_classes,
  )
  return limit_parts(dataset, eval_clients, seed=seeds[5])


def local_tests(
  label: np.ndarray,
  train: FederatedData,
  test: FederatedData,
  *,
  num_classes: int,
  seed: int,
) -> FederatedData:
  """A test set for every client in proportion to its train classes.

  t_cy = int(T n_cy / n) of the T test rows, of each class without replacement;
  clients may share rows. No more than the class has.

  Args:
    label: int [M] of the columns.
    train: the clients' train rows.
    test: the pooled test rows.
    num_classes: Y.
    seed: of the draws.
  """
  counts = count_classes(train, label, num_classes=num_classes)
  wanted = proportional_counts(counts, size=test.num_examples)
  rng = np.random.default_rng(seed)
  test_rows = np.asarray(test.rows)
  pools = [test_rows[label[test_rows] == y] for y in range(num_classes)]
  owners, rows = [], []
  for c, y in zip(*np.nonzero(wanted), strict=True):
    drawn = rng.permutation(pools[y])[: wanted[c, y]]
    rows.append(drawn)
    owners.append(np.full(len(drawn), c))
  empty = np.zeros(0, np.int64)
  return from_assignment(
    train.features,
    np.concatenate([empty, *owners]),
    client_ids=train.client_ids,
    rows=np.concatenate([empty, *rows]),
  )


def _by_group(
  label: np.ndarray,
  test: FederatedData,
  local: FederatedData,
  num_classes: int,
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
  """Test rows by the groups of all clients, local ones by each client's own.

  Yields:
    (split, {group: mask bool [N] over the split's positions}).
  """
  counts = count_classes(local, label, num_classes=num_classes)
  own = np.stack([group_classes(row) for row in counts])
  of_test = group_classes(counts.sum(0))[label[test.rows]]
  of_local = own[local.owners(), label[local.rows]]
  for split, group in (('test', of_test), ('local_test', of_local)):
    yield split, {name: group == g for g, name in enumerate(GROUPS)}
