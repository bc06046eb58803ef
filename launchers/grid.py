"""The grid of a table: rows x data sets x seeds, and each cell's command.

Pure functions: nothing here reads a file or starts a process.
"""

import dataclasses
import hashlib
import itertools
import re
import shlex
from collections.abc import Mapping

from launchers import fields
from launchers import spec as spec_lib

# Flag values that tuning chose, as (flag name, value) pairs.
Values = tuple[tuple[str, str], ...]
# What tuning chose for a (data set, row).
Choices = Mapping[tuple[str, str], Values]

_NOT_YET_TUNED = 'TUNED'  # A dry run prints it where no value is chosen yet.
_LONGEST_FOLDER = 80


@dataclasses.dataclass(frozen=True)
class Plan:
  """What to run of a table, and where.

  Attributes:
    name: the paper's folder in experiments/, and '/' and the table's name if it
      has one.
    preset: the scale.
    seeds: the seeds to report.
    folder: the paper's folder, relative to the repository root.
    results: the folder of this preset's results, relative to the root where it
      lies under it.
    own_seeds: of the columns that have seeds of their own.
  """

  name: str
  preset: str
  seeds: tuple[int, ...]
  folder: str
  results: str
  own_seeds: Mapping[str, tuple[int, ...]] = dataclasses.field(
    default_factory=dict
  )

  def seeds_of(self, dataset: str) -> tuple[int, ...]:
    """The seeds to report of one column."""
    return self.own_seeds.get(dataset, self.seeds)


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of an experiment binary.

  Attributes:
    dataset: the column.
    row: the method.
    seed: the seed.
    values: the tuned values, or the candidate that a tuning run tries.
    workdir: where the binary writes, as given to it.
    args: the arguments after the Python interpreter.
  """

  dataset: str
  row: str
  seed: int
  values: Values
  workdir: str
  args: tuple[str, ...]

  @property
  def label(self) -> str:
    """Names the cell for people."""
    tuned = ''.join(f' / {name}={value}' for name, value in self.values)
    return f'{self.dataset} / {self.row} / seed {self.seed}{tuned}'

  def command(self, interpreter: str = 'python') -> str:
    """Returns the command as one shell-quoted line."""
    return shlex.join((interpreter, *self.args))


def make_plan(
  spec: spec_lib.TableSpec,
  *,
  name: str,
  preset: str,
  seeds: tuple[int, ...] | None,
  folder: str,
  results_dir: str,
) -> Plan:
  """Checks the preset and the seeds that the user asked for.

  Args:
    spec: the table.
    name: the paper's folder name.
    preset: one of the table's presets.
    seeds: seeds to report in place of the preset's, or None.
    folder: the paper's folder, relative to the repository root.
    results_dir: the folder that holds the results of every paper.

  Returns:
    The plan.

  Raises:
    TableError: the table lacks the preset, or a seed may not be reported.
  """
  if preset not in spec.presets:
    raise fields.TableError(
      f'--preset: the table of {name} has no preset {preset!r}; it has '
      + ', '.join(spec.presets)
    )
  own_seeds = {}
  if seeds is None:
    seeds = spec.presets[preset].seeds
    own_seeds = {
      d.name: d.seeds[preset] for d in spec.datasets if preset in d.seeds
    }
  spec_lib.check_seeds(spec, seeds, where='--seeds')
  results = f'{results_dir}/{name}/{preset}'
  return Plan(name, preset, seeds, folder, results, own_seeds)


def report_cells(
  spec: spec_lib.TableSpec, plan: Plan, choices: Choices
) -> list[Cell]:
  """Lists the cells of the table, by data set, then row, then seed.

  Args:
    spec: the table.
    plan: the preset and seeds.
    choices: what tuning chose; a tuned row without a choice gets a placeholder.

  Returns:
    One cell for each data set, row and seed.
  """
  cells = []
  for dataset, row in _pairs(spec, plan):
    tuned = row.tune if spec.tunes(row, plan.preset) else ()
    untuned = tuple((name, _NOT_YET_TUNED) for name, _ in tuned)
    values = choices.get((row.tuned_on(dataset.name), row.name), untuned)
    folder = f'{spec_lib.slug(dataset.name)}/{spec_lib.slug(row.name)}'
    for seed in plan.seeds_of(dataset.name):
      workdir = f'{plan.results}/runs/{folder}/seed_{seed}'
      cells.append(
        _cell(
          spec,
          plan,
          dataset,
          row,
          seed=seed,
          values=values,
          extra=(),
          workdir=workdir,
        )
      )
  return cells


def tuning_cells(spec: spec_lib.TableSpec, plan: Plan) -> list[Cell]:
  """Lists the tuning runs: each candidate of each tuned row and data set.

  Args:
    spec: the table.
    plan: the preset.

  Returns:
    The runs, candidates in the order of the grid (the last flag moves first);
    none where no row is tuned.
  """
  if spec.tuning is None:
    return []
  tuned = dict.fromkeys(
    (row.tuned_on(dataset.name), row.name)
    for dataset, row in _pairs(spec, plan)
    if spec.tunes(row, plan.preset)
  )
  datasets = {dataset.name: dataset for dataset in spec.datasets}
  rows = {row.name: row for row in spec.rows}
  cells = []
  for dataset, row in ((datasets[d], rows[r]) for d, r in tuned):
    for values in candidates(row):
      workdir = '/'.join(
        (
          plan.results,
          'tuning',
          spec_lib.slug(dataset.name),
          spec_lib.slug(row.name),
          _values_folder(values),
          f'seed_{spec.tuning.seed}',
        )
      )
      cells.append(
        _cell(
          spec,
          plan,
          dataset,
          row,
          seed=spec.tuning.seed,
          values=values,
          extra=(*spec.tuning.flags, *dataset.tuning),
          workdir=workdir,
        )
      )
  return cells


def candidates(row: spec_lib.Row) -> list[Values]:
  """Expands a row's tuning grid; a row without one has no candidates."""
  if not row.tune:
    return []
  names = [name for name, _ in row.tune]
  grids = [values for _, values in row.tune]
  return [
    tuple(zip(names, point, strict=True)) for point in itertools.product(*grids)
  ]


def _pairs(
  spec: spec_lib.TableSpec, plan: Plan
) -> list[tuple[spec_lib.Dataset, spec_lib.Row]]:
  """Pairs every row with the preset's columns that it is about."""
  columns = spec.presets[plan.preset].datasets
  datasets = [d for d in spec.datasets if d.name in columns]
  return [
    (dataset, row)
    for dataset, row in itertools.product(datasets, spec.rows)
    if dataset.name in row.datasets
  ]


def _cell(
  spec: spec_lib.TableSpec,
  plan: Plan,
  dataset: spec_lib.Dataset,
  row: spec_lib.Row,
  *,
  seed: int,
  values: Values,
  extra: tuple[str, ...],
  workdir: str,
) -> Cell:
  """Builds one cell; of two equal flags, absl takes the later one."""
  module = '.'.join((*plan.folder.split('/'), 'run'))
  args = (
    '-m',
    module,
    f'--flagfile={plan.folder}/{dataset.flagfile}',
    *dataset.flags,
    *row.flags,
    *spec.presets[plan.preset].flags,
    *dataset.presets.get(plan.preset, ()),
    *extra,
    *(f'--{name}={value}' for name, value in values),
    f'--seed={seed}',
    f'--workdir={workdir}',
  )
  return Cell(dataset.name, row.name, seed, values, workdir, args)


def _values_folder(values: Values) -> str:
  """Names the folder of a candidate; a hash tells cut or odd values apart."""
  plain = '-'.join(f'{name}={value}' for name, value in values)
  folder = re.sub(r'[^A-Za-z0-9_.=+-]', '_', plain)
  if folder == plain and len(folder) <= _LONGEST_FOLDER:
    return folder
  digest = hashlib.sha256(plain.encode()).hexdigest()[:8]
  return f'{folder[:_LONGEST_FOLDER]}-{digest}'
