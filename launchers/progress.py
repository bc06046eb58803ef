"""Progress over cells: a tqdm bar on a terminal, log lines elsewhere."""

import contextlib
import sys
import time
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
    ended, start = kept, time.monotonic()

    def log_line(message: str) -> None:
      nonlocal ended
      ended += 1
      each = (time.monotonic() - start) / (ended - kept)
      left = _spoken((total - ended) * each)
      logging.info('%s %d/%d%s: %s', label, ended, total, left, message)

    yield log_line
    return
  # The monitor thread would run beside the forks that start the cells.
  tqdm.monitor_interval = 0
  with tqdm(total=total, initial=kept, desc=label, unit='cell') as bar:

    def advance(message: str) -> None:
      bar.write(message, file=sys.stderr)
      bar.update()

    yield advance


def _spoken(seconds: float) -> str:
  """', 12 min left', ', 2 h 5 min left', or '' where nothing is."""
  if not seconds:
    return ''
  minutes = max(1, round(seconds / 60))
  hours, rest = divmod(minutes, 60)
  return f', {hours} h {rest} min left' if hours else f', {minutes} min left'


def _import_tqdm() -> type | None:
  try:
    from tqdm import tqdm
  except ImportError:
    return None
  return tqdm
