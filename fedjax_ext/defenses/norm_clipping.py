"""Norm clipping: no update counts for more than a fixed length.

Sun, Kairouz, Suresh and McMahan, "Can you really backdoor federated learning?",
2019, https://arxiv.org/abs/1911.07963.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_ext.core import validate, weighted_mean
from fedjax_ext.core.reducers import Reducer, premap
from fedjax_ext.defenses.updates import norm_of

PyTree = Any


def clip(update: PyTree, bound: float | jax.Array) -> PyTree:
  """update * min(1, bound / |update|), over all leaves together."""
  norm = norm_of(update)
  scale = jnp.minimum(1, bound / jnp.maximum(norm, 1e-12))
  return jax.tree.map(lambda x: x * scale, update)


def norm_clipping(*, bound: float = 0.5) -> Reducer:
  """The weighted mean of updates clipped to a Euclidean norm.

  Args:
    bound: c > 0.
  """
  validate.above('bound', bound, 0)
  return premap(lambda update, weight: clip(update, bound), weighted_mean())
