"""Draws a table: bars, or lines where its columns are numbers."""

import io
from collections.abc import Sequence
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
  contents = io.BytesIO()
  chart.savefig(contents, format='png', dpi=120)
  return contents.getvalue()
