"""Federated data in SQLite files, those of FedJAX and TensorFlow Federated.

FedJAX's format is a table federated_data(client_id BLOB PRIMARY KEY, data
BLOB, num_examples INTEGER) with one row a client, whose data is zlib-compressed
MessagePack, see `serialization`; one file for each split. Format:
https://github.com/google/fedjax/blob/main/fedjax/core/sqlite_federated_data.py.

TensorFlow Federated's has one row an example, examples(split_name, client_id,
serialized_example_proto), and client_metadata(client_id, split_name,
num_examples); all splits in one file. Format: https://github.com/google-parfait/
tensorflow-federated/blob/main/tensorflow_federated/python/simulation/datasets/sql_client_data.py.

Opening reads names and sizes of clients; examples are read when their rows are
asked for, a client at a time. SQLite stores num_examples behind the data, so
that a FedJAX file's first open walks through all of it: 0.3 s for 100,000
clients in 480 MB that the system has in memory, about 1 s from a disk, and in
proportion. Of files above 16 MB the result is kept in FILE.index.npz; a later
open takes 0.06 s. A changed file (size or time of change) is indexed again, and
where the folder is read-only every open is like the first.

Axis letters: C clients, M rows.
"""

import logging
import os
import pathlib
import sqlite3
import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.data.columns import Columns, StoredClients, store_clients
from fedjax_ext.data.index_cache import cached_index, file_key
from fedjax_ext.data.lazy import (
  Reader,
  Records,
  RecordType,
  client_reader,
  concatenate,
  lazy_columns,
)
from fedjax_ext.data.serialization import (
  pack_arrays,
  unpack_arrays,
  unpack_examples,
)

_LOG = logging.getLogger(__name__)
_KEEP_INDEX_FROM = 1 << 24  # bytes of the file
_FEDJAX, _TFF = {'federated_data'}, {'examples', 'client_metadata'}
# Our split -> its names in TensorFlow Federated's files.
_SPLITS = {
  'train': ('train',),
  'validation': ('validation', 'heldout', 'held_out'),
  'test': ('test',),
}


class _Database(threading.local):
  """A file opened for reading, once in each thread that uses it."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._connection: sqlite3.Connection | None = None

  def select(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
    try:
      if self._connection is None:
        uri = self._path.absolute().as_uri() + '?mode=ro'
        self._connection = sqlite3.connect(uri, uri=True)
      return self._connection.execute(query, values).fetchall()
    except sqlite3.Error as error:
      raise validate.InvalidInput(
        f'Expected an intact SQLite file at {self._path}: {error}'
      ) from error


class _FedjaxFile:
  """One split: client_ids str [C] ascending, sizes int64 [C], read(c)."""

  def __init__(self, path: pathlib.Path, database: _Database):
    self.path, self._database = path, database
    if path.stat().st_size < _KEEP_INDEX_FROM:
      index = self._index()
    else:
      beside = path.with_name(f'{path.name}.index.npz')
      index = cached_index(beside, file_key([path]), self._index)
    self.client_ids, self.sizes = index['client_ids'], index['sizes']
    self._rowids = index['rowids']

  def _index(self) -> dict[str, np.ndarray]:
    _LOG.info('Reading the clients of %s.', self.path)
    found = self._database.select(
      'SELECT client_id, num_examples, rowid FROM federated_data'
    )
    client_ids = _names([row[0] for row in found])
    sizes = _sizes([row[1] for row in found], self.path)
    order = np.argsort(client_ids, kind='stable')
    rowids = np.array([row[2] for row in found], np.int64)
    return {
      'client_ids': client_ids[order],
      'sizes': sizes[order],
      'rowids': rowids[order],
    }

  def read(self, c: int) -> dict[str, np.ndarray]:
    """Examples {name: [n, ...]} of client number c."""
    found = self._database.select(
      'SELECT data FROM federated_data WHERE rowid = ?', int(self._rowids[c])
    )
    if not found:
      raise _broken(self, c, 'the file has changed since it was opened.')
    try:
      arrays = unpack_arrays(zlib.decompress(found[0][0]))
    except (zlib.error, TypeError, validate.InvalidInput) as error:
      raise _broken(self, c, error) from error
    return _checked(self, c, arrays)


class _TffFile:
  """The same of one split of TensorFlow Federated's format."""

  def __init__(self, path: pathlib.Path, database: _Database, split: str):
    self.path, self._database, self._split = path, database, split
    found = database.select(
      'SELECT client_id, num_examples FROM client_metadata '
      'WHERE split_name = ?',
      split,
    )
    self._keys = [row[0] for row in found]
    client_ids = _names(self._keys)
    self._order = np.argsort(client_ids, kind='stable')
    self.client_ids = client_ids[self._order]
    self.sizes = _sizes([row[1] for row in found], path)[self._order]

  def read(self, c: int) -> dict[str, np.ndarray]:
    """Examples {name: [n, ...]} of client number c."""
    found = self._database.select(
      'SELECT serialized_example_proto FROM examples '
      'WHERE split_name = ? AND client_id = ? ORDER BY rowid',
      self._split,
      self._keys[self._order[c]],
    )
    try:
      arrays = unpack_examples([row[0] for row in found])
    except (TypeError, validate.InvalidInput) as error:
      raise _broken(self, c, error) from error
    return _checked(self, c, arrays)


_File = _FedjaxFile | _TffFile


def _names(found: list[Any]) -> np.ndarray:
  names = [
    n.decode(errors='backslashreplace') if isinstance(n, bytes) else str(n)
    for n in found
  ]
  return np.array(names, str) if names else np.zeros(0, '<U1')


def _sizes(found: list[Any], path: pathlib.Path) -> np.ndarray:
  wrong = [n for n in found if not isinstance(n, int) or n < 0]
  validate.check(
    not wrong, f'Expected num_examples >= 0 in {path}, got {wrong[:1]}.'
  )
  return np.array(found, np.int64)


def _broken(
  file: _File, c: int, error: Exception | str
) -> validate.InvalidInput:
  return validate.InvalidInput(
    f'Expected intact examples of client {file.client_ids[c]} in '
    f'{file.path}: {error}'
  )


def _checked(
  file: _File, c: int, arrays: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  size = file.sizes[c]
  for name, x in arrays.items():
    if not isinstance(x, np.ndarray) or x.ndim < 1 or len(x) != size:
      got = list(x.shape) if isinstance(x, np.ndarray) else type(x).__name__
      message = f'{name!r} should have {size} rows but is {got}.'
      raise _broken(file, c, message)
  return dict(arrays)


def _open(paths: Mapping[str, pathlib.Path]) -> dict[str, _File]:
  """Files of FedJAX's by split, or the splits of one of TFF's."""
  opened: dict[str, _File] = {}
  for split, path in paths.items():
    validate.check(
      path.is_file(), f'Expected an SQLite file at {path}, found none.'
    )
    database = _Database(path)
    found = database.select(
      "SELECT name FROM sqlite_master WHERE type IN ('table', 'view')"
    )
    tables = {row[0] for row in found}
    if tables >= _FEDJAX:
      opened[split] = _FedjaxFile(path, database)
      continue
    validate.check(
      tables >= _TFF,
      'Expected a table federated_data, or examples and client_metadata, in '
      f'{path}, got tables {sorted(tables)}.',
    )
    validate.check(
      list(paths) == ['train'],
      f'Expected no other file beside {path}, which has all splits, got '
      f'{sorted(set(map(str, paths.values())) - {str(path)})}.',
    )
    found = database.select('SELECT DISTINCT split_name FROM client_metadata')
    names = {row[0] for row in found}
    for ours, theirs in _SPLITS.items():
      for name in theirs:
        if name in names and ours not in opened:
          opened[ours] = _TffFile(path, database, name)
  validate.check(
    'train' in opened and opened['train'].sizes.sum() > 0,
    f'Expected train examples in {next(iter(paths.values()))}, got none.',
  )
  return opened


def read_clients(
  path: str | pathlib.Path, split: str = 'train'
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
  """Yields every client's name and examples, in ascending order of names.

  Args:
    path: the file.
    split: of a file of TensorFlow Federated's: 'train', 'validation', 'test';
      FedJAX's files have one each.

  Yields:
    (name, {feature: [n, ...]}); features of bytes are object arrays. Arrays
    are read-only.

  Raises:
    InvalidInput: the file is missing or broken; the message names the client.
  """
  opened = _open({'train': pathlib.Path(path)})
  if isinstance(opened['train'], _TffFile):
    validate.one_of(f'split of {path}', split, opened)
    file = opened[split]
  else:
    file = opened['train']
  for c, name in enumerate(file.client_ids.tolist()):
    yield name, file.read(c)


def open_sqlite(
  paths: Mapping[str, pathlib.Path],
  *,
  num_classes: int = 0,
  rename: Mapping[str, str] | None = None,
  text: Collection[str] = (),
) -> tuple[Reader, StoredClients]:
  """Opens files without reading examples, but for the first client's types.

  Args:
    paths: {split: file} with 'train' first, then 'validation' and 'test'; of a
      file of TensorFlow Federated's, {'train': file} for all its splits.
    num_classes: Y, see `lazy.check_records`.
    rename: {name in the file: name of the feature}.
    text: features of bytes to read too; others of bytes are left out.

  Returns:
    A reader of the numeric and text features, split after split, and the
    clients.

  Raises:
    InvalidInput: a file is missing, of another format or broken.
  """
  opened = _open(paths)
  readers = []
  for file in opened.values():
    if not file.sizes.any():
      continue
    first = int(np.flatnonzero(file.sizes)[0])
    read = _renamed_read(file, rename or {}, first)
    types = _types(read(first), file.path, text)
    readers.append(
      client_reader(
        read,
        np.concatenate([[0], np.cumsum(file.sizes)]),
        types,
        client_ids=file.client_ids,
        source=str(file.path),
        num_classes=num_classes,
      )
    )
  clients = store_clients(
    {split: (f.client_ids, f.sizes) for split, f in opened.items()}
  )
  return concatenate(readers), clients


def _renamed_read(
  file: _File, rename: Mapping[str, str], first: int
) -> Callable[[int], Records]:
  found = file.read(first)
  for old, new in rename.items():
    validate.check(
      old == new or old in found,
      f'Expected a feature {old} in {file.path}, got {sorted(found)}.',
    )

  def read(c: int) -> Records:
    records = file.read(c)
    moved = {new: records[old] for old, new in rename.items() if old in records}
    return {n: x for n, x in records.items() if n not in rename} | moved

  return read


def _types(
  records: Records, path: pathlib.Path, text: Collection[str]
) -> dict[str, RecordType]:
  """Types of one client's numeric and text features; labels become int32."""
  for name in text:
    validate.check(
      name in records,
      f'Expected a feature {name!r} in {path}, got {sorted(records)}.',
    )
  types = {
    name: RecordType(x.shape[1:], x.dtype)
    for name, x in records.items()
    if name in text or x.dtype.kind not in 'OSU'
  }
  validate.check(
    types, f'Expected numeric features in {path}, got {sorted(records)}.'
  )
  if 'label' in types:
    shape, dtype = types['label']
    validate.check(
      shape == () and dtype.kind in 'iu',
      f'Expected labels of {path} to be integers [M], got '
      f'{dtype}{["M", *shape]}.',
    )
    types['label'] = RecordType((), np.dtype(np.int32))
  return types


def load_sqlite(
  *,
  data_dir: str,
  file: str,
  test_file: str = '',
  validation_file: str = '',
  num_classes: int = 0,
  label: str = 'label',
  image: str = 'image',
) -> Columns:
  """Opens SQLite files of FedJAX's or TensorFlow Federated's format.

  Examples stay in the file until their rows are asked for; each client's are
  checked then: labels in 0..num_classes-1, finite floats. Features of bytes
  are left out, see `read_clients`.

  Args:
    data_dir: folder of the files.
    file: file of the train clients, in it; TensorFlow Federated's has all
      splits ('heldout' becomes 'validation').
    test_file: file of the test examples, in FedJAX's format.
    validation_file: the same for validation.
    num_classes: Y; 0 takes the largest label + 1, at the cost of reading all.
    label: integer feature [M] to be called 'label'.
    image: feature to be called 'image'.

  Returns:
    Lazy columns with `StoredClients`.

  Raises:
    InvalidInput: a file is missing, of another format or broken, or has no
      such label.
  """
  names = {'train': file, 'validation': validation_file, 'test': test_file}
  paths = {s: pathlib.Path(data_dir, name) for s, name in names.items() if name}
  reader, clients = open_sqlite(
    paths, num_classes=num_classes, rename={label: 'label', image: 'image'}
  )
  validate.check(
    'label' in reader.types,
    f'Expected an integer feature {label} in {paths["train"]}, got '
    f'{sorted(reader.types)}.',
  )
  columns = lazy_columns(reader)
  if not num_classes:
    _LOG.warning('Reading all labels of %s; num_classes=... saves that.', file)
    num_classes = int(columns['label'][:].max()) + 1
  return Columns(paths['train'].stem, columns, num_classes, clients)


def write_sqlite(
  path: str | pathlib.Path,
  clients: Iterable[tuple[str | bytes, Mapping[str, np.ndarray]]],
) -> pathlib.Path:
  """Writes clients as a file that FedJAX reads too; one split a file.

  Args:
    path: the file, which must not exist; it appears when all is written.
    clients: (name, {feature: [n, ...]}) of each; numbers, or bytes or text,
      which is kept as bytes.

  Returns:
    The path.

  Raises:
    InvalidInput: the file exists, a name occurs twice, or the features of a
      client differ in length.
  """
  path = pathlib.Path(path)
  validate.check(not path.exists(), f'Expected no file at {path} yet.')
  partial = path.with_name(f'{path.name}.partial')
  partial.unlink(missing_ok=True)
  connection = sqlite3.connect(partial)
  try:
    connection.execute('PRAGMA journal_mode=OFF')
    connection.execute(
      'CREATE TABLE federated_data (client_id BLOB NOT NULL PRIMARY KEY, '
      'data BLOB NOT NULL, num_examples INTEGER NOT NULL)'
    )
    connection.executemany(
      'INSERT INTO federated_data VALUES (?, ?, ?)',
      (_encoded(name, features) for name, features in clients),
    )
    connection.commit()
    connection.close()
    os.replace(partial, path)
  except sqlite3.Error as error:
    raise validate.InvalidInput(
      f'Expected to write clients with names of their own to {path}: {error}'
    ) from error
  finally:
    connection.close()
    partial.unlink(missing_ok=True)
  return path


def _encoded(
  name: str | bytes, features: Mapping[str, np.ndarray]
) -> tuple[bytes, bytes, int]:
  arrays = {n: np.asarray(x) for n, x in features.items()}
  lengths = {n: len(x) if x.ndim else -1 for n, x in arrays.items()}
  validate.check(
    len(set(lengths.values())) == 1 and -1 not in lengths.values(),
    f'Expected features of client {name!r} of one length, got {lengths}.',
  )
  name = name.encode() if isinstance(name, str) else name
  size = next(iter(lengths.values()))
  return name, zlib.compress(pack_arrays(arrays)), size
