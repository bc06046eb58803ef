"""CReFF: a classifier re-trained at the server on federated features.

Shang, Lu, Huang and Wang, "Federated learning on heterogeneous and long-tailed
data via classifier re-training with federated features", 2022,
https://arxiv.org/abs/2204.13399.

Axis letters: C clients, D features, Y classes, M features made up of a class.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from fedjax_ext.algorithms.class_gradients import mean_class_gradients
from fedjax_ext.algorithms.fed_avg import fed_avg
from fedjax_ext.algorithms.personal_heads import head_predictors
from fedjax_ext.algorithms.server_step import ServerState
from fedjax_ext.core import (
  FederatedAlgorithm,
  Layout,
  Phase,
  PlanSpec,
  finish,
  for_each_client,
  total,
)
from fedjax_ext.losses.federated_features import Retraining, retrained
from fedjax_ext.losses.headed import HeadedTask, join, with_head
from fedjax_ext.models import params_of
from fedjax_ext.models.heads import Head, apply_head


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
  def params(self) -> Any:
    """The averaged model, a pytree."""
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
  shape = (task.num_classes, retraining.features_per_class, task.num_features)
  common = dict(layout=layout, debug=debug)
  plain = fed_avg(
    with_head(task),
    client_optimizer=client_optimizer,
    server_optimizer=optax.sgd(1.0),
    phase=phase,
    **common,
  )
  run = for_each_client(mean_class_gradients(task), total(), **common)
  once = {'gradient': PlanSpec((phase._replace(epochs=1, steps=None),))}
  head_of = lambda average: params_of(average.params)['head']

  def init(key: jax.Array) -> CreffState:
    model, features = jax.random.split(key)
    average = plain.init(model)
    made_up = jax.random.normal(features, shape)
    return CreffState(average, made_up, head_of(average))

  @jax.jit
  def retrain(state: CreffState, average: ServerState, output) -> CreffState:
    (gradients, _), _ = finish(total(), output)
    heads = state.head, head_of(average)
    made = retrained(state.features, *heads, gradients, how=retraining)
    return CreffState(average, *made)

  def apply(state: CreffState, client_states, cohort):
    output, _ = run((state.params, state.head), cohort, 'gradient')
    average, _, metrics = plain.apply(state.average, None, cohort)
    return retrain(state, average, output), client_states, metrics

  both = lambda state: join(
    state.params, {**params_of(state.params), 'retrained': state.head}
  )
  logits = {
    'retrained': lambda p, f: apply_head(p['retrained'], f),
    'average': lambda p, f: apply_head(p['head'], f),
  }
  predictors = head_predictors(
    task, counts=counts, global_logits=logits, shared_of=both
  )
  return FederatedAlgorithm(init, apply, {**plain.plans, **once}, predictors)
