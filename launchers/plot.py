"""Draws a table: bars, lines where its columns are numbers, and curves."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from launchers import claims, summary
from launchers import spec as spec_lib


def bar_chart(
  spec: spec_lib.TableSpec, groups: Sequence[summary.Group], *, subtitle: str
) -> bytes:
  """Draws one bar for each row and data set, with its seeds.

  Args:
    spec: the table.
    groups: its summary.
    subtitle: what stands under the title, such as the preset and the seeds.

  Returns:
    A PNG. Bars are means over seeds, whiskers one standard deviation, dots the
    seeds; seeds that diverged or failed are counted on their bar.

  Raises:
    ImportError: matplotlib is not installed.
  """
  from matplotlib import figure

  rows = list(dict.fromkeys(group.row for group in groups))
  datasets = list(dict.fromkeys(group.dataset for group in groups))
  width = 0.8 / len(rows)
  inches = max(6.0, 1.0 + 0.45 * len(rows) * len(datasets))
  chart = figure.Figure(figsize=(inches, 4.0), layout='constrained')
  axes = chart.add_subplot()
  named = set()
  for group in groups:
    index = rows.index(group.row)
    x = datasets.index(group.dataset) + (index + 0.5) * width - 0.4
    counts = (('diverged', group.diverged), ('failed', group.failed))
    note = ', '.join(f'{count} {name}' for name, count in counts if count)
    axes.text(x, 0, f'  {note}', rotation=90, ha='center', va='bottom')
    if group.mean is None:
      continue
    label = None if group.row in named else group.row
    named.add(group.row)
    axes.bar(
      x,
      group.mean,
      0.9 * width,
      yerr=group.deviation,
      capsize=3,
      color=f'C{index % 10}',
      alpha=0.7,
      label=label,
    )
    axes.plot([x] * len(group.values), group.values, 'k.', markersize=4)
  axes.set_xticks(range(len(datasets)), datasets)
  axes.set_xlim(-0.5, len(datasets) - 0.5)
  return _as_png(chart, axes, spec, subtitle=subtitle, legend=bool(named))


def line_chart(
  spec: spec_lib.TableSpec, groups: Sequence[summary.Group], *, subtitle: str
) -> bytes:
  """Draws one line for each row over the columns' x.

  Args:
    spec: the table, whose columns have an x.
    groups: its summary.
    subtitle: what stands under the title.

  Returns:
    A PNG. Points are means over seeds, whiskers 95 % t-intervals, dots the
    seeds.

  Raises:
    ImportError: matplotlib or scipy is not installed.
  """
  from matplotlib import figure

  places = {dataset.name: dataset.x for dataset in spec.datasets}
  rows = list(dict.fromkeys(group.row for group in groups))
  chart = figure.Figure(figsize=(9.0, 4.5), layout='constrained')
  axes = chart.add_subplot()
  for index, row in enumerate(rows):
    mine = [g for g in groups if g.row == row and g.mean is not None]
    mine.sort(key=lambda g: places[g.dataset])
    # Rows stand side by side, or their whiskers hide each other.
    x = [
      places[g.dataset] * 1.02 ** (index - (len(rows) - 1) / 2) for g in mine
    ]
    half = [
      claims.t_interval(g.values).high - g.mean if len(g.values) > 1 else 0
      for g in mine
    ]
    colour = f'C{index % 10}'
    axes.errorbar(
      x, [g.mean for g in mine], half, marker='o', ms=4, capsize=3, lw=1.2,
      color=colour, label=row,
    )  # fmt: skip
    for place, group in zip(x, mine, strict=True):
      axes.plot(
        [place] * len(group.values), group.values, '.', ms=3, alpha=0.4,
        color=colour,
      )  # fmt: skip
  axes.axhline(0, color='k', lw=0.8)
  ticks = sorted(set(places.values()))
  axes.set_xscale('log')
  axes.set_xticks(ticks, [f'{x:g}' for x in ticks])
  axes.minorticks_off()
  axes.set_xlabel(spec.x_label)
  return _as_png(chart, axes, spec, subtitle=subtitle, legend=True)


# By (figure, data set, row): a list of (round, shown value) for each seed.
Curves = Mapping[tuple[str, str, str], Sequence[Sequence[tuple[int, float]]]]


def curves(spec: spec_lib.TableSpec, series: Curves, *, subtitle: str) -> bytes:
  """Draws figures against rounds, a panel for each figure and data set.

  Args:
    spec: the table.
    series: what to draw; a row that is measured at its end alone is a point.
    subtitle: what stands under the title.

  Returns:
    A PNG. Lines are means over seeds at the rounds that all of them have,
    bands reach from the lowest to the highest seed.

  Raises:
    ImportError: matplotlib is not installed.
  """
  from matplotlib import figure

  names = list(dict.fromkeys(name for name, _, _ in series))
  datasets = list(dict.fromkeys(dataset for _, dataset, _ in series))
  rows = [row.name for row in spec.rows]
  size = (2.5 + 3.6 * len(datasets), 0.8 + 2.7 * len(names))
  chart = figure.Figure(figsize=size, layout='constrained')
  panels = chart.subplots(
    len(names), len(datasets), squeeze=False, sharey='row'
  )
  handles = {}
  for (name, dataset, row), seeds in series.items():
    axes = panels[names.index(name)][datasets.index(dataset)]
    by_seed = [dict(points) for points in seeds]
    rounds = sorted(set.intersection(*map(set, by_seed)))
    if not rounds:
      continue
    columns = [[points[r] for points in by_seed] for r in rounds]
    index = rows.index(row)
    style = {'color': f'C{index % 10}', 'ls': ('-', '--')[index // 10 % 2]}
    [handles[row]] = axes.plot(
      rounds, [sum(c) / len(c) for c in columns], marker='.', lw=1.2, **style
    )
    axes.fill_between(
      rounds, [min(c) for c in columns], [max(c) for c in columns],
      color=style['color'], alpha=0.12, lw=0,
    )  # fmt: skip
  unit = ' (%)' if spec.scale == 100 else ''
  for i, name in enumerate(names):
    panels[i][0].set_ylabel(f'{name}{unit}')
  for j, dataset in enumerate(datasets):
    panels[0][j].set_title(dataset, fontsize=9)
    panels[-1][j].set_xlabel('round')
  for axes in panels.flat:
    axes.grid(alpha=0.3)
  chart.suptitle(f'{spec.title}\n{subtitle}', fontsize=10)
  chart.legend(
    handles.values(), handles, fontsize=8, loc='outside right center'
  )
  return _png(chart)


def _as_png(
  chart: Any,
  axes: Any,
  spec: spec_lib.TableSpec,
  *,
  subtitle: str,
  legend: bool,
) -> bytes:
  """Titles, the unit and the legend; then the picture."""
  unit = ' (%)' if spec.scale == 100 else ''
  axes.set_ylabel(f'{spec.metric}{unit}')
  axes.set_title(f'{spec.title}\n{subtitle}', fontsize=10)
  if legend:
    axes.legend(fontsize=8, loc='center left', bbox_to_anchor=(1.0, 0.5))
  return _png(chart)


def _png(chart: Any) -> bytes:
  contents = io.BytesIO()
  chart.savefig(contents, format='png', dpi=110)
  return contents.getvalue()
