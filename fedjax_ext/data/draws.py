"""Draws and checks that partitioners share.

Axis letters: N examples, C clients, Y classes.
"""

import numpy as np

from fedjax_ext.core import validate


def check_sizes(num_examples: int, num_clients: int, min_examples: int) -> None:
  """Raises InvalidInput unless all clients can have `min_examples`, scalars."""
  validate.at_least('num_clients', num_clients, 1)
  validate.at_least('min_examples', min_examples, 0)
  validate.check(
    num_clients * min_examples <= num_examples,
    f'Expected num_clients * min_examples <= {num_examples} examples, got '
    f'num_clients={num_clients}, min_examples={min_examples}.',
  )


def check_alpha(alpha: float, name: str = 'alpha') -> None:
  """Raises InvalidInput unless a concentration is positive and finite."""
  validate.check(
    0 < alpha < np.inf, f'Expected 0 < {name} < infinity, got {name}={alpha}.'
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


def softmax(logs: np.ndarray) -> np.ndarray:
  """Shares [C, Y] that sum to 1 over classes."""
  shares = np.exp(logs - logs.max(1, keepdims=True))
  return shares / shares.sum(1, keepdims=True)


def log_gammas(
  rng: np.random.Generator, alpha: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
  """Logarithms of Gamma(alpha) draws; normalised, they are a Dirichlet draw.

  In log space, where a tiny alpha does not give 0/0:
  log Gamma(a) = log Gamma(a + 1) + log(U) / a in distribution.
  """
  alpha = np.maximum(alpha, 1e-300)  # log(U) / a stays finite
  logs = np.log(rng.gamma(alpha + 1, size=shape))
  return logs + np.log1p(-rng.random(shape)) / alpha


def dirichlet_draw(
  rng: np.random.Generator, alpha: float, size: int
) -> np.ndarray:
  """A symmetric Dirichlet draw [size]."""
  logs = log_gammas(rng, np.float64(alpha), (size,))
  shares = np.exp(logs - logs.max())
  return shares / shares.sum()


def rows_by_class(rng: np.random.Generator, label: np.ndarray) -> np.ndarray:
  """Rows in ascending order of labels [N], in random order within one; [N]."""
  rows = rng.permutation(len(label))
  return rows[np.argsort(label[rows], kind='stable')]
