"""Writes a table's results as Markdown and CSV texts. Pure functions."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from launchers import grid, summary, verdicts
from launchers import results as results_lib
from launchers import spec as spec_lib
from launchers.report import Report, layout

_SCALE_NOTES = {
  'smoke': (
    'Smoke scale: it shows that every row runs. Its figures say nothing about '
    'the methods, and neither confirm nor refute the scale of the paper.'
  ),
  'small': (
    'Small scale: the claims are judged at this scale. The result neither '
    'confirms nor refutes the scale of the paper.'
  ),
  'paper': (
    'The scale of the paper, as far as the flags below describe it; the '
    'reproduction card lists the differences that are known.'
  ),
}


def markdown(report: Report) -> str:
  """Writes the whole table.md."""
  spec = report.spec
  groups = summary.summarise(spec, report.results)
  sections = [
    _heading(report),
    _results_table(spec, groups),
    *_also_section(report),
    f'Mean ± standard deviation over n seeds of `{spec.metric}`'
    + _spelled(spec)
    + _unit(spec)
    + _better(spec)
    + '. "Published" is the paper\'s own number '
    'with its place; "not found" where no source was read.',
    *_details_section(report),
    '## Cells',
    _cells_table(groups),
  ]
  if report.choices:
    sections += ['## Tuned values', *_tuning_section(report)]
  if spec.claims:
    sections += ['## Claims', *verdicts.claims_section(report)]
  if spec.slopes:
    sections += ['## Slopes', *verdicts.slopes_section(report)]
  if spec.relatives:
    sections += ['## Relative figures', *verdicts.relatives_section(report)]
  if spec.limits:
    sections += ['## Limits', *verdicts.limits_section(report)]
  failed = [r for r in report.results if r.final is None]
  if failed:
    lines = [f'- {r.cell.label}: `{r.reason}`' for r in failed]
    sections += ['## Failed cells', '\n'.join(lines)]
  sections += ['## Provenance', _provenance(report.results)]
  cells = [*report.tuning_cells, *(r.cell for r in report.results)]
  commands = '\n'.join(cell.command() for cell in cells)
  sections += [
    '## Commands',
    f'From the repository root:\n\n```sh\n{report.command}\n```',
    f'which runs\n\n```sh\n{commands}\n```',
  ]
  return '\n\n'.join(sections) + '\n'


def csv_text(report: Report) -> str:
  """Writes table.csv, one line for each row, data set and seed.

  `value` and `published` are in shown units.
  """
  lines = [_csv_line(report, result) for result in report.results]
  table = io.StringIO()
  writer = csv.DictWriter(table, list(lines[0]), lineterminator='\n')
  writer.writeheader()
  writer.writerows(lines)
  return table.getvalue()


def _csv_line(report: Report, result: results_lib.Result) -> dict[str, Any]:
  """Returns one line of table.csv by the names of its columns."""
  cell, final = result.cell, result.final
  figure = results_lib.measure_figure(report.spec, result, report.spec.metric)
  value = figure.value
  row = next(row for row in report.spec.rows if row.name == cell.row)
  source = row.published.get(cell.dataset)
  return {
    'paper': report.plan.name,
    'preset': report.plan.preset,
    'dataset': cell.dataset,
    'row': cell.row,
    'seed': cell.seed,
    'metric': report.spec.metric,
    'status': figure.status,
    'value': None if value is None else report.spec.scale * value,
    **{
      metric: None if also.value is None else report.spec.scale * also.value
      for metric in report.spec.further
      for also in [results_lib.measure_figure(report.spec, result, metric)]
    },
    'published': source.value if source else 'not found',
    'published_source': source.source if source else None,
    'difference': None
    if value is None or source is None
    else report.spec.scale * value - source.value,
    'rounds': final and final.round,
    'clients': final and _clients(final),
    'examples': final and final.examples,
    'examples_processed': final and final.examples_processed,
    'wall_seconds': final and final.wall_seconds,
    'tuned': _values(cell.values),
    'device': final and final.device,
    'versions': final and _versions(final),
    'commit': final and final.commit,
    'code': result.code,
    'reason': figure.reason,
    'command': cell.command(),
  }


def _heading(report: Report) -> str:
  seeds = report.plan.seeds
  few = len(seeds) < 3 and report.plan.preset != 'smoke'
  lines = [
    f'# {report.spec.title}',
    report.spec.paper,
    f'Preset `{report.plan.preset}`, '
    f'seed{"s" if len(seeds) > 1 else ""} {", ".join(map(str, seeds))}. '
    + _SCALE_NOTES[report.plan.preset],
  ]
  for name, own in report.plan.own_seeds.items():
    lines[-1] += f' {name}: seeds {", ".join(map(str, own))}.'
  if report.not_run:
    lines.append(f'Not run yet: {"; ".join(report.not_run)}.')
  if few:
    lines.append('Fewer than 3 seeds: a trial, not a result.')
  return '\n\n'.join(lines)


def _results_table(
  spec: spec_lib.TableSpec, groups: Sequence[summary.Group]
) -> str:
  """Rows x data sets, each with the published number beside it."""
  cells = {(group.row, group.dataset): group for group in groups}
  datasets = list(dict.fromkeys(group.dataset for group in groups))
  header = ['']
  for name in datasets:
    header += [name, f'{name}, published']
  lines = []
  for row in spec.rows:
    line = [row.name]
    for name in datasets:
      group = cells.get((row.name, name))
      line += [
        summary.show(group, decimals=spec.decimals) if group else '',
        _published(row.published.get(name), group, spec.decimals),
      ]
    lines.append(line)
  return layout(header, lines)


def _published(
  source: spec_lib.Published | None,
  group: summary.Group | None,
  decimals: int,
) -> str:
  """The paper's number, how far the measured one is from it, and its place."""
  if source is None:
    return 'not found' if group else ''
  far = ''
  if group and group.mean is not None:
    far = f'measured {group.mean - source.value:+.{decimals}f}; '
  return f'{source.value:g} ({far}{source.source})'


def _cells_table(groups: Sequence[summary.Group]) -> str:
  lines = []
  for group in groups:
    finals = [r.final for r in group.results if r.final is not None]
    seconds = [f.wall_seconds for f in finals if f.wall_seconds is not None]
    wall = f'{sum(seconds) / len(seconds):.1f} s' if seconds else 'not recorded'
    lines.append(
      [
        group.row,
        group.dataset,
        f'{len(finals)} of {len(group.results)}',
        *(
          _range([value(final) for final in finals])
          for value in (
            _clients,
            lambda final: final.examples,
            lambda final: final.round,
            lambda final: final.examples_processed,
          )
        ),
        wall,
      ]
    )
  header = [
    'method',
    'data set',
    'seeds',
    'clients',
    'examples',
    'rounds',
    'examples processed',
    'mean wall time',
  ]
  return layout(header, lines)


def _clients(final: results_lib.Final) -> int | None:
  """Clients that took part; pooled ones are counted as they were before."""
  trained = final.metrics.get('train/clients')
  if final.clients is None or not isinstance(trained, int):
    return final.clients
  return max(final.clients, trained)


def _tuning_section(report: Report) -> list[str]:
  setting = report.spec.tuning
  assert setting is not None
  lines = []
  for choice in report.choices:
    lines.append(
      [
        choice.row,
        choice.dataset,
        str(len(choice.candidates)),
        _values(choice.chosen) if choice.chosen else choice.reason,
      ]
    )
  counts = {line[2] for line in lines}
  untuned = [
    row.name
    for row in report.spec.rows
    if not report.spec.tunes(row, report.plan.preset)
  ]
  notes = (
    f'Chosen by the best `{setting.metric}` ({setting.direction} is better) '
    f'with seed {setting.seed}, which no reported run uses; every candidate '
    'with its figure stands in tuning.json.'
  )
  if untuned:
    notes += f' Not tuned: {", ".join(untuned)}.'
  if len(counts) > 1:
    notes += ' The methods have different numbers of candidates.'
  header = ['method', 'data set', 'candidates', 'chosen']
  return [notes, layout(header, lines)]


def _also_section(report: Report) -> list[str]:
  """The table's further metrics, a column for each and each data set."""
  spec = report.spec
  if not spec.also:
    return []
  cells, header = {}, ['']
  for metric in spec.also:
    groups = summary.summarise(spec, report.results, metric=metric)
    for group in groups:
      cells[group.row, f'{group.dataset}, `{metric}`'] = summary.show(
        group, decimals=spec.decimals
      )
  header += list(dict.fromkeys(column for _, column in cells))
  lines = [
    [row.name, *(cells.get((row.name, column), '') for column in header[1:])]
    for row in spec.rows
  ]
  return [layout(header, lines)]


def _details_section(report: Report) -> list[str]:
  """A table for each group of further figures and each data set."""
  spec, sections = report.spec, []
  for detail in spec.details:
    groups = {
      (group.dataset, group.row, metric): group
      for metric in detail.metrics
      for group in summary.summarise(spec, report.results, metric=metric)
    }
    for dataset in dict.fromkeys(dataset for dataset, _, _ in groups):
      rows = dict.fromkeys(row for d, row, _ in groups if d == dataset)
      lines = [
        [
          row,
          *(
            summary.show(group, decimals=spec.decimals) if group else '-'
            for metric in detail.metrics
            for group in [groups.get((dataset, row, metric))]
          ),
        ]
        for row in (r.name for r in spec.rows)
        if row in rows
      ]
      sections += [
        f'## {detail.title}: {dataset}',
        layout(['', *detail.metrics], lines),
      ]
  if spec.figures:
    lines = [f'- {name}: `{key}`' for name, key in spec.figures.items()]
    lines += [
      f'- {name} of {row.name}: ' + (f'`{key}`' if key else 'it has none')
      for row in spec.rows
      for name, key in row.figures.items()
    ]
    sections += ['## What the figures are', '\n'.join(lines)]
  return sections


def _provenance(results: Sequence[results_lib.Result]) -> str:
  """Lists the code and machines; more than one of a kind is counted."""
  finals = [result.final for result in results if result.final is not None]
  codes = [result.code for result in results if result.final is not None]
  kinds = [
    ('commit', (final.commit for final in finals)),
    ('code digest', codes),
    ('versions', (_versions(final) for final in finals)),
    ('device', (final.device for final in finals)),
  ]
  lines = [f'- {name}: {_count(values)}' for name, values in kinds]
  seconds = sum(final.wall_seconds or 0 for final in finals)
  lines.append(f'- wall time of all cells together: {seconds:.1f} s')
  if len(set(codes)) > 1:
    lines.append(
      '- The code changed while the cells ran: run the command again.'
    )
  return '\n'.join(lines)


def _count(values: Iterable[str]) -> str:
  counts = Counter(value or 'not recorded' for value in values)
  if len(counts) == 1:
    return next(iter(counts))
  return '; '.join(f'{value} ({n} cells)' for value, n in counts.items()) or (
    'not recorded'
  )


def _versions(final: results_lib.Final) -> str:
  return ', '.join(f'{name} {v}' for name, v in sorted(final.versions.items()))


def _values(values: grid.Values) -> str:
  return ', '.join(f'{name}={value}' for name, value in values)


def _range(values: Sequence[int | None]) -> str:
  known = [value for value in values if value is not None]
  if not known:
    return 'not recorded'
  low, high = min(known), max(known)
  return f'{low:,}' if low == high else f'{low:,} to {high:,}'


def _better(spec: spec_lib.TableSpec) -> str:
  """Which side is better, for a sentence."""
  if spec.direction == 'neither':
    return ''
  return f'; {spec.direction} is better'


def _spelled(spec: spec_lib.TableSpec) -> str:
  """The metric behind the table's own, where that is a name."""
  key = spec.figures.get(spec.metric)
  return f' (`{key}`)' if key else ''


def _unit(spec: spec_lib.TableSpec) -> str:
  if spec.scale == 100:
    return ' in %'
  return '' if spec.scale == 1 else f' times {spec.scale:g}'
