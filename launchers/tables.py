"""Writes a table's results as Markdown and CSV texts. Pure functions."""

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from launchers import claims, grid, summary, tuning
from launchers import results as results_lib
from launchers import spec as spec_lib

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """All that a table shows.

  Attributes:
    spec: the table.
    plan: what was run.
    results: every reported cell's result.
    tuning_cells: the tuning runs.
    choices: what tuning found.
    command: the launcher's own command line.
  """

  spec: spec_lib.TableSpec
  plan: grid.Plan
  results: Sequence[results_lib.Result]
  tuning_cells: Sequence[grid.Cell]
  choices: Sequence[tuning.Choice]
  command: str


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
    sections += ['## Claims', *_claims_section(report)]
  if spec.slopes:
    sections += ['## Slopes', *_slopes_section(report)]
  if spec.relatives:
    sections += ['## Relative figures', *_relatives_section(report)]
  if spec.limits:
    sections += ['## Limits', *_limits_section(report)]
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
  return _table(header, lines)


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
  return _table(header, lines)


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
  return [notes, _table(header, lines)]


def _claims_section(report: Report) -> list[str]:
  decimals = report.spec.decimals
  lines = []
  for verdict in claims.judge_all(report.spec, report.results):
    interval = verdict.interval
    gains = ', '.join(
      f'{gain:+.{decimals}f}' for _, gain in verdict.differences
    )
    lines.append(
      [
        verdict.claim.text,
        verdict.dataset,
        _compared(verdict.claim) + f': {gains or "none"}',
        f'{interval.mean:+.{decimals}f} '
        f'[{interval.low:+.{decimals}f}, {interval.high:+.{decimals}f}]'
        if interval
        else 'n/a',
        f'±{verdict.claim.margin:g}',
        f'**{verdict.outcome}**'
        + (f' ({verdict.reason})' if verdict.reason else ''),
      ]
    )
  if not lines:
    return ['No claim is about the data sets of this preset.']
  directions = {
    v.claim.direction or report.spec.direction
    for v in claims.judge_all(report.spec, report.results)
  }
  sign = ' with the sign turned' if 'lower' in directions else ''
  if sign and len(directions) > 1:
    sign += ' where lower is better'
  side = 'more' if report.spec.direction == 'neither' else 'better'
  header = [
    'claim',
    'data set',
    'differences by seed',
    'mean [95 % t-interval]',
    'equal within',
    'verdict',
  ]
  return [
    _table(header, lines),
    f'Differences are paired by seed{sign}, so that positive means {side}. A '
    'claim holds when the interval lies wholly above 0; it fails when the '
    'interval lies wholly below 0, or contains 0 and lies inside the margin; '
    'else it is undecided. A claim of equality (=) holds when the interval '
    'lies inside the margin and fails when it lies wholly outside. A claim of '
    'no effect (~ 0) holds when the interval lies inside the margin, is not '
    'contradicted when it contains 0 or the mean lies inside the margin, else '
    'it fails.',
  ]


def _compared(claim: spec_lib.Claim) -> str:
  """What is compared: 'A - B', 'A = B', 'A ~ 0', ..."""
  named = lambda row, figure: f'{row} ({figure})' if figure else row
  better = named(claim.better, claim.figure)
  worse = claim.worse and named(claim.worse, claim.against or claim.figure)
  if claim.kind == 'zero':
    return f'{better} {f"- {worse} " if worse else ""}~ {claim.level:g}'
  sign = '=' if claim.kind == 'equal' else '-' if worse else '>'
  return f'{better} {sign} {worse or f"{claim.level:g}"}'


def _slopes_section(report: Report) -> list[str]:
  """Slopes against 1 / x by seed."""
  lines = []
  for slope in report.spec.slopes:
    verdict = claims.judge_slope(slope, report.spec, report.results)
    interval = verdict.interval
    lines.append(
      [
        slope.text,
        slope.row,
        ', '.join(f'{value:+.3g}' for _, value in verdict.values) or 'none',
        f'{interval.mean:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]'
        if interval
        else 'n/a',
        ', '.join(verdict.columns),
        slope.sign,
        f'**{verdict.outcome}**'
        + (f' ({verdict.reason})' if verdict.reason else ''),
      ]
    )
  header = [
    'claim',
    'method',
    'slope by seed',
    'mean [95 % t-interval]',
    'columns',
    'claimed',
    'verdict',
  ]
  return [
    _table(header, lines),
    'Least squares of the figure against 1 / x over the columns that all seeds '
    'have, where x is the number in a column; in shown points for each 1 / x.',
  ]


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
  return [_table(header, lines)]


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
        _table(['', *detail.metrics], lines),
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


def _relatives_section(report: Report) -> list[str]:
  """Gains and gaps by seed, of the table's metric and of the further ones."""
  spec, lines = report.spec, []
  for relative in spec.relatives:
    for metric in (spec.metric, *spec.also):
      groups = {
        (g.row, g.dataset): g
        for g in summary.summarise(spec, report.results, metric=metric)
      }
      for dataset in relative.datasets:
        pair = [
          groups.get((row, dataset))
          for row in (relative.row, relative.reference)
        ]
        if None in pair:
          continue
        lines.append(_relative_line(relative, dataset, metric, *pair))
  return [
    _table(
      ['figure', 'data set', 'metric', 'by seed', 'mean', 'published'], lines
    ),
    'A gain is row / reference - 1, a gap 1 - row / reference, in % of the '
    "reference, seed by seed; both rows' figures stand above.",
  ]


def _relative_line(
  relative: spec_lib.Relative,
  dataset: str,
  metric: str,
  mine: summary.Group,
  reference: summary.Group,
) -> list[str]:
  paired = len(mine.values) == len(reference.values) == len(mine.results)
  values = []
  if paired and all(reference.values):
    ratios = [a / b for a, b in zip(mine.values, reference.values, strict=True)]
    values = [
      100 * (r - 1 if relative.kind == 'gain' else 1 - r) for r in ratios
    ]
  return [
    f'{relative.text}: {relative.row} / {relative.reference}',
    dataset,
    f'`{metric}`',
    ', '.join(f'{v:+.2f} %' for v in values) or 'n/a',
    f'{sum(values) / len(values):+.2f} %' if values else 'n/a',
    relative.published + (f' ({relative.source})' if relative.source else ''),
  ]


def _limits_section(report: Report) -> list[str]:
  """Bounds that every seed has to keep."""
  decimals = report.spec.decimals
  lines = [
    [
      limit.row + (f' ({limit.figure})' if limit.figure else ''),
      dataset,
      _bound(limit),
      _by_seed(limit, values, decimals),
      limit.source,
      f'**{"kept" if kept else "broken"}**',
    ]
    for limit, dataset, values, kept in _judged_limits(report)
  ]
  if not lines:
    return ['No limit is judged at this scale.']
  header = ['method', 'data set', 'limit', 'by seed', 'source', 'verdict']
  return [_table(header, lines)]


def _by_seed(
  limit: spec_lib.Limit, values: Sequence[float], decimals: int
) -> str:
  """Figures by seed, and their mean where that is judged."""
  if not values:
    return 'none'
  said = ', '.join(f'{v:.{decimals}f}' for v in values)
  if limit.of == 'mean':
    said += f'; mean {sum(values) / len(values):.{decimals}f}'
  return said


def broken_limits(report: Report) -> list[str]:
  """One line for each limit that a seed breaks or has no figure for."""
  return [
    f'{limit.row} on {dataset}: expected {_bound(limit)}, got '
    + (', '.join(f'{v:g}' for v in values) or 'nothing')
    for limit, dataset, values, kept in _judged_limits(report)
    if not kept
  ]


def _bound(limit: spec_lib.Limit) -> str:
  of = 'mean ' if limit.of == 'mean' else ''
  if limit.at_least is not None:
    return f'{of}>= {limit.at_least:g}'
  return f'{of}<= {limit.at_most:g}'


def _judged_limits(
  report: Report,
) -> list[tuple[spec_lib.Limit, str, tuple[float, ...], bool]]:
  """(limit, data set, figures by seed, whether all keep it) of what was run.

  None at smoke scale, whose figures say nothing.
  """
  if report.plan.preset == 'smoke':
    return []
  judged = []
  for limit in report.spec.limits:
    groups = {
      (g.row, g.dataset): g
      for g in summary.summarise(
        report.spec, report.results, metric=limit.figure or None
      )
    }
    for dataset in limit.datasets:
      group = groups.get((limit.row, dataset))
      if group is None:
        continue
      low, high = limit.at_least, limit.at_most
      judging = group.values if limit.of == 'seeds' else (group.mean,)
      kept = len(group.values) == len(group.results) and all(
        (low is None or v >= low) and (high is None or v <= high)
        for v in judging
      )
      judged.append((limit, dataset, group.values, kept))
  return judged


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


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  """Lays out a Markdown table."""

  def line(cells: Sequence[str]) -> str:
    escaped = (cell.replace('|', '\\|').replace('\n', ' ') for cell in cells)
    return f'| {" | ".join(escaped)} |'

  rule = ['---'] * len(header)
  return '\n'.join([line(header), line(rule), *map(line, lines)])
