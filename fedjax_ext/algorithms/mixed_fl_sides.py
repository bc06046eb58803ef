"""The two sides of mixed federated learning: what clients and the server run.

`mixed_fl.py` puts them together.

Axis letters: B_c examples in a central batch, M_c examples of the server.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_ext.algorithms.local_sgd import LocalState, delta_of, local_sgd
from fedjax_ext.core import (
  Batch,
  Client,
  ClientOutput,
  ClientProgram,
  Cohort,
  Layout,
  finish,
  for_each_client,
  run_one,
  summarize,
  weighted_mean,
)
from fedjax_ext.core.programs import accept

PyTree = Any
Loss = Callable[[PyTree, Batch], jax.Array]
_SERVER = 'server_'  # prefix of the server's features in an oracle's batch


class ServerLoss(NamedTuple):
  """f_c and how the server works on it.

  Attributes:
    loss: (params, batch) -> scalar mean over the batch; without data the batch
      has no features.
    optimizer: any optax transformation; starts anew each round.
    steps: K_c, central steps a round; also how many batches a gradient that
      goes to the clients is the mean of.
    weight: w_c.
    client: number of the client that stands for the server, whose examples are
      the split 'server' (see `data.split_off_server`); None if f_c has no data.
    batch_size: B_c.
    features: {name: [M_c, ...]}, the server's examples, for mode 'oracle'.
  """

  loss: Loss
  optimizer: optax.GradientTransformation
  steps: int
  weight: float = 1.0
  client: int | None = None
  batch_size: int = 20
  features: Mapping[str, jax.Array] | None = None

  def weighted(self, params: PyTree, batch: Batch) -> jax.Array:
    """w_c f_c of a batch, a scalar; params is a pytree."""
    return self.weight * self.loss(params, batch)


class Shared(NamedTuple):
  """What a side starts a round with; three pytrees.

  Attributes:
    params: the model.
    augmentation: the gradient that it adds to its own, like params, or ().
    server_features: what clients of an oracle draw the server's batches from.
  """

  params: PyTree
  augmentation: PyTree = ()
  server_features: PyTree = ()


def _sum_of_gradients() -> optax.GradientTransformation:
  """Passes gradients on; its state is their sum."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (
      updates,
      jax.tree.map(jnp.add, state, updates),
    ),
  )


def side_program(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  *,
  loss_scale: float,
  augmented: bool,
  keep_gradient: bool,
) -> ClientProgram:
  """Local steps on loss + <augmentation, x>, of clients and server alike.

  Its update is {'delta': x - x^0} and, with `keep_gradient`, 'gradient': the
  mean over the steps of the gradient without the augmentation. The loss is
  logged divided by `loss_scale`.
  """
  if keep_gradient:
    optimizer = optax.chain(_sum_of_gradients(), optimizer)

  def end(shared: Shared, client: Client, state: LocalState) -> ClientOutput:
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
    loss_sum, examples = state.loss
    if loss_scale:
      loss_sum = loss_sum / loss_scale
    return ClientOutput(
      update,
      client.num_examples,
      metrics={'train_loss': (loss_sum, examples)},
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


def gradient_program(loss: Loss) -> ClientProgram:
  """The mean gradient over a client's examples at the model that was sent."""

  def init(shared: Shared, client: Client, key: jax.Array):
    del client, key
    zeros = jax.tree.map(jnp.zeros_like, shared.params)
    return zeros, jnp.zeros(())

  def step(shared: Shared, state, batch: Batch):
    total, examples = state
    count = batch.mask.sum().astype(examples.dtype)
    gradient = jax.grad(loss)(shared.params, batch)
    total = jax.tree.map(lambda t, g: t + count * g, total, gradient)
    return total, examples + count

  def final(shared: Shared, client: Client, state) -> ClientOutput:
    del shared
    total, examples = state
    mean = jax.tree.map(lambda t: t / jnp.maximum(examples, 1), total)
    return ClientOutput(mean, client.num_examples)

  return ClientProgram(init, step, final)


class Central(NamedTuple):
  """What a program left behind at the server.

  Attributes:
    update: pytree; zeros if it was not finite.
    counted: scalar bool, whether it was.
    metrics: {name: scalar}.
  """

  update: PyTree
  counted: jax.Array
  metrics: dict[str, Any]


def central_runner(
  program: ClientProgram, server: ServerLoss, layout: Layout, debug: bool
) -> Callable[[Shared, Cohort], Central]:
  """Runs a program at the server: (shared, cohort) -> Central.

  With data it is a client of its own that runs the plan 'server'; without, a
  loop of as many steps.
  """
  if server.client is not None:
    reducer = weighted_mean()
    run = for_each_client(program, reducer, layout=layout, debug=debug)
    result = jax.jit(lambda output: finish(reducer, output)[0])

    def with_data(shared: Shared, cohort: Cohort) -> Central:
      output, _ = run(shared, cohort, 'server')
      scalars = summarize(output)
      bare = output._replace(metrics={}, diagnostics={})
      metrics = {'centre_dropped': scalars['clients_dropped']}
      if 'train_loss' in scalars:
        metrics['central_loss'] = scalars['train_loss']
      return Central(result(bare), output.acc[1] > 0, metrics)

    return with_data

  @jax.jit
  def loop(shared: Shared, key: jax.Array) -> Central:
    one = Client(jnp.int32(0), jnp.int32(1))
    mask = jnp.ones((server.steps, 1), bool)
    output = run_one(program, shared, one, key, {}, mask)
    update, _, _, metrics, _, dropped = accept(output, ())
    scalars = {'centre_dropped': dropped.astype(jnp.int32)}
    if 'train_loss' in metrics:
      loss_sum, steps = metrics['train_loss']
      scalars['central_loss'] = loss_sum / steps
    return Central(update, ~dropped, scalars)

  return lambda shared, cohort: loop(shared, cohort.plan_key('server'))


def with_server_loss(client_loss: Loss, server: ServerLoss) -> Loss:
  """w_f f_i(B) + w_c f_c(B'), with B' in the batch or without data."""

  def both(params: PyTree, batch: Batch) -> jax.Array:
    if server.client is None:
      own = Batch({}, jnp.ones(1, bool), batch.info)
      return client_loss(params, batch) + server.weighted(params, own)
    theirs = {
      name.removeprefix(_SERVER): x
      for name, x in batch.data.items()
      if name.startswith(_SERVER)
    }
    mask = jnp.ones(server.batch_size, bool)
    own = Batch(theirs, mask, batch.info)
    return client_loss(params, batch) + server.weighted(params, own)

  return both


def with_server_batches(
  program: ClientProgram, batch_size: int
) -> ClientProgram:
  """Adds B_c examples of the server, drawn anew, to each batch."""

  def step(shared: Shared, state, batch: Batch):
    features = shared.server_features
    size = len(next(iter(features.values())))
    key = jax.random.fold_in(batch.info.key, 2)
    rows = jax.random.randint(key, (batch_size,), 0, size)
    drawn = {f'{_SERVER}{n}': x[rows] for n, x in features.items()}
    return program.step(shared, state, batch._replace(data=batch.data | drawn))

  return program._replace(step=step)
