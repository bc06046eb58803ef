"""RFA: the geometric median of updates.

Pillutla, Kakade and Harchaoui, "Robust aggregation for federated learning",
2022, https://arxiv.org/abs/1912.13445.

Axis letters: K' client slots, some of them empty.
"""

import jax
import jax.numpy as jnp

from fedjax_ext.core import validate
from fedjax_ext.core.reducers import Reducer
from fedjax_ext.defenses.updates import as_rows, mean_of_rows, rule


def geometric_median(
  *, iterations: int = 10, smoothing: float = 1e-6
) -> Reducer:
  """argmin_v sum_k w_k |v - update_k|, by the smoothed Weiszfeld algorithm.

  Each step is a mean with weights w_k / max(smoothing, |v - update_k|), the
  first one the weighted mean.

  Args:
    iterations: steps after the first mean.
    smoothing: nu > 0.
  """
  validate.at_least('iterations', iterations, 1)
  validate.above('smoothing', smoothing, 0)

  def weiszfeld(updates, weights, clients):
    del clients
    rows = as_rows(updates)

    def step(_, shares):
      middle = mean_of_rows(rows, shares)
      away = jnp.linalg.norm(rows - middle, axis=1)
      return weights / jnp.maximum(smoothing, away)

    return mean_of_rows(
      updates, jax.lax.fori_loop(0, iterations, step, weights)
    )

  return rule(weiszfeld)
