"""Columns of examples before clients are assigned, and the checks on reading.

Axis letters: M rows, Y classes.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping

import numpy as np

from fedjax_ext.core import validate


@dataclasses.dataclass(frozen=True)
class Columns:
  """What a source delivers.

  Attributes:
    name: of the data set.
    features: {name: [M, ...]}, with 'label' int [M].
    num_classes: Y.
    client: [M] names of natural clients, None without.
    split: int [M], 0 = train, 1 = test, None without.
  """

  name: str
  features: Mapping[str, np.ndarray]
  num_classes: int
  client: np.ndarray | None = None
  split: np.ndarray | None = None


def make_columns(
  name: str,
  arrays: Mapping[str, np.ndarray],
  *,
  num_classes: int = 0,
  client_column: str = 'client',
) -> Columns:
  """Checks arrays by the schema and sorts them into columns.

  Schema: `label` integers [M]; features under any other name [M, ...];
  optionally the client column [M] and `split` [M] (0 = train, 1 = test).
  Arrays of another length than `label` are tables beside the examples and are
  left out.

  Args:
    name: for messages.
    arrays: by name.
    num_classes: Y; 0 takes the largest label + 1.
    client_column: name of the client column.

  Raises:
    InvalidInput: the schema is broken; the message says where.
  """
  validate.check(
    'label' in arrays,
    f'Expected an array "label" in {name}, got {sorted(arrays)}.',
  )
  label = np.asarray(arrays['label'])
  validate.check(
    label.ndim == 1 and label.dtype.kind in 'iu' and len(label) > 0,
    f'Expected labels of {name} to be integers [M], got '
    f'{label.dtype}{list(label.shape)}.',
  )
  num_classes = num_classes or int(label.max()) + 1
  _check_range(f'label of {name}', label, num_classes - 1)
  for column in ('image', 'split', client_column):
    validate.check(
      column not in arrays or len(np.atleast_1d(arrays[column])) == len(label),
      f'Expected {column} of {name} to have {len(label)} rows as label has, '
      f'got shape {list(np.shape(arrays.get(column)))}.',
    )
  columns = {
    n: x for n, x in arrays.items() if np.ndim(x) and len(x) == len(label)
  }
  for feature, column in columns.items():
    _check_finite(name, feature, column)
  client = columns.pop(client_column, None)
  split = columns.pop('split', None)
  for column, values in (('client', client), ('split', split)):
    validate.check(
      values is None or np.ndim(values) == 1,
      f'Expected {column} of {name} to be a column [M], got shape '
      f'{list(np.shape(values))}.',
    )
  if client is not None and client.dtype.kind == 'O':
    client = client.astype(str)
  if split is not None:
    split = np.asarray(split)
    validate.check(
      split.dtype.kind in 'iub',
      f'Expected split of {name} to be integers, got {split.dtype}.',
    )
    _check_range(f'split of {name}', split.astype(np.int64), 1)
    split = split.astype(np.int8)
  columns['label'] = label.astype(np.int32)
  return Columns(name, columns, num_classes, client, split)


def _check_range(name: str, column: np.ndarray, largest: int) -> None:
  bad = np.flatnonzero((column < 0) | (column > largest))
  if len(bad):
    validate.check(
      False,
      f'Expected {name} in 0..{largest}, got {column[bad[0]]} in row '
      f'{bad[0]} ({len(bad)} such rows).',
    )


def _check_finite(name: str, feature: str, column: np.ndarray) -> None:
  if column.dtype.kind != 'f':
    return
  for start in range(0, len(column), 65536):  # in pieces: may be memory-mapped
    finite = np.isfinite(column[start : start + 65536])
    if not finite.all():
      rows = np.flatnonzero(~finite.reshape(len(finite), -1).all(1))
      validate.check(
        False,
        f'Expected finite values in feature {feature!r} of {name}, got NaN or '
        f'infinity in row {start + rows[0]}.',
      )


def load_columns(
  path: pathlib.Path, *, num_classes: int = 0, client_column: str = 'client'
) -> Columns:
  """Reads FILE.npz, or a folder of .npy files as memory maps.

  Args:
    path: the file or folder; one array for each column, see `make_columns`.
    num_classes: Y; 0 takes the largest label + 1.
    client_column: name of the client column.

  Raises:
    InvalidInput: the file is missing, unreadable or breaks the schema.
  """
  path = pathlib.Path(path)
  validate.check(
    path.exists(), f'Expected a data file or folder at {path}, found none.'
  )
  try:
    if path.is_dir():
      arrays = {
        p.stem: np.load(p, mmap_mode='r', allow_pickle=False)
        for p in sorted(path.glob('*.npy'))
      }
    else:
      with np.load(path, allow_pickle=False) as file:
        arrays = {n: file[n] for n in file.files}
  except (OSError, ValueError, EOFError, KeyError) as error:
    raise validate.InvalidInput(
      f'Expected readable arrays in {path}: {error}'
    ) from error
  except Exception as error:  # zipfile.BadZipFile, zlib.error
    raise validate.InvalidInput(
      f'Expected an intact .npz file at {path}: {error}'
    ) from error
  return make_columns(
    path.stem, arrays, num_classes=num_classes, client_column=client_column
  )


def fingerprint(columns: Columns) -> str:
  """SHA-256 (hex) over names, shapes, dtypes, all labels and sampled rows.

  Cheap for memory-mapped data: at most 1,024 rows of every feature are read.
  """
  digest = hashlib.sha256()
  rows = np.unique(
    np.linspace(0, len(columns.features['label']) - 1, 1024).astype(np.int64)
  )
  for name in sorted(columns.features):
    x = columns.features[name]
    digest.update(f'{name} {x.dtype.str} {x.shape}'.encode())
    sampled = x if name == 'label' else x[rows]
    digest.update(np.ascontiguousarray(sampled).tobytes())
  for name, extra in (('client', columns.client), ('split', columns.split)):
    if extra is not None:
      digest.update(f'{name} {extra.dtype.str}'.encode())
      digest.update(np.ascontiguousarray(extra).tobytes())
  return digest.hexdigest()
