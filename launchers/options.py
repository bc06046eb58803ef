"""Which table is meant: the flags that every launcher has."""

import pathlib
import shlex
from collections.abc import Sequence

from absl import flags

from launchers import fields, reproduce, runners, spec

_ROOT = pathlib.Path(__file__).resolve().parent.parent

_PAPER = flags.DEFINE_string(
  'paper',
  None,
  'The folder in experiments/ that holds table.toml, or "all" of them.',
)
_TABLE = flags.DEFINE_string(
  'table', 'table', 'Which table of the paper: TABLE.toml.'
)
_PRESET = flags.DEFINE_enum('preset', None, spec.PRESETS, 'The scale.')
_RESULTS_DIR = flags.DEFINE_string(
  'results_dir', 'results', 'Where NAME/PRESET with the results goes.'
)
_EXPERIMENTS_DIR = flags.DEFINE_string(
  'experiments_dir',
  str(_ROOT / 'experiments'),
  'The folder of all papers; the commands run in its parent.',
)
_SEEDS = flags.DEFINE_list(
  'seeds', None, 'Seeds to report in place of those of the preset.'
)
flags.mark_flags_as_required(['paper', 'preset'])


def papers() -> list[str]:
  """The papers that --paper names, each checked before the first one runs.

  Raises:
    TableError: there is none, or one of "all" lacks the preset.
  """
  if _PAPER.value != 'all':
    return [_PAPER.value]
  names = reproduce.all_papers(pathlib.Path(_EXPERIMENTS_DIR.value))
  if not names:
    raise fields.TableError(
      f'--experiments_dir: no */table.toml in {_EXPERIMENTS_DIR.value}'
    )
  for name in names:
    reproduce.load(from_flags(name))
  return names


def from_flags(
  paper: str, *, only_collect: bool = False, retries: int = 1
) -> reproduce.Options:
  """Gathers the flags for one paper.

  Args:
    paper: one of `papers`.
    only_collect: whether to take what earlier calls left.
    retries: how many times a cell that failed is started again.

  Raises:
    TableError: the seeds are no whole numbers.
  """
  seeds = None
  if _SEEDS.value is not None:
    try:
      seeds = tuple(int(seed) for seed in _SEEDS.value)
    except ValueError as error:
      got = ','.join(_SEEDS.value)
      raise fields.TableError(
        f'--seeds: expected whole numbers such as 1,2,3, got {got!r}'
      ) from error
  command = ['python', '-m', 'launchers.table', f'--paper={paper}']
  if _TABLE.value != 'table':
    command.append(f'--table={_TABLE.value}')
  command.append(f'--preset={_PRESET.value}')
  if seeds is not None:
    command.append(f'--seeds={",".join(map(str, seeds))}')
  return reproduce.Options(
    paper=paper,
    table=_TABLE.value,
    preset=_PRESET.value,
    seeds=seeds,
    experiments_dir=pathlib.Path(_EXPERIMENTS_DIR.value),
    results_dir=pathlib.Path(_RESULTS_DIR.value),
    command=shlex.join(command),
    make_runner=runners.from_flags,
    only_collect=only_collect,
    retries=retries,
  )


def parse_flags(argv: Sequence[str]) -> list[str]:
  """The parser of all commands, imported late: launchers import no package.

  Args:
    argv: the program's name and its arguments.

  Returns:
    The program's name alone.
  """
  from fedjax_ext.training import command_line

  return command_line.parse_flags(argv)
