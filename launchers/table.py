"""Makes one paper's table: tunes, runs, judges the claims, writes the results.

Usage:
  python -m launchers.table --paper=NAME --preset=smoke|small|paper [--dry_run]

Reads experiments/NAME/table.toml (its format: launchers/spec.py) and writes
table.md, table.csv, plot.png and tuning.json to results/NAME/PRESET; with
--table=OTHER it reads OTHER.toml and writes to results/NAME/OTHER/PRESET. The
same command resumes after Ctrl-C and reruns what changed. Exit codes: 0, 1
where a cell failed, 2 where the command is wrong, 130 after Ctrl-C.
"""

import pathlib
import shlex
import sys
from collections.abc import Sequence

from absl import app, flags

from launchers import fields, flags_parser, local, reproduce, spec

_ROOT = pathlib.Path(__file__).resolve().parent.parent

_PAPER = flags.DEFINE_string(
  'paper', None, 'The folder in experiments/ that holds table.toml.'
)
_TABLE = flags.DEFINE_string(
  'table', 'table', 'Which table of the paper: TABLE.toml.'
)
_PRESET = flags.DEFINE_enum('preset', None, spec.PRESETS, 'The scale.')
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Print the commands, one a line, and run nothing.'
)
_RESULTS_DIR = flags.DEFINE_string(
  'results_dir', 'results', 'Where NAME/PRESET with the results goes.'
)
_EXPERIMENTS_DIR = flags.DEFINE_string(
  'experiments_dir',
  str(_ROOT / 'experiments'),
  'The folder of all papers; the commands run in its parent.',
)
_JOBS = flags.DEFINE_integer(
  'jobs', 2, 'How many cells run at a time, each on one core.', lower_bound=1
)
_SEEDS = flags.DEFINE_list(
  'seeds', None, 'Seeds to report in place of those of the preset.'
)
flags.mark_flags_as_required(['paper', 'preset'])


def main(argv: Sequence[str]) -> int:
  """Makes the table.

  Args:
    argv: the program's name; absl holds the flags.

  Returns:
    The exit code.
  """
  del argv
  try:
    options = _options()
    if _DRY_RUN.value:
      print('\n'.join(reproduce.dry_run(options)))
      return 0
    return reproduce.run(options)
  except fields.TableError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except local.Interrupted as error:
    print(error, file=sys.stderr)
    return 128 + error.signum
  except KeyboardInterrupt:
    print('interrupted: the same command resumes', file=sys.stderr)
    return 130


def _options() -> reproduce.Options:
  """Gathers the flags."""
  seeds = None
  if _SEEDS.value is not None:
    try:
      seeds = tuple(int(seed) for seed in _SEEDS.value)
    except ValueError as error:
      got = ','.join(_SEEDS.value)
      raise fields.TableError(
        f'--seeds: expected whole numbers such as 1,2,3, got {got!r}'
      ) from error
  command = ['python', '-m', 'launchers.table', f'--paper={_PAPER.value}']
  if _TABLE.value != 'table':
    command.append(f'--table={_TABLE.value}')
  command.append(f'--preset={_PRESET.value}')
  if seeds is not None:
    command.append(f'--seeds={",".join(map(str, seeds))}')
  return reproduce.Options(
    paper=_PAPER.value,
    table=_TABLE.value,
    preset=_PRESET.value,
    seeds=seeds,
    jobs=_JOBS.value,
    experiments_dir=pathlib.Path(_EXPERIMENTS_DIR.value),
    results_dir=pathlib.Path(_RESULTS_DIR.value),
    command=shlex.join(command),
  )


if __name__ == '__main__':
  app.run(main, flags_parser=flags_parser.parse_flags)
