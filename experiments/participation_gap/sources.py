"""Sources of this experiment's tables that no other experiment needs.

Named in flag files as --data_source=experiments.participation_gap.sources.NAME.

Axis letters: M rows.
"""

import dataclasses
import pathlib

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.data import (
  Columns,
  load_digits,
  load_npz,
  read_jsonl,
  text_columns,
)
from fedjax_ext.data.text import character_vocabulary


def writers(
  *, data_dir: str = '', num_writers: int = 0, seed: int = 0
) -> Columns:
  """MNIST by writer from DATA_DIR/mnist_writers.npz, without its split.

  The official split is one by writer, and of two populations: staff of the
  census and students.

  Args:
    data_dir: folder of the file; arrays `image`, `label`, `client`, `hsf`.
      Empty for writers that are made up of scikit-learn's digits, to try the
      tables without the file.
    num_writers: keep a random choice of so many; 0 keeps all.
    seed: seed of that choice.
  """
  if data_dir:
    columns = load_npz(data_dir=data_dir, file='mnist_writers', num_classes=10)
    columns = dataclasses.replace(columns, split=None)
  else:
    columns = _made_up_writers()
  if not num_writers:
    return columns
  names = np.unique(columns.client)
  validate.between('num_writers', num_writers, 1, len(names))
  kept = np.random.default_rng(seed).permutation(names)[:num_writers]
  return _take(columns, np.flatnonzero(np.isin(columns.client, kept)))


def _made_up_writers(
  num_writers: int = 761, each: int = 24, seed: int = 0
) -> Columns:
  """Digits dealt out to writers who shift and fade them in their own way."""
  rng = np.random.default_rng(seed)
  digits = load_digits().features
  rows = rng.integers(len(digits['label']), size=(num_writers, each))
  image = np.asarray(digits['image'])[rows][..., 0]  # [writers, each, 8, 8]
  image = np.kron(image, np.ones((3, 3), np.float32))
  image = np.pad(image, ((0, 0), (0, 0), (2, 2), (2, 2)))
  shifts = rng.integers(-2, 3, size=(num_writers, 2))
  image = np.stack(
    [np.roll(x, tuple(by), (1, 2)) for x, by in zip(image, shifts, strict=True)]
  )
  image *= rng.uniform(0.5, 1.0, (num_writers, 1, 1, 1))
  client = np.repeat(np.arange(num_writers), each)
  features = {
    'image': np.round(255 * image).astype(np.uint8).reshape(-1, 28, 28),
    'label': np.asarray(digits['label'])[rows].ravel(),
    'hsf': np.repeat(rng.choice([0, 4], num_writers), each),
  }
  return Columns('made_up_writers', features, 10, client=client)


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
