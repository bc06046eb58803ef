"""Judges a paper's claims by paired per-seed differences."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Literal

from launchers import results as results_lib
from launchers import spec as spec_lib

_CONFIDENCE = 0.95
Outcome = Literal['holds', 'fails', 'undecided', 'not contradicted']


@dataclasses.dataclass(frozen=True)
class Interval:
  """Mean and two-sided 95 % t-interval of paired differences."""

  mean: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The judgement of one claim on one data set.

  Attributes:
    claim: the claim.
    dataset: the column.
    differences: (seed, gain) pairs in shown points; a gain is positive where
      the row that is claimed to be better is better.
    interval: their interval, or None with fewer than two of them.
    outcome: what follows.
    reason: why the claim is undecided, where the interval does not say it.
  """

  claim: spec_lib.Claim
  dataset: str
  differences: tuple[tuple[int, float], ...]
  interval: Interval | None
  outcome: Outcome
  reason: str = ''


def t_interval(differences: Sequence[float]) -> Interval:
  """Computes mean +- t(0.975, n - 1) * s / sqrt(n).

  Args:
    differences: at least two paired differences; s is their standard deviation
      with n - 1 in the denominator.

  Returns:
    The interval; of zero width where all differences are equal.
  """
  from scipy import stats

  n = len(differences)
  mean = statistics.fmean(differences)
  quantile = float(stats.t.ppf(0.5 + _CONFIDENCE / 2, n - 1))
  half = quantile * statistics.stdev(differences) / math.sqrt(n)
  return Interval(mean, mean - half, mean + half)


def outcome(
  interval: Interval, *, margin: float, kind: str = 'better'
) -> Outcome:
  """Applies the rule of verdicts to one interval.

  Args:
    interval: of the gains; positive is the claimed side.
    margin: the points inside which two rows count as equal.
    kind: 'better', 'equal' or 'zero'.

  Returns:
    Of 'better': 'holds' where the interval lies wholly above 0; 'fails' where
    it lies wholly below 0, or contains 0 and lies inside +-margin. Of 'equal':
    'holds' where it lies inside +-margin, 'fails' where it lies wholly outside.
    Else 'undecided'. Of 'zero', no effect: 'holds' where the interval lies
    inside +-margin, 'not contradicted' where it contains 0 or the mean lies
    inside +-margin (a wide interval contradicts nothing), else 'fails'.
  """
  if kind == 'zero':
    if -margin <= interval.low and interval.high <= margin:
      return 'holds'
    near = abs(interval.mean) <= margin
    return (
      'not contradicted'
      if near or interval.low <= 0 <= interval.high
      else 'fails'
    )
  if kind == 'equal':
    if -margin <= interval.low and interval.high <= margin:
      return 'holds'
    outside = interval.low > margin or interval.high < -margin
    return 'fails' if outside else 'undecided'
  if interval.low > 0:
    return 'holds'
  if interval.high < 0:
    return 'fails'
  equal = -margin <= interval.low and interval.high <= margin
  return 'fails' if equal else 'undecided'


def judge(
  claim: spec_lib.Claim,
  dataset: str,
  results: Sequence[results_lib.Result],
  *,
  spec: spec_lib.TableSpec,
) -> Verdict:
  """Judges one claim on one data set.

  Args:
    claim: the claim.
    dataset: the column.
    results: every result of the table.
    spec: the table.

  Returns:
    The verdict. A seed that has no figure in either row leaves the claim
    undecided: dropping it would judge the survivors alone.
  """
  ended = {
    (result.cell.row, result.cell.seed): result
    for result in results
    if result.cell.dataset == dataset
  }
  direction = claim.direction or spec.direction
  sign = -1 if direction == 'lower' else 1
  sides = [(claim.better, claim.figure or spec.metric)]
  if claim.worse:
    sides.append((claim.worse, claim.against or sides[0][1]))
  differences, missing = [], []
  for seed in dict.fromkeys(seed for _, seed in ended):
    pair = [
      results_lib.measure_figure(spec, ended[row, seed], figure)
      for row, figure in sides
    ]
    if all(figure.value is not None for figure in pair):
      values = [spec.scale * figure.value for figure in pair]
      gain = values[0] - sum(values[1:]) - claim.level
      differences.append((seed, sign * gain))
      continue
    for (row, _), figure in zip(sides, pair, strict=True):
      if figure.value is None:
        missing.append(f'{row}, seed {seed}: {figure.status}')
  n = len(differences)
  interval = t_interval([gain for _, gain in differences]) if n > 1 else None
  verdict = Verdict(claim, dataset, tuple(differences), interval, 'undecided')
  if missing:
    return dataclasses.replace(verdict, reason='; '.join(missing))
  if interval is None:
    reason = f'n = {n} seed; an interval needs at least 2'
    return dataclasses.replace(verdict, reason=reason)
  return dataclasses.replace(
    verdict,
    outcome=outcome(interval, margin=claim.margin, kind=claim.kind),
  )


def judge_all(
  spec: spec_lib.TableSpec, results: Sequence[results_lib.Result]
) -> list[Verdict]:
  """Judges every claim on each of its data sets that was run."""
  ran = dict.fromkeys(result.cell.dataset for result in results)
  return [
    judge(claim, dataset, results, spec=spec)
    for claim in spec.claims
    for dataset in ran
    if dataset in claim.datasets
    and all(
      dataset in row.datasets
      for row in spec.rows
      if row.name in (claim.better, claim.worse)
    )
  ]


@dataclasses.dataclass(frozen=True)
class SlopeVerdict:
  """The judgement of one slope.

  Attributes:
    slope: what is claimed.
    columns: those that every seed has.
    values: (seed, slope) pairs in shown points for each 1 / x.
    interval: their interval, or None with fewer than two of them.
    outcome: what follows.
    reason: why it is undecided, where the interval does not say it.
  """

  slope: spec_lib.Slope
  columns: tuple[str, ...]
  values: tuple[tuple[int, float], ...]
  interval: Interval | None
  outcome: Outcome
  reason: str = ''


def judge_slope(
  slope: spec_lib.Slope,
  spec: spec_lib.TableSpec,
  results: Sequence[results_lib.Result],
) -> SlopeVerdict:
  """Least-squares slope of a row's figure against 1 / x, seed by seed.

  Args:
    slope: what is claimed.
    spec: the table.
    results: every result of it.

  Returns:
    The verdict over the columns that all seeds have; a cell without a figure
    leaves it undecided.
  """
  places = {d.name: d.x for d in spec.datasets if d.name in slope.datasets}
  points: dict[int, list[tuple[float, float]]] = {}
  missing, columns = [], {}
  for result in results:
    cell = result.cell
    x = places.get(cell.dataset)
    if cell.row != slope.row or not x:
      continue
    columns.setdefault(cell.seed, set()).add(cell.dataset)
    figure = results_lib.measure_figure(spec, result, spec.metric)
    if figure.value is None:
      missing.append(f'{cell.dataset}, seed {cell.seed}: {figure.status}')
    else:
      point = (1 / x, figure.value, cell.dataset)
      points.setdefault(cell.seed, []).append(point)
  # The columns that all seeds have: others would weigh some seeds differently.
  shared = set.intersection(*columns.values()) if columns else set()
  values = []
  for seed, all_points in points.items():
    own = [(x, y) for x, y, column in all_points if column in shared]
    if len({x for x, _ in own}) > 1:
      xs, ys = zip(*own, strict=True)
      fit = statistics.linear_regression(xs, ys)
      values.append((seed, spec.scale * fit.slope))
  names = tuple(d.name for d in spec.datasets if d.name in shared)
  verdict = SlopeVerdict(slope, names, tuple(values), None, 'undecided')
  if missing:
    return dataclasses.replace(verdict, reason='; '.join(missing))
  if len(values) < 2:
    reason = 'fewer than two seeds with two columns'
    return dataclasses.replace(verdict, reason=reason)
  interval = t_interval([value for _, value in values])
  sign = 1 if slope.sign == 'positive' else -1
  low, high = sorted((sign * interval.low, sign * interval.high))
  said = 'holds' if low > 0 else 'fails' if high < 0 else 'undecided'
  return dataclasses.replace(verdict, interval=interval, outcome=said)
