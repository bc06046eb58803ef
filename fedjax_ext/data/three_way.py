"""The three-way split: participating train and validation, unparticipating.

Some clients never train; those that may keep some of their examples out of
training. Reports on the three parts tell the gap to fresh examples from the gap
to fresh clients, see `core.generalization`.

Yuan, Morningstar, Ning and Singhal, "What do we mean by generalization in
federated learning?", 2022, https://arxiv.org/abs/2110.14216.

Axis letters: C clients, N examples of a view, U units, S strata.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from fedjax_ext.core import Part, examples_of, validate
from fedjax_ext.core.plans import client_shuffles, ramp, rows_of
from fedjax_ext.data.columns import Columns
from fedjax_ext.data.datasets import (
  FederatedDataset,
  assign_clients,
  limit_parts,
)
from fedjax_ext.data.draws import apportion
from fedjax_ext.data.federated_data import FederatedData, from_assignment
from fedjax_ext.data.partition import Partitioner
from fedjax_ext.data.skew import Skew
from fedjax_ext.data.splits import check_fraction


def three_way(
  columns: Columns,
  *,
  partition: Partitioner | None = None,
  num_clients: int = 100,
  skew: Skew | None = None,
  unparticipating: float | None = None,
  train_per_validation: int | None = None,
  participating: float = 1.0,
  participating_clients: int = 0,
  split: Literal['made', 'by_example', 'by_client'] = 'made',
  all_unparticipating: bool = False,
  max_examples: int = 0,
  min_examples: int = 2,
  stratify_column: str = '',
  unit_column: str = '',
  eval_clients: int = 0,
  seed: int = 0,
) -> FederatedDataset:
  """Splits clients in two, and the examples of each client in two.

  Clients with fewer than `min_examples` are left out first. Of the others
  round(unparticipating * C) never train, the same ones whatever part of the
  rest participates. Of n examples of a client, shuffled, those at positions
  0, r + 1, 2 (r + 1), ... are for validation: ceil(n / (r + 1)) of them.

  Parts: 'train' and 'validation', of the participating clients;
  'unparticipating', of the others, on their validation examples alone, so that
  clients of both have slices of like size: percentiles and variances over
  clients depend on the size of a slice.

  Args:
    columns: the source.
    partition: as for `make_dataset`; None takes the natural clients.
    num_clients: C of a partition made here.
    skew: as for `make_dataset`.
    unparticipating: share of clients that never train, u; by default 0.2.
    train_per_validation: train examples for each validation example, r; by
      default 4.
    participating: share of the remaining clients that may train, q.
    participating_clients: how many of them may train, instead of a share; 0
      takes the share. Fewer are a subset of more.
    split: 'made' pools all examples of a client and splits them here;
      'by_example' keeps the source's split within clients, its test examples
      being validation; 'by_client' keeps its split of clients, those with test
      examples alone being unparticipating. These two leave out validation
      examples that the source has apart.
    all_unparticipating: score unparticipating clients on all of their examples:
      less noise in means, but slices that are larger.
    max_examples: of a client in each part, a random choice; 0 takes all.
    min_examples: or units, that a client has; at least 2.
    stratify_column: an integer column; unparticipating clients are chosen from
      the clients of each value by its share. A client's is its first row's.
    unit_column: rows of a client that share this column's value are one unit
      and stay together, as the windows of one text do.
    eval_clients: as for `make_dataset`.
    seed: seed of all of these choices, each of which has a stream of its own.

  Returns:
    The dataset, its parts disjoint.

  Raises:
    InvalidInput: a number or a column cannot be met.
  """
  _check_settings(split, unparticipating, train_per_validation, stratify_column)
  share = 0.2 if unparticipating is None else unparticipating
  ratio = 4 if train_per_validation is None else train_per_validation
  check_fraction('unparticipating', share)
  validate.check(
    0 < participating <= 1,
    f'Expected 0 < participating <= 1, got participating={participating}.',
  )
  validate.check(
    participating == 1 or not participating_clients,
    'Expected one of participating and participating_clients, got '
    f'{participating} and {participating_clients}.',
  )
  validate.at_least('participating_clients', participating_clients, 0)
  validate.at_least('train_per_validation', ratio, 1)
  validate.at_least('max_examples', max_examples, 0)
  validate.at_least('min_examples', min_examples, 2)
  validate.check(
    not columns.overlapping or split == 'by_example' or unit_column,
    f'Expected split=by_example or a unit_column for {columns.name}: examples '
    f'of one client overlap, and split={split} would put pieces of one into '
    'two parts.',
  )
  seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(9)]
  assigned = assign_clients(
    columns,
    partition=partition,
    num_clients=num_clients,
    skew=skew,
    test_fraction=0.0,
    test_owner='clients',
    seeds=seeds,
  )
  used = assigned if split == 'made' else (assigned.train, assigned.test)
  views = [view for view in used if view is not None]
  train_sizes = assigned.train.sizes()
  test_sizes = 0 * train_sizes
  if assigned.test is not None:
    test_sizes = assigned.test.sizes()
  validate.check(
    split == 'made' or test_sizes.any(),
    f'Expected test rows in {columns.name} for split={split}, got none.',
  )
  everybody = np.arange(len(train_sizes))
  if unit_column:  # units are known once all rows are read
    units = _count_units(_merge(views, everybody), unit_column)
  else:
    units = sum(view.sizes() for view in views)
  candidates = np.flatnonzero(units >= min_examples)
  if split == 'by_client':
    tested_only = (test_sizes > 0) & (train_sizes == 0)
    held_out = candidates[tested_only[candidates]]
    rest = candidates[train_sizes[candidates] > 0]
  else:
    if split == 'by_example':
      candidates = candidates[
        ((test_sizes > 0) & (train_sizes > 0))[candidates]
      ]
    strata = _strata(views, candidates, stratify_column)
    held_out = _choose(candidates, share, strata, seeds[6])
    rest = np.setdiff1d(candidates, held_out)
  chosen = _participants(rest, participating, participating_clients, seeds[7])
  # From here on only the rows of clients that some part is about.
  mine = _merge(views, np.union1d(chosen, held_out))
  rank = _ranks(mine, _units(mine, unit_column), seeds[8])
  if split == 'by_example':
    is_validation = np.isin(
      mine.rows, rows_of(assigned.test, np.union1d(chosen, held_out))[0]
    )
  else:
    is_validation = rank % (ratio + 1) == 0
  cut = lambda keep: _first(mine, rank, keep, max_examples)
  splits = {'train': cut(~is_validation), 'validation': cut(is_validation)}
  scored = 'validation'
  if all_unparticipating:
    scored = 'all'
    splits['all'] = cut(np.ones(len(rank), bool))
  parts = {
    'train': Part(chosen, 'train'),
    'validation': Part(chosen, 'validation'),
    'unparticipating': Part(held_out, scored),
  }
  dataset = FederatedDataset(
    columns.name, splits, chosen, parts, columns.num_classes
  )
  check_disjoint(dataset)
  return limit_parts(dataset, eval_clients, seed=seeds[5])


def _check_settings(
  split: str,
  unparticipating: float | None,
  train_per_validation: int | None,
  stratify_column: str,
) -> None:
  """Refuses settings that a kind of split has no use for."""
  validate.one_of('split', split, ('made', 'by_example', 'by_client'))
  unused = {
    'made': {},
    'by_example': {'train_per_validation': train_per_validation},
    'by_client': {
      'unparticipating': unparticipating,
      'stratify_column': stratify_column or None,
    },
  }[split]
  for name, value in unused.items():
    validate.check(
      value is None,
      f'Expected no {name} for split={split}, which the source decides, got '
      f'{name}={value}.',
    )


def check_disjoint(dataset: FederatedDataset) -> None:
  """Checks that no part of a three-way split has anything of another.

  Raises:
    InvalidInput: a client is on both sides, a row is in two splits, or a part
      is empty.
  """
  held_out = dataset.parts['unparticipating'].clients
  both = np.intersect1d(dataset.participating, held_out)
  validate.check(
    not len(both), f'Expected no client on both sides, got {both[:3]}.'
  )
  train, validation = dataset.splits['train'], dataset.splits['validation']
  shared = np.intersect1d(train.rows, validation.rows)
  validate.check(
    not len(shared), f'Expected no row in two splits, got {shared[:3]}.'
  )
  for name, part in dataset.parts.items():
    validate.check(
      len(part.clients) > 0
      and examples_of(part, dataset.splits).sizes(part.clients).sum() > 0,
      f'Expected clients with examples in part {name!r} of {dataset.name}, got '
      'none.',
    )


def _merge(
  views: Sequence[FederatedData], clients: np.ndarray
) -> FederatedData:
  """The rows that some clients [C'] have in views over the same columns."""
  rows, owners = [], []
  for view in views:
    of_view, at = rows_of(view, clients)
    rows.append(np.asarray(of_view))
    owners.append(clients[at])
  return from_assignment(
    views[0].features,
    np.concatenate(owners),
    client_ids=views[0].client_ids,
    rows=np.concatenate(rows),
  )


def _column(
  features: Mapping[str, np.ndarray], setting: str, name: str, rows: np.ndarray
) -> np.ndarray:
  """A column at some rows [N]."""
  validate.check(
    name in features and features[name].ndim == 1,
    f'Expected {setting} to be a column [M] of {sorted(features)}, got '
    f'{setting}={name}.',
  )
  return np.asarray(features[name][rows])


def _units(data: FederatedData, column: str) -> np.ndarray:
  """The unit of every position, int64 [N]; ascending from client to client."""
  if not column:
    return np.arange(data.num_examples)
  values = np.unique(
    _column(data.features, 'unit_column', column, data.rows),
    return_inverse=True,
  )
  pair = data.owners() * (int(values[1].max(initial=0)) + 1) + values[1]
  return np.unique(pair, return_inverse=True)[1].astype(np.int64)


def _count_units(data: FederatedData, column: str) -> np.ndarray:
  """Units of each client, int64 [C]."""
  first = np.unique(_units(data, column), return_index=True)[1]
  return np.bincount(data.owners()[first], minlength=data.num_clients)


def _ranks(data: FederatedData, unit: np.ndarray, seed: int) -> np.ndarray:
  """Place of every position's unit in its client's shuffle, int64 [N]."""
  first = np.unique(unit, return_index=True)[1]
  owner = data.owners()[first]  # of each unit, ascending
  clients, sizes = np.unique(owner, return_counts=True)
  order = client_shuffles(seed, clients, sizes)
  rank = np.empty(len(owner), np.int64)
  rank[np.repeat(np.cumsum(sizes) - sizes, sizes) + order] = ramp(sizes)
  return rank[unit]


def _first(
  data: FederatedData, rank: np.ndarray, keep: np.ndarray, most: int
) -> FederatedData:
  """The view of the kept positions, of each client the first by rank."""
  if most:
    owner = data.owners()
    order = np.lexsort((rank, owner))
    order = order[keep[order]]
    counts = np.bincount(owner[order], minlength=data.num_clients)
    keep = np.zeros(len(rank), bool)
    keep[order[ramp(counts) < most]] = True
  return data.filter(keep)


def _strata(
  views: Sequence[FederatedData], clients: np.ndarray, column: str
) -> np.ndarray:
  """The stratum of clients [C'], int [C']: its value in their first rows."""
  if not column:
    return np.zeros(len(clients), np.int64)
  first = np.full(len(clients), -1, np.int64)
  for view in views:
    missing = np.flatnonzero((first < 0) & (view.sizes(clients) > 0))
    first[missing] = view.rows[view.offsets[clients[missing]]]
  values = _column(views[0].features, 'stratify_column', column, first)
  validate.check(
    values.dtype.kind in 'iub',
    f'Expected stratify_column={column} to have integers, got {values.dtype}.',
  )
  return values


def _choose(
  clients: np.ndarray, fraction: float, strata: np.ndarray, seed: int
) -> np.ndarray:
  """round(fraction * C) of the clients [C], each stratum by its share."""
  rng = np.random.default_rng(seed)
  shuffled = rng.permutation(len(clients))
  values, sizes = np.unique(strata, return_counts=True)
  counts = apportion(sizes, round(fraction * len(clients)))
  chosen = [shuffled[:0]]
  chosen += [
    shuffled[strata[shuffled] == value][:count]
    for value, count in zip(values, counts, strict=True)
  ]
  return np.sort(clients[np.concatenate(chosen)])


def _participants(
  clients: np.ndarray, fraction: float, count: int, seed: int
) -> np.ndarray:
  """The first so many of shuffled clients [C]; sorted."""
  validate.check(len(clients) > 0, 'Expected clients that may train, got none.')
  validate.check(
    count <= len(clients),
    f'Expected participating_clients <= {len(clients)}, got '
    f'participating_clients={count}.',
  )
  count = count or max(1, round(fraction * len(clients)))
  shuffled = np.random.default_rng(seed).permutation(clients)
  return np.sort(shuffled[:count])
