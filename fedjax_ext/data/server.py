"""Data at the server, beside the clients': for mixed federated learning.

The server is one more client, named `SERVER`, that never takes part in a
cohort. It owns the split 'server', and 'server_test' where there are test rows
of the server's own.

Axis letters: C clients, N examples of the train split, M rows of the columns.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping

import numpy as np

from fedjax_ext.core import Part, examples_of, validate
from fedjax_ext.core.plans import rows_of
from fedjax_ext.data.columns import Columns
from fedjax_ext.data.datasets import FederatedDataset, make_dataset
from fedjax_ext.data.federated_data import FederatedData
from fedjax_ext.data.splits import check_fraction

SERVER = '(server)'
Selection = Callable[..., np.ndarray]


def split_off_server(
  dataset: FederatedDataset, chosen: np.ndarray
) -> tuple[FederatedDataset, int]:
  """Moves train rows of participating clients to the server.

  Args:
    dataset: with a split 'train'.
    chosen: bool [N] over the positions of the train split; rows of clients that
      do not participate stay where they are.

  Returns:
    The dataset with the split 'server', and the server's client number. Clients
    that are left without train rows take part no more.

  Raises:
    InvalidInput: no row is left on one of the sides.
  """
  train = dataset.splits['train']
  owners = train.owners()
  chosen = np.asarray(chosen, bool) & np.isin(owners, dataset.participating)
  validate.check(chosen.any(), 'Expected train rows for the server, got none.')
  moved = np.asarray(train.rows)[chosen]
  kept = train.filter(~chosen)
  clients = dataset.participating
  clients = clients[kept.sizes(clients) > 0]
  validate.check(
    len(clients) > 0, 'Expected train rows that stay on clients, got none.'
  )
  parts = dict(dataset.parts)
  for name, part in parts.items():
    if part.split == 'train':
      if part.only is not None:
        part = part._replace(only=part.only[~chosen])
      left = examples_of(part, {'train': kept}).sizes(part.clients) > 0
      parts[name] = part._replace(clients=part.clients[left])
  dataset = dataclasses.replace(
    dataset,
    splits={**dataset.splits, 'train': kept},
    participating=clients,
    parts=parts,
  )
  return _with_server(dataset, {'server': moved}), train.num_clients


def add_server_data(
  dataset: FederatedDataset,
  columns: Columns,
  *,
  test_fraction: float = 0.2,
  seed: int = 0,
) -> tuple[FederatedDataset, int]:
  """Gives the server the examples of another source.

  All columns are read into memory, the clients' and the server's.

  Args:
    dataset: the clients'.
    columns: the server's source, with the same features; its clients, where it
      has any, are only used to hold whole ones out.
    test_fraction: of the source's clients (or else rows), for the part
      'server_test'.
    seed: seed of that choice.

  Returns:
    The dataset with the split 'server', and the server's client number.

  Raises:
    InvalidInput: features differ in name, shape or kind, or the server has more
      classes.
  """
  check_fraction('test_fraction', test_fraction)
  ours, theirs = dataset.features, columns.features
  _check_alike(dataset, columns)
  train, test = _rows_of_source(columns, test_fraction, seed)
  first = len(next(iter(ours.values())))
  features = {
    name: np.concatenate([np.asarray(x), np.asarray(theirs[name], x.dtype)])
    for name, x in ours.items()
  }
  splits = {
    name: dataclasses.replace(view, features=features)
    for name, view in dataset.splits.items()
  }
  dataset = dataclasses.replace(dataset, splits=splits)
  rows = {'server': first + train}
  if len(test):
    rows['server_test'] = first + test
  number = dataset.splits['train'].num_clients
  dataset = _with_server(dataset, rows)
  if len(test):
    parts = {
      **dataset.parts,
      'server_test': Part(np.array([number]), 'server_test'),
    }
    dataset = dataclasses.replace(dataset, parts=parts)
  return dataset, number


def _check_alike(dataset: FederatedDataset, columns: Columns) -> None:
  """Checks that a source can stand beside the clients' data."""
  ours, theirs = dataset.features, columns.features
  for name, x in ours.items():
    validate.check(
      name in theirs and theirs[name].shape[1:] == x.shape[1:],
      f'Expected feature {name!r} {["M", *x.shape[1:]]} in the data of the '
      f'server, as clients have, got '
      + (
        f'{["M", *theirs[name].shape[1:]]}.'
        if name in theirs
        else f'{sorted(theirs)}.'
      ),
    )
    validate.check(
      np.can_cast(theirs[name].dtype, x.dtype, 'same_kind'),
      f'Expected feature {name!r} of the server to be {x.dtype}, as clients '
      f'have, got {theirs[name].dtype}.',
    )
  validate.check(
    columns.num_classes <= dataset.num_classes,
    f'Expected at most {dataset.num_classes} classes (or tokens) in the data '
    f'of the server, as clients have, got {columns.num_classes}.',
  )


def _rows_of_source(
  columns: Columns, test_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Rows of a source to train on and to test on, int64 [n] each."""
  if columns.client is None:
    size = len(next(iter(columns.features.values())))
    rows = np.random.default_rng(seed).permutation(size)
    count = round(test_fraction * len(rows))
    return np.sort(rows[count:]), np.sort(rows[:count])
  other = make_dataset(
    columns,
    test_fraction=0.0,
    unparticipating_fraction=test_fraction,
    seed=seed,
  )
  view = other.splits['train']
  held_out = np.setdiff1d(np.flatnonzero(view.sizes() > 0), other.participating)
  train, _ = rows_of(view, other.participating)
  test, _ = rows_of(view, held_out)
  return train, test


def _with_server(
  dataset: FederatedDataset, rows: Mapping[str, np.ndarray]
) -> FederatedDataset:
  """Adds the client `SERVER` to all splits, and splits that it owns alone."""

  def appended(view: FederatedData) -> FederatedData:
    return dataclasses.replace(
      view,
      client_ids=np.append(view.client_ids, SERVER),
      offsets=np.append(view.offsets, view.offsets[-1]),
      # Its rows come after all others: there are none.
      rows=np.asarray(view.rows),
    )

  splits = {name: appended(view) for name, view in dataset.splits.items()}
  train = splits['train']
  for name, mine in rows.items():
    offsets = np.zeros(train.num_clients + 1, np.int64)
    offsets[-1] = len(mine)
    splits[name] = FederatedData(
      train.client_ids, offsets, np.asarray(mine, np.int64), train.features
    )
  return dataclasses.replace(dataset, splits=splits)


def server_features(dataset: FederatedDataset) -> dict[str, np.ndarray]:
  """The server's examples, {name: [M_c, ...]}, read into memory."""
  rows = np.asarray(dataset.splits['server'].rows)
  return {
    name: np.asarray(x[rows])
    for name, x in dataset.features.items()
    if x.dtype.kind in 'biuf'
  }


def client_to_server(
  dataset: FederatedDataset, *, name: str = 'server'
) -> np.ndarray:
  """All rows of the client with that name, bool [N]."""
  train = dataset.splits['train']
  number = np.flatnonzero(train.client_ids == name)
  validate.check(
    len(number) == 1, f'Expected a client named {name!r} in the data.'
  )
  return train.owners() == number[0]


def classes_to_server(
  dataset: FederatedDataset, *, labels: tuple[int, ...]
) -> np.ndarray:
  """The rows with these labels, bool [N]."""
  train = dataset.splits['train']
  label = np.asarray(dataset.features['label'])[np.asarray(train.rows)]
  return np.isin(label, labels)


def random_to_server(
  dataset: FederatedDataset, *, fraction: float = 0.5, seed: int = 0
) -> np.ndarray:
  """That fraction of all rows at random, bool [N]."""
  check_fraction('fraction', fraction)
  size = len(dataset.splits['train'].rows)
  return np.random.default_rng(seed).random(size) < fraction


SERVER_DATA: Mapping[str, Selection] = types.MappingProxyType(
  {
    'client': client_to_server,
    'classes': classes_to_server,
    'random': random_to_server,
  }
)
