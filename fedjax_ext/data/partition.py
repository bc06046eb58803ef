"""Partitioners: who owns which example.

Each returns the owner of every example, int64 [N], gives each example to
exactly one client, always terminates, and depends on its arguments only.

Axis letters: N examples, C clients, Y classes.
"""

import numpy as np

from fedjax_ext.core import validate


def _check_sizes(
  num_examples: int, num_clients: int, min_examples: int
) -> None:
  validate.at_least('num_clients', num_clients, 1)
  validate.at_least('min_examples', min_examples, 0)
  validate.check(
    num_clients * min_examples <= num_examples,
    f'Expected num_clients * min_examples <= {num_examples} examples, got '
    f'num_clients={num_clients}, min_examples={min_examples}.',
  )


def apportion(shares: np.ndarray, total: int) -> np.ndarray:
  """Splits a total by shares [C] into whole counts [C], by largest remainder.

  Hamilton's method; ties go to the lower index. The counts sum to `total` and
  differ from shares * total / sum(shares) by less than 1.
  """
  shares = np.asarray(shares, np.float64)
  exact = shares / shares.sum() * total
  counts = np.floor(exact).astype(np.int64)
  left = total - counts.sum()
  order = np.argsort(-(exact - counts), kind='stable')
  counts[order[:left]] += 1
  return counts


def iid_partition(
  num_examples: int, *, num_clients: int, seed: int
) -> np.ndarray:
  """Deals shuffled examples out evenly; sizes differ by at most 1.

  Returns:
    Owners int64 [N].
  """
  _check_sizes(num_examples, num_clients, 0)
  rng = np.random.default_rng(seed)
  owner = np.empty(num_examples, np.int64)
  owner[rng.permutation(num_examples)] = np.arange(num_examples) % num_clients
  return owner


def dirichlet_partition(
  label: np.ndarray,
  *,
  num_clients: int,
  alpha: float,
  min_examples: int = 1,
  seed: int,
) -> np.ndarray:
  """Splits each class over clients by a Dirichlet(alpha) draw.

  Client shares of class y: p_y ~ Dirichlet(alpha * 1_C), turned into counts by
  apportionment. Clients below `min_examples` then take examples from the
  largest clients, out of those clients' most frequent classes. Yurochkin et
  al., "Bayesian nonparametric federated learning of neural networks", 2019,
  https://arxiv.org/abs/1905.12022, redraw until all clients are large enough,
  which need not end.

  Args:
    label: int [N].
    num_clients: C.
    alpha: concentration; small values give few classes to a client.
    min_examples: every client gets at least so many.
    seed: seed of the draw.

  Returns:
    Owners int64 [N].

  Raises:
    InvalidInput: alpha <= 0, or fewer than C * min_examples examples.
  """
  label = np.asarray(label)
  validate.check(
    0 < alpha < np.inf, f'Expected 0 < alpha < infinity, got alpha={alpha}.'
  )
  _check_sizes(len(label), num_clients, min_examples)
  rng = np.random.default_rng(seed)
  classes, label = np.unique(label, return_inverse=True)
  counts = np.zeros((num_clients, len(classes)), np.int64)
  for y, size in enumerate(np.bincount(label, minlength=len(classes))):
    counts[:, y] = apportion(_dirichlet(rng, alpha, num_clients), int(size))
  _raise_minimum(counts, min_examples)
  owner = np.empty(len(label), np.int64)
  for y in range(len(classes)):
    rows = rng.permutation(np.flatnonzero(label == y))
    owner[rows] = np.repeat(np.arange(num_clients), counts[:, y])
  return owner


def _dirichlet(rng: np.random.Generator, alpha: float, size: int) -> np.ndarray:
  """A Dirichlet draw [size] in log space, where a tiny alpha does not give 0/0.

  log Gamma(a) = log Gamma(a + 1) + log(U) / a in distribution.
  """
  logs = np.log(rng.gamma(alpha + 1, size=size))
  logs += np.log1p(-rng.random(size)) / alpha
  shares = np.exp(logs - logs.max())
  return shares / shares.sum()


def _raise_minimum(counts: np.ndarray, minimum: int) -> None:
  """Moves examples in counts [C, Y], in place, until each row sums to it."""
  sizes = counts.sum(1)
  for poor in np.flatnonzero(sizes < minimum).tolist():
    while sizes[poor] < minimum:
      rich = int(sizes.argmax())
      y = int(counts[rich].argmax())
      counts[rich, y] -= 1
      counts[poor, y] += 1
      sizes[rich] -= 1
      sizes[poor] += 1
