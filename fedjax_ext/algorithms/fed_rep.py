"""FedRep: the head learns first, then the shared backbone.

Collins, Hassani, Mokhtari and Shakkottai, "Exploiting shared representations
for personalized federated learning", 2021, https://arxiv.org/abs/2102.07078.

Axis letters: C clients, Y classes.
"""

from typing import Any

import jax
import numpy as np
import optax

from fedjax_ext.algorithms.fed_avg import fed_avg
from fedjax_ext.algorithms.fed_per import only_body, own_head
from fedjax_ext.algorithms.personal_heads import (
  head_predictors,
  heads_of,
  partly_personal,
)
from fedjax_ext.algorithms.server_step import ServerState
from fedjax_ext.core import (
  FederatedAlgorithm,
  Layout,
  Phase,
  PlanSpec,
  for_each_client,
  total,
)
from fedjax_ext.losses.headed import HeadedTask
from fedjax_ext.losses.task import with_stats
from fedjax_ext.models.heads import apply_head

PyTree = Any


def fed_rep(
  task: HeadedTask,
  *,
  counts: np.ndarray,
  client_optimizer: optax.GradientTransformation,
  layout: Layout,
  phase: Phase = Phase(),
  head_phase: Phase | None = None,
  debug: bool = False,
) -> FederatedAlgorithm:
  """Builds FedRep: two passes of the cohort, each with a fresh optimizer.

  First phi_c trains on CE(phi_c sg(h(x)), y) and stays with its client, then
  theta on CE(sg(phi_c) h(x), y) and is averaged by examples.

  Args:
    task: the backbone's task.
    counts: train examples of every client and class [C, Y], for masks.
    client_optimizer: any optax transformation.
    layout: devices, lanes, waves.
    phase: the backbone's local work.
    head_phase: the head's; default: twice the epochs or steps of `phase` (the
      official code of FedLoGe has 10 epochs and 5).
    debug: run client by client in plain Python.
  """
  if head_phase is None:
    head_phase = phase._replace(
      epochs=2 * phase.epochs, steps=phase.steps and 2 * phase.steps
    )

  def loss_on(trained: str):
    stop = jax.lax.stop_gradient

    def loss(model: PyTree, batch, _) -> Any:
      body, _, own = heads_of(model)
      features, stats = task.features(body, batch)
      if trained == 'head':
        logits = apply_head(own, stop(features))
      else:
        logits = apply_head(stop(own), features)
      value = task.cross_entropy(logits, batch)
      return with_stats(value, stats)

    return loss

  run_head = for_each_client(
    partly_personal(loss_on('head'), client_optimizer),
    total(),
    layout=layout,
    debug=debug,
  )
  algorithm = fed_avg(
    only_body(task),
    client_optimizer=client_optimizer,
    server_optimizer=optax.sgd(1.0),
    layout=layout,
    phase=phase,
    program=partly_personal(loss_on('body'), client_optimizer),
    init_client=lambda key, number: task.head(key),
    predictors=head_predictors(
      task,
      counts=counts,
      global_logits={},
      personal_logits={'personal': own_head},
    ),
    debug=debug,
  )

  def apply(state: ServerState, client_states, cohort):
    # What this pass does to the backbone (nothing) is not used.
    _, client_states = run_head(
      state.params, cohort, 'head', states=client_states
    )
    return algorithm.apply(state, client_states, cohort)

  return algorithm._replace(
    apply=apply,
    plans={'head': PlanSpec((head_phase,)), **algorithm.plans},
  )
