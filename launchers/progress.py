"""Progress over cells: a tqdm bar on a terminal, log lines elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from absl import logging


@contextlib.contextmanager
def progress(
  total: int, label: str, *, kept: int = 0
) -> Iterator[Callable[[str], None]]:
  """Shows how many cells have ended.

  Args:
    total: how many cells there are.
    label: what to call them.
    kept: how many had ended before.

  Yields:
    A function to call with one line whenever a cell has ended.
  """
  tqdm = _import_tqdm() if sys.stderr.isatty() else None
  if tqdm is None:
    if kept:
      logging.info('%s: %d of %d kept from before', label, kept, total)
    ended = kept

    def log_line(message: str) -> None:
      nonlocal ended
      ended += 1
      logging.info('%s %d/%d: %s', label, ended, total, message)

    yield log_line
    return
  # The monitor thread would run beside the forks that start the cells.
  tqdm.monitor_interval = 0
  with tqdm(total=total, initial=kept, desc=label, unit='cell') as bar:

    def advance(message: str) -> None:
      bar.write(message, file=sys.stderr)
      bar.update()

    yield advance


def _import_tqdm() -> type | None:
  try:
    from tqdm import tqdm
  except ImportError:
    return None
  return tqdm
