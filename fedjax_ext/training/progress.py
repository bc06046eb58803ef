"""Progress of long work: a bar on a terminal, log lines elsewhere."""

import logging
import sys
import time
from types import TracebackType
from typing import Any

_LOG = logging.getLogger(__name__)


class Progress:
  """Counts rounds; use as a context manager."""

  def __init__(
    self,
    total: int,
    *,
    initial: int = 0,
    seconds_between_lines: float = 10.0,
    bar: bool = True,
  ):
    """Starts counting.

    Args:
      total: rounds in all.
      initial: rounds already done.
      seconds_between_lines: at least so long between two log lines.
      bar: False writes log lines on a terminal, too.
    """
    self._total = total
    self._done = initial
    self._start = self._last = time.monotonic()
    self._initial = initial
    self._pause = seconds_between_lines
    self._bar = _bar(total, initial) if bar else None

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if self._bar is not None:
      self._bar.close()

  def update(self, text: str, *, important: bool = False) -> None:
    """Counts one round and shows a short text about it.

    Args:
      text: e.g. 'train_loss=0.31'.
      important: write a log line even if the last one is recent.
    """
    self._done += 1
    if self._bar is not None:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(1)
      return
    now = time.monotonic()
    if (
      important or now - self._last >= self._pause or self._done == self._total
    ):
      self._last = now
      done = self._done - self._initial
      left = (now - self._start) / done * (self._total - self._done)
      _LOG.info(
        'round %d/%d, %.0f s left: %s', self._done, self._total, left, text
      )


def _bar(total: int, initial: int) -> Any:
  if not sys.stderr.isatty():
    return None
  try:
    import tqdm
  except ImportError:
    return None
  return tqdm.tqdm(
    total=total, initial=initial, unit='round', dynamic_ncols=True
  )
