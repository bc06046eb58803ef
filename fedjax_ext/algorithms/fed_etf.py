"""FedETF: a fixed simplex classifier on projected, normalised features.

Li, Shang, He, Lin and Wu, "No fear of classifier biases: neural collapse
inspired federated learning with synthetic and fixed classifier", 2023,
https://arxiv.org/abs/2303.10058.

Axis letters: B examples, C clients, D features, Y classes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_ext.algorithms.fed_avg import fed_avg
from fedjax_ext.algorithms.local_sgd import from_server, local_sgd
from fedjax_ext.algorithms.personal_heads import fine_tuned_predictors
from fedjax_ext.core import FederatedAlgorithm, Layout, Phase
from fedjax_ext.losses import Task
from fedjax_ext.losses.headed import (
  HeadedTask,
  balanced_softmax,
  body_of,
  join,
)
from fedjax_ext.losses.task import with_stats
from fedjax_ext.models import params_of
from fedjax_ext.models.heads import apply_head, linear_head, simplex_etf

PyTree = Any


def fed_etf(
  task: HeadedTask,
  *,
  counts: np.ndarray,
  client_optimizer: optax.GradientTransformation,
  layout: Layout,
  phase: Phase = Phase(),
  fine_tuning: Phase | None = None,
  seed: int = 0,
  debug: bool = False,
) -> FederatedAlgorithm:
  """Builds FedETF.

  With p(x) = P h(x) + b in as many dimensions as classes, V a dense simplex
  [Y, Y] and t a trained temperature, logits are t V' p(x) / |p(x)|; backbone,
  projection and temperature train on balanced softmax by the client's class
  counts and are averaged by examples. Personal models are fine-tuned as a whole
  before scoring. (The official personalisation alternates with projections.)

  Args:
    task: the backbone's task.
    counts: train examples of every client and class [C, Y].
    client_optimizer: any optax transformation; also of the fine-tuning.
    layout: devices, lanes, waves.
    phase: the local work.
    fine_tuning: the local work before scoring; default: `phase`.
    seed: of the simplex.
    debug: run client by client in plain Python.
  """
  counts = np.asarray(counts)
  num_classes = task.num_classes
  vectors = jnp.asarray(
    simplex_etf(np.random.default_rng(seed), num_classes, num_classes)
  )

  def init(key: jax.Array) -> PyTree:
    body, head = jax.random.split(key)
    variables = task.init(body)
    return join(
      variables,
      {
        'body': params_of(variables),
        'projection': linear_head(head, task.num_features, num_classes),
        'temperature': jnp.ones(()),
      },
    )

  def logits(params: PyTree, features: jax.Array) -> jax.Array:
    projected = apply_head(params['projection'], features)
    norms = jnp.sqrt(jnp.square(projected).sum(-1, keepdims=True) + 1e-12)
    return params['temperature'] * (projected / norms) @ vectors

  def loss(model: PyTree, batch, mine: jax.Array) -> Any:
    features, stats = task.features(body_of(model), batch)
    balanced = balanced_softmax(logits(params_of(model), features), mine)
    value = task.cross_entropy(balanced, batch)
    return with_stats(value, stats)

  program = local_sgd(
    loss,
    client_optimizer,
    begin=lambda shared, client, key: (
      from_server(shared, client, key)[0],
      client.inputs,
    ),
    uses_context=True,
  )
  return fed_avg(
    Task(init, None, None),
    client_optimizer=client_optimizer,
    server_optimizer=optax.sgd(1.0),
    layout=layout,
    phase=phase,
    program=program,
    inputs=lambda cohort: counts[cohort.clients],
    predictors=fine_tuned_predictors(
      task,
      counts=counts,
      optimizer=client_optimizer,
      phase=fine_tuning or phase,
      logits=logits,
      loss=loss,
    ),
    debug=debug,
  )
