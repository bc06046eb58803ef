"""What a cell leaves behind: final.json from the binary, cell.json from us."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from launchers import grid
from launchers import spec as spec_lib

Status = Literal['ok', 'diverged', 'failed']


@dataclasses.dataclass(frozen=True)
class Final:
  """The contents of one final.json; None or '' where it says nothing."""

  metrics: Mapping[str, Any]
  diverged: bool
  round: int | None
  clients: int | None
  examples: int | None
  examples_processed: int | None
  wall_seconds: float | None
  device: str
  versions: Mapping[str, str]
  commit: str


@dataclasses.dataclass(frozen=True)
class Result:
  """How one cell ended.

  Attributes:
    cell: the cell.
    final: what the binary reported, or None if it failed.
    code: the digest of the code that it ran on.
    reason: why it failed, one line; '' if it did not.
  """

  cell: grid.Cell
  final: Final | None
  code: str
  reason: str = ''


@dataclasses.dataclass(frozen=True)
class Measure:
  """One metric of one cell; `value` is None unless the status is 'ok'."""

  status: Status
  value: float | None = None
  reason: str = ''


def measure(result: Result, metric: str) -> Measure:
  """Takes one metric out of a result, and nothing else.

  Args:
    result: how the cell ended.
    metric: the key in final.json's metrics.

  Returns:
    The value as the binary wrote it. A figure that is not finite counts as
    divergence, a metric that is absent as failure.
  """
  if result.final is None:
    return Measure('failed', reason=result.reason)
  if result.final.diverged:
    return Measure('diverged', reason='the run diverged')
  value = result.final.metrics.get(metric)
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return Measure('failed', reason=f'final.json has no number for {metric!r}')
  if not math.isfinite(value):
    return Measure('diverged', reason=f'{metric} is {value}')
  return Measure('ok', float(value))


def measure_figure(
  spec: spec_lib.TableSpec, result: Result, figure: str
) -> Measure:
  """Takes a figure out of a result, wherever the result's row has it."""
  return measure(result, spec.key(result.cell.row, figure))


def lacks(spec: spec_lib.TableSpec, result: Result, figure: str) -> bool:
  """Whether a run that ended well has no such figure at all."""
  key = spec.key(result.cell.row, figure)
  return not key or (
    result.final is not None and key not in result.final.metrics
  )


def read_final(workdir: pathlib.Path) -> Final | None:
  """Reads a cell's final.json.

  Args:
    workdir: the cell's folder.

  Returns:
    Its contents, or None where the file is absent or is no valid report.
  """
  data = read_json(workdir / 'final.json')
  if not isinstance(data, dict) or not isinstance(data.get('metrics'), dict):
    return None
  versions = data.get('versions')
  return Final(
    metrics=data['metrics'],
    diverged=bool(data.get('diverged', False)),
    round=data.get('round'),
    clients=data.get('clients'),
    examples=data.get('examples'),
    examples_processed=data.get('examples_processed'),
    wall_seconds=data.get('wall_seconds'),
    device=str(data.get('device', '')),
    versions=versions if isinstance(versions, dict) else {},
    commit=str(data.get('commit', '')),
  )


def read_curve(workdir: pathlib.Path, metric: str) -> list[tuple[int, float]]:
  """Reads a metric's course from a cell's metrics.jsonl.

  Args:
    workdir: the cell's folder.
    metric: its key there.

  Returns:
    (round, value) where a round has a finite one; empty where nothing is.
  """
  try:
    lines = (workdir / 'metrics.jsonl').read_text('utf8').splitlines()
  except OSError:
    return []
  points = []
  for line in lines:
    try:
      row = json.loads(line)
    except ValueError:  # Cut short by a kill.
      continue
    value = row.get(metric)
    if isinstance(value, (int, float)) and math.isfinite(value):
      points.append((row['round'], float(value)))
  return points


def read_json(path: pathlib.Path) -> Any:
  """Reads a JSON file; None where it is absent or cut short."""
  try:
    return json.loads(path.read_text('utf8'))
  except (OSError, ValueError):
    return None


def last_log_line(path: pathlib.Path) -> str:
  """Returns the last line of a log that is not blank, or ''."""
  try:
    with path.open('rb') as log:
      log.seek(max(0, path.stat().st_size - 65536))
      lines = log.read().decode('utf8', 'replace').split('\n')
  except OSError:
    return ''
  return next((line.strip() for line in reversed(lines) if line.strip()), '')


def write_atomic(path: pathlib.Path, contents: bytes | str) -> None:
  """Writes a file so that a reader sees the old contents or the new ones.

  Args:
    path: the file; its folder is made where it is missing.
    contents: bytes, or text to be written as UTF-8.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  if isinstance(contents, str):
    contents = contents.encode()
  scratch = path.with_name(f'.{path.name}.{os.getpid()}')
  with scratch.open('wb') as file:
    file.write(contents)
    file.flush()
    os.fsync(file.fileno())
  os.replace(scratch, path)


def write_json(path: pathlib.Path, data: Any) -> None:
  """Writes a JSON file atomically, indented for people."""
  write_atomic(path, json.dumps(data, indent=2) + '\n')
