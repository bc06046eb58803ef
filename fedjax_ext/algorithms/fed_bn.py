"""FedBN: normalisation layers stay with their clients.

Li, Jiang, Zhang, Kamp and Dou, "FedBN: federated learning on non-IID features
via local batch normalization", 2021, https://arxiv.org/abs/2102.07623; here for
the scales and shifts of any normalisation layer.

Axis letters: C clients, Y classes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_ext.algorithms.fed_avg import fed_avg
from fedjax_ext.algorithms.personal_heads import (
  head_predictors,
  partly_personal,
)
from fedjax_ext.core import FederatedAlgorithm, Layout, Phase, validate
from fedjax_ext.losses.headed import HeadedTask, with_head
from fedjax_ext.models import Variables, params_of
from fedjax_ext.models.heads import apply_head

PyTree = Any


def norm_params(params: PyTree) -> dict[str, jax.Array]:
  """The params of normalisation layers, {path: array}: a layer named Norm."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  paths = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
  return {path: leaf for path, leaf in paths.items() if 'Norm' in path}


def with_norms(params: PyTree, norms: dict[str, jax.Array]) -> PyTree:
  """Params with those of normalisation layers replaced."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: norms.get(jax.tree_util.keystr(path), leaf), params
  )


def fed_bn(
  task: HeadedTask,
  *,
  counts: np.ndarray,
  client_optimizer: optax.GradientTransformation,
  layout: Layout,
  phase: Phase = Phase(),
  debug: bool = False,
) -> FederatedAlgorithm:
  """Builds FedBN: FedAvg of all params but those of normalisation layers.

  A client's layers begin as the server's. The global model has the server's
  first ones, which nobody trains.

  Args:
    task: the backbone's task; the model is it and a linear head.
    counts: train examples of every client and class [C, Y], for masks.
    client_optimizer: any optax transformation; its state starts anew each
      round.
    layout: devices, lanes, waves.
    phase: the local work.
    debug: run client by client in plain Python.

  Raises:
    InvalidInput: the model has no normalisation layer, or moving statistics.
  """
  plain = with_head(task)
  model = jax.eval_shape(plain.init, jax.random.key(0))
  validate.check(
    not isinstance(model, Variables) and bool(norm_params(model)),
    'Expected a model with normalisation layers and without moving '
    'statistics for fed_bn, such as group_norm_cnn or resnet8.',
  )

  def own(shared: PyTree, row: PyTree) -> dict[str, jax.Array]:
    return jax.tree.map(
      lambda mine, common: jnp.where(row['seen'], mine, common),
      row['norms'],
      norm_params(shared),
    )

  def loss(model: PyTree, batch, _) -> jax.Array:
    params = params_of(model)
    return plain.loss(with_norms(params['shared'], params['personal']), batch)

  def init_client(key: jax.Array, number: jax.Array) -> PyTree:
    del number
    norms = norm_params(plain.init(key))
    zeros = jax.tree.map(jnp.zeros_like, norms)
    return {'norms': zeros, 'seen': jnp.bool(False)}

  mine = lambda shared, row: with_norms(shared, own(shared, row))
  return fed_avg(
    plain,
    client_optimizer=client_optimizer,
    server_optimizer=optax.sgd(1.0),
    layout=layout,
    phase=phase,
    program=partly_personal(
      loss,
      client_optimizer,
      own=lambda shared, client: own(shared, client.state),
      row=lambda norms: {'norms': norms, 'seen': jnp.bool(True)},
    ),
    init_client=init_client,
    predictors=head_predictors(
      task,
      counts=counts,
      global_logits={'global': lambda p, f: apply_head(p['head'], f)},
      personal_logits={'personal': lambda p, row, f: apply_head(p['head'], f)},
      features=lambda shared, row, batch: task.frozen_features(
        mine(shared, row)['body'], batch
      ),
    ),
    debug=debug,
  )
