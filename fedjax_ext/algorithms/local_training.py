"""Local training only: every client learns alone, the baseline of all others.

Nothing is averaged. A client's model lives in its `ClientStates` row and goes
on where it stopped when the client is sampled again.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_ext.algorithms.local_sgd import LocalState, local_sgd
from fedjax_ext.core import (
  Client,
  ClientOutput,
  FederatedAlgorithm,
  Layout,
  Phase,
  PlanSpec,
  Predictor,
  for_each_client,
  summarize,
  total,
)
from fedjax_ext.losses import Task

PyTree = Any


def own_params(shared: PyTree, client: Client) -> PyTree:
  """The client's model, or the common first one until it has trained."""
  return own_or_first(shared, client.state)


def own_or_first(shared: PyTree, row: PyTree) -> PyTree:
  """The model in a row {'params', 'seen'}, or `shared` until it is seen."""
  return jax.tree.map(
    lambda own, first: jnp.where(row['seen'], own, first),
    row['params'],
    shared,
  )


def unseen(model: PyTree) -> PyTree:
  """The row of a client that has not trained yet."""
  zeros = jax.tree.map(jnp.zeros_like, model)
  return {'params': zeros, 'seen': jnp.bool(False)}


def local_training(
  task: Task,
  *,
  client_optimizer: optax.GradientTransformation,
  layout: Layout,
  phase: Phase = Phase(),
  debug: bool = False,
) -> FederatedAlgorithm:
  """Builds local training; all clients start from one model.

  The server state is that first model, a pytree of params; it never changes.

  Args:
    task: init, loss and metrics.
    client_optimizer: any optax transformation; its state starts anew each
      time the client is sampled.
    layout: devices, lanes, waves.
    phase: the local work of one round.
    debug: run client by client in plain Python.
  """

  def begin(shared: PyTree, client: Client, key: jax.Array):
    del key
    return own_params(shared, client), ()

  def end(shared: PyTree, client: Client, state: LocalState) -> ClientOutput:
    del shared
    return ClientOutput(
      (),
      client.num_examples,
      state={'params': state.params, 'seen': jnp.bool(True)},
      metrics={'train_loss': state.loss},
    )

  program = local_sgd(task.loss, client_optimizer, begin=begin, end=end)
  run = for_each_client(program, total(), layout=layout, debug=debug)

  def init_client(key: jax.Array, number: jax.Array) -> PyTree:
    del number
    return unseen(task.init(key))

  def apply(params: PyTree, client_states, cohort):
    output, client_states = run(params, cohort, 'train', states=client_states)
    return params, client_states, summarize(output)

  return FederatedAlgorithm(
    init=task.init,
    apply=apply,
    plans={'train': PlanSpec((phase,))},
    predictors={'personal': Predictor(task.metrics, params=own_params)},
    init_client=init_client,
  )
