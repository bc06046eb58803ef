"""Reading rows out of memory maps that are larger than memory.

Axis letters: M rows of a column, R rows of a request.
"""

import mmap
import os
from typing import Any

import numpy as np

# Runs of successive rows are read as such from this mean length on.
_RUN = 8


def _is_whole(column: Any) -> bool:
  """Whether a column is a memory map as it was opened, not a view of one."""
  return (
    type(column) is np.memmap
    and isinstance(column.base, mmap.mmap)
    and column.filename is not None
    and column.mode != 'c'  # what was written to it is not in the file
    and column.flags.c_contiguous
  )


def expect_random_access(column: Any) -> None:
  """Tells the system not to read around what is asked for.

  Rows of a few clients lie far apart: reading around them takes ten to a
  hundred times as long as reading them. Other columns are left alone.
  """
  if _is_whole(column) and hasattr(mmap, 'MADV_RANDOM'):
    column.base.madvise(mmap.MADV_RANDOM)


def read_rows(column: Any, rows: np.ndarray) -> np.ndarray:
  """column[rows], by system calls where rows int64 [R] are long runs.

  Args:
    column: [M, ...], anything that is indexed by rows.
    rows: int64 [R], in any order.

  Returns:
    [R, ...].
  """
  if not _is_whole(column) or not len(rows):
    return column[rows]
  begins = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
  if len(begins) * _RUN > len(rows):
    return column[rows]
  if rows.min() < 0 or rows.max() >= len(column):
    raise IndexError(
      f'Expected rows 0..{len(column) - 1}, got {rows.min()}..{rows.max()}.'
    )
  if column.mode in ('w+', 'r+'):
    column.flush()  # what was written to the map is read from the file
  result = np.empty((len(rows), *column.shape[1:]), column.dtype)
  size = result.nbytes // len(rows)
  into = memoryview(result.reshape(-1).view(np.uint8))
  ends = np.append(begins[1:], len(rows))
  file = os.open(column.filename, os.O_RDONLY)
  try:
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
      at = column.offset + int(rows[begin]) * size
      first, last = begin * size, end * size
      while first < last:
        count = os.preadv(file, [into[first:last]], at)
        if not count:
          raise OSError(f'{column.filename} ends before byte {at + 1}')
        first, at = first + count, at + count
  finally:
    os.close(file)
  return result
