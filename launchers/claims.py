"""Judges a paper's claims by paired per-seed differences."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Literal

from launchers import results as results_lib
from launchers import spec as spec_lib

_CONFIDENCE = 0.95


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
  outcome: Literal['holds', 'fails', 'undecided']
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
) -> Literal['holds', 'fails', 'undecided']:
  """Applies the rule of verdicts to one interval.

  Args:
    interval: of the gains; positive is the claimed side.
    margin: the points inside which two rows count as equal.
    kind: 'better' or 'equal'.

  Returns:
    Of 'better': 'holds' where the interval lies wholly above 0; 'fails' where
    it lies wholly below 0, or contains 0 and lies inside +-margin. Of 'equal':
    'holds' where it lies inside +-margin, 'fails' where it lies wholly outside.
    Else 'undecided'.
  """
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
  metric: str,
  scale: float,
  direction: str,
) -> Verdict:
  """Judges one claim on one data set.

  Args:
    claim: the claim.
    dataset: the column.
    results: every result of the table.
    metric: the table's metric.
    scale: shown = scale * measured.
    direction: 'higher' or 'lower', whichever is better.

  Returns:
    The verdict. A seed that has no figure in either row leaves the claim
    undecided: dropping it would judge the survivors alone.
  """
  figures = {
    (result.cell.row, result.cell.seed): results_lib.measure(result, metric)
    for result in results
    if result.cell.dataset == dataset
  }
  sign = scale if direction == 'higher' else -scale
  differences, missing = [], []
  for seed in dict.fromkeys(seed for _, seed in figures):
    pair = [figures[row, seed] for row in (claim.better, claim.worse)]
    if all(figure.value is not None for figure in pair):
      differences.append((seed, sign * (pair[0].value - pair[1].value)))
      continue
    for row, figure in zip((claim.better, claim.worse), pair, strict=True):
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
    judge(
      claim,
      dataset,
      results,
      metric=spec.metric,
      scale=spec.scale,
      direction=spec.direction,
    )
    for claim in spec.claims
    for dataset in ran
    if dataset in claim.datasets
  ]
