"""Workloads of the benchmarks: data, client sizes, cohorts and first weights.

All of it is drawn from a seed, so that every contestant trains on the same
examples. Sizes are log-normal (sigma 0.6 of the logarithm), clipped; clients
are windows into a pool of at most 100,000 examples; cohorts are uniform,
without replacement.

Axis letters: M examples of the pool, C clients, K clients of a cohort.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

_POOL = 100_000
_SIGMA = 0.6
VOCABULARY, LENGTH = 86, 80


class Workload(NamedTuple):
  """What is trained; scalars. Rate 0.1 on clients, 1 at the server, 1 epoch.

  Attributes:
    model: 'cnn', 'softmax', 'lstm', 'mlp' or 'cifar'.
    population: C.
    cohort: K.
    mean_size: mean examples of a client.
    sizes: the smallest and the largest client.
    batch_size: B.
    num_classes: Y.
  """

  model: str
  population: int
  cohort: int
  mean_size: float
  sizes: tuple[int, int]
  batch_size: int
  num_classes: int


WORKLOADS = {
  'W1': Workload('cnn', 1_000, 50, 200, (10, 600), 20, 62),
  'W2': Workload('softmax', 10_000, 500, 60, (3, 180), 20, 10),
  'W3': Workload('lstm', 700, 10, 60, (3, 180), 4, VOCABULARY),
  'W4': Workload('mlp', 1_000, 100, 200, (10, 600), 20, 10),
  # The shape of pfl-research's CIFAR-10 benchmark, with noise for images.
  'cifar10': Workload('cifar', 1_000, 50, 50, (50, 50), 10, 10),
}


@dataclasses.dataclass(frozen=True)
class Data:
  """A workload's data.

  Attributes:
    workload: its numbers.
    x: float32 [M, 28, 28, 1] or [M, 32, 32, 3], or tokens int32 [M, 80].
    y: labels int32 [M], or next tokens int32 [M, 80].
    starts: each client's first example, int64 [C].
    sizes: each client's number of examples, int64 [C].
    seed: of the cohorts.
  """

  workload: Workload
  x: np.ndarray
  y: np.ndarray
  starts: np.ndarray
  sizes: np.ndarray
  seed: int

  def cohort(self, round: int) -> np.ndarray:
    """Client numbers int64 [K] of a round, sorted."""
    rng = np.random.default_rng([self.seed, round])
    chosen = rng.choice(len(self.sizes), self.workload.cohort, replace=False)
    return np.sort(chosen)

  def num_batches(self, round: int) -> int:
    """Batches of a round, a client's last one may be short; a scalar."""
    sizes = self.sizes[self.cohort(round)]
    return int((-(-sizes // self.workload.batch_size)).sum())


def make_data(
  name: str, *, seed: int = 0, population: int = 0, cohort: int = 0
) -> Data:
  """Draws a workload's data.

  Args:
    name: one of WORKLOADS.
    seed: of everything.
    population: C instead of the workload's, if > 0.
    cohort: K instead of the workload's, if > 0; a population that is smaller
      grows to ten times that.
  """
  workload = WORKLOADS[name]
  if cohort:
    workload = workload._replace(cohort=cohort)
  if cohort > (population or workload.population):
    population = 10 * cohort
  rng = np.random.default_rng([seed, list(WORKLOADS).index(name) + 1])
  size = min(_POOL, int(workload.population * workload.mean_size))
  x, y = (_text if workload.model == 'lstm' else _images)(rng, size, workload)
  mean = np.log(workload.mean_size) - _SIGMA**2 / 2
  sizes = rng.lognormal(mean, _SIGMA, population or workload.population)
  sizes = np.clip(np.rint(sizes), *workload.sizes).astype(np.int64)
  return Data(workload, x, y, rng.integers(0, size - sizes), sizes, seed)


def _images(
  rng: np.random.Generator, size: int, workload: Workload
) -> tuple[np.ndarray, np.ndarray]:
  y = rng.integers(0, workload.num_classes, size).astype(np.int32)
  shape = (32, 32, 3) if workload.model == 'cifar' else (28, 28, 1)
  features = math.prod(shape)
  prototypes = 0.05 * rng.standard_normal((workload.num_classes, features))
  # Small enough for SGD at 0.1 to be stable.
  x = 0.1 * rng.standard_normal((size, features), dtype=np.float32)
  x += prototypes.astype(np.float32)[y]
  return x.reshape(size, *shape), y


def _text(
  rng: np.random.Generator, size: int, workload: Workload
) -> tuple[np.ndarray, np.ndarray]:
  """A noisy chain of tokens, so that there is something to learn."""
  after = rng.permutation(VOCABULARY)
  tokens = np.empty((size, LENGTH + 1), np.int32)
  tokens[:, 0] = rng.integers(0, VOCABULARY, size)
  for t in range(LENGTH):
    noise = rng.integers(0, VOCABULARY, size)
    follows = rng.random(size) < 0.7
    tokens[:, t + 1] = np.where(follows, after[tokens[:, t]], noise)
  return tokens[:, :-1].copy(), tokens[:, 1:].copy()
