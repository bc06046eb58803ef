"""Cohort sampling: pure functions of (seed, round).

Any round's cohort can be recomputed alone, so a resumed run needs no sampler
state. C clients in the population, K in the cohort.
"""

from collections.abc import Callable

import numpy as np

from fedjax_ext.core import validate

Sampler = Callable[[np.random.Generator], np.ndarray]


def sample_cohort(sampler: Sampler, seed: int, round: int) -> np.ndarray:
  """Returns the cohort of a round: client numbers int64 [K], sorted, distinct.

  Args:
    sampler: one of the samplers below, or any pure function of a generator.
    seed: the sampling seed.
    round: round number, from 1.

  Raises:
    InvalidInput: the sampler returned a client twice.
  """
  rng = np.random.Generator(
    np.random.Philox(key=np.array([seed, round], np.uint64))
  )
  clients = np.sort(np.asarray(sampler(rng), np.int64))
  validate.check(
    not np.any(clients[1:] == clients[:-1]),
    f'Expected distinct clients in the cohort of round {round}.',
  )
  return clients


def _pool(clients: int | np.ndarray) -> np.ndarray | None:
  return None if np.ndim(clients) == 0 else np.asarray(clients, np.int64)


def check_cohort_size(cohort_size: int, population: int) -> None:
  """Checks that the scalar 1 <= cohort_size <= population."""
  validate.at_least('cohort_size', cohort_size, 1)
  validate.check(
    cohort_size <= population,
    f'Expected cohort_size <= {population} (the participating clients), got '
    f'cohort_size={cohort_size}.',
  )


def uniform_sampler(clients: int | np.ndarray, *, cohort_size: int) -> Sampler:
  """Draws K clients uniformly without replacement.

  Args:
    clients: the participating client numbers [C'], or C for all of 0..C-1.
    cohort_size: K.
  """
  pool = _pool(clients)
  population = int(clients) if pool is None else len(pool)
  check_cohort_size(cohort_size, population)

  def sample(rng: np.random.Generator) -> np.ndarray:
    chosen = rng.choice(population, cohort_size, replace=False, shuffle=False)
    return chosen if pool is None else pool[chosen]

  return sample


def poisson_sampler(
  clients: int | np.ndarray, *, probability: float
) -> Sampler:
  """Every client takes part independently; the cohort may be empty.

  The sampling that amplification theorems of differential privacy assume.

  Args:
    clients: the participating client numbers [C'], or C for all of 0..C-1.
    probability: a client's chance of taking part, in (0, 1].
  """
  pool = _pool(clients)
  population = int(clients) if pool is None else len(pool)
  validate.above('probability', probability, 0)
  validate.between('probability', probability, 0, 1)

  def sample(rng: np.random.Generator) -> np.ndarray:
    size = rng.binomial(population, probability)
    chosen = rng.choice(population, size, replace=False, shuffle=False)
    return chosen if pool is None else pool[chosen]

  return sample


def weighted_sampler(
  clients: int | np.ndarray, *, weights: np.ndarray, cohort_size: int
) -> Sampler:
  """Draws K clients without replacement, one after another by weight.

  Keys log(u) / w, the K largest win: Efraimidis and Spirakis, "Weighted random
  sampling with a reservoir", 2006, https://doi.org/10.1016/j.ipl.2005.11.003.

  Args:
    clients: the participating client numbers [C'], or C for all of 0..C-1.
    weights: [C'] >= 0; a client of weight 0 is never drawn.
    cohort_size: K.
  """
  pool = _pool(clients)
  population = int(clients) if pool is None else len(pool)
  weights = np.asarray(weights, np.float64)
  validate.check(
    weights.shape == (population,),
    f'Expected weights of shape [{population}], got {list(weights.shape)}.',
  )
  validate.check(
    np.isfinite(weights).all() and (weights >= 0).all(),
    'Expected finite weights >= 0.',
  )
  check_cohort_size(cohort_size, int((weights > 0).sum()))

  def sample(rng: np.random.Generator) -> np.ndarray:
    with np.errstate(divide='ignore'):
      keys = np.log1p(-rng.random(population)) / weights
    keys[weights == 0] = -np.inf
    chosen = np.argpartition(-keys, cohort_size - 1)[:cohort_size]
    return chosen if pool is None else pool[chosen]

  return sample


def fixed_sampler(clients: np.ndarray) -> Sampler:
  """The same clients [K] in every round (cross-silo training)."""
  chosen = np.array(clients, np.int64)
  return lambda rng: chosen
