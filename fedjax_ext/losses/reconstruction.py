"""Reconstruction: the task of an autoencoder.

Axis letters: B examples, D features.
"""

import jax
import jax.numpy as jnp
import optax

from fedjax_ext.core import Batch
from fedjax_ext.losses.task import Task, masked_mean
from fedjax_ext.models.autoencoder import VariationalAutoencoder


def reconstruction_task(
  module: VariationalAutoencoder, *, feature: str = 'x', beta: float = 1.0
) -> Task:
  """Negative evidence lower bound of features in [0, 1].

    -E_{z ~ q(z|x)} log p(x|z) + beta KL(q(z|x) || N(0, I)),

  with p Bernoulli in every feature and one draw of z. The metric is 'loss'.

  Kingma and Welling, "Auto-encoding variational Bayes", 2014,
  https://arxiv.org/abs/1312.6114.

  Args:
    module: the autoencoder.
    feature: name of the column [B, D].
    beta: weight of the divergence.
  """

  def values(params, batch: Batch) -> jax.Array:
    x = batch.data[feature]
    logits, mean, log_variance = module.apply(
      {'params': params}, x, batch.info.key
    )
    entropy = optax.sigmoid_binary_cross_entropy(logits, x).sum(-1)
    divergence = jnp.exp(log_variance) + mean**2 - 1 - log_variance
    return entropy + beta * divergence.sum(-1) / 2

  def init(key: jax.Array):
    return module.init(key, jnp.zeros((1, module.num_features)), key)['params']

  return Task(
    init,
    lambda params, batch: masked_mean(values(params, batch), batch.mask),
    lambda params, batch: {
      'loss': (values(params, batch), batch.mask.astype(jnp.float32))
    },
  )
