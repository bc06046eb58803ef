"""What a cell's folder says: finished, to be resumed, or to start afresh.

A cell whose final.json stands beside a cell.json with the same command and
code is kept. One that was interrupted is started again in its folder, where
the binary resumes; one whose command or code changed starts from nothing.
"""

import contextlib
import pathlib
import shutil

from launchers import grid
from launchers import results as results_lib


def kept_result(
  cell: grid.Cell, root: pathlib.Path, code: str
) -> results_lib.Result | None:
  """Returns a cell's finished result, if it is that of this command and code.

  Args:
    cell: the cell.
    root: the repository root, where its command runs.
    code: the present digest of the code.

  Returns:
    The result, or None where the cell has to run.
  """
  workdir = root / cell.workdir
  if not same_run(cell, workdir, code):
    return None
  final = results_lib.read_final(workdir)
  return final and results_lib.Result(cell, final, code)


def collected_result(cell: grid.Cell, root: pathlib.Path) -> results_lib.Result:
  """Returns what a cell left, whatever code it ran on.

  Args:
    cell: the cell.
    root: the repository root.

  Returns:
    The result with the digest of the code that it ran on; one that says why
    where there is none of this command.
  """
  workdir = root / cell.workdir
  record = results_lib.read_json(workdir / 'cell.json')
  final = results_lib.read_final(workdir)
  if not isinstance(record, dict) or final is None:
    return results_lib.Result(cell, None, '', 'not run')
  if record.get('command') != cell.command():
    return results_lib.Result(cell, None, '', 'ran with another command')
  return results_lib.Result(cell, final, str(record.get('code', '')))


def same_run(cell: grid.Cell, workdir: pathlib.Path, code: str) -> bool:
  """Whether a folder is that of a cell with its present command and code."""
  return results_lib.read_json(workdir / 'cell.json') == _record(cell, code)


def prepare(cell: grid.Cell, root: pathlib.Path, code: str) -> None:
  """Makes a cell's folder ready for its command to start or to resume.

  Args:
    cell: the cell.
    root: the repository root.
    code: the digest of the code that it will run on.
  """
  workdir = root / cell.workdir
  if not same_run(cell, workdir, code):
    with contextlib.suppress(FileNotFoundError):
      shutil.rmtree(workdir)
    results_lib.write_json(workdir / 'cell.json', _record(cell, code))
  # Left here it is no report, or one of a process that failed later on.
  (workdir / 'final.json').unlink(missing_ok=True)


def ended_result(
  cell: grid.Cell, root: pathlib.Path, code: str, failure: str
) -> results_lib.Result:
  """Turns a cell that has ended into a result.

  Args:
    cell: the cell.
    root: the repository root.
    code: the digest of the code that it ran on.
    failure: how its process ended if not well, such as 'signal 9'; else ''.

  Returns:
    The result, whose reason quotes the log's last line after a failure.
  """
  workdir = root / cell.workdir
  if not failure:
    final = results_lib.read_final(workdir)
    if final is not None:
      return results_lib.Result(cell, final, code)
    failure = 'exit code 0, but no valid final.json'
    return results_lib.Result(cell, None, code, failure)
  # A report that a failing process left must not be kept by the next call.
  (workdir / 'final.json').unlink(missing_ok=True)
  last = results_lib.last_log_line(workdir / 'log.txt')
  reason = f'{failure}: {last}' if last else f'{failure}, empty log'
  return results_lib.Result(cell, None, code, reason)


def _record(cell: grid.Cell, code: str) -> dict[str, str]:
  """What cell.json holds; the interpreter's path is no part of a cell."""
  return {'command': cell.command(), 'code': code}
