"""Executes the notebooks and writes their outputs back, cleaned.

Usage:
  python -m tools.notebooks [--check] [NAME ...]

Runs notebooks/NAME.ipynb, or all of them, in the root of the repository. With
--check nothing is written. Exit codes: 0, 1 where a notebook failed.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / 'notebooks'
METADATA = {
  'kernelspec': {
    'display_name': 'Python 3',
    'language': 'python',
    'name': 'python3',
  },
  'language_info': {'name': 'python'},
}

Notebook = dict[str, Any]


class NotebookError(RuntimeError):
  """A cell failed; the message is one line with the notebook and the cell."""


def names() -> list[str]:
  """The names of all notebooks, sorted."""
  return sorted(path.stem for path in FOLDER.glob('*.ipynb'))


def execute(name: str, *, timeout: int = 600) -> Notebook:
  """Runs a notebook from top to bottom in the root of the repository.

  Args:
    name: of the notebook, without folder and ending.
    timeout: seconds that a cell, or the kernel's start, may take.

  Returns:
    The notebook with its outputs, cleaned.

  Raises:
    NotebookError: there is no such notebook, or a cell failed.
  """
  path = FOLDER / f'{name}.ipynb'
  if not path.exists():
    raise NotebookError(f'{name}: expected one of {", ".join(names())}')
  # Here, since nothing else of this module needs them.
  import nbclient
  import nbformat
  from traitlets.config import Config

  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(
    notebook,
    timeout=timeout,
    startup_timeout=timeout,  # a busy machine takes over a minute
    kernel_name=METADATA['kernelspec']['name'],
    record_timing=False,
    config=Config({'KernelManager': {'transport': 'ipc'}}),
    resources={'metadata': {'path': str(ROOT)}},
  )
  try:
    client.execute()
  except nbclient.exceptions.CellExecutionError as error:
    number, said = _failed_cell(notebook)
    raise NotebookError(f'{name}: cell {number}: {said}') from error
  except nbclient.exceptions.CellTimeoutError as error:
    raise NotebookError(f'{name}: a cell ran over {timeout} s') from error
  return cleaned(notebook)


def _failed_cell(notebook: Notebook) -> tuple[int, str]:
  """The number of the cell with an error, from 0, and what it says."""
  for number, cell in enumerate(notebook['cells']):
    for output in cell.get('outputs', ()):
      if output['output_type'] == 'error':
        said = ' '.join(output['evalue'].split())
        return number, f'{output["ename"]}: {said:.200}'
  return -1, 'no cell has an error'


def cleaned(notebook: Notebook) -> Notebook:
  """Leaves out what differs by machine and run, in place.

  That is: metadata of the notebook and of cells, whatever was written to stderr
  (warnings, progress), and the text that stands for a figure.
  """
  notebook['metadata'] = METADATA
  for cell in notebook['cells']:
    cell['metadata'] = {}
    if cell['cell_type'] != 'code':
      continue
    cell['outputs'] = [
      output for output in cell['outputs'] if output.get('name') != 'stderr'
    ]
    for output in cell['outputs']:
      if 'image/png' in output.get('data', {}):
        output['data'].pop('text/plain', None)
        output['metadata'] = {}
  return notebook


def write(name: str, notebook: Notebook) -> pathlib.Path:
  """Writes a notebook, checked against the format; returns its path."""
  import nbformat

  path = FOLDER / f'{name}.ipynb'
  notebook = nbformat.from_dict(notebook)
  nbformat.validate(notebook)
  path.write_text(nbformat.writes(notebook) + '\n')
  return path


def main(argv: Sequence[str] | None = None) -> int:
  """Executes the notebooks that the command line names.

  Args:
    argv: the command line, without the program's name.

  Returns:
    The exit code.
  """
  parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('--check', action='store_true', help='write nothing')
  parser.add_argument('name', nargs='*', help='all of them by default')
  arguments = parser.parse_args(argv)
  failed = False
  for name in arguments.name or names():
    begun = time.monotonic()
    try:
      notebook = execute(name)
    except NotebookError as error:
      print(f'error: {error}', file=sys.stderr)
      failed = True
      continue
    line = f'{name}: {time.monotonic() - begun:.0f} s'
    if not arguments.check:
      line += f', {write(name, notebook).stat().st_size:,} bytes'
    print(line, flush=True)
  return int(failed)


if __name__ == '__main__':
  sys.exit(main())
