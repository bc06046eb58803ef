"""Federated image data sets that others publish as SQLite files.

Axis letters: M rows.
"""

import pathlib

import numpy as np

from fedjax_ext.data.columns import Columns
from fedjax_ext.data.lazy import Records, RecordType, lazy_columns, map_records
from fedjax_ext.data.published import dataset_paths
from fedjax_ext.data.sqlite import open_sqlite


def federated_emnist(*, data_dir: str, only_digits: bool = False) -> Columns:
  """Handwriting of 3,400 writers in 62 classes; 3,383 in 10 of digits only.

  Every writer has train and test examples. Caldas et al., "LEAF: a benchmark
  for federated settings", 2018, https://arxiv.org/abs/1812.01097, in FedJAX's
  files; get them by
  `python -m fedjax_ext.data.download federated_emnist --data_dir=DIR`
  (`federated_emnist_digits` for digits only).

  Args:
    data_dir: folder of the files.
    only_digits: the part with digits.

  Returns:
    Lazy columns `image` float32 [M, 28, 28, 1] in [0, 1], 1 being ink (the
    files have 1 for paper), and `label` int32 [M].

  Raises:
    InvalidInput: a file is missing or broken.
  """
  name = 'federated_emnist_digits' if only_digits else 'federated_emnist'
  stem = 'federated_emnist_digitsonly' if only_digits else name
  paths = dataset_paths(name, data_dir)
  num_classes = 10 if only_digits else 62

  def ink(records: Records) -> Records:
    image = 1 - records['pixels'].astype(np.float32)[..., None]
    return {'image': image, 'label': records['label']}

  reader, clients = open_sqlite(
    {s: paths[f'{stem}_{s}.sqlite'] for s in ('train', 'test')},
    num_classes=num_classes,
  )
  types = {
    'image': RecordType((28, 28, 1), np.dtype(np.float32)),
    'label': reader.types['label'],
  }
  columns = lazy_columns(map_records(reader, ink, types))
  return Columns(name, columns, num_classes, clients)


def federated_cifar100(*, data_dir: str) -> Columns:
  """CIFAR-100 by TensorFlow Federated: 500 train and 100 other test clients.

  Each has 100 images, assigned by a Pachinko allocation over the coarse
  labels; Reddi et al., "Adaptive federated optimization", 2021,
  https://arxiv.org/abs/2003.00295. Get the file by
  `python -m fedjax_ext.data.download federated_cifar100 --data_dir=DIR`.

  Args:
    data_dir: folder of cifar100.sqlite.

  Returns:
    Lazy columns `image` uint8 [M, 32, 32, 3], `label` int32 [M] of 100 classes
    and `coarse_label` int32 [M] of 20.

  Raises:
    InvalidInput: the file is missing or broken.
  """
  path: pathlib.Path = dataset_paths('federated_cifar100', data_dir)[
    'cifar100.sqlite'
  ]

  def shaped(records: Records) -> Records:
    image = records['image'].astype(np.uint8)
    return {
      'image': image.reshape(-1, 32, 32, 3),
      'label': records['label'],
      'coarse_label': records['coarse_label'],
    }

  reader, clients = open_sqlite({'train': path}, num_classes=100)
  types = {
    'image': RecordType((32, 32, 3), np.dtype(np.uint8)),
    'label': reader.types['label'],
    'coarse_label': RecordType((), np.dtype(np.int32)),
  }
  columns = lazy_columns(map_records(reader, shaped, types))
  return Columns('federated_cifar100', columns, 100, clients)
