"""Controls: the same examples, in other hands.

What a federation loses against training on the pooled examples can come from
clients that differ or from training federatedly; these tell the two apart. The
columns stay as they are, in memory or on disk: only who owns a row changes.

Axis letters: C clients, N examples of a view.
"""

import dataclasses

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.core.plans import ramp
from fedjax_ext.data.datasets import FederatedDataset
from fedjax_ext.data.federated_data import FederatedData, from_assignment


def first_examples(
  dataset: FederatedDataset, *, max_examples: int
) -> FederatedDataset:
  """Keeps the first so many train rows of each participating client.

  Before the controls below, where clients train on no more than these: so that
  all of them see the same examples.

  Args:
    dataset: with a split 'train'.
    max_examples: scalar >= 1.
  """
  validate.at_least('max_examples', max_examples, 1)
  train = dataset.splits['train']
  keep = ramp(train.sizes()) < max_examples
  others = np.ones(train.num_clients, bool)
  others[np.asarray(dataset.participating)] = False
  return _with_train(dataset, train.filter(keep | others[train.owners()]))


def shuffle_across_clients(
  dataset: FederatedDataset, *, seed: int
) -> FederatedDataset:
  """Deals the train rows of the participating clients out at random.

  Each participating client keeps its number of examples, so that clients are
  alike but for their sizes. All other clients and splits stay as they are.

  Args:
    dataset: with a split 'train'.
    seed: seed of the permutation.
  """
  train = dataset.splits['train']
  clients = np.asarray(dataset.participating)
  sizes = train.sizes(clients)
  mine = np.repeat(train.offsets[clients], sizes) + ramp(sizes)
  rows = np.array(train.rows)
  rows[mine] = np.random.default_rng(seed).permutation(rows[mine])
  return _with_train(dataset, dataclasses.replace(train, rows=rows))


def pool_clients(dataset: FederatedDataset) -> FederatedDataset:
  """Gives the first participating client the train rows of all of them.

  It alone participates then: centralised training. Its rows are the
  participating clients', one client after another. All other clients, splits
  and parts stay as they are; the emptied clients keep their names, and their
  validation and test rows. The part 'train' is about the same clients as
  before, by the split 'train_by_client'.
  """
  train = dataset.splits['train']
  clients = np.asarray(dataset.participating)
  validate.check(len(clients) > 0, 'Expected participating clients, got none.')
  first = clients[:1]
  new_owner = np.arange(train.num_clients)
  new_owner[clients] = first[0]
  pooled = from_assignment(
    train.features,
    new_owner[train.owners()],
    client_ids=train.client_ids,
    rows=np.asarray(train.rows),
  )
  parts, own = dict(dataset.parts), 'train_by_client'
  if 'train' in parts:
    parts['train'] = parts['train']._replace(split=own)
  dataset = _with_train(dataset, pooled)
  return dataclasses.replace(
    dataset,
    splits=dict(dataset.splits) | {own: train},
    participating=first,
    parts=parts,
  )


def _with_train(
  dataset: FederatedDataset, train: FederatedData
) -> FederatedDataset:
  return dataclasses.replace(
    dataset, splits=dict(dataset.splits) | {'train': train}
  )
