"""Embeddings that are trained on the pool with the project's own engine.

Importing this module adds them to `data.EMBEDDINGS`.

Axis letters: N examples, D features, L latent features.
"""

import functools
import logging

import jax
import numpy as np
import optax

from fedjax_ext import data
from fedjax_ext.algorithms import centralised
from fedjax_ext.core import (
  Phase,
  make_cohort,
  make_layout,
  place_features,
  validate,
)
from fedjax_ext.losses.reconstruction import reconstruction_task
from fedjax_ext.models.autoencoder import VariationalAutoencoder

_LOG = logging.getLogger(__name__)


def vae(
  x: np.ndarray,
  *,
  latent: int = 32,
  hidden: int = 256,
  epochs: int = 20,
  batch_size: int = 128,
  learning_rate: float = 1e-3,
  seed: int = 0,
) -> np.ndarray:
  """Trains a variational autoencoder on all examples; returns mean codes.

  One client with all examples, trained by `centralised` with Adam.

  Args:
    x: [N, ...], bytes or floats in [0, 1].
    latent: L.
    hidden: width of both hidden layers.
    epochs: over all examples.
    batch_size: examples of a step.
    learning_rate: of Adam.
    seed: of the first weights, shuffles and codes.

  Returns:
    float32 [N, L].

  Raises:
    InvalidInput: a value outside of [0, 1].
  """
  flat = data.EMBEDDINGS['identity'](x)
  validate.check(
    flat.min(initial=0) >= 0 and flat.max(initial=1) <= 1,
    'Expected bytes or floats in [0, 1] for embedding=vae, got '
    f'{flat.min():.4g}..{flat.max():.4g}.',
  )
  pool = data.from_assignment(
    {'x': flat}, np.zeros(len(flat), np.int64), client_ids=np.array(['pool'])
  )
  module = VariationalAutoencoder(flat.shape[1], hidden, latent)
  layout = make_layout(num_devices=1, lanes=1)
  algorithm = centralised(
    reconstruction_task(module),
    optimizer=optax.adam(learning_rate),
    layout=layout,
    phase=Phase(batch_size=batch_size),
  )
  features = place_features(pool.features, layout)
  state = algorithm.init(jax.random.key(seed))
  for epoch in range(1, epochs + 1):
    cohort = make_cohort(
      np.array([0]),
      round=epoch,
      seed=seed,
      specs=algorithm.plans,
      data={'train': pool},
      features=features,
      layout=layout,
    )
    state, _, metrics = algorithm.apply(state, None, cohort)
    if epoch in (1, epochs) or epoch % 5 == 0:
      _LOG.info(
        'Autoencoder: epoch %d of %d, loss %.2f.',
        epoch,
        epochs,
        float(metrics['train_loss']),
      )
  encode = jax.jit(
    functools.partial(module.apply, method=VariationalAutoencoder.encode)
  )
  codes = [
    np.asarray(encode({'params': state.params}, flat[first : first + 4096])[0])
    for first in range(0, len(flat), 4096)
  ]
  return np.concatenate(codes)


data.EMBEDDINGS['vae'] = vae
