"""The three-way report: seen examples, fresh examples, unseen clients.

One held-out figure mixes two effects. Fresh examples of the clients that
trained tell how a model does beyond the examples it saw; clients that never
trained tell how it does beyond the clients it saw.

Yuan, Morningstar, Ning and Singhal, "What do we mean by generalization in
federated learning?", 2022, https://arxiv.org/abs/2110.14216.

Axis letters: K' clients of a part, R bootstrap samples.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.core.client_states import ClientStates
from fedjax_ext.core.evaluation import PartReport, Report, evaluate

PyTree = Any

# The parts of a three-way split, by the names that reports give them.
TRAIN, VALIDATION, UNPARTICIPATING = THREE_WAY = (
  'train',
  'validation',
  'unparticipating',
)
CONFIDENCE = 0.95
_BLOCK = 2**22  # Drawn counts in memory at a time.


class Gap(NamedTuple):
  """A gap and its bootstrap interval over clients; scalars.

  Positive where the model does worse on what it has seen less of: losses are
  subtracted as they are, all other metrics the other way around.
  """

  value: float
  low: float
  high: float


class Generalization(NamedTuple):
  """The gaps of one metric.

  Attributes:
    out_of_sample: fresh against seen examples of participating clients.
    participation: unparticipating against participating clients, on fresh
      examples of both.
  """

  out_of_sample: Gap
  participation: Gap


def lower_is_better(metric: str) -> bool:
  """Whether a metric is a loss, by its name."""
  return metric.rpartition('_')[2] in ('loss', 'perplexity')


def is_three_way(report: Report) -> bool:
  """Whether a report has the three parts."""
  return all(part in report for part in THREE_WAY)


def check_three_way(report: Report) -> None:
  """Checks that a three-way report says what it claims to.

  Raises:
    InvalidInput: a part is absent, or a client is in both groups.
  """
  absent = [part for part in THREE_WAY if part not in report]
  validate.check(
    not absent,
    f'Expected parts {list(THREE_WAY)}, got {sorted(report)}.',
  )
  seen = np.union1d(report[TRAIN].clients, report[VALIDATION].clients)
  both = np.intersect1d(seen, report[UNPARTICIPATING].clients)
  validate.check(
    not len(both),
    'Expected unparticipating clients to be others than the participating '
    f'ones, got {len(both)} in both, such as {both[:3].tolist()}.',
  )


def generalization_gaps(
  report: Report,
  metric: str = 'accuracy',
  *,
  weighting: str = 'pooled',
  num_samples: int = 1000,
  seed: int = 0,
) -> Generalization:
  """The gaps of a metric, with bootstrap intervals over clients.

  With F the mean of a loss over a part,

    out-of-sample gap = F(validation) - F(train)
    participation gap = F(unparticipating) - F(validation)

  and the signs turned for metrics of which more is better. The bootstrap draws
  clients with replacement, the model staying as it is: participating ones
  together with both of their parts, unparticipating ones apart. It says how the
  gap depends on who was measured, not on who trained; repeat the split over
  seeds for that.

  Args:
    report: of the three parts.
    metric: which.
    weighting: 'pooled', every example (of text: token) alike, or 'mean', every
      client alike.
    num_samples: R.
    seed: seed of the bootstrap.

  Returns:
    Values with 95 % percentile intervals; NaN where a part has no figure.

  Raises:
    InvalidInput: a part or the metric is absent, or clients are in both groups.
  """
  validate.one_of('weighting', weighting, ('pooled', 'mean'))
  validate.at_least('num_samples', num_samples, 1)
  check_three_way(report)
  for part in THREE_WAY:
    validate.one_of('metric', metric, list(report[part].sums))
  sign = 1 if lower_is_better(metric) else -1
  rng = np.random.default_rng(seed)
  participating = np.union1d(report[TRAIN].clients, report[VALIDATION].clients)
  held_out = report[UNPARTICIPATING].clients
  columns = lambda part, clients: _columns(
    report[part], metric, weighting, clients
  )
  seen = [columns(TRAIN, participating), columns(VALIDATION, participating)]
  train, validation = _resampled_means(rng, seen, num_samples)
  (unparticipating,) = _resampled_means(
    rng, [columns(UNPARTICIPATING, held_out)], num_samples
  )
  return Generalization(
    _gap(sign * (validation - train)),
    _gap(sign * (unparticipating - validation)),
  )


def gap_metrics(
  report: Report, *, num_samples: int = 1000, seed: int = 0
) -> dict[str, float]:
  """The gaps of every metric, or {} where a part is absent.

  Returns:
    {'gap/<metric>/<out_of_sample or participation><statistic>': scalar} with
    statistics '' (every example alike), '_low' and '_high' (the interval) and
    '_mean' (every client alike).
  """
  if not is_three_way(report):
    return {}
  result = {}
  for metric in report[TRAIN].sums:
    said = generalization_gaps(
      report, metric, num_samples=num_samples, seed=seed
    )
    alike = generalization_gaps(report, metric, weighting='mean', num_samples=1)
    for name in Generalization._fields:
      key, gap = f'gap/{metric}/{name}', getattr(said, name)
      result[key] = gap.value
      result[f'{key}_low'], result[f'{key}_high'] = gap.low, gap.high
      result[f'{key}_mean'] = getattr(alike, name).value
  return {name: value for name, value in result.items() if np.isfinite(value)}


def evaluate_generalization(
  predictor: Any,
  server_state: PyTree,
  states: ClientStates | None = None,
  *,
  metrics: Sequence[str] = ('accuracy',),
  weighting: str = 'pooled',
  num_samples: int = 1000,
  **settings: Any,
) -> tuple[Report, dict[str, Generalization]]:
  """Scores the three parts with one model, in one pass, and takes the gaps.

  Args:
    predictor: the model or models.
    server_state: pytree.
    states: the clients' rows, where the predictor uses them.
    metrics: of which to take gaps.
    weighting: as in `generalization_gaps`.
    num_samples: R, of the bootstrap.
    **settings: `data`, `parts`, `features`, `layout`, ... of `make_evaluator`,
      with parts 'train', 'validation' and 'unparticipating'.

  Returns:
    The report, client by client ([K'] arrays; `summary()` of a part has its
    statistics), and the gaps by metric.
  """
  absent = [part for part in THREE_WAY if part not in settings['parts']]
  validate.check(
    not absent,
    f'Expected parts {list(THREE_WAY)}, got {sorted(settings["parts"])}.',
  )
  report = evaluate(predictor, server_state, states, **settings)
  return report, {
    metric: generalization_gaps(
      report,
      metric,
      weighting=weighting,
      num_samples=num_samples,
      seed=settings.get('seed', 0),
    )
    for metric in metrics
  }


def _columns(
  part: PartReport, metric: str, weighting: str, clients: np.ndarray
) -> np.ndarray:
  """Sums and weights of clients [K'], 0 for absent ones; float64 [2, K']."""
  sums = np.asarray(part.sums[metric], np.float64)
  weights = np.asarray(part.weights[metric], np.float64)
  some = weights > 0
  if weighting == 'mean':
    sums = np.divide(sums, weights, out=np.zeros_like(sums), where=some)
    weights = some.astype(np.float64)
  result = np.zeros((2, len(clients)))
  result[:, np.searchsorted(clients, part.clients)] = sums, weights
  return result


def _resampled_means(
  rng: np.random.Generator, parts: list[np.ndarray], num_samples: int
) -> list[np.ndarray]:
  """Means of parts [2, K'] of the same clients: as they are, then resampled.

  Every sample draws the clients once for all parts. In blocks, so that memory
  does not grow with K' * R.

  Returns:
    One array [1 + R] for each part.
  """
  table = np.concatenate(parts).T  # [K', 2 * parts]
  size = len(table)
  totals = [table.sum(0, keepdims=True)]
  block = max(1, _BLOCK // max(size, 1))
  for first in range(0, num_samples if size else 0, block):
    count = min(block, num_samples - first)
    totals.append(rng.multinomial(size, np.full(size, 1 / size), count) @ table)
  total = np.concatenate(totals)
  with np.errstate(invalid='ignore'):
    return [total[:, 2 * i] / total[:, 2 * i + 1] for i in range(len(parts))]


def _gap(values: np.ndarray) -> Gap:
  """From the figure and its bootstrap samples [1 + R]."""
  samples = values[1:][np.isfinite(values[1:])]
  tail = 100 * (1 - CONFIDENCE) / 2
  low, high = (
    np.percentile(samples, (tail, 100 - tail))
    if len(samples)
    else (np.nan, np.nan)
  )
  return Gap(float(values[0]), float(low), float(high))
