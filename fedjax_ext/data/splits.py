"""Splits by example and by client, as masks and client numbers.

Axis letters: C clients, N examples of a view, Y classes.
"""

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.data.draws import apportion
from fedjax_ext.data.federated_data import FederatedData


def stratified_mask(
  label: np.ndarray, *, fraction: float, seed: int
) -> np.ndarray:
  """Chooses ceil(fraction * N) examples, each class by its share.

  Args:
    label: int [N].
    fraction: in [0, 1).
    seed: seed of the choice.

  Returns:
    bool [N], True for the chosen examples.
  """
  check_fraction('fraction', fraction)
  label = np.asarray(label)
  chosen = np.zeros(len(label), bool)
  rng = np.random.default_rng(seed)
  classes, sizes = np.unique(label, return_counts=True)
  counts = apportion(sizes, int(np.ceil(fraction * len(label))))
  for y, count in zip(classes, counts, strict=True):
    rows = rng.permutation(np.flatnonzero(label == y))
    chosen[rows[:count]] = True
  return chosen


def client_mask(
  data: FederatedData, *, fraction: float, seed: int
) -> np.ndarray:
  """Chooses round(fraction * n) random examples of every client.

  A client with one example keeps it unchosen.

  Returns:
    bool [N] over the view's positions, True for the chosen examples.
  """
  check_fraction('fraction', fraction)
  sizes = data.sizes()
  counts = np.minimum(np.rint(fraction * sizes), np.maximum(sizes - 1, 0))
  rng = np.random.default_rng(seed)
  owner = data.owners()
  order = np.lexsort((rng.random(len(owner)), owner))
  rank = np.empty(len(owner), np.int64)
  rank[order] = np.arange(len(owner)) - np.repeat(data.offsets[:-1], sizes)
  return rank < counts[owner]


def choose_clients(
  clients: np.ndarray, *, fraction: float, seed: int
) -> np.ndarray:
  """Chooses round(fraction * C) of the client numbers [C]; sorted."""
  check_fraction('fraction', fraction)
  count = round(fraction * len(clients))
  if not count:
    return np.asarray(clients)[:0]
  return sample_clients(clients, count, seed=seed)


def sample_clients(clients: np.ndarray, count: int, *, seed: int) -> np.ndarray:
  """Chooses at most `count` of the client numbers [C]; sorted."""
  validate.at_least('count', count, 1)
  rng = np.random.default_rng(seed)
  return np.sort(rng.permutation(np.asarray(clients))[:count])


def check_fraction(name: str, fraction: float) -> None:
  """Checks that the scalar 0 <= fraction < 1."""
  validate.check(
    0 <= fraction < 1, f'Expected 0 <= {name} < 1, got {name}={fraction}.'
  )
