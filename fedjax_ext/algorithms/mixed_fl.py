"""Mixed federated learning: a federated loss and a loss at the server.

Augenstein, Hard, Ning, Singhal, Kale, Partridge, Mathews, "Mixed federated
learning: joint decentralized and centralized learning", 2022,
https://arxiv.org/abs/2205.13655. The model x minimises w_f f_f(x) + w_c f_c(x):
f_f lives on clients, f_c at the server, which may have examples of its own or
none (a regulariser).

All modes are one function. They differ in whether clients and server train, in
the constant gradient that each adds to its own (the augmentation), and in the
weights that merge what comes back.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_ext.algorithms.local_sgd import weighted_by
from fedjax_ext.algorithms.mixed_fl_sides import (
  ServerLoss,
  Shared,
  central_runner,
  gradient_program,
  side_program,
  with_server_batches,
  with_server_loss,
)
from fedjax_ext.algorithms.server_step import ServerState as FedAvgState
from fedjax_ext.algorithms.server_step import server_step
from fedjax_ext.core import (
  Batch,
  Cohort,
  FederatedAlgorithm,
  Layout,
  Phase,
  PlanSpec,
  Predictor,
  Reducer,
  SparseTable,
  finish,
  for_each_client,
  sparse_weighted_mean,
  summarize,
  validate,
  weighted_mean,
  with_sparse_rows,
)
from fedjax_ext.losses import Task
from fedjax_ext.models import Variables

PyTree = Any
SERVER_SPLIT = 'server'
GRADIENTS = ('stale', 'warm', 'fresh')


class Mode(NamedTuple):
  """What sets one mode apart.

  Attributes:
    clients: whether clients train on f_f.
    centre: whether the server trains on f_c.
    augment_clients: whether clients add the server's gradient to each step.
    augment_centre: whether the server adds the clients' gradient to each step.
    on_clients: whether clients evaluate f_c themselves.
    merge: weights of the clients' delta and of the server's.
  """

  clients: bool = True
  centre: bool = False
  augment_clients: bool = False
  augment_centre: bool = False
  on_clients: bool = False
  merge: tuple[float, float] = (1.0, 1.0)


MODES: Mapping[str, Mode] = {
  'fed_only': Mode(),
  'central_only': Mode(clients=False, centre=True),
  'parallel_training': Mode(centre=True),
  'one_way': Mode(augment_clients=True),
  # Each side already steps on all of f: adding both would step twice.
  'two_way': Mode(
    centre=True, augment_clients=True, augment_centre=True, merge=(0.5, 0.5)
  ),
  'oracle': Mode(on_clients=True),
  'client_side': Mode(on_clients=True),
}


class ServerState(NamedTuple):
  """The model, the optimizer's state, and gradients of the round before.

  Attributes:
    params: pytree.
    optimizer_state: pytree.
    central_gradient: g_c, of w_c f_c, like params; () unless mode is two_way.
    federated_gradient: g_f, of w_f f_f, likewise.
  """

  params: PyTree
  optimizer_state: PyTree
  central_gradient: PyTree = ()
  federated_gradient: PyTree = ()


def mixed_fl(
  task: Task,
  *,
  mode: str,
  server: ServerLoss,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  layout: Layout,
  phase: Phase = Phase(),
  federated_weight: float = 1.0,
  merge_weights: tuple[float, float] | None = None,
  gradients: str = 'stale',
  weighting: str = 'examples',
  tables: tuple[SparseTable, ...] = (),
  debug: bool = False,
) -> FederatedAlgorithm:
  """Builds mixed federated learning.

  One side's steps: x <- x - optimizer(w grad f(x) + augmentation). With D_f the
  weighted mean of the clients' deltas and D_c the server's, the server
  optimizer takes -(beta_f D_f + beta_c D_c) as its gradient.

    parallel_training: no augmentation; beta = (1, 1).
    one_way: clients add g_c = w_c grad f_c(x), taken at the round's model and
      held; beta = (1, 0).
    two_way: clients add g_c, the server adds g_f; beta = (1/2, 1/2).
    fed_only, central_only: one of the losses.
    oracle, client_side: clients take w_f grad f_i + w_c grad f_c at each step,
      which needs the server's examples on them, or none.

  Args:
    task: init, f_f's loss, metrics.
    mode: one of `MODES`.
    server: f_c, w_c and the server's own steps.
    client_optimizer: any optax transformation.
    server_optimizer: takes the merged delta.
    layout: devices, lanes, waves.
    phase: the clients' local work.
    federated_weight: w_f.
    merge_weights: (beta_f, beta_c) instead of the mode's.
    gradients: where two_way's come from: 'stale', the means of the raw
      gradients along the other side's round before, 0 at first; 'warm', the
      same, but at first those at the first model; 'fresh', those at each
      round's model, by a pass more over the round's batches.
    weighting: clients count by 'examples' or are 'uniform'.
    tables: see `fed_avg`; for modes without augmentation on clients.
    debug: run client by client in plain Python.

  Raises:
    InvalidInput: an unknown mode, or arguments that do not fit it.
  """
  chosen = _check(mode, server, gradients, tables)
  two_way = chosen.augment_centre
  runs = _make_runs(
    task,
    chosen,
    server,
    client_optimizer,
    federated_weight=federated_weight,
    weighting=weighting,
    tables=tables,
    layout=layout,
    debug=debug,
  )
  merge = _make_merge(runs.reducer, merge_weights or chosen.merge, two_way)
  step = jax.jit(functools.partial(server_step, server_optimizer))
  server_features = layout.replicate(dict(server.features or {}))

  def init(key: jax.Array) -> ServerState:
    params = task.init(key)
    validate.check(
      not isinstance(params, Variables),
      'Expected a model without moving statistics for mixed_fl (two sides have '
      'two), got one with BatchNorm; GroupNorm has none.',
    )
    zeros = jax.tree.map(jnp.zeros_like, params) if two_way else ()
    return ServerState(params, server_optimizer.init(params), zeros, zeros)

  def at_the_model(state: ServerState, cohort: Cohort) -> ServerState:
    """Two-way's gradients, over the round's batches, at the round's model."""
    shared = Shared(state.params)
    output, _ = runs.client_gradient(shared, cohort, 'train')
    federated, _ = finish(weighted_mean(), output)
    centre = runs.central_gradient(shared, cohort)
    return state._replace(
      central_gradient=keep_if(
        centre.counted, centre.update, state.central_gradient
      ),
      federated_gradient=keep_if(
        output.acc[1] > 0, federated, state.federated_gradient
      ),
    )

  def apply(state: ServerState, client_states, cohort: Cohort):
    if gradients == 'fresh' or (gradients == 'warm' and cohort.round == 1):
      state = at_the_model(state, cohort)
    metrics, clients, centre = {}, None, None
    sent = Shared(state.params)
    if two_way:
      sent = sent._replace(augmentation=state.central_gradient)
    elif chosen.augment_clients:
      gradient = runs.central_gradient(sent, cohort)
      metrics = gradient.metrics
      sent = sent._replace(augmentation=gradient.update)
    elif chosen.on_clients:
      sent = sent._replace(server_features=server_features)
    if chosen.clients:
      inputs = (cohort.touched('train'), ()) if tables else ()
      clients, _ = runs.clients(sent, cohort, 'train', inputs=inputs)
      metrics |= summarize(clients)
    if chosen.centre:
      own = Shared(state.params, state.federated_gradient)
      centre = runs.centre(own, cohort)
      metrics |= centre.metrics
      centre = centre._replace(metrics={})
    # The output's clients are numpy: what jit needs of it are the sums.
    if clients is not None:
      clients = clients._replace(metrics={}, diagnostics={})
    delta, kept, more = merge(state, sent.augmentation, clients, centre)
    stepped = step(FedAvgState(state.params, state.optimizer_state), delta)
    params, optimizer_state, _ = stepped
    state = ServerState(params, optimizer_state, *kept)
    return state, client_states, metrics | more

  return FederatedAlgorithm(
    init=init,
    apply=apply,
    plans=_plans(chosen, server, phase, tables),
    predictors={
      'global': Predictor(task.metrics, shared=lambda state: state.params)
    },
  )


class _Runs(NamedTuple):
  """The compiled functions of both sides, and how clients' updates combine."""

  clients: Callable
  client_gradient: Callable
  centre: Callable
  central_gradient: Callable
  reducer: Reducer


def _make_runs(
  task: Task,
  chosen: Mode,
  server: ServerLoss,
  client_optimizer: optax.GradientTransformation,
  *,
  federated_weight: float,
  weighting: str,
  tables: tuple[SparseTable, ...],
  layout: Layout,
  debug: bool,
) -> _Runs:
  """Builds what clients and server run in a mode."""
  two_way = chosen.augment_centre

  def client_loss(params: PyTree, batch: Batch) -> jax.Array:
    return federated_weight * task.loss(params, batch)

  if chosen.on_clients:
    client_loss = with_server_loss(client_loss, server)
  program = side_program(
    client_loss,
    client_optimizer,
    # An oracle's loss is the whole objective, w_f f_f + w_c f_c.
    loss_scale=1.0 if chosen.on_clients else federated_weight,
    augmented=chosen.augment_clients,
    keep_gradient=two_way,
  )
  if chosen.on_clients and server.client is not None:
    program = with_server_batches(program, server.batch_size)
  gradient = gradient_program(client_loss)
  program = weighted_by(program, weighting)
  gradient = weighted_by(gradient, weighting)
  reducer = weighted_mean()
  if tables:
    program = with_sparse_rows(program, tables)
    reducer = sparse_weighted_mean(tables)
  own_steps = side_program(
    server.weighted,
    server.optimizer,
    loss_scale=server.weight,
    augmented=two_way,
    keep_gradient=two_way,
  )
  # Without data every step has the same gradient.
  batches = server if server.client is not None else server._replace(steps=1)
  settings = dict(layout=layout, debug=debug)
  return _Runs(
    for_each_client(program, reducer, **settings),
    for_each_client(gradient, weighted_mean(), **settings),
    central_runner(own_steps, server, **settings),
    central_runner(gradient_program(server.weighted), batches, **settings),
    reducer,
  )


def _make_merge(
  reducer: Reducer, beta: tuple[float, float], two_way: bool
) -> Callable:
  """Compiles how the two sides' work becomes one delta.

  Returns:
    (state, augmentation, clients' output, Central) -> (delta, the gradients for
    the next round, {name: scalar}); what a side did not do is None.
  """

  def merge(state: ServerState, augmentation: PyTree, clients, centre):
    """The merged delta, the new gradients; what a side did not do is None."""
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    federated, central = zeros, zeros
    if clients is not None:
      mean, _ = finish(reducer, clients)
      federated = mean['delta']
      if two_way:
        kept = keep_if(
          clients.acc[1] > 0, mean['gradient'], state.federated_gradient
        )
        state = state._replace(federated_gradient=kept)
    if centre is not None:
      central = centre.update['delta']
      if two_way:
        kept = keep_if(
          centre.counted, centre.update['gradient'], state.central_gradient
        )
        state = state._replace(central_gradient=kept)
    delta = jax.tree.map(
      lambda f, c: beta[0] * f + beta[1] * c, federated, central
    )
    norm = optax.tree.norm
    return (
      delta,
      (state.central_gradient, state.federated_gradient),
      {
        'client_delta_norm': norm(federated),
        'central_delta_norm': norm(central),
        'augmentation_norm': norm(augmentation),
      },
    )

  return jax.jit(merge)


def keep_if(new_counts: jax.Array, new: PyTree, old: PyTree) -> PyTree:
  """`new` where the scalar bool holds (nobody was absent), else `old`."""
  return jax.tree.map(lambda a, b: jnp.where(new_counts, a, b), new, old)


def _check(
  mode: str,
  server: ServerLoss,
  gradients: str,
  tables: tuple[SparseTable, ...],
) -> Mode:
  validate.one_of('mode', mode, list(MODES))
  validate.one_of('gradients', gradients, GRADIENTS)
  validate.at_least('steps of the server', server.steps, 1)
  validate.at_least('batch_size of the server', server.batch_size, 1)
  chosen = MODES[mode]
  validate.check(
    chosen.augment_centre or gradients == 'stale',
    f'Expected mode=two_way for gradients={gradients}, got mode={mode}.',
  )
  validate.check(
    not tables or not (chosen.augment_clients or chosen.on_clients),
    f'Expected no sparse tables for mode={mode}: the gradient of f_c is about '
    'all rows.',
  )
  validate.check(
    mode != 'client_side' or server.client is None,
    'Expected a server loss without data for mode=client_side; mode=oracle '
    'puts the examples of the server on clients.',
  )
  validate.check(
    mode != 'oracle' or server.client is None or server.features is not None,
    'Expected the features of the server for mode=oracle.',
  )
  return chosen


def _plans(
  chosen: Mode,
  server: ServerLoss,
  phase: Phase,
  tables: tuple[SparseTable, ...],
) -> dict[str, PlanSpec]:
  """The clients' work and the server's batches."""
  plans = {}
  if chosen.clients:
    plans['train'] = PlanSpec((phase,), tables)
  needs_server = chosen.centre or chosen.augment_clients
  if needs_server and server.client is not None:
    batches = Phase(
      SERVER_SPLIT,
      steps=server.steps,
      batch_size=server.batch_size,
      remainder='fill',
    )
    plans['server'] = PlanSpec((batches,), clients=(server.client,))
  return plans
