"""Makes a paper's table: tunes, runs, judges the claims, writes the results.

Usage:
  python -m launchers.table --paper=NAME|all --preset=smoke|small|paper
    [--runner=local|slurm|tpu_vm] [--dry_run] [--only_collect]

Reads experiments/NAME/table.toml (its format: launchers/spec.py) and writes
table.md, table.csv, table.tex, plot.png and tuning.json to
results/NAME/PRESET; with --table=OTHER it reads OTHER.toml and writes to
results/NAME/OTHER/PRESET. --paper=all makes every paper's table. The same
command resumes after Ctrl-C or a crash and reruns what changed. Exit codes: 0,
1 where a cell failed, 2 where the command is wrong, 130 after Ctrl-C.
"""

import os
import sys
from collections.abc import Sequence

from absl import app, flags

from launchers import fields, options, reproduce, schedule

_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Print the commands, one a line, and run nothing.'
)
_ONLY_COLLECT = flags.DEFINE_bool(
  'only_collect',
  False,
  'Build the table from the runs that are there, whatever code they ran on, '
  'and run nothing.',
)
_RETRIES = flags.DEFINE_integer(
  'retries',
  1,
  'How many times a cell that failed is started again, in its folder.',
  lower_bound=0,
)


def main(argv: Sequence[str]) -> int:
  """Makes the table.

  Args:
    argv: the program's name; absl holds the flags.

  Returns:
    The exit code.
  """
  del argv
  try:
    papers = options.papers()
    if _DRY_RUN.value:
      for paper in papers:
        lines = reproduce.dry_run(options.from_flags(paper))
        print('\n'.join(lines), flush=True)
      return 0
    return max([_run(paper) for paper in papers])
  except BrokenPipeError:  # Who read the commands has seen enough: `| head`.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except fields.TableError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except schedule.Interrupted as error:
    print(error, file=sys.stderr)
    return 128 + error.signum
  except KeyboardInterrupt:
    print('interrupted: the same command resumes', file=sys.stderr)
    return 130


def _run(paper: str) -> int:
  chosen = options.from_flags(
    paper, only_collect=_ONLY_COLLECT.value, retries=_RETRIES.value
  )
  return reproduce.run(chosen)


if __name__ == '__main__':
  app.run(main, flags_parser=options.parse_flags)
