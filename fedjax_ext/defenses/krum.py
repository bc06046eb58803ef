"""Krum and multi-Krum: the updates that lie closest to their neighbours.

Blanchard, El Mhamdi, Guerraoui and Stainer, "Machine learning with adversaries:
Byzantine tolerant gradient descent", 2017, https://arxiv.org/abs/1703.02757.

Axis letters: K' client slots, some of them empty; P parameters.
"""

import jax
import jax.numpy as jnp

from fedjax_ext.core import validate
from fedjax_ext.core.reducers import Reducer
from fedjax_ext.defenses.updates import as_rows, mean_of_rows, rule


def krum_scores(
  rows: jax.Array, present: jax.Array, *, num_malicious: int
) -> jax.Array:
  """Sum of squared distances to the n - f - 2 nearest others, [K'].

  Args:
    rows: updates [K', P].
    present: bool [K'], n of them True; the others score infinity.
    num_malicious: f.
  """
  squares = jnp.square(rows).sum(1)
  between = squares[:, None] + squares - 2 * rows @ rows.T
  others = present & ~jnp.eye(len(rows), dtype=bool)
  between = jnp.where(others, jnp.maximum(between, 0), jnp.inf)
  nearest = jnp.sort(between, axis=1)
  counted = jnp.arange(len(rows)) < present.sum() - num_malicious - 2
  scores = jnp.where(counted, nearest, 0).sum(1)
  return jnp.where(present, scores, jnp.inf)


def multi_krum(
  *, cohort_size: int, num_malicious: int = 1, keep: int = 1
) -> Reducer:
  """The weighted mean of the `keep` updates with the lowest scores.

  Ties go to the lower client number. With keep=1 this is Krum. A round with
  fewer than 2 f + 3 clients left keeps what scores it has.

  Args:
    cohort_size: n, clients of a round; at least 2 f + 3.
    num_malicious: f, as assumed.
    keep: m, at most n - f - 2.

  Raises:
    InvalidInput: n, f and m do not fit.
  """
  validate.at_least('num_malicious', num_malicious, 0)
  least = 2 * num_malicious + 3
  validate.check(
    cohort_size >= least,
    f'Expected cohort_size >= {least} for num_malicious={num_malicious} (Krum '
    f'needs 2 f + 3 clients), got cohort_size={cohort_size}.',
  )
  validate.between('keep', keep, 1, cohort_size - num_malicious - 2)

  def choose(updates, weights, clients):
    present = weights > 0
    scores = krum_scores(as_rows(updates), present, num_malicious=num_malicious)
    order = jnp.lexsort((clients, scores))
    chosen = jnp.zeros(len(scores), bool).at[order[:keep]].set(True)
    return mean_of_rows(updates, jnp.where(chosen & present, weights, 0))

  return rule(choose)


def krum(*, cohort_size: int, num_malicious: int = 1) -> Reducer:
  """The one update with the lowest score; see `multi_krum`."""
  return multi_krum(
    cohort_size=cohort_size, num_malicious=num_malicious, keep=1
  )
