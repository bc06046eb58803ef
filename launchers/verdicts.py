"""A table's judgements in Markdown: claims, slopes, gains and limits."""

from collections.abc import Sequence

from launchers import claims, summary
from launchers import report as report_lib
from launchers import spec as spec_lib


def claims_section(report: report_lib.Report) -> list[str]:
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
    report_lib.layout(header, lines),
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


def slopes_section(report: report_lib.Report) -> list[str]:
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
    report_lib.layout(header, lines),
    'Least squares of the figure against 1 / x over the columns that all seeds '
    'have, where x is the number in a column; in shown points for each 1 / x.',
  ]


def relatives_section(report: report_lib.Report) -> list[str]:
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
    report_lib.layout(
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


def limits_section(report: report_lib.Report) -> list[str]:
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
  return [report_lib.layout(header, lines)]


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


def broken_limits(report: report_lib.Report) -> list[str]:
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
  report: report_lib.Report,
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
