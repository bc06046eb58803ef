"""Indexes of data files, kept beside them so that later opens are cheap."""

import contextlib
import logging
import os
import pathlib
import threading
from collections.abc import Callable, Sequence

import numpy as np

_LOG = logging.getLogger(__name__)
_KEY = 'key of the indexed files'


def file_key(paths: Sequence[pathlib.Path], *extra: object) -> str:
  """What changes when a file does: names, sizes, times of last change."""
  stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
  return repr((1, stats, *extra))  # 1: version of this layout


def cached_index(
  path: pathlib.Path, key: str, build: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
  """The arrays that `build` makes, from the file if it has them.

  The file is written whole or not at all. One that is broken, or made for
  another key, is replaced. Where nothing can be written, nothing is kept.

  Args:
    path: FILE.npz to keep them in.
    key: of what they were made from, see `file_key`.
    build: makes {name: array}, without Python objects.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      if str(file[_KEY]) == key:
        return {n: file[n] for n in file.files if n != _KEY}
  except Exception:  # absent, cut short, or something else: made again
    pass
  arrays = build()
  mine = f'{path.name}.{os.getpid()}-{threading.get_ident()}.partial'
  partial = path.with_name(mine)
  try:
    with open(partial, 'wb') as file:
      np.savez(file, **{_KEY: np.array(key)}, **arrays)
    os.replace(partial, path)
  except OSError as error:
    _LOG.debug('No index kept at %s: %s', path, error)
    with contextlib.suppress(OSError):
      partial.unlink()
  return arrays
