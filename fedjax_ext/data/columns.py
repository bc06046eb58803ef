"""Columns of examples before clients are assigned, and the checks on reading.

Axis letters: C clients, M rows, Y classes.
"""

import dataclasses
import hashlib
import json
import pathlib
import urllib.parse
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.data.lazy import LazyColumn

# In a folder that `convert.write_columns` made, beside a file for each feature,
# none of which has an @ in its name.
CONVERTED, CLIENTS = 'columns.json', 'clients.npz'
CLIENT_COLUMN, SPLIT_COLUMN = '@client.npy', '@split.npy'


class StoredClients(NamedTuple):
  """Natural clients of a source that keeps each one's rows together.

  Two numbers a client and split, where a column of names would cost a name for
  each of M rows.

  Attributes:
    client_ids: [C], ascending.
    segments: {split: (first row int64 [C], number of rows int64 [C])}, with
      'train' and, where there are any, 'validation' and 'test'.
  """

  client_ids: np.ndarray
  segments: Mapping[str, tuple[np.ndarray, np.ndarray]]


def store_clients(
  parts: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> StoredClients:
  """The clients of rows that lie part by part, client after client.

  Args:
    parts: {split: (names [C'], number of rows int [C'])} in the order of the
      rows; a client may be in several splits, once in each.

  Raises:
    InvalidInput: a name occurs twice in one split.
  """
  parts = {
    s: (np.asarray(names, str), sizes) for s, (names, sizes) in parts.items()
  }
  client_ids = np.unique(np.concatenate([names for names, _ in parts.values()]))
  segments, start = {}, 0
  for split, (names, sizes) in parts.items():
    first, count = np.zeros((2, len(client_ids)), np.int64)
    where = np.searchsorted(client_ids, names)
    again = np.flatnonzero(np.bincount(where, minlength=1) > 1)
    if len(again):
      raise validate.InvalidInput(
        f'Expected clients of {split} to have names of their own, got '
        f'{str(client_ids[again[0]])!r} twice.'
      )
    ends = start + np.cumsum(sizes, dtype=np.int64)
    first[where], count[where] = ends - sizes, sizes
    segments[split] = first, count
    start += int(np.sum(sizes))
  return StoredClients(client_ids, segments)


@dataclasses.dataclass(frozen=True)
class Columns:
  """What a source delivers.

  Attributes:
    name: of the data set.
    features: {name: [M, ...]}, with 'label' int [M], or tokens int [M, T]
      for sequences; arrays, memory maps or `LazyColumn`s.
    num_classes: Y.
    client: [M] names of natural clients, `StoredClients`, or None without.
    split: int [M], 0 = train, 1 = test, None without.
    overlapping: whether a client's rows share content, as the windows of one
      timeline do, so that a random split within clients would leak.
  """

  name: str
  features: Mapping[str, np.ndarray]
  num_classes: int
  client: np.ndarray | StoredClients | None = None
  split: np.ndarray | None = None
  overlapping: bool = False

  def __post_init__(self):
    if isinstance(self.client, np.ndarray) and self.client.dtype.kind == 'O':
      object.__setattr__(self, 'client', self.client.astype(str))
    label = self.features.get('label')
    # What is on disk is checked when it is read; [M, T] may mean anything.
    if type(label) is np.ndarray and label.ndim == 1:
      validate.check(
        label.dtype.kind in 'iu',
        f'Expected labels of {self.name} to be integers, got {label.dtype}.',
      )
      _check_range(f'label of {self.name}', label, self.num_classes - 1)


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
  arrays = {
    n: x if hasattr(x, 'dtype') else np.asarray(x) for n, x in arrays.items()
  }
  label = np.asarray(arrays['label'])
  validate.check(
    label.ndim == 1 and label.dtype.kind in 'iu' and len(label) > 0,
    f'Expected labels of {name} to be integers [M], got '
    f'{label.dtype}{list(label.shape)}.',
  )
  num_classes = num_classes or int(label.max()) + 1
  _check_range(f'label of {name}', label, num_classes - 1)
  for column in ('image', 'x', 'split', client_column):
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

  A folder that `convert.write_columns` made (it has columns.json) keeps its
  clients and is opened without reading its columns, which were checked then.

  Args:
    path: the file or folder; one array for each column, see `make_columns`.
    num_classes: Y; 0 takes the largest label + 1.
    client_column: name of the client column; a converted folder knows it.

  Raises:
    InvalidInput: the file is missing, unreadable or breaks the schema.
  """
  path = pathlib.Path(path)
  validate.check(
    path.exists(), f'Expected a data file or folder at {path}, found none.'
  )
  if (path / CONVERTED).is_file():
    return _load_converted(path, num_classes)
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


def column_file(name: str) -> str:
  """File of a feature in a converted folder; a name may have slashes."""
  return urllib.parse.quote(name, safe='') + '.npy'


def _load_converted(path: pathlib.Path, num_classes: int) -> Columns:
  """Opens a folder that `convert.write_columns` made, in O(C)."""
  try:
    made = json.loads((path / CONVERTED).read_text())
    validate.check(
      made['format'] == 1,
      f'Expected format 1 in {path / CONVERTED}, got {made["format"]}.',
    )
    load = lambda name: np.load(path / name, mmap_mode='r', allow_pickle=False)
    features = {n: load(column_file(n)) for n in made['features']}
    client = split = None
    if made['client'] == 'stored':
      with np.load(path / CLIENTS, allow_pickle=False) as file:
        segments = {
          s: (file[f'{s}_first'], file[f'{s}_count']) for s in made['segments']
        }
        client = StoredClients(file['client_ids'], segments)
    elif made['client'] == 'column':
      client = load(CLIENT_COLUMN)
    if made['split']:
      split = load(SPLIT_COLUMN)
    lengths = {n: len(x) for n, x in features.items()}
    validate.check(
      set(lengths.values()) == {made['rows']},
      f'Expected {made["rows"]} rows in {path}, got {lengths}.',
    )
    known = made['num_classes']
    validate.check(
      num_classes == 0 or num_classes >= known,
      f'Expected num_classes >= {known}, as {path} has, got '
      f'num_classes={num_classes}.',
    )
    return Columns(
      made['name'],
      features,
      num_classes or known,
      client,
      split,
      made.get('overlapping', False),
    )
  except validate.InvalidInput:
    raise
  except Exception as error:  # zipfile.BadZipFile, zlib.error, KeyError, ...
    raise validate.InvalidInput(
      f'Expected an intact folder of columns at {path}: '
      f'{error or type(error).__name__}'
    ) from error


def fingerprint(columns: Columns) -> str:
  """SHA-256 (hex) over names, shapes, dtypes, all labels and sampled rows.

  Cheap for memory-mapped data: at most 1,024 rows of every feature are read.
  Of lazy columns at most 64 rows are read, also of labels.
  """
  digest = hashlib.sha256()
  lazy = any(isinstance(x, LazyColumn) for x in columns.features.values())
  size = len(
    columns.features.get('label', next(iter(columns.features.values())))
  )
  rows = np.unique(
    np.linspace(0, size - 1, 64 if lazy else 1024).astype(np.int64)
  )
  for name in sorted(columns.features):
    x = columns.features[name]
    digest.update(f'{name} {x.dtype.str} {x.shape}'.encode())
    whole = name == 'label' and not isinstance(x, LazyColumn)
    digest.update(np.ascontiguousarray(x if whole else x[rows]).tobytes())
  for name, extra in _client_and_split(columns).items():
    digest.update(f'{name} {extra.dtype.str}'.encode())
    digest.update(np.ascontiguousarray(extra).tobytes())
  return digest.hexdigest()


def _client_and_split(columns: Columns) -> dict[str, np.ndarray]:
  client, arrays = columns.client, {}
  if isinstance(client, StoredClients):
    arrays['client_ids'] = client.client_ids
    for split in sorted(client.segments):
      first, count = client.segments[split]
      arrays |= {f'{split} first': first, f'{split} count': count}
  elif client is not None:
    arrays['client'] = client
  if columns.split is not None:
    arrays['split'] = columns.split
  return arrays
