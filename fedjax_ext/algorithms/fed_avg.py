"""Federated averaging, with any optax optimizer on clients and server.

McMahan et al., "Communication-efficient learning of deep networks from
decentralized data", 2017, https://arxiv.org/abs/1602.05629. With an adaptive
server optimizer this is FedAdam, FedYogi or FedAdagrad: Reddi et al., "Adaptive
federated optimization", 2021, https://arxiv.org/abs/2003.00295.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from fedjax_ext.algorithms.averaging import (
  Averaging,
  by_sparse_rows,
  run_averaged,
)
from fedjax_ext.algorithms.local_sgd import local_sgd, weighted_by
from fedjax_ext.algorithms.server_step import (
  ServerState,
  first_state,
  server_step,
)
from fedjax_ext.core import (
  ClientProgram,
  Cohort,
  FederatedAlgorithm,
  Layout,
  Phase,
  PlanSpec,
  Predictor,
  SparseTable,
  summarize,
)
from fedjax_ext.losses import Task

PyTree = Any


def fed_avg(
  task: Task,
  *,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  layout: Layout,
  phase: Phase = Phase(),
  weighting: str = 'examples',
  program: ClientProgram | None = None,
  init_client: Callable[[jax.Array, jax.Array], PyTree] | None = None,
  inputs: Callable[[Cohort], PyTree] | None = None,
  predictors: Mapping[str, Predictor] | None = None,
  tables: tuple[SparseTable, ...] = (),
  averaging: Averaging = Averaging(),
  debug: bool = False,
) -> FederatedAlgorithm:
  """Builds federated averaging.

  Each client of the cohort: x_c <- x, then local steps of the client
  optimizer. Server: delta = sum_c w_c (x_c - x) / sum_c w_c, and the server
  optimizer takes -delta as its gradient; SGD with rate 1 gives the mean of the
  clients' models. If no client counts, delta is 0.

  Args:
    task: init, loss and metrics.
    client_optimizer: any optax transformation.
    server_optimizer: any optax transformation.
    layout: devices, lanes, waves.
    phase: the local work.
    weighting: w_c is the client's number of 'examples', or 'uniform'.
    program: replaces plain local SGD; takes params as `shared` and returns a
      delta as its update, as FedProx's does.
    init_client: makes the first state row of a client, for programs that keep
      some; see `FederatedAlgorithm`.
    inputs: what the cohort's clients get beside the model, rows [K, ...].
    predictors: what to evaluate, by name; by default the model, 'global'.
    tables: embedding tables of which a client gets, trains and returns only the
      rows that its examples name; see `core.sparse_rows`.
    averaging: how updates are averaged, and who attacks.
    debug: run client by client in plain Python.
  """
  program = program or local_sgd(task.loss, client_optimizer)
  program = weighted_by(program, weighting)
  if tables:
    program, averaging, inputs = by_sparse_rows(
      program, averaging, tables, inputs
    )
  plan = PlanSpec((phase,), tables)
  averaged = run_averaged(
    program, averaging, init=task.init, plan=plan, layout=layout, debug=debug
  )

  def init(key: jax.Array) -> ServerState:
    model = task.init(key)
    return first_state(server_optimizer, model, averaged.memory(model))

  # Compiled apart from the mean, so that the bits of a step do not depend on
  # where its delta comes from: mixed_fl without a server loss is this.
  step = jax.jit(functools.partial(server_step, server_optimizer))

  def apply(state: ServerState, client_states, cohort):
    given = inputs(cohort) if inputs else ()
    delta, memory, output, client_states = averaged.run(
      state.params, state.memory, cohort, client_states, given
    )
    state = step(state._replace(memory=memory), delta)
    return state, client_states, summarize(output)

  return FederatedAlgorithm(
    init=init,
    apply=apply,
    plans={'train': plan, **averaged.plans},
    predictors=predictors
    or {'global': Predictor(task.metrics, shared=lambda state: state.params)},
    init_client=init_client,
  )
