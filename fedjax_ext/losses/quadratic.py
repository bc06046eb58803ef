"""Quadratics: the task on which the theory of mixed learning is exact.

Axis letters: B examples, D features.
"""

import jax
import jax.numpy as jnp

from fedjax_ext.core import Batch
from fedjax_ext.losses.task import Task, masked_mean


def quadratic_task(num_features: int) -> Task:
  """Loss a/2 |w - b|^2 of examples (a, b); the model is {'w': [D]}, from 0.

  The metrics are the loss and 'w', the model's first coordinate.

  Args:
    num_features: D.
  """

  def values(params: dict[str, jax.Array], batch: Batch) -> jax.Array:
    square = jnp.square(params['w'] - batch.data['x']).sum(-1)
    return batch.data['curvature'] / 2 * square

  def metrics(params: dict[str, jax.Array], batch: Batch) -> dict:
    loss = values(params, batch)
    weight = batch.mask.astype(loss.dtype)
    first = jnp.broadcast_to(params['w'][0], loss.shape)
    return {'loss': (loss, weight), 'w': (first, weight)}

  return Task(
    lambda key: {'w': jnp.zeros(num_features)},
    lambda params, batch: masked_mean(values(params, batch), batch.mask),
    metrics,
  )
