"""Ditto: personal models that stay near the global one.

Li, Hu, Beirami and Smith, "Ditto: fair and robust federated learning through
personalization", 2021, https://arxiv.org/abs/2012.04221.

Axis letters: C clients, Y classes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_ext.algorithms.fed_avg import fed_avg
from fedjax_ext.algorithms.local_training import own_params, unseen
from fedjax_ext.algorithms.personal_heads import (
  partly_personal,
  whole_model_predictors,
)
from fedjax_ext.core import FederatedAlgorithm, Layout, Phase, validate
from fedjax_ext.losses.headed import HeadedTask, with_head
from fedjax_ext.models import check_no_statistics, params_of

PyTree = Any


def squared_distance(a: PyTree, b: PyTree) -> jax.Array:
  """|a - b|^2 over two like pytrees, a scalar."""
  pieces = jax.tree.map(lambda x, y: jnp.square(x - y).sum(), a, b)
  return sum(jax.tree.leaves(pieces))


def ditto(
  task: HeadedTask,
  *,
  counts: np.ndarray,
  client_optimizer: optax.GradientTransformation,
  layout: Layout,
  phase: Phase = Phase(),
  proximal_weight: float = 0.01,
  debug: bool = False,
) -> FederatedAlgorithm:
  """Builds Ditto; both models take the same steps on the same batches.

    w <- SGD(F(w)),  v_c <- SGD(F(v_c) + lambda/2 |v_c - w_t|^2)

  w is averaged by examples; w_t is what the round began with. v_c begins at w_t
  when the client first takes part.

  Args:
    task: the backbone's task; the model is it and a linear head, without
      moving statistics.
    counts: train examples of every client and class [C, Y], for masks.
    client_optimizer: any optax transformation; its state starts anew each
      round.
    layout: devices, lanes, waves.
    phase: the local work.
    proximal_weight: lambda.
    debug: run client by client in plain Python.
  """
  validate.at_least('proximal_weight', proximal_weight, 0)
  plain = with_head(task)

  check_no_statistics('ditto', plain.init)

  def loss(model: PyTree, batch, _) -> jax.Array:
    params = params_of(model)
    return plain.loss(params['shared'], batch) + plain.loss(
      params['personal'], batch
    )

  program = partly_personal(
    loss,
    client_optimizer,
    own=own_params,
    penalty=lambda params, start: (
      proximal_weight / 2 * squared_distance(params['personal'], start)
    ),
    row=lambda personal: {'params': personal, 'seen': jnp.bool(True)},
  )

  return fed_avg(
    plain,
    client_optimizer=client_optimizer,
    server_optimizer=optax.sgd(1.0),
    layout=layout,
    phase=phase,
    program=program,
    init_client=lambda key, number: unseen(plain.init(key)),
    predictors=whole_model_predictors(task, counts=counts),
    debug=debug,
  )
