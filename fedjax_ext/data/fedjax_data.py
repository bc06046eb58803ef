"""Data of FedJAX's `FederatedData` objects, as columns.

Axis letters: M rows.
"""

import copy
import pathlib
import sqlite3
from typing import Any

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.data.columns import Columns, store_clients
from fedjax_ext.data.lazy import (
  Reader,
  Records,
  RecordType,
  client_reader,
  concatenate,
  lazy_columns,
)


def from_fedjax(
  train: Any,
  *,
  test: Any = None,
  name: str = 'fedjax',
  num_classes: int = 0,
  image: str = 'x',
  label: str = 'y',
) -> Columns:
  """Wraps `fedjax.FederatedData`; examples are asked for when they are read.

  Their preprocessing is FedJAX's and runs at every read. It may not change a
  client's number of examples, nor draw random numbers.

  Args:
    train: train clients, with FedJAX's `client_sizes()` and `get_client(id)`.
    test: test clients, of the same names or others.
    name: for messages.
    num_classes: Y; 0 takes the largest label + 1, at the cost of reading all.
    image: feature to be called 'image', where there is one.
    label: integer feature [n] to be called 'label'.

  Returns:
    Lazy columns with `StoredClients`.

  Raises:
    InvalidInput: there is no such label, no train example, or two clients
      have one name.
  """
  rename = {label: 'label', image: 'image'}
  readers, parts = [], {}
  for split, data in (('train', train), ('test', test)):
    if data is None:
      continue
    found = [(_text(key), key, size) for key, size in data.client_sizes()]
    found.sort(key=lambda client: client[0])
    names = np.array([text for text, _, _ in found], str)
    sizes = np.array([size for _, _, size in found], np.int64)
    parts[split] = names, sizes
    if sizes.sum():
      keys = [key for _, key, _ in found]
      where = f'{split} of {name}'
      readers.append(
        _reader(data, keys, names, sizes, rename, num_classes, where)
      )
  validate.check(
    parts['train'][1].sum() > 0,
    f'Expected train examples in {name}, got none.',
  )
  columns = lazy_columns(concatenate(readers))
  if not num_classes:
    num_classes = int(columns['label'][:].max()) + 1
  return Columns(name, columns, num_classes, store_clients(parts))


def _text(key: Any) -> str:
  if isinstance(key, bytes):
    return key.decode(errors='backslashreplace')
  return str(key)


def _reader(
  data: Any,
  keys: list[Any],
  names: np.ndarray,
  sizes: np.ndarray,
  rename: dict[str, str],
  num_classes: int,
  where: str,
) -> Reader:
  data = _for_any_thread(data)

  def read(c: int) -> Records:
    examples = data.get_client(keys[c]).all_examples()
    return {rename.get(n, n): np.asarray(x) for n, x in examples.items()}

  first = read(int(np.flatnonzero(sizes)[0]))
  types = {
    n: RecordType(x.shape[1:], x.dtype)
    for n, x in first.items()
    if x.dtype.kind not in 'OSU'
  }
  validate.check(
    'label' in types
    and types['label'].shape == ()
    and types['label'].dtype.kind in 'iu',
    f'Expected an integer label [n] in {where}, got '
    f'{ {n: f"{t.dtype}{list(t.shape)}" for n, t in types.items()} }.',
  )
  types['label'] = RecordType((), np.dtype(np.int32))
  return client_reader(
    read,
    np.concatenate([[0], np.cumsum(sizes)]),
    types,
    client_ids=names,
    source=where,
    num_classes=num_classes,
  )


def _for_any_thread(data: Any) -> Any:
  """FedJAX's SQLite data with a connection that other threads may use.

  Its own belongs to the thread that opened it, but plans are made in another.
  Reads wait for each other, see `Reader`.
  """
  connection = getattr(data, '_connection', None)
  if not isinstance(connection, sqlite3.Connection):
    return data
  (_, _, file), *_ = connection.execute('PRAGMA database_list').fetchall()
  if not file:  # in memory
    return data
  copied = copy.copy(data)
  copied._connection = sqlite3.connect(
    pathlib.Path(file).as_uri() + '?mode=ro', uri=True, check_same_thread=False
  )
  return copied
