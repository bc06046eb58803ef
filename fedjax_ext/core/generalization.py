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
from fedjax_ext.core.evaluation import evaluate
from fedjax_ext.core.parts import PartReport, Report

PyTree = Any

# The parts of a three-way split, by the names that reports give them.
TRAIN, VALIDATION, UNPARTICIPATING = THREE_WAY = (
  'train',
  'validation',
  'unparticipating',
)
CONFIDENCE = 0.95
_BLOCK = 2**22  # Drawn counts in memory at a time.
_MOST = 2 * 10**8  # Drawn counts in all, beyond 100 samples.
_LOWER = ('loss', 'perplexity', 'error', 'nll', 'mse', 'rank')


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
  """Whether less of a metric is better, by the last word of its name."""
  return metric.rpartition('_')[2] in _LOWER


def is_three_way(report: Report) -> bool:
  """Whether a report has the three parts, about the clients that they say.

  Those of 'validation' have to be among those of 'train', those of
  'unparticipating' others: a source's own validation clients make no gap.
  """
  return not _mistake(report)


def check_three_way(report: Report) -> None:
  """Checks that a three-way report says what it claims to.

  Raises:
    InvalidInput: a part is absent, or clients are in the wrong ones.
  """
  mistake = _mistake(report)
  validate.check(not mistake, mistake)


def _mistake(report: Report) -> str:
  """What is wrong with a three-way report, or ''."""
  absent = [part for part in THREE_WAY if part not in report]
  if absent:
    return f'Expected parts {list(THREE_WAY)}, got {sorted(report)}.'
  trained = report[TRAIN].clients
  others = np.setdiff1d(report[VALIDATION].clients, trained)
  if len(others):
    return (
      'Expected validation examples of clients that train, got '
      f'{len(others)} others, such as {others[:3].tolist()}.'
    )
  both = np.intersect1d(trained, report[UNPARTICIPATING].clients)
  if len(both):
    return (
      'Expected unparticipating clients to be others than the participating '
      f'ones, got {len(both)} in both, such as {both[:3].tolist()}.'
    )
  return ''


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

  and the signs turned for metrics of which more is better: all but those whose
  name ends in loss, perplexity, error, nll, mse or rank. The bootstrap draws
  clients with replacement, the model staying as it is: participating ones
  together with both of their parts, unparticipating ones apart. It says how the
  gap depends on who was measured, not on who trained; repeat the split over
  seeds for that.

  Args:
    report: of the three parts.
    metric: which.
    weighting: 'pooled', every example (of text: token) alike, or 'mean', every
      client alike.
    num_samples: R; fewer, at least 100, beyond 200,000 clients. 0 leaves the
      intervals NaN.
    seed: seed of the bootstrap.

  Returns:
    Values with 95 % percentile intervals; NaN where a part has no figure.

  Raises:
    InvalidInput: a part or the metric is absent, or clients are in the wrong
      parts.
  """
  return _all_gaps(report, (metric,), weighting, num_samples, seed)[metric]


def _all_gaps(
  report: Report,
  metrics: Sequence[str],
  weighting: str,
  num_samples: int,
  seed: int,
) -> dict[str, Generalization]:
  """The gaps of several metrics, of the same bootstrap samples."""
  validate.one_of('weighting', weighting, ('pooled', 'mean'))
  validate.at_least('num_samples', num_samples, 0)
  check_three_way(report)
  for metric in metrics:
    for part in THREE_WAY:
      validate.one_of('metric', metric, list(report[part].sums))
  rng = np.random.default_rng(seed)
  participating, held_out = (
    report[part].clients for part in (TRAIN, UNPARTICIPATING)
  )
  clients = len(participating) + len(held_out)
  if clients:
    num_samples = min(num_samples, max(100, _MOST // clients))
  columns = lambda part, who: [
    _columns(report[part], metric, weighting, who) for metric in metrics
  ]
  seen = columns(TRAIN, participating) + columns(VALIDATION, participating)
  both = _resampled_means(rng, seen, num_samples)
  unseen = _resampled_means(
    rng, columns(UNPARTICIPATING, held_out), num_samples
  )
  result = {}
  for i, metric in enumerate(metrics):
    sign = 1 if lower_is_better(metric) else -1
    train, validation = both[i], both[len(metrics) + i]
    result[metric] = Generalization(
      _gap(sign * (validation - train)), _gap(sign * (unseen[i] - validation))
    )
  return result


def gap_metrics(
  report: Report, *, num_samples: int = 1000, seed: int = 0
) -> dict[str, float]:
  """The gaps of every metric, or {} where a report is not a three-way one.

  Returns:
    {'gap/<metric>/<out_of_sample or participation><statistic>': scalar} with
    statistics '' (every example alike), '_mean' (every client alike) and, with
    num_samples > 0, '_low' and '_high' (the interval of the first).
  """
  if not is_three_way(report):
    return {}
  metrics = [
    name
    for name in report[TRAIN].sums
    if all(name in report[part].sums for part in THREE_WAY)
  ]
  pooled = _all_gaps(report, metrics, 'pooled', num_samples, seed)
  alike = _all_gaps(report, metrics, 'mean', 0, seed)
  result = {}
  for metric in metrics:
    for name in Generalization._fields:
      key, gap = f'gap/{metric}/{name}', getattr(pooled[metric], name)
      result[key] = gap.value
      if num_samples:
        result[f'{key}_low'], result[f'{key}_high'] = gap.low, gap.high
      result[f'{key}_mean'] = getattr(alike[metric], name).value
  return result


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
  seed = settings.get('seed', 0)
  return report, _all_gaps(report, metrics, weighting, num_samples, seed)


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
