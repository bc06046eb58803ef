"""The three-way split: participating train and validation, unparticipating.

Some clients never train; those that may keep some of their examples out of
training. Reports on the three parts tell the gap to fresh examples from the gap
to fresh clients, see `core.generalization`.

Yuan, Morningstar, Ning and Singhal, "What do we mean by generalization in
federated learning?", 2022, https://arxiv.org/abs/2110.14216.

Axis letters: C clients, N examples of a view, U units, S strata.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from fedjax_ext.core import Part, validate
from fedjax_ext.core.plans import ramp
from fedjax_ext.data.columns import Columns
from fedjax_ext.data.datasets import (
  FederatedDataset,
  assign_clients,
  limit_parts,
)
from fedjax_ext.data.federated_data import FederatedData, from_assignment
from fedjax_ext.data.partition import Partitioner, apportion
from fedjax_ext.data.skew import Skew
from fedjax_ext.data.splits import check_fraction


def three_way(
  columns: Columns,
  *,
  partition: Partitioner | None = None,
  num_clients: int = 100,
  skew: Skew | None = None,
  unparticipating: float = 0.2,
  train_per_validation: int = 4,
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
    unparticipating: share of clients that never train, u.
    train_per_validation: train examples for each validation example, r.
    participating: share of the remaining clients that may train, q.
    participating_clients: how many of them may train, instead of a share; 0
      takes the share. Fewer are a subset of more.
    split: 'made' pools all examples of a client and splits them here;
      'by_example' keeps the source's split within clients, its test examples
      being validation; 'by_client' keeps its split of clients, those with test
      examples alone being unparticipating.
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
  check_fraction('unparticipating', unparticipating)
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
  validate.at_least('train_per_validation', train_per_validation, 1)
  validate.at_least('max_examples', max_examples, 0)
  validate.at_least('min_examples', min_examples, 2)
  validate.one_of('split', split, ('made', 'by_example', 'by_client'))
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
  views = [view for view in assigned if view is not None]
  everything = _merge(views)
  tested = None if assigned.test is None else assigned.test.sizes() > 0
  trained = assigned.train.sizes() > 0
  if split != 'made':
    validate.check(
      tested is not None and tested.any(),
      f'Expected test rows in {columns.name} for split={split}, got none.',
    )
  unit = _units(everything, unit_column)
  units = _count_units(everything, unit)
  candidates = np.flatnonzero(units >= min_examples)
  if split == 'by_client':
    held_out = candidates[(tested & ~trained)[candidates]]
    rest = candidates[trained[candidates]]
  else:
    if split == 'by_example':
      candidates = candidates[(tested & trained)[candidates]]
    held_out = _choose(
      candidates,
      unparticipating,
      _strata(everything, candidates, stratify_column),
      seeds[6],
    )
    rest = np.setdiff1d(candidates, held_out)
  chosen = _participants(rest, participating, participating_clients, seeds[7])
  rank = _ranks(everything, unit, seeds[8])
  if split == 'by_example':
    is_validation = np.isin(everything.rows, assigned.test.rows)
  else:
    is_validation = rank % (train_per_validation + 1) == 0
  cut = lambda keep: _first(everything, rank, keep, max_examples)
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
      and dataset.splits[part.split].sizes(part.clients).sum() > 0,
      f'Expected clients with examples in part {name!r} of {dataset.name}, got '
      'none.',
    )


def _merge(views: list[FederatedData]) -> FederatedData:
  """All rows of views over the same clients and columns."""
  first = views[0]
  return from_assignment(
    first.features,
    np.concatenate([view.owners() for view in views]),
    client_ids=first.client_ids,
    rows=np.concatenate([np.asarray(view.rows) for view in views]),
  )


def _column(data: FederatedData, setting: str, name: str) -> np.ndarray:
  """A column at the view's positions, [N]."""
  features = data.features
  validate.check(
    name in features and features[name].ndim == 1,
    f'Expected {setting} to be a column [M] of {sorted(features)}, got '
    f'{setting}={name}.',
  )
  return np.asarray(features[name][np.asarray(data.rows)])


def _units(data: FederatedData, column: str) -> np.ndarray:
  """The unit of every position, int64 [N]; ascending from client to client."""
  if not column:
    return np.arange(data.num_examples)
  values = np.unique(_column(data, 'unit_column', column), return_inverse=True)
  pair = data.owners() * (int(values[1].max(initial=0)) + 1) + values[1]
  return np.unique(pair, return_inverse=True)[1].astype(np.int64)


def _count_units(data: FederatedData, unit: np.ndarray) -> np.ndarray:
  """Units of each client, int64 [C]."""
  first = np.unique(unit, return_index=True)[1]
  return np.bincount(data.owners()[first], minlength=data.num_clients)


def _ranks(data: FederatedData, unit: np.ndarray, seed: int) -> np.ndarray:
  """Place of every position's unit in its client's shuffle, int64 [N]."""
  first = np.unique(unit, return_index=True)[1]
  owner = data.owners()[first]  # of each unit, ascending
  rng = np.random.default_rng(seed)
  order = np.lexsort((rng.random(len(owner)), owner))
  rank = np.empty(len(owner), np.int64)
  rank[order] = ramp(np.bincount(owner, minlength=data.num_clients))
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
  data: FederatedData, clients: np.ndarray, column: str
) -> np.ndarray:
  """The stratum of clients [C'], int [C']."""
  if not column:
    return np.zeros(len(clients), np.int64)
  values = _column(data, 'stratify_column', column)
  validate.check(
    values.dtype.kind in 'iub',
    f'Expected stratify_column={column} to have integers, got {values.dtype}.',
  )
  return values[data.offsets[clients]]


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


THREE_WAY: dict[str, Callable[..., FederatedDataset]] = {'three_way': three_way}
