"""FedPer: a shared backbone, a head of one's own.

Arivazhagan, Aggarwal, Singh and Choudhary, "Federated learning with
personalization layers", 2019, https://arxiv.org/abs/1912.00818.

Axis letters: C clients, Y classes.
"""

from typing import Any

import jax
import numpy as np
import optax

from fedjax_ext.algorithms.fed_avg import fed_avg
from fedjax_ext.algorithms.personal_heads import (
  head_predictors,
  heads_of,
  partly_personal,
)
from fedjax_ext.core import FederatedAlgorithm, Layout, Phase
from fedjax_ext.losses import Task
from fedjax_ext.losses.headed import HeadedTask, join
from fedjax_ext.losses.task import with_stats
from fedjax_ext.models import params_of
from fedjax_ext.models.heads import apply_head

PyTree = Any


def only_body(task: HeadedTask) -> Task:
  """A server model that is a backbone without any head."""

  def init(key: jax.Array) -> PyTree:
    variables = task.init(key)
    return join(variables, {'body': params_of(variables)})

  return Task(init, None, None)


def own_head(shared: PyTree, row: PyTree, features: jax.Array) -> jax.Array:
  """Logits [B, Y] of the client's head, which is its row."""
  del shared
  return apply_head(row, features)


def fed_per(
  task: HeadedTask,
  *,
  counts: np.ndarray,
  client_optimizer: optax.GradientTransformation,
  layout: Layout,
  phase: Phase = Phase(),
  debug: bool = False,
) -> FederatedAlgorithm:
  """Builds FedPer: theta and phi_c train together on CE(phi_c h(x), y).

  theta is averaged by examples, phi_c stays. There is no global head, so no
  generic model is reported.

  Args:
    task: the backbone's task.
    counts: train examples of every client and class [C, Y], for masks.
    client_optimizer: any optax transformation; its state starts anew each
      round.
    layout: devices, lanes, waves.
    phase: the local work.
    debug: run client by client in plain Python.
  """

  def loss(model: PyTree, batch, _) -> Any:
    body, _, own = heads_of(model)
    features, stats = task.features(body, batch)
    value = task.cross_entropy(apply_head(own, features), batch)
    return with_stats(value, stats)

  return fed_avg(
    only_body(task),
    client_optimizer=client_optimizer,
    server_optimizer=optax.sgd(1.0),
    layout=layout,
    phase=phase,
    program=partly_personal(loss, client_optimizer),
    init_client=lambda key, number: task.head(key),
    predictors=head_predictors(
      task,
      counts=counts,
      global_logits={},
      personal_logits={'personal': own_head},
    ),
    debug=debug,
  )
