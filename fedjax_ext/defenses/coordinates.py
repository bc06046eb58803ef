"""Rules that look at every parameter by itself.

Axis letters: K' client slots, some of them empty.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_ext.core import validate
from fedjax_ext.core.reducers import Reducer
from fedjax_ext.defenses.updates import mean_of_rows, rule

PyTree = Any


def _sorted(x: jax.Array, present: jax.Array) -> jax.Array:
  """Rows of x [K', ...] in rising order, absent ones last."""
  shape = (-1, *[1] * (x.ndim - 1))
  return jnp.sort(jnp.where(present.reshape(shape), x, jnp.inf), axis=0)


def median() -> Reducer:
  """The median of every parameter, clients alike.

  Yin, Chen, Kannan and Bartlett, "Byzantine-robust distributed learning:
  towards optimal statistical rates", 2018, https://arxiv.org/abs/1803.01498.
  """

  def middle(updates: PyTree, weights: jax.Array, clients: jax.Array) -> PyTree:
    del clients
    present = weights > 0
    n = present.sum()
    low, high = jnp.maximum(n - 1, 0) // 2, n // 2
    # Of no client at all there is no median: the model stays.
    pick = lambda s: jnp.where(n > 0, (s[low] + s[high]) / 2, 0)
    return jax.tree.map(lambda x: pick(_sorted(x, present)), updates)

  return rule(middle)


def trimmed_mean(*, cohort_size: int, trim: int = 1) -> Reducer:
  """The mean of every parameter without its `trim` extremes on each side.

  Yin et al., 2018, as for `median`; clients alike.

  Args:
    cohort_size: n, more than 2 * trim.
    trim: values to leave out on either side.

  Raises:
    InvalidInput: nothing would be left.
  """
  validate.at_least('trim', trim, 0)
  validate.check(
    cohort_size > 2 * trim,
    f'Expected cohort_size > 2 * trim = {2 * trim}, got '
    f'cohort_size={cohort_size}.',
  )

  def trimmed(updates: PyTree, weights: jax.Array, clients: jax.Array):
    del clients
    present = weights > 0
    n = present.sum()
    place = jnp.arange(len(present))
    kept = (place >= trim) & (place < n - trim)

    def mean(x):
      values = _sorted(x, present)
      mask = kept.reshape(-1, *[1] * (x.ndim - 1))
      return jnp.where(mask, values, 0).sum(0) / jnp.maximum(kept.sum(), 1)

    return jax.tree.map(mean, updates)

  return rule(trimmed)


def robust_learning_rate(*, threshold: int = 4) -> Reducer:
  """The weighted mean, turned round where too few clients agree on its sign.

    +mean where |sum_k sign(update_k)| >= threshold, else -mean

  Ozdayi, Kantarcioglu and Gel, "Defending against backdoors in federated
  learning with robust learning rate", 2021, https://arxiv.org/abs/2007.03767.

  Args:
    threshold: theta >= 0, clients that have to agree.
  """
  validate.at_least('threshold', threshold, 0)

  def turned(updates: PyTree, weights: jax.Array, clients: jax.Array):
    del clients
    mean = mean_of_rows(updates, weights)
    # Absent clients' updates are zeros, whose sign is 0.
    agree = lambda x: jnp.abs(jnp.sign(x).sum(0)) >= threshold
    return jax.tree.map(lambda m, x: jnp.where(agree(x), m, -m), mean, updates)

  return rule(turned)
