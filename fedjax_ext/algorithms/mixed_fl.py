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

from fedjax_ext.algorithms.fed_avg import ServerState as FedAvgState
from fedjax_ext.algorithms.fed_avg import server_step
from fedjax_ext.algorithms.local_sgd import LocalState, delta_of, local_sgd
from fedjax_ext.core import (
  Batch,
  Client,
  ClientOutput,
  ClientProgram,
  Cohort,
  FederatedAlgorithm,
  Layout,
  Phase,
  PlanSpec,
  Predictor,
  SparseTable,
  finish,
  for_each_client,
  run_one,
  sparse_weighted_mean,
  summarize,
  validate,
  weighted_mean,
  with_sparse_rows,
)
from fedjax_ext.losses import Task
from fedjax_ext.models import Variables

PyTree = Any
Loss = Callable[[PyTree, Batch], jax.Array]
SERVER_SPLIT = 'server'
_SERVER = 'server_'  # prefix of the server's features in an oracle's batch


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


class ServerLoss(NamedTuple):
  """f_c and how the server works on it.

  Attributes:
    loss: (params, batch) -> scalar mean over the batch; without data the batch
      has no features.
    steps: K_c, central steps a round; also how many batches a gradient that
      goes to the clients is the mean of.
    client: number of the client that stands for the server, whose examples are
      the split 'server' (see `data.split_off_server`); None if f_c has no data.
    batch_size: B_c.
    features: {name: [M_c, ...]}, the server's examples, for mode 'oracle'.
  """

  loss: Loss
  steps: int
  client: int | None = None
  batch_size: int = 20
  features: Mapping[str, jax.Array] | None = None


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


class _Shared(NamedTuple):
  """What a side starts a round with: the model and what it adds."""

  params: PyTree
  augmentation: PyTree = ()
  server_features: PyTree = ()


def mixed_fl(
  task: Task,
  *,
  mode: str,
  server: ServerLoss,
  client_optimizer: optax.GradientTransformation,
  central_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  layout: Layout,
  phase: Phase = Phase(),
  federated_weight: float = 1.0,
  central_weight: float = 1.0,
  merge_weights: tuple[float, float] | None = None,
  fresh: bool = False,
  warm_start: bool = False,
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
    two_way: clients add g_c, the server adds g_f; beta = (1/2, 1/2). Both are
      the means of the raw gradients along the other side's last round; with
      `fresh` they are taken at the round's model, by a pass more.
    fed_only, central_only: one of the losses.
    oracle, client_side: clients take w_f grad f_i + w_c grad f_c at each step,
      which needs the server's examples on them, or none.

  Args:
    task: init, f_f's loss, metrics.
    mode: one of `MODES`.
    server: f_c.
    client_optimizer: any optax transformation.
    central_optimizer: the server's in its own steps; starts anew each round.
    server_optimizer: takes the merged delta.
    layout: devices, lanes, waves.
    phase: the clients' local work.
    federated_weight: w_f.
    central_weight: w_c.
    merge_weights: (beta_f, beta_c) instead of the mode's.
    fresh: two_way with gradients at the round's model.
    warm_start: two_way starts from gradients at the first model, not from 0.
    weighting: clients count by 'examples' or are 'uniform'.
    tables: see `fed_avg`; for modes without augmentation on clients.
    debug: run client by client in plain Python.

  Raises:
    InvalidInput: an unknown mode, or arguments that do not fit it.
  """
  chosen = _check(mode, server, fresh, warm_start, tables, weighting)
  beta = merge_weights or chosen.merge
  two_way = chosen.augment_centre

  client_loss = _scaled(task.loss, federated_weight)
  server_loss = _scaled(server.loss, central_weight)
  if chosen.on_clients:
    client_loss = _with_server_loss(client_loss, server_loss, server)
  program = _side_program(
    client_loss,
    client_optimizer,
    loss_scale=federated_weight,
    augmented=chosen.augment_clients,
    keep_gradient=two_way,
    uniform=weighting == 'uniform',
  )
  if chosen.on_clients and server.client is not None:
    program = _with_server_batches(program, server.batch_size)
  reducer = weighted_mean()
  if tables:
    program = with_sparse_rows(program, tables)
    reducer = sparse_weighted_mean(tables)
  run_clients = for_each_client(program, reducer, layout=layout, debug=debug)
  run_gradient = for_each_client(
    _gradient_program(client_loss, weighting == 'uniform'),
    weighted_mean(),
    layout=layout,
    debug=debug,
  )
  run_centre = _central_runner(
    _side_program(
      server_loss,
      central_optimizer,
      loss_scale=central_weight,
      augmented=two_way,
      keep_gradient=two_way,
    ),
    server,
    layout,
    debug,
  )
  run_central_gradient = _central_runner(
    _gradient_program(server_loss), server, layout, debug
  )

  def init(key: jax.Array) -> ServerState:
    params = task.init(key)
    validate.check(
      not isinstance(params, Variables),
      'Expected a model without moving statistics for mixed_fl (two sides have '
      'two), got one with BatchNorm; GroupNorm has none.',
    )
    zeros = jax.tree.map(jnp.zeros_like, params) if two_way else ()
    return ServerState(params, server_optimizer.init(params), zeros, zeros)

  @jax.jit
  def merge(state: ServerState, augmentation: PyTree, clients, centre):
    """The merged delta, the new gradients; what a side did not do is None."""
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    federated, central = zeros, zeros
    if clients is not None:
      mean, _ = finish(reducer, clients)
      federated = mean['delta']
      if two_way:
        some = clients.acc[1] > 0  # nobody came: keep the estimate
        kept = jax.tree.map(
          lambda new, old: jnp.where(some, new, old),
          mean['gradient'],
          state.federated_gradient,
        )
        state = state._replace(federated_gradient=kept)
    if centre is not None:
      central = centre['delta']
      if two_way:
        state = state._replace(central_gradient=centre['gradient'])
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

  step = jax.jit(functools.partial(server_step, server_optimizer))

  def at_the_model(state: ServerState, cohort: Cohort) -> ServerState:
    """Two-way's gradients, over the round's batches, at the round's model."""
    shared = _Shared(state.params)
    output, _ = run_gradient(shared, cohort, 'train')
    federated, _ = finish(weighted_mean(), output)
    central, _ = run_central_gradient(shared, cohort)
    return state._replace(
      central_gradient=central, federated_gradient=federated
    )

  def apply(state: ServerState, client_states, cohort: Cohort):
    if fresh or (warm_start and cohort.round == 1):
      state = at_the_model(state, cohort)
    metrics, clients, centre = {}, None, None
    sent = _Shared(state.params)
    if two_way:
      sent = sent._replace(augmentation=state.central_gradient)
    elif chosen.augment_clients:
      gradient, metrics = run_central_gradient(sent, cohort)
      sent = sent._replace(augmentation=gradient)
    elif chosen.on_clients and server.features is not None:
      sent = sent._replace(server_features=dict(server.features))
    if chosen.clients:
      inputs = (cohort.touched('train'), ()) if tables else ()
      clients, _ = run_clients(sent, cohort, 'train', inputs=inputs)
      metrics |= summarize(clients)
    if chosen.centre:
      own = _Shared(state.params, state.federated_gradient)
      centre, more = run_centre(own, cohort)
      metrics |= more
    # The output's clients are numpy: what jit needs of it are the sums.
    if clients is not None:
      clients = clients._replace(metrics={}, diagnostics={})
    delta, gradients, more = merge(state, sent.augmentation, clients, centre)
    stepped = step(FedAvgState(state.params, state.optimizer_state), delta)
    return ServerState(*stepped, *gradients), client_states, metrics | more

  return FederatedAlgorithm(
    init=init,
    apply=apply,
    plans=_plans(chosen, server, phase, tables),
    predictors={
      'global': Predictor(task.metrics, shared=lambda state: state.params)
    },
  )


def _check(
  mode: str,
  server: ServerLoss,
  fresh: bool,
  warm_start: bool,
  tables: tuple[SparseTable, ...],
  weighting: str,
) -> Mode:
  validate.one_of('mode', mode, list(MODES))
  validate.one_of('weighting', weighting, ('examples', 'uniform'))
  validate.at_least('steps of the server', server.steps, 1)
  validate.at_least('batch_size of the server', server.batch_size, 1)
  chosen = MODES[mode]
  validate.check(
    chosen.augment_centre or not (fresh or warm_start),
    f'Expected mode=two_way for fresh or warm_start, got mode={mode}.',
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


def _scaled(loss: Loss, weight: float) -> Loss:
  return lambda params, batch: weight * loss(params, batch)


def _sum_of_gradients() -> optax.GradientTransformation:
  """Passes gradients on; its state is their sum."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (
      updates,
      jax.tree.map(jnp.add, state, updates),
    ),
  )


def _side_program(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  *,
  loss_scale: float,
  augmented: bool,
  keep_gradient: bool,
  uniform: bool = False,
) -> ClientProgram:
  """Local steps on loss + <augmentation, x>, of clients and server alike.

  Its update is {'delta': x - x^0} and, with `keep_gradient`, 'gradient': the
  mean over the steps of the gradient without the augmentation.
  """
  if keep_gradient:
    optimizer = optax.chain(_sum_of_gradients(), optimizer)

  def end(shared: _Shared, client: Client, state: LocalState) -> ClientOutput:
    update = {'delta': delta_of(state.params, shared.params)}
    if keep_gradient:
      steps = state.num_steps
      update['gradient'] = jax.tree.map(
        lambda total, g: jnp.where(
          steps > 0, total / jnp.maximum(steps, 1) - g, 0
        ),
        state.optimizer_state[0],
        shared.augmentation,
      )
    weight = client.num_examples
    if uniform:
      weight = jnp.minimum(weight, 1)
    loss_sum, examples = state.loss
    if loss_scale:
      loss_sum = loss_sum / loss_scale
    return ClientOutput(
      update, weight, metrics={'train_loss': (loss_sum, examples)}
    )

  return local_sgd(
    loss,
    optimizer,
    begin=lambda shared, client, key: (shared.params, shared.augmentation),
    penalty=(
      (lambda params, g: optax.tree_utils.tree_vdot(g, params))
      if augmented
      else None
    ),
    end=end,
  )


def _gradient_program(loss: Loss, uniform: bool = False) -> ClientProgram:
  """The mean gradient over a client's examples at the model that was sent."""

  def init(shared: _Shared, client: Client, key: jax.Array):
    del client, key
    zeros = jax.tree.map(jnp.zeros_like, shared.params)
    return zeros, jnp.zeros(())

  def step(shared: _Shared, state, batch: Batch):
    total, examples = state
    count = batch.mask.sum().astype(examples.dtype)
    gradient = jax.grad(loss)(shared.params, batch)
    total = jax.tree.map(lambda t, g: t + count * g, total, gradient)
    return total, examples + count

  def final(shared: _Shared, client: Client, state) -> ClientOutput:
    del shared
    total, examples = state
    mean = jax.tree.map(lambda t: t / jnp.maximum(examples, 1), total)
    weight = client.num_examples
    return ClientOutput(mean, jnp.minimum(weight, 1) if uniform else weight)

  return ClientProgram(init, step, final)


def _central_runner(
  program: ClientProgram, server: ServerLoss, layout: Layout, debug: bool
) -> Callable[[_Shared, Cohort], tuple[PyTree, dict[str, Any]]]:
  """Runs a program at the server: (shared, cohort) -> (update, metrics).

  With data it is a client of its own that runs the plan 'server'; without, a
  loop of as many steps.
  """
  if server.client is not None:
    reducer = weighted_mean()
    run = for_each_client(program, reducer, layout=layout, debug=debug)
    result = jax.jit(lambda output: finish(reducer, output)[0])

    def with_data(shared: _Shared, cohort: Cohort):
      output, _ = run(shared, cohort, 'server')
      scalars = summarize(output)
      bare = output._replace(metrics={}, diagnostics={})
      return result(bare), _central_metrics(scalars)

    return with_data

  @jax.jit
  def loop(shared: _Shared, key: jax.Array):
    one = Client(jnp.int32(0), jnp.int32(1))
    mask = jnp.ones((server.steps, 1), bool)
    output = run_one(program, shared, one, key, {}, mask)
    return output.update, {n: s / w for n, (s, w) in output.metrics.items()}

  def without_data(shared: _Shared, cohort: Cohort):
    update, metrics = loop(shared, cohort.plan_key('server'))
    return update, _central_metrics(metrics)

  return without_data


def _central_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
  """The server's own loss; the rest speaks of clients."""
  names = {'train_loss': 'central_loss', 'clients_dropped': 'centre_dropped'}
  return {new: metrics[old] for old, new in names.items() if old in metrics}


def _with_server_loss(
  client_loss: Loss, server_loss: Loss, server: ServerLoss
) -> Loss:
  """w_f f_i(B) + w_c f_c(B'), with B' in the batch or without data."""

  def both(params: PyTree, batch: Batch) -> jax.Array:
    if server.client is None:
      own = Batch({}, jnp.ones(1, bool), batch.info)
      return client_loss(params, batch) + server_loss(params, own)
    theirs = {
      name.removeprefix(_SERVER): x
      for name, x in batch.data.items()
      if name.startswith(_SERVER)
    }
    mask = jnp.ones(server.batch_size, bool)
    own = Batch(theirs, mask, batch.info)
    return client_loss(params, batch) + server_loss(params, own)

  return both


def _with_server_batches(
  program: ClientProgram, batch_size: int
) -> ClientProgram:
  """Adds B_c examples of the server, drawn anew, to each batch."""

  def step(shared: _Shared, state, batch: Batch):
    features = shared.server_features
    size = len(next(iter(features.values())))
    key = jax.random.fold_in(batch.info.key, 2)
    rows = jax.random.randint(key, (batch_size,), 0, size)
    drawn = {f'{_SERVER}{n}': x[rows] for n, x in features.items()}
    return program.step(shared, state, batch._replace(data=batch.data | drawn))

  return program._replace(step=step)
