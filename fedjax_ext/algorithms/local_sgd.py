"""Local training by gradient steps: the client program of most algorithms.

Written once: an algorithm says where a client begins, what it adds to the loss
and what it returns.

Axis letters: B examples in a batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_ext.core import (
  Batch,
  Client,
  ClientOutput,
  ClientProgram,
  validate,
)
from fedjax_ext.models import params_of, with_params

PyTree = Any


class LocalState(NamedTuple):
  """A client in the middle of its local steps.

  Attributes:
    params: its model, a pytree of params or `models.Variables`.
    optimizer_state: its optimizer's state, made anew each round.
    context: what `begin` handed over, constant during the round.
    num_steps: steps so far, a scalar.
    loss: (sum over examples, examples), two scalars.
  """

  params: PyTree
  optimizer_state: PyTree
  context: PyTree
  num_steps: jax.Array
  loss: tuple[jax.Array, jax.Array]


def delta_of(after: PyTree, before: PyTree) -> PyTree:
  """after - before, leaf by leaf of two like pytrees."""
  return jax.tree.map(jnp.subtract, after, before)


def add_scaled(x: PyTree, scale: jax.Array | float, y: PyTree) -> PyTree:
  """x + scale * y, leaf by leaf of two like pytrees; scale is a scalar."""
  return jax.tree.map(lambda a, b: (a + scale * b).astype(a.dtype), x, y)


def decay_by_round(
  *, factor: float, every: int = 1
) -> optax.GradientTransformationExtraArgs:
  """Rates that fall with the rounds.

    update * factor^floor((round - 1) / every)

  To be chained after an optimizer.

  Args:
    factor: in (0, 1].
    every: rounds between falls.
  """
  validate.above('factor', factor, 0)
  validate.between('factor', factor, 0, 1)
  validate.at_least('every', every, 1)

  def update(updates, state, params=None, *, round=0, **more):
    del params, more
    falls = jnp.maximum(jnp.asarray(round) - 1, 0) // every
    scale = factor ** falls.astype(jnp.result_type(float))
    return jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )


def from_server(shared: PyTree, client: Client, key: jax.Array) -> PyTree:
  """Begins at the server's model (`shared` is a pytree)."""
  del client, key
  return shared, ()


def return_delta(
  shared: PyTree, client: Client, state: LocalState
) -> ClientOutput:
  """Returns params - shared (pytrees), weighted by examples."""
  return ClientOutput(
    delta_of(state.params, shared),
    client.num_examples,
    metrics={'train_loss': state.loss},
  )


def weighted_by(program: ClientProgram, weighting: str) -> ClientProgram:
  """The same program, whose clients have the weight that `weighting` names.

  Args:
    program: of which a client weighs its number of examples.
    weighting: 'examples' leaves it; 'uniform': 1 for clients with examples.
  """
  validate.one_of('weighting', weighting, ('examples', 'uniform'))
  if weighting == 'examples':
    return program

  def final(shared, client, state):
    output = program.final(shared, client, state)
    return output._replace(weight=jnp.minimum(client.num_examples, 1))

  return program._replace(final=final)


def local_sgd(
  loss: Callable[[PyTree, Batch], Any],
  optimizer: optax.GradientTransformation,
  *,
  begin: Callable[
    [PyTree, Client, jax.Array], tuple[PyTree, PyTree]
  ] = from_server,
  penalty: Callable[[PyTree, PyTree], jax.Array] | None = None,
  end: Callable[[PyTree, Client, LocalState], ClientOutput] = return_delta,
  uses_context: bool = False,
) -> ClientProgram:
  """A client program that takes one optimizer step a batch.

  x <- x - optimizer(grad(loss(x, batch) + penalty(x, context)))

  An optimizer that takes extra arguments gets `round`, a scalar from 1 (0 in
  evaluation), see `decay_by_round`.

  Moving statistics, where the model has any, become what the loss returns
  beside its value; optimizer and penalty see params alone.

  Args:
    loss: (model, batch) -> scalar mean over the batch's real examples, or
      (scalar, stats) for a model that is `Variables`.
    optimizer: any optax transformation; its state starts anew each round.
    begin: (shared, client, key) -> (model, context).
    penalty: (params, context) -> scalar, added to the loss; not logged.
    end: (shared, client, LocalState) -> ClientOutput.
    uses_context: the loss is (model, batch, context).
  """

  optimizer = optax.with_extra_args_support(optimizer)

  def objective(params, model, context, batch):
    more = (context,) if uses_context else ()
    result = loss(with_params(model, params), batch, *more)
    value, stats = result if isinstance(result, tuple) else (result, ())
    extra = 0 if penalty is None else penalty(params, context)
    return value + extra, (value, stats)

  def init(shared: PyTree, client: Client, key: jax.Array) -> LocalState:
    model, context = begin(shared, client, key)
    zero = jnp.zeros(())
    return LocalState(
      model,
      optimizer.init(params_of(model)),
      context,
      jnp.int32(0),
      (zero, zero),
    )

  def step(shared: PyTree, state: LocalState, batch: Batch) -> LocalState:
    del shared
    params = params_of(state.params)
    grads, (value, stats) = jax.grad(objective, has_aux=True)(
      params, state.params, state.context, batch
    )
    updates, optimizer_state = optimizer.update(
      grads, state.optimizer_state, params, round=batch.info.round
    )
    count = batch.mask.sum().astype(value.dtype)
    loss_sum, examples = state.loss
    return LocalState(
      with_params(state.params, optax.apply_updates(params, updates), stats),
      optimizer_state,
      state.context,
      state.num_steps + 1,
      (loss_sum + value * count, examples + count),
    )

  return ClientProgram(init, step, end)
