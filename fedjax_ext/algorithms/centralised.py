"""Centralised training on pooled data: the reference of federated training.

One client, as `data.pool_clients` makes it, owns all examples. A round is some
of the steps; the optimizer's state lives in the server state and goes on.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_ext.algorithms.local_sgd import LocalState, local_sgd
from fedjax_ext.algorithms.server_step import ServerState, first_state
from fedjax_ext.core import (
  Client,
  ClientOutput,
  FederatedAlgorithm,
  Layout,
  Phase,
  PlanSpec,
  Predictor,
  finish,
  for_each_client,
  summarize,
  total,
)
from fedjax_ext.losses import Task

PyTree = Any


def centralised(
  task: Task,
  *,
  optimizer: optax.GradientTransformation,
  layout: Layout,
  phase: Phase = Phase(),
  debug: bool = False,
) -> FederatedAlgorithm:
  """Builds training on one client's data, whose optimizer never restarts.

  Args:
    task: init, loss and metrics.
    optimizer: any optax transformation.
    layout: devices; one of them works.
    phase: the steps of one round.
    debug: run in plain Python.
  """

  def end(shared: ServerState, client: Client, state: LocalState):
    del shared, client
    new = ServerState(state.params, state.optimizer_state)
    return ClientOutput(new, jnp.ones(()), metrics={'train_loss': state.loss})

  program = local_sgd(
    task.loss,
    optimizer,
    begin=lambda shared, client, key: (shared.params, ()),
    end=end,
  )

  def resume(shared: ServerState, client: Client, key: jax.Array) -> LocalState:
    state = program.init(shared, client, key)
    return state._replace(optimizer_state=shared.optimizer_state)

  reducer = total()
  run = for_each_client(
    program._replace(init=resume), reducer, layout=layout, debug=debug
  )

  def init(key: jax.Array) -> ServerState:
    return first_state(optimizer, task.init(key))

  @jax.jit
  def update(state: ServerState, output) -> ServerState:
    (new, weight), _ = finish(reducer, output)
    # Nothing came back from steps that were not finite.
    return jax.tree.map(lambda n, o: jnp.where(weight > 0, n, o), new, state)

  def apply(state: ServerState, client_states, cohort):
    output, _ = run(state, cohort, 'train')
    return update(state, output), client_states, summarize(output)

  return FederatedAlgorithm(
    init=init,
    apply=apply,
    plans={'train': PlanSpec((phase,))},
    predictors={
      'global': Predictor(task.metrics, shared=lambda state: state.params)
    },
  )
