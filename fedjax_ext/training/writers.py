"""Metric writers: JSON lines, CSV and TensorBoard, one row a round.

metrics.jsonl is the record; metrics.csv is made from it and grows a column when
a new metric appears. A resumed run drops the rows after its checkpoint.
"""

import csv
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

_LOG = logging.getLogger(__name__)


Row = dict[str, Any]


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Replaces a file by text as a whole; the old one stays on failure.

  Raises:
    OSError: the text could not be written.
  """
  temporary = path.with_name(f'.{path.name}.tmp')
  try:
    with temporary.open('w') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  except OSError:
    temporary.unlink(missing_ok=True)
    raise


def read_rows(path: pathlib.Path) -> list[Row]:
  """Rows of a JSON-lines file ({name: scalar} each); a torn last one is cut."""
  rows = []
  if path.exists():
    for line in path.read_text().splitlines():
      try:
        rows.append(json.loads(line))
      except json.JSONDecodeError:
        break
  return rows


class MetricWriter:
  """Writes rows of scalars under a workdir."""

  def __init__(
    self, workdir: pathlib.Path, *, after_round: int, tensorboard: bool = True
  ):
    """Opens the files and drops rows after a round.

    Args:
      workdir: the run's folder.
      after_round: the round that the run resumes from, 0 for a fresh run.
      tensorboard: also write TensorBoard events, if tensorboardX is there.
    """
    self._jsonl = workdir / 'metrics.jsonl'
    self._csv = workdir / 'metrics.csv'
    self.rows = [
      row for row in read_rows(self._jsonl) if row['round'] <= after_round
    ]
    write_atomically(
      self._jsonl, ''.join(f'{json.dumps(row)}\n' for row in self.rows)
    )
    self._columns: list[str] = []
    self._rewrite_csv()
    self._events = None
    if tensorboard:
      self._events = _event_writer(workdir / 'tensorboard', after_round + 1)

  def _rewrite_csv(self) -> None:
    self._columns = list(dict.fromkeys(k for row in self.rows for k in row))
    lines = [self._columns] + [
      [row.get(c, '') for c in self._columns] for row in self.rows
    ]
    temporary = self._csv.with_name('.metrics.csv.tmp')
    with temporary.open('w', newline='') as file:
      csv.writer(file).writerows(lines)
    temporary.replace(self._csv)

  def write(self, round: int, values: Mapping[str, Any]) -> None:
    """Appends one row.

    Args:
      round: number of the round.
      values: {name: scalar}.

    Raises:
      OSError: a file could not be written.
    """
    row = {'round': round} | {k: _plain(v) for k, v in values.items()}
    self.rows.append(row)
    try:
      self._append(row)
    except OSError as error:
      raise OSError(
        error.errno, error.strerror, str(self._jsonl.parent)
      ) from error

  def _append(self, row: Row) -> None:
    with self._jsonl.open('a') as file:
      file.write(f'{json.dumps(row)}\n')
    if set(row) <= set(self._columns):
      with self._csv.open('a', newline='') as file:
        csv.writer(file).writerow([row.get(c, '') for c in self._columns])
    else:
      self._rewrite_csv()
    if self._events is not None:
      self._events.write(row)

  def close(self) -> None:
    """Closes the TensorBoard writer; the files are closed after each row."""
    if self._events is not None:
      self._events.close()


def _plain(value: Any) -> Any:
  """A Python number; non-finite ones as text, since JSON has no such number."""
  value = value.item() if hasattr(value, 'item') else value
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value


class _Events:
  """TensorBoard events, written in the caller's thread.

  tensorboardX's SummaryWriter writes in a thread of its own; when the disk is
  full that thread dies and the queue to it blocks for ever.
  """

  def __init__(self, path: pathlib.Path, first_round: int):
    from tensorboardX import event_file_writer, proto, summary

    self._proto, self._summary = proto.event_pb2, summary
    path.mkdir(exist_ok=True)
    self._writer = event_file_writer.EventsWriter(str(path / 'events'))
    start = self._proto.SessionLog(status=self._proto.SessionLog.START)
    self._write(first_round, session_log=start)  # hides what a kill left over

  def _write(self, round: int, **content: Any) -> None:
    event = self._proto.Event(step=round, wall_time=time.time(), **content)
    self._writer.write_event(event)

  def write(self, row: Row) -> None:
    try:
      for name, value in row.items():
        if name != 'round' and isinstance(value, int | float):
          self._write(row['round'], summary=self._summary.scalar(name, value))
      self._writer.flush()
    except OSError:
      self._writer = None  # closing it would try the same again
      raise

  def close(self) -> None:
    if self._writer is not None:
      self._writer.close()
      self._writer = None


def _event_writer(path: pathlib.Path, first_round: int) -> _Events | None:
  try:
    return _Events(path, first_round)
  except ImportError:
    _LOG.info('tensorboardX is not installed: no TensorBoard events.')
    return None
