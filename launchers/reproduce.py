"""From a paper's name to its table: tune, run, judge, write."""

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Sequence

from absl import logging

from launchers import (
  cells,
  fields,
  grid,
  latex,
  plot,
  runners,
  schedule,
  sources,
  summary,
  tables,
  tuning,
  verdicts,
)
from launchers import report as report_lib
from launchers import results as results_lib
from launchers import spec as spec_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What the user asked for.

  Attributes:
    paper: the folder in `experiments_dir` that holds the table.
    table: the table's file there, without .toml.
    preset: smoke, small or paper.
    seeds: seeds in place of the preset's, or None.
    experiments_dir: the folder of all papers; its parent is the root where the
      commands run.
    results_dir: where results/NAME/PRESET goes.
    command: the command line that made these options, for table.md.
    make_runner: makes what runs the cells.
    only_collect: whether to take what earlier calls left, and to run nothing.
    retries: how many times a cell that failed is started again.
    grace_seconds: how long a run may take to save its state after Ctrl-C.
  """

  paper: str
  preset: str
  seeds: tuple[int, ...] | None
  experiments_dir: pathlib.Path
  results_dir: pathlib.Path
  command: str
  make_runner: runners.MakeRunner
  only_collect: bool = False
  retries: int = 1
  grace_seconds: float = 30.0
  table: str = 'table'


def load(options: Options) -> tuple[spec_lib.TableSpec, grid.Plan]:
  """Reads the table's description and plans its preset.

  Args:
    options: what the user asked for.

  Returns:
    The description and the plan.

  Raises:
    TableError: the options or the description are wrong.
  """
  if not options.paper.isidentifier():
    raise fields.TableError(
      f'--paper: expected the name of a folder, got {options.paper!r}'
    )
  experiments = options.experiments_dir.resolve()
  if not options.table.isidentifier():
    raise fields.TableError(
      f'--table: expected the name of a file, got {options.table!r}'
    )
  path = experiments / options.paper / f'{options.table}.toml'
  if not path.is_file():
    others = sorted(experiments.glob(f'{options.paper}/*.toml'))
    if others:
      raise fields.TableError(
        f'--table: no {_shown(path, experiments.parent)}; tables of '
        f'{options.paper}: {", ".join(p.stem for p in others)}'
      )
    papers = sorted({p.parent.name for p in experiments.glob('*/*.toml')})
    raise fields.TableError(
      f'--paper: no {_shown(path, experiments.parent)}; papers with a table: '
      + (', '.join(papers) or 'none')
    )
  spec = spec_lib.load_table(path, shown=_shown(path, experiments.parent))
  name = options.paper
  if options.table != 'table':
    name = f'{name}/{options.table}'
  plan = grid.make_plan(
    spec,
    name=name,
    preset=options.preset,
    seeds=options.seeds,
    folder=f'{experiments.name}/{options.paper}',
    results_dir=_shown(options.results_dir.resolve(), experiments.parent),
  )
  return spec, plan


def all_papers(experiments_dir: pathlib.Path) -> list[str]:
  """Names the folders in `experiments_dir` that hold a table.toml, sorted."""
  return sorted(p.parent.name for p in experiments_dir.glob('*/table.toml'))


def dry_run(options: Options) -> list[str]:
  """Lists the commands, shell-quoted, and runs nothing.

  Args:
    options: what the user asked for.

  Returns:
    The tuning runs, then the table's cells. Where the results of the tuning
    are there already, the cells have the chosen values, else a placeholder.

  Raises:
    TableError: the options or the description are wrong.
  """
  spec, plan = load(options)
  root = _root(options)
  tuned = grid.tuning_cells(spec, plan)
  kept = _kept(tuned, root, _digest(options))
  choices = tuning.choose_all(spec, list(kept.values()))
  reported = grid.report_cells(spec, plan, tuning.chosen_values(choices))
  runner = options.make_runner(root, root / plan.results / 'runs' / 'jobs', ())
  return [
    line
    for stage in (tuned, reported)
    if stage
    for line in runner.describe(stage)
  ]


def missing_cells(options: Options) -> list[grid.Cell]:
  """Lists what a launcher of its own has to run next.

  Args:
    options: what the user asked for.

  Returns:
    The tuning runs that are missing; once there are none, the table's cells.
    Their folders are ready.

  Raises:
    TableError: the options or the description are wrong, or tuning failed.
  """
  spec, plan = load(options)
  root, code = _root(options), _digest(options)
  tuned = grid.tuning_cells(spec, plan)
  kept = _kept(tuned, root, code)
  missing = [cell for cell in tuned if cell not in kept]
  if not missing:
    choices = tuning.choose_all(spec, list(kept.values()))
    for choice in choices:
      if choice.chosen is None:
        raise fields.TableError(
          f'{choice.row} on {choice.dataset}: {choice.reason}'
        )
    reported = grid.report_cells(spec, plan, tuning.chosen_values(choices))
    kept = _kept(reported, root, code)
    missing = [cell for cell in reported if cell not in kept]
  for cell in missing:
    cells.prepare(cell, root, code)
  return missing


def _kept(
  wanted: Sequence[grid.Cell], root: pathlib.Path, code: str
) -> dict[grid.Cell, results_lib.Result]:
  """The finished results that count for a code's digest, in their order."""
  found = {cell: cells.kept_result(cell, root, code) for cell in wanted}
  return {cell: r for cell, r in found.items() if r is not None}


def run(options: Options) -> int:
  """Runs the table's cells and writes its files.

  Args:
    options: what the user asked for.

  Returns:
    The exit code: 0, or 1 where a cell failed.

  Raises:
    TableError: the options or the description are wrong.
    Interrupted: a signal stopped the runs.
  """
  spec, plan = load(options)
  root = _root(options)
  folder = root / plan.results
  with schedule.results_lock(folder / 'runs') as pass_fds:
    how = schedule.Schedule(
      root=root,
      runner=options.make_runner(root, folder / 'runs' / 'jobs', pass_fds),
      digest=lambda: _digest(options),
      retries=options.retries,
      grace_seconds=options.grace_seconds,
    )
    tuning_cells = grid.tuning_cells(spec, plan)
    tuned = _results(tuning_cells, how, options, label='tuning')
    choices = tuning.choose_all(spec, tuned)
    results = _report_results(spec, plan, choices, how, options)
    not_run = ()
    if options.only_collect:
      results, not_run = _without_unrun_columns(results)
      if not results:
        raise fields.TableError(
          f'--only_collect: no finished run of this table in '
          f'{plan.results}/runs'
        )
    if choices:
      record = tuning.to_json(spec, choices)
      results_lib.write_json(folder / 'tuning.json', record)
    report = report_lib.Report(
      spec=spec,
      plan=plan,
      results=results,
      tuning_cells=tuning_cells,
      choices=choices,
      command=options.command,
      not_run=not_run,
    )
    _write(report, folder, root)
  return _exit_code([*tuned, *results], report, root)


def _results(
  wanted: Sequence[grid.Cell],
  how: schedule.Schedule,
  options: Options,
  *,
  label: str,
) -> list[results_lib.Result]:
  """Runs the cells, or only collects what they left."""
  if options.only_collect:
    return [cells.collected_result(cell, how.root) for cell in wanted]
  return schedule.run_cells(wanted, how, label=label)


def _without_unrun_columns(
  results: Sequence[results_lib.Result],
) -> tuple[list[results_lib.Result], tuple[str, ...]]:
  """(results of data sets with a finished run, the other data sets)."""
  ran = {r.cell.dataset for r in results if r.final is not None}
  others = dict.fromkeys(
    r.cell.dataset for r in results if r.cell.dataset not in ran
  )
  return [r for r in results if r.cell.dataset in ran], tuple(others)


def _report_results(
  spec: spec_lib.TableSpec,
  plan: grid.Plan,
  choices: Sequence[tuning.Choice],
  how: schedule.Schedule,
  options: Options,
) -> list[results_lib.Result]:
  """The results of the table's cells; those whose tuning failed fail unrun."""
  reported = grid.report_cells(spec, plan, tuning.chosen_values(choices))
  blocked = {
    (choice.dataset, choice.row): choice.reason
    for choice in choices
    if choice.chosen is None
  }
  rows = {row.name: row for row in spec.rows}
  why = lambda c: blocked.get((rows[c.row].tuned_on(c.dataset), c.row), '')
  ready = [c for c in reported if not why(c)]
  ran = {r.cell: r for r in _results(ready, how, options, label='cells')}
  return [
    ran[cell] if cell in ran else results_lib.Result(cell, None, '', why(cell))
    for cell in reported
  ]


def _write(
  report: report_lib.Report, folder: pathlib.Path, root: pathlib.Path
) -> None:
  """Writes table.{md,csv,tex} and, where matplotlib is there, the plots."""
  results_lib.write_atomic(folder / 'table.md', tables.markdown(report))
  results_lib.write_atomic(folder / 'table.csv', tables.csv_text(report))
  results_lib.write_atomic(folder / 'table.tex', latex.table(report))
  try:
    drawn = _plots(report, root)
  except ImportError as error:
    for name in ('plot.png', 'curves.png'):
      (folder / name).unlink(missing_ok=True)
    logging.info('no plots: %s', error)
    return
  for name, picture in drawn.items():
    results_lib.write_atomic(folder / name, picture)


def _plots(report: report_lib.Report, root: pathlib.Path) -> dict[str, bytes]:
  """The table's pictures by their files' names."""
  spec = report.spec
  seeds = ', '.join(map(str, report.plan.seeds))
  subtitle = f'{report.plan.preset} scale, seeds {seeds}'
  lines = all(dataset.x is not None for dataset in spec.datasets)
  draw = plot.line_chart if lines else plot.bar_chart
  groups = summary.summarise(spec, report.results)
  drawn = {'plot.png': draw(spec, groups, subtitle=subtitle)}
  series = _curves(report, root)
  if series:
    drawn['curves.png'] = plot.curves(spec, series, subtitle=subtitle)
  return drawn


def _curves(report: report_lib.Report, root: pathlib.Path) -> plot.Curves:
  """The course of `curves` in every cell that has one."""
  spec, series = report.spec, {}
  for figure, result in itertools.product(spec.curves, report.results):
    cell = result.cell
    points = results_lib.read_curve(
      root / cell.workdir, spec.key(cell.row, figure)
    )
    if points and result.final is not None:
      shown = [(r, spec.scale * value) for r, value in points]
      series.setdefault((figure, cell.dataset, cell.row), []).append(shown)
  return series


def _exit_code(
  ended: Sequence[results_lib.Result],
  report: report_lib.Report,
  root: pathlib.Path,
) -> int:
  """Says what failed and where the table is; 1 for failures, broken limits."""
  lines = []
  for result in ended:
    if result.final is None:
      log = root / result.cell.workdir / 'log.txt'
      where = f' ({result.cell.workdir}/log.txt)' if log.is_file() else ''
      lines.append(f'{result.cell.label}: {result.reason}{where}')
      continue
    if result.cell in {r.cell for r in report.results}:
      figure = results_lib.measure_figure(
        report.spec, result, report.spec.metric
      )
      if figure.status == 'failed':
        lines.append(f'{result.cell.label}: {figure.reason}')
  for line in lines:
    print(f'failed: {line}', file=sys.stderr)
  broken = verdicts.broken_limits(report)
  for line in broken:
    print(f'limit broken: {line}', file=sys.stderr)
  if report.not_run:
    print(f'not run: {"; ".join(report.not_run)}', file=sys.stderr)
  print(f'{report.plan.results}/table.md')
  return 1 if lines or broken or report.not_run else 0


def _root(options: Options) -> pathlib.Path:
  """Where the commands run."""
  return options.experiments_dir.resolve().parent


def _digest(options: Options) -> str:
  """Of the present code."""
  folder = options.experiments_dir.resolve() / options.paper
  return sources.code_digest(_root(options), folder)


def _shown(path: pathlib.Path, root: pathlib.Path) -> str:
  """Writes a path relative to the root where it lies under it."""
  if path.is_relative_to(root):
    path = path.relative_to(root)
  return path.as_posix()
