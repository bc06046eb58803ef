"""Sources of this experiment's tables that no other experiment needs.

Named in flag files as --data_source=experiments.participation_gap.sources.NAME.

Axis letters: M rows.
"""

import dataclasses
import pathlib

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.data import Columns, load_npz, read_jsonl, text_columns
from fedjax_ext.data.text import character_vocabulary


def writers(*, data_dir: str, num_writers: int = 0, seed: int = 0) -> Columns:
  """MNIST by writer from DATA_DIR/mnist_writers.npz, without its split.

  The official split is one by writer, and of two populations: staff of the
  census and students.

  Args:
    data_dir: folder of the file; arrays `image`, `label`, `client`, `hsf`.
    num_writers: keep a random choice of so many; 0 keeps all.
    seed: seed of that choice.
  """
  columns = load_npz(data_dir=data_dir, file='mnist_writers', num_classes=10)
  columns = dataclasses.replace(columns, split=None)
  if not num_writers:
    return columns
  names = np.unique(columns.client)
  validate.between('num_writers', num_writers, 1, len(names))
  kept = np.random.default_rng(seed).permutation(names)[:num_writers]
  return _take(columns, np.flatnonzero(np.isin(columns.client, kept)))


def cifar10_parts(*, data_dir: str) -> Columns:
  """CIFAR-10 images of two files, 15,979 where these are what we have.

  Args:
    data_dir: folder of cifar10_balanced_small.npz (all of its rows) and
      cifar10_lt.npz (its test rows: split 1).
  """
  balanced = load_npz(
    data_dir=data_dir, file='cifar10_balanced_small', num_classes=10
  )
  other = load_npz(data_dir=data_dir, file='cifar10_lt', num_classes=10)
  validate.check(
    other.split is not None, 'Expected a split column in cifar10_lt.npz.'
  )
  for columns in (balanced, other):
    validate.check(
      'image' in columns.features,
      f'Expected an array "image" in {columns.name}.npz, got '
      f'{sorted(columns.features)}.',
    )
  test = np.asarray(other.split) == 1
  features = {
    name: np.concatenate([balanced.features[name], other.features[name][test]])
    for name in ('image', 'label')
  }
  return Columns('cifar10', features, 10)


def roles(
  *,
  data_dir: str,
  file: str = 'shakespeare_roles.jsonl.gz',
  min_speeches: int = 5,
  shuffle: bool = False,
  sequence_length: int = 80,
  seed: int = 0,
) -> Columns:
  """Characters of plays by role, windows within one speech.

  Args:
    data_dir: folder of the file, with "client" and "speeches" in each line.
    file: its name.
    min_speeches: roles with fewer are left out.
    shuffle: deal all speeches out anew, each role keeping its number of them.
    sequence_length: T.
    seed: seed of the shuffle.

  Returns:
    Columns `tokens` [M, T+1] and `text` [M], the speech of each window.
  """
  validate.at_least('min_speeches', min_speeches, 1)
  path = pathlib.Path(data_dir) / file
  validate.check(path.exists(), f'Expected a data file at {path}, found none.')
  kept = {
    client: texts
    for client, texts in read_jsonl(path, 'client', 'speeches')
    if len(texts) >= min_speeches
  }
  validate.check(
    len(kept) > 0,
    f'Expected roles with min_speeches={min_speeches} in {path}, got none.',
  )
  speeches = [speech for texts in kept.values() for speech in texts]
  if shuffle:
    order = np.random.default_rng(seed).permutation(len(speeches))
    speeches = [speeches[i] for i in order]
  ends = np.cumsum([len(texts) for texts in kept.values()])
  clients = [
    (name, speeches[end - len(kept[name]) : end])
    for name, end in zip(kept, ends.tolist(), strict=True)
  ]
  return text_columns(
    path.name.split('.')[0],
    {'train': clients},
    vocabulary=character_vocabulary(),
    sequence_length=sequence_length,
    by_text=True,
  )


def _take(columns: Columns, rows: np.ndarray) -> Columns:
  """Columns of some rows; each [M, ...]."""
  return dataclasses.replace(
    columns,
    features={n: np.asarray(x[rows]) for n, x in columns.features.items()},
    client=np.asarray(columns.client)[rows],
  )
