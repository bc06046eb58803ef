"""Conversion of any source to a folder of memory-mapped columns.

A converted folder opens in O(clients) and its rows are read straight from
disk, where the source decompresses and decodes them at every read. It has a
.npy file for each feature, clients.npz or @client.npy, @split.npy, and
columns.json, which says what there is; `load_columns` reads it.

Axis letters: C clients, M rows.
"""

import contextlib
import json
import logging
import os
import pathlib
import shutil

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.data.columns import (
  CLIENT_COLUMN,
  CLIENTS,
  CONVERTED,
  SPLIT_COLUMN,
  Columns,
  StoredClients,
  column_file,
)
from fedjax_ext.data.lazy import check_records

_LOG = logging.getLogger(__name__)
_CHUNK = 1 << 26  # bytes of all features together


def write_columns(columns: Columns, folder: str | pathlib.Path) -> pathlib.Path:
  """Writes columns to a folder, in chunks of 64 MB; all of it or nothing.

  Values are checked on the way, see `lazy.check_records`. Features that
  are not numbers of NumPy's (text, bytes, bfloat16) are left out, with a line
  in the log.

  Args:
    columns: of any source.
    folder: which must not exist; it appears when all is written. What an
      interrupted call left in FOLDER.partial is removed.

  Returns:
    The folder, for `load_columns`.

  Raises:
    InvalidInput: the folder exists, cannot be written, or a value is wrong.
  """
  folder = pathlib.Path(folder)
  validate.check(not folder.exists(), f'Expected no folder at {folder} yet.')
  features = {
    name: x for name, x in columns.features.items() if x.dtype.kind in 'biufc'
  }
  left_out = sorted(set(columns.features) - set(features))
  if left_out:
    _LOG.info('Left out of %s: %s, which are not numbers.', folder, left_out)
  validate.check(
    features, f'Expected numeric features in {columns.name}, got {left_out}.'
  )
  partial = folder.with_name(f'{folder.name}.partial')
  try:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_features(columns, features, partial)
    _write_clients(columns, partial)
    _write_description(columns, features, partial)
    os.replace(partial, folder)
  except OSError as error:
    raise validate.InvalidInput(
      f'Expected to write {folder}: {error}'
    ) from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return folder


def _write_features(
  columns: Columns, features: dict[str, np.ndarray], folder: pathlib.Path
) -> None:
  rows = len(next(iter(features.values())))
  row_bytes = sum(
    int(np.prod(x.shape[1:])) * x.dtype.itemsize for x in features.values()
  )
  chunk = max(1, _CHUNK // max(1, row_bytes))
  classes = features.get('label') is not None and features['label'].ndim == 1
  with contextlib.ExitStack() as stack:
    files = {}
    for name, x in features.items():
      file = stack.enter_context(open(folder / column_file(name), 'wb'))
      files[name] = file
      header = {
        'descr': np.lib.format.dtype_to_descr(x.dtype),
        'fortran_order': False,
        'shape': tuple(x.shape),
      }
      np.lib.format.write_array_header_1_0(file, header)
    for start in range(0, rows, chunk):
      here = slice(start, min(start + chunk, rows))
      records = {n: np.asarray(x[here]) for n, x in features.items()}
      check_records(
        {n: x for n, x in records.items() if n != 'label' or classes},
        where=f'rows {here.start} to {here.stop - 1} of {columns.name}',
        num_classes=columns.num_classes,
      )
      for name, values in records.items():
        np.ascontiguousarray(values).tofile(files[name])


def _write_clients(columns: Columns, folder: pathlib.Path) -> None:
  client = columns.client
  if isinstance(client, StoredClients):
    arrays = {'client_ids': _plain(client.client_ids)}
    for split, (first, count) in client.segments.items():
      arrays |= {f'{split}_first': first, f'{split}_count': count}
    np.savez(folder / CLIENTS, **arrays)
  elif client is not None:
    np.save(folder / CLIENT_COLUMN, _plain(client))
  if columns.split is not None:
    np.save(folder / SPLIT_COLUMN, np.asarray(columns.split))


def _plain(names: np.ndarray) -> np.ndarray:
  """Names without Python objects."""
  names = np.asarray(names)
  return names.astype(str) if names.dtype.kind == 'O' else names


def _write_description(
  columns: Columns, features: dict[str, np.ndarray], folder: pathlib.Path
) -> None:
  client, stored = columns.client, isinstance(columns.client, StoredClients)
  description = {
    'format': 1,
    'name': columns.name,
    'num_classes': int(columns.num_classes),
    'rows': len(next(iter(features.values()))),
    'features': sorted(features),
    'client': 'stored' if stored else 'none' if client is None else 'column',
    'segments': list(client.segments) if stored else [],
    'split': columns.split is not None,
    'overlapping': columns.overlapping,
  }
  path = folder / CONVERTED
  path.write_text(json.dumps(description, indent=1) + '\n')
