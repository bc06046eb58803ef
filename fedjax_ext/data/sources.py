"""Sources by name: functions that return `Columns`.

A source has keyword-only settings of simple types. One called `data_dir` gets
--data_dir, one called `seed` the data seed; the others stand after the name in
--data_source. docs/add_a_data_set.md shows how to write one of your own.
"""

import pathlib
import types
from collections.abc import Callable, Mapping

from fedjax_ext.data.columns import Columns, load_columns
from fedjax_ext.data.digits import load_digits
from fedjax_ext.data.federated_images import (
  federated_cifar100,
  federated_emnist,
)
from fedjax_ext.data.mixed import quadratic, synthetic_smile
from fedjax_ext.data.records import load_array_record, load_tfds
from fedjax_ext.data.retrieval import (
  movielens,
  movielens_tfds,
  synthetic_retrieval,
)
from fedjax_ext.data.sqlite import load_sqlite
from fedjax_ext.data.synthetic import synthetic_femnist, synthetic_styles
from fedjax_ext.data.text import (
  shakespeare,
  stackoverflow,
  text_jsonl,
  text_sqlite,
)

Source = Callable[..., Columns]


def load_npz(
  *,
  data_dir: str,
  file: str,
  num_classes: int = 0,
  client_column: str = 'client',
) -> Columns:
  """DATA_DIR/FILE.npz, or a folder DATA_DIR/FILE of memory-mapped .npy files.

  Arrays `image` or `x` [M, ...], `label` [M], and optionally a client column
  and `split`; see `make_columns`.

  Args:
    data_dir: folder of the file.
    file: its name, with or without .npz.
    num_classes: Y; 0 takes the largest label + 1.
    client_column: name of the column of clients.
  """
  path = pathlib.Path(data_dir) / file.removesuffix('.npz')
  return load_columns(
    path if path.is_dir() else path.with_name(f'{path.name}.npz'),
    num_classes=num_classes,
    client_column=client_column,
  )


SOURCES: Mapping[str, Source] = types.MappingProxyType(
  {
    'digits': load_digits,
    'synthetic_femnist': synthetic_femnist,
    'synthetic_styles': synthetic_styles,
    'npz': load_npz,
    'sqlite': load_sqlite,
    'array_record': load_array_record,
    'tfds': load_tfds,
    'federated_emnist': federated_emnist,
    'federated_cifar100': federated_cifar100,
    'shakespeare': shakespeare,
    'stackoverflow': stackoverflow,
    'text_jsonl': text_jsonl,
    'text_sqlite': text_sqlite,
    'movielens': movielens,
    'movielens_tfds': movielens_tfds,
    'synthetic_retrieval': synthetic_retrieval,
    'synthetic_smile': synthetic_smile,
    'quadratic': quadratic,
  }
)
