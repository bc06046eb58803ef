"""SCAFFOLD: control variates that correct client drift.

Karimireddy et al., "SCAFFOLD: stochastic controlled averaging for federated
learning", 2020, https://arxiv.org/abs/1910.06378.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_ext.algorithms.local_sgd import LocalState, delta_of, local_sgd
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
  validate,
  weighted_mean,
)
from fedjax_ext.losses import Task

PyTree = Any


class ServerState(NamedTuple):
  """Two like pytrees: the model x and the server's control variate c."""

  params: PyTree
  control: PyTree


def scaffold(
  task: Task,
  *,
  client_learning_rate: float,
  server_learning_rate: float = 1.0,
  num_clients: int,
  layout: Layout,
  phase: Phase = Phase(),
  debug: bool = False,
) -> FederatedAlgorithm:
  """Builds SCAFFOLD with option II of the paper's algorithm 1.

  A client with control variate c_i takes K steps y <- y - eta_l (g(y) - c_i +
  c) from y = x and sets c_i+ = c_i - c + (x - y) / (K eta_l); without a step
  it keeps c_i. Server, over the cohort S of N clients:
  x <- x + eta_g mean(y - x) and c <- c + |S| / N mean(c_i+ - c_i), where S
  counts the clients that were not dropped.

  Args:
    task: init, loss and metrics.
    client_learning_rate: eta_l > 0, of plain SGD.
    server_learning_rate: eta_g > 0.
    num_clients: N, the clients that may take part.
    layout: devices, lanes, waves.
    phase: the local work.
    debug: run client by client in plain Python.
  """
  validate.above('client_learning_rate', client_learning_rate, 0)
  validate.above('server_learning_rate', server_learning_rate, 0)
  validate.at_least('num_clients', num_clients, 1)

  def begin(shared: ServerState, client: Client, key: jax.Array):
    del key
    return shared.params, delta_of(shared.control, client.state)

  def correction(params: PyTree, context: PyTree) -> jax.Array:
    """<c - c_i, y>, whose gradient is c - c_i."""
    return optax.tree_utils.tree_vdot(context, params)

  def end(
    shared: ServerState, client: Client, state: LocalState
  ) -> ClientOutput:
    delta = delta_of(state.params, shared.params)
    scale = 1 / (jnp.maximum(state.num_steps, 1) * client_learning_rate)
    stepped = state.num_steps > 0
    control_delta = jax.tree.map(
      lambda c, d: jnp.where(stepped, -c - scale * d, 0).astype(c.dtype),
      shared.control,
      delta,
    )
    control = jax.tree.map(jnp.add, client.state, control_delta)
    return ClientOutput(
      {'params': delta, 'control': control_delta},
      jnp.ones(()),
      state=control,
      metrics={'train_loss': state.loss},
    )

  program = local_sgd(
    task.loss,
    optax.sgd(client_learning_rate),
    begin=begin,
    penalty=correction,
    end=end,
  )
  reducer = weighted_mean()
  run = for_each_client(program, reducer, layout=layout, debug=debug)

  def init(key: jax.Array) -> ServerState:
    params = task.init(key)
    return ServerState(params, jax.tree.map(jnp.zeros_like, params))

  def init_client(key: jax.Array, number: jax.Array) -> PyTree:
    del number
    return jax.tree.map(jnp.zeros_like, task.init(key))

  @jax.jit
  def update(state: ServerState, output) -> ServerState:
    mean, _ = finish(reducer, output)
    share = output.acc[1] / num_clients  # |S| / N
    add = lambda scale, x, d: jax.tree.map(lambda a, b: a + scale * b, x, d)
    return ServerState(
      add(server_learning_rate, state.params, mean['params']),
      add(share, state.control, mean['control']),
    )

  def apply(state: ServerState, client_states, cohort):
    output, client_states = run(state, cohort, 'train', states=client_states)
    return update(state, output), client_states, summarize(output)

  return FederatedAlgorithm(
    init=init,
    apply=apply,
    plans={'train': PlanSpec((phase,))},
    predictors={
      'global': Predictor(task.metrics, shared=lambda state: state.params)
    },
    init_client=init_client,
  )
