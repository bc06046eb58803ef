"""SCAFFOLD: control variates that correct client drift.

Karimireddy et al., "SCAFFOLD: stochastic controlled averaging for federated
learning", 2020, https://arxiv.org/abs/1910.06378.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_ext import core
from fedjax_ext.algorithms.local_sgd import (
  LocalState,
  add_scaled,
  delta_of,
  local_sgd,
)
from fedjax_ext.losses import Task
from fedjax_ext.models import params_of, stats_of, with_params

PyTree = Any


class ServerState(NamedTuple):
  """Two pytrees: the model x, and the control variate c like its params."""

  params: PyTree
  control: PyTree


def scaffold(
  task: Task,
  *,
  client_learning_rate: float,
  server_learning_rate: float = 1.0,
  num_clients: int,
  layout: core.Layout,
  phase: core.Phase = core.Phase(),
  debug: bool = False,
) -> core.FederatedAlgorithm:
  """Builds SCAFFOLD with option II of the paper's algorithm 1.

  A client takes K steps y <- y - eta_l (g(y) - c_i + c) from y = x and sets
  c_i+ = c_i - c + (x - y) / (K eta_l); without a step it keeps c_i. Server,
  over the cohort S (less dropped clients) of N: x <- x + eta_g mean(y - x) and
  c <- c + |S| / N mean(c_i+ - c_i). Moving statistics become the clients' mean.

  Args:
    task: init, loss and metrics.
    client_learning_rate: eta_l > 0, of plain SGD.
    server_learning_rate: eta_g.
    num_clients: N, the clients that may take part.
    layout: devices, lanes, waves.
    phase: the local work.
    debug: run client by client in plain Python.
  """
  core.validate.above('client_learning_rate', client_learning_rate, 0)
  core.validate.at_least('num_clients', num_clients, 1)

  def begin(shared: ServerState, client: core.Client, _: jax.Array):
    return shared.params, delta_of(shared.control, client.state)

  def end(
    shared: ServerState, client: core.Client, state: LocalState
  ) -> core.ClientOutput:
    delta = delta_of(state.params, shared.params)
    steps = state.num_steps
    scale = 1 / (jnp.maximum(steps, 1) * client_learning_rate)
    control_delta = jax.tree.map(
      lambda c, d: jnp.where(steps > 0, -c - scale * d, 0).astype(c.dtype),
      shared.control,
      params_of(delta),
    )
    return core.ClientOutput(
      {'params': delta, 'control': control_delta},
      weight=jnp.ones(()),
      state=jax.tree.map(jnp.add, client.state, control_delta),
      metrics={'train_loss': state.loss},
    )

  program = local_sgd(
    task.loss,
    optax.sgd(client_learning_rate),
    begin=begin,
    # <c - c_i, y>, whose gradient is the correction c - c_i.
    penalty=lambda params, correction: optax.tree_utils.tree_vdot(
      correction, params
    ),
    end=end,
  )
  reducer = core.weighted_mean()
  run = core.for_each_client(program, reducer, layout=layout, debug=debug)

  def init(key: jax.Array) -> ServerState:
    model = task.init(key)
    return ServerState(model, jax.tree.map(jnp.zeros_like, params_of(model)))

  @jax.jit
  def update(state: ServerState, output) -> ServerState:
    mean, _ = core.finish(reducer, output)
    share = output.acc[1] / num_clients  # |S| / N
    x, delta = state.params, mean['params']
    params = add_scaled(params_of(x), server_learning_rate, params_of(delta))
    x = with_params(x, params, add_scaled(stats_of(x), 1.0, stats_of(delta)))
    return ServerState(x, add_scaled(state.control, share, mean['control']))

  def apply(state: ServerState, client_states, cohort):
    output, client_states = run(state, cohort, 'train', states=client_states)
    return update(state, output), client_states, core.summarize(output)

  return core.FederatedAlgorithm(
    init,
    apply,
    plans={'train': core.PlanSpec((phase,))},
    predictors={'global': core.Predictor(task.metrics, lambda s: s.params)},
    init_client=lambda key, number: init(key).control,
  )
