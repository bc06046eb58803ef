"""Starts an experiment many times for the price of one start.

  python -m tests.experiments.forks experiments.fed_avg.run < commands.json

Reads a list of argument lists, runs each in a fork that imported everything
but the experiment itself, and writes a list of [exit code, stdout, stderr].
"""

import json
import os
import runpy
import sys
import tempfile
import traceback
import warnings

import orbax.checkpoint  # noqa: F401
import sklearn.datasets  # noqa: F401

from fedjax_ext.training import app, flags  # noqa: F401


def _start(module: str, arguments: list[str], out: int, err: int) -> int:
  """Runs `python -m module arguments` in a fork; returns its exit code."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # jax warns of forks; it has not begun
    child = os.fork()
  if child:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  code = 1
  try:
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name='__main__', alter_sys=True)
    code = 0
  except SystemExit as stop:
    code = stop.code or 0
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
  """Reads the commands, writes what became of them."""
  results = []
  for arguments in json.load(sys.stdin):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
      code = _start(sys.argv[1], arguments, out.fileno(), err.fileno())
      texts = []
      for file in (out, err):
        file.seek(0)
        texts.append(file.read().decode())
      results.append([code, *texts])
  json.dump(results, sys.stdout)


if __name__ == '__main__':
  main()
