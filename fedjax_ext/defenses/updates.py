"""Clients' updates as rows of a matrix, for rules that compare them.

Axis letters: K' client slots, some of them empty; P parameters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_ext.core import collect
from fedjax_ext.core.reducers import Collected, Reducer

PyTree = Any


def as_rows(updates: PyTree) -> jax.Array:
  """Updates with leaves [K', ...] as one matrix [K', P]."""
  leaves = [x.reshape(x.shape[0], -1) for x in jax.tree.leaves(updates)]
  return jnp.concatenate(leaves, axis=1)


def norm_of(update: PyTree) -> jax.Array:
  """Euclidean norm of one update over all leaves, a scalar.

  Where it is 0 its gradient is too.
  """
  squares = sum(jnp.square(x).sum() for x in jax.tree.leaves(update))
  some = squares != 0  # Of NaN too, whose norm is NaN.
  return jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1)), 0)


def mean_of_rows(updates: PyTree, weights: jax.Array) -> PyTree:
  """sum_k weights_k update_k / sum_k weights_k; zeros if no row counts.

  Args:
    updates: leaves [K', ...].
    weights: [K'] >= 0.
  """
  total = weights.sum()
  share = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0)
  return jax.tree.map(lambda x: jnp.tensordot(share, x, 1), updates)


def rule(
  function: Callable[[PyTree, jax.Array, jax.Array], PyTree],
) -> Reducer:
  """A reducer that sees all updates at once.

  Args:
    function: (updates with leaves [K', ...], weights [K'], clients int [K'],
      -1 in empty slots) -> result like one update. Weight 0 marks a slot whose
      client is absent or was dropped; its update is zeros.
  """

  def finish(acc: Collected, memory, clients, key):
    del key
    return function(acc.update, acc.weight, clients), memory

  return collect()._replace(finish=finish)
