"""Summarises the seeds of each row and data set."""

import dataclasses
import statistics
from collections.abc import Sequence

from launchers import results as results_lib
from launchers import spec as spec_lib


@dataclasses.dataclass(frozen=True)
class Group:
  """The seeds of one row on one data set.

  Attributes:
    row: the method.
    dataset: the column.
    values: the figures in shown units, of the seeds that have one.
    diverged: how many seeds diverged.
    failed: how many seeds failed.
    results: every seed's result.
  """

  row: str
  dataset: str
  values: tuple[float, ...]
  diverged: int
  failed: int
  results: tuple[results_lib.Result, ...]

  @property
  def mean(self) -> float | None:
    """Mean over the seeds that have a figure, None where there are none."""
    return statistics.fmean(self.values) if self.values else None

  @property
  def deviation(self) -> float | None:
    """Standard deviation (n - 1 in the denominator), None below 2 seeds."""
    return statistics.stdev(self.values) if len(self.values) > 1 else None


def summarise(
  spec: spec_lib.TableSpec,
  results: Sequence[results_lib.Result],
  *,
  metric: str | None = None,
) -> list[Group]:
  """Groups the results by row and data set, in the order of the results.

  Args:
    spec: the table.
    results: of its cells.
    metric: instead of the table's; rows that lack it have no group then.

  Returns:
    One group for each row and data set.
  """
  groups: dict[tuple[str, str], list[results_lib.Result]] = {}
  for result in results:
    key = (result.cell.row, result.cell.dataset)
    groups.setdefault(key, []).append(result)
  summary = []
  for (row, dataset), members in groups.items():
    if metric and all(results_lib.lacks(spec, m, metric) for m in members):
      continue
    figures = [
      results_lib.measure_figure(spec, m, metric or spec.metric)
      for m in members
    ]
    statuses = [figure.status for figure in figures]
    summary.append(
      Group(
        row=row,
        dataset=dataset,
        values=tuple(
          spec.scale * figure.value
          for figure in figures
          if figure.value is not None
        ),
        diverged=statuses.count('diverged'),
        failed=statuses.count('failed'),
        results=tuple(members),
      )
    )
  return summary


def show(group: Group, *, decimals: int) -> str:
  """Writes a group as a table's cell.

  Args:
    group: the seeds of one row on one data set.
    decimals: how many to show.

  Returns:
    'mean ± deviation (n = 3)'; seeds that diverged or failed are named first,
    since the mean of the others flatters the method.
  """
  total = len(group.results)
  parts = [
    f'{name} {count} of {total}' if total > 1 else name
    for name, count in (('diverged', group.diverged), ('failed', group.failed))
    if count
  ]
  if group.mean is not None:
    spread = (
      'n/a' if group.deviation is None else f'{group.deviation:.{decimals}f}'
    )
    n = len(group.values)
    parts.append(f'{group.mean:.{decimals}f} ± {spread} (n = {n})')
  return '; '.join(parts)
