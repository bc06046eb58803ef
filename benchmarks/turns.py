"""Algorithms that take turns on the same cohorts of made-up images.

For ratios of rounds within one process: the machine's speed drifts, and whoever
follows a long round finds cold caches.
"""

import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def made_up(
  *, num_clients: int, examples: int, shape: tuple[int, ...]
) -> tuple[Any, Callable]:
  """Clients of so many random images in ten classes.

  Returns:
    (layout, (algorithm, clients [K], round) -> cohort with its plans made).
  """
  import numpy as np

  from fedjax_ext import core
  from fedjax_ext.data import from_assignment

  rng = np.random.default_rng(0)
  count = num_clients * examples
  columns = {
    'image': rng.integers(0, 256, (count, *shape), np.uint8),
    'label': rng.integers(0, 10, count).astype(np.int32),
  }
  data = from_assignment(
    columns,
    np.repeat(np.arange(num_clients), examples),
    client_ids=np.arange(num_clients),
  )
  layout = core.make_layout()
  features = core.place_features(columns, layout)

  def cohort_of(algorithm, clients, number):
    cohort = core.make_cohort(
      clients,
      round=number,
      seed=0,
      specs=algorithm.plans,
      data={'train': data},
      features=features,
      layout=layout,
    )
    for plan in algorithm.plans:
      cohort.prepare(plan)
    return cohort

  return layout, cohort_of


def bank_of(algorithm, num_clients: int, folder: pathlib.Path | None = None):
  """An empty bank of client states, None for algorithms without rows."""
  import jax

  from fedjax_ext.core import make_client_states

  if algorithm.init_client is None:
    return None
  return make_client_states(
    algorithm.init_client,
    num_clients=num_clients,
    key=jax.random.key(1),
    directory=folder,
  )


def take_turns(
  contestants: Mapping[str, Any],
  cohort_of: Callable,
  *,
  num_clients: int,
  cohort_size: int,
  rounds: int,
) -> dict[str, float]:
  """Median seconds of a round of each, cohorts planned before the clock starts.

  The first two rounds, which compile, are left out.
  """
  import jax

  from fedjax_ext import core

  states = {n: a.init(jax.random.key(0)) for n, a in contestants.items()}
  banks = {n: bank_of(a, num_clients) for n, a in contestants.items()}
  seconds: dict[str, list[float]] = {name: [] for name in contestants}
  sampler = core.uniform_sampler(num_clients, cohort_size=cohort_size)
  for number in range(1, rounds + 3):
    clients = core.sample_cohort(sampler, 0, number)
    for name in sorted(contestants, reverse=bool(number % 2)):
      cohort = cohort_of(contestants[name], clients, number)
      begun = time.perf_counter()
      states[name], banks[name], _ = contestants[name].apply(
        states[name], banks[name], cohort
      )
      jax.block_until_ready(states[name])
      seconds[name].append(time.perf_counter() - begun)
  return {name: statistics.median(s[2:]) for name, s in seconds.items()}
