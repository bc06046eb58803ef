"""CReFF: a classifier re-trained at the server on federated features.

Shang, Lu, Huang and Wang, "Federated learning on heterogeneous and long-tailed
data via classifier re-training with federated features", 2022,
https://arxiv.org/abs/2204.13399.

Axis letters: C clients, D features, Y classes, M features made up of a class.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_ext.algorithms.class_gradients import mean_class_gradients
from fedjax_ext.algorithms.fed_avg import ServerState, fed_avg
from fedjax_ext.algorithms.personal_heads import head_predictors
from fedjax_ext.core import (
  FederatedAlgorithm,
  Layout,
  Phase,
  PlanSpec,
  finish,
  for_each_client,
  total,
)
from fedjax_ext.losses.federated_features import (
  Retraining,
  match_features,
  train_head,
)
from fedjax_ext.losses.headed import HeadedTask, join, with_head
from fedjax_ext.models import params_of
from fedjax_ext.models.heads import Head, apply_head

PyTree = Any


class CreffState(NamedTuple):
  """The averaged model with its optimizer's state, and what is re-trained.

  Attributes:
    average: FedAvg's server state.
    features: federated features [Y, M, D].
    head: the classifier re-trained on them.
  """

  average: ServerState
  features: jax.Array
  head: Head

  @property
  def params(self) -> PyTree:
    """The averaged model."""
    return self.average.params


def creff(
  task: HeadedTask,
  *,
  counts: np.ndarray,
  client_optimizer: optax.GradientTransformation,
  layout: Layout,
  phase: Phase = Phase(),
  retraining: Retraining = Retraining(),
  debug: bool = False,
) -> FederatedAlgorithm:
  """Builds CReFF: FedAvg, and after each round a classifier for balanced data.

  Clients also return, for each of their classes, the mean gradient of the
  re-trained classifier on the features of the round's first model. The server
  moves its federated features until their gradients agree, by the sum over
  classes and class vectors of 1 - cosine, and trains the averaged head on them.

  Args:
    task: the backbone's task; the model is it and a linear head.
    counts: train examples of every client and class [C, Y], for masks.
    client_optimizer: any optax transformation.
    layout: devices, lanes, waves.
    phase: the local work.
    retraining: of the classifier at the server.
    debug: run client by client in plain Python.
  """
  each = retraining.features_per_class
  shape = (task.num_classes, each, task.num_features)
  plain = fed_avg(
    with_head(task),
    client_optimizer=client_optimizer,
    server_optimizer=optax.sgd(1.0),
    layout=layout,
    phase=phase,
    debug=debug,
  )
  reducer = total()
  run = for_each_client(
    mean_class_gradients(task), reducer, layout=layout, debug=debug
  )

  def init(key: jax.Array) -> CreffState:
    model, features = jax.random.split(key)
    average = plain.init(model)
    head = params_of(average.params)['head']
    return CreffState(average, jax.random.normal(features, shape), head)

  @jax.jit
  def retrain(state: CreffState, average: ServerState, output) -> CreffState:
    ((sums, clients), _), _ = finish(reducer, output)
    features = match_features(
      state.features,
      state.head,
      sums / jnp.maximum(clients, 1)[:, None, None],
      clients > 0,
      steps=retraining.match_steps,
      learning_rate=retraining.match_learning_rate,
    )
    head = params_of(average.params)['head']
    head = train_head(
      head,
      features,
      steps=retraining.head_steps,
      learning_rate=retraining.head_learning_rate,
    )
    return CreffState(average, features, head)

  def apply(state: CreffState, client_states, cohort):
    shared = (state.params, state.head)
    output, _ = run(shared, cohort, 'gradient')
    average, _, metrics = plain.apply(state.average, None, cohort)
    return retrain(state, average, output), client_states, metrics

  def both(state: CreffState) -> PyTree:
    params = params_of(state.params) | {'retrained': state.head}
    return join(state.params, params)

  return FederatedAlgorithm(
    init=init,
    apply=apply,
    plans={
      **plain.plans,
      'gradient': PlanSpec((phase._replace(epochs=1, steps=None),)),
    },
    predictors=head_predictors(
      task,
      counts=counts,
      global_logits={
        'retrained': lambda p, f: apply_head(p['retrained'], f),
        'average': lambda p, f: apply_head(p['head'], f),
      },
      shared_of=both,
    ),
  )
