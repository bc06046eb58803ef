"""What methods with a shared and a personal part have in common.

A client's model is {'shared': ..., 'personal': ...}: it trains both at once,
the first is averaged, the second stays in its `ClientStates` row. Algorithms
say what the parts are and what is lost on them.

Axis letters: B examples, C clients, D features, Y classes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_ext.algorithms.local_sgd import LocalState, delta_of, local_sgd
from fedjax_ext.algorithms.local_training import own_or_first
from fedjax_ext.core import (
  Adaptation,
  Batch,
  Client,
  ClientOutput,
  ClientProgram,
  Phase,
  Predictor,
)
from fedjax_ext.losses.headed import (
  HeadedTask,
  body_of,
  join,
  mask_absent,
  with_head,
)
from fedjax_ext.models import params_of
from fedjax_ext.models.heads import apply_head

PyTree = Any
# (shared params, features [B, D]) -> logits [B, Y]
GlobalLogits = Callable[[PyTree, jax.Array], jax.Array]
# (shared params, the client's row, features [B, D]) -> logits [B, Y]
PersonalLogits = Callable[[PyTree, PyTree, jax.Array], jax.Array]


def partly_personal(
  loss: Callable[[PyTree, Batch, PyTree], Any],
  optimizer: optax.GradientTransformation,
  *,
  own: Callable[[PyTree, Client], PyTree] = lambda shared, client: client.state,
  penalty: Callable[[PyTree, PyTree], jax.Array] | None = None,
  row: Callable[[PyTree], PyTree] = lambda personal: personal,
) -> ClientProgram:
  """Local SGD on {'shared': params, 'personal': the client's own}.

  Args:
    loss: (model, batch, client's inputs) -> scalar, or (scalar, stats); the
      model's params have the two parts.
    optimizer: any optax transformation that treats entries one by one, so that
      parts whose losses have nothing in common train as if alone.
    own: (shared, client) -> the personal part to begin with.
    penalty: (params, the shared params at the start) -> scalar, added.
    row: personal part -> the client's new state row.
  """

  def begin(shared: PyTree, client: Client, key: jax.Array):
    del key
    start = params_of(shared)
    params = {'shared': start, 'personal': own(shared, client)}
    return join(shared, params), (start, client.inputs)

  def end(shared: PyTree, client: Client, state: LocalState) -> ClientOutput:
    params = params_of(state.params)
    after = join(state.params, params['shared'])
    return ClientOutput(
      delta_of(after, shared),
      client.num_examples,
      state=row(params['personal']),
      metrics={'train_loss': state.loss},
    )

  extra = None
  if penalty is not None:
    extra = lambda params, context: penalty(params, context[0])
  return local_sgd(
    lambda model, batch, context: loss(model, batch, context[1]),
    optimizer,
    begin=begin,
    end=end,
    penalty=extra,
    uses_context=True,
  )


def heads_of(model: PyTree) -> tuple[PyTree, PyTree, PyTree]:
  """(backbone's variables, shared params, personal part) of a client's model.

  The shared params are a dictionary with the backbone's as 'body'.
  """
  params = params_of(model)
  shared = params['shared']
  return join(model, shared['body']), shared, params['personal']


def head_predictors(
  task: HeadedTask,
  *,
  counts: jax.Array,
  global_logits: Mapping[str, GlobalLogits],
  personal_logits: Mapping[str, PersonalLogits] = {},
  features: Callable[[PyTree, PyTree, Batch], jax.Array] | None = None,
  shared_of: Callable[[PyTree], PyTree] = lambda state: state.params,
) -> dict[str, Predictor]:
  """Scores every head of a method on one computation of the features.

  'global' scores the shared heads, 'personal' the clients' own ones and, named
  'global_...', the shared ones (without a name where there are no others); each
  also with classes that the client has no
  train examples of masked out ('..._masked'). Metrics of the first head of a
  predictor go without a name: 'accuracy', 'accuracy_masked', 'accuracy_psi'.

  Args:
    task: the backbone's task.
    counts: train examples of every client and class [C, Y].
    global_logits: heads by name.
    personal_logits: heads by name; () for methods without.
    features: (shared variables, row, batch) -> features [B, D], for backbones
      with personal parts; default: the shared backbone's.
    shared_of: server state -> shared variables.

  Returns:
    'global', without a metric where there are no shared heads, and 'personal'.
  """
  counts = jnp.asarray(counts)
  if features is None:
    features = lambda shared, row, batch: task.frozen_features(
      body_of(shared), batch
    )

  def global_metrics(shared: PyTree, batch: Batch) -> dict:
    if not global_logits:
      return {}
    f = task.frozen_features(body_of(shared), batch)
    return _named(
      task,
      batch,
      {name: z(params_of(shared), f) for name, z in global_logits.items()},
    )

  def personal_metrics(model: tuple, batch: Batch) -> dict:
    shared, row, mine = model
    f = features(shared, row, batch)
    logits = {
      name: z(params_of(shared), row, f) for name, z in personal_logits.items()
    }
    if global_logits:
      common = task.frozen_features(body_of(shared), batch)
      for name, z in global_logits.items():
        logits[f'global_{name}'] = z(params_of(shared), common)
    masked = {name: mask_absent(z, mine) for name, z in logits.items()}
    return _named(task, batch, logits) | _named(task, batch, masked, '_masked')

  personal = Predictor(
    personal_metrics,
    shared=lambda state: (shared_of(state), counts),
    params=lambda shared, client: (
      shared[0],
      client.state,
      shared[1][client.number],
    ),
  )
  return {
    'global': Predictor(global_metrics, shared=shared_of),
    'personal': personal,
  }


def whole_model_predictors(
  task: HeadedTask,
  *,
  counts: jax.Array,
  shared_of: Callable[[PyTree], PyTree] = lambda state: state.params,
  generic: bool = True,
) -> dict[str, Predictor]:
  """Scores personal models of 'body' and 'head' in rows {'params', 'seen'}.

  Args:
    task: the backbone's task.
    counts: train examples of every client and class [C, Y].
    shared_of: server state -> the model of clients that have none yet.
    generic: whether that is also a model to report.
  """
  own = own_or_first
  logits = lambda params, f: apply_head(params['head'], f)
  return head_predictors(
    task,
    counts=counts,
    global_logits={'global': logits} if generic else {},
    personal_logits={'personal': lambda p, row, f: logits(own(p, row), f)},
    features=lambda shared, row, batch: task.frozen_features(
      own(shared, row)['body'], batch
    ),
    shared_of=shared_of,
  )


def fine_tuned_predictors(
  task: HeadedTask,
  *,
  counts: jax.Array,
  optimizer: optax.GradientTransformation,
  phase: Phase,
  logits: GlobalLogits = lambda shared, f: apply_head(shared['head'], f),
  loss: Callable[[PyTree, Batch, PyTree], Any] | None = None,
) -> dict[str, Predictor]:
  """The global model, and each client's after fine-tuning all of it.

  Metrics of the fine-tuned one are 'accuracy' and 'accuracy_masked', ...; of
  the global one as it is for the same clients 'accuracy_global', ...

  Args:
    task: the backbone's task.
    counts: train examples of every client and class [C, Y].
    optimizer: of the fine-tuning.
    phase: its local work.
    logits: of the global model.
    loss: (model, batch, the client's counts [Y]) of the fine-tuning; default:
      cross-entropy of 'body' and 'head'.
  """
  counts = jnp.asarray(counts)
  predictors = head_predictors(
    task, counts=counts, global_logits={'global': logits}
  )
  plain = with_head(task)
  program = local_sgd(
    loss or (lambda model, batch, _: plain.loss(model, batch)),
    optimizer,
    begin=lambda shared, client, key: (
      shared[0],
      shared[1][client.number],
    ),
    uses_context=True,
  )

  def metrics(model: tuple, batch: Batch) -> dict:
    params, mine = model
    z = logits(params_of(params), task.frozen_features(body_of(params), batch))
    return _named(task, batch, {'': z}) | _named(
      task, batch, {'': mask_absent(z, mine)}, '_masked'
    )

  fine_tuned = Predictor(
    metrics,
    shared=lambda state: (state.params, counts),
    adapt=Adaptation(
      program, (phase,), lambda state: (state.params, state.context)
    ),
  )
  return predictors | {'fine_tuned': fine_tuned}


def _named(
  task: HeadedTask,
  batch: Batch,
  logits: Mapping[str, jax.Array],
  ending: str = '',
) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Metrics of logits [B, Y] by head; the first goes without its name."""
  result = {}
  for i, (name, z) in enumerate(logits.items()):
    middle = f'_{name}' if i else ''
    for metric, value in task.metrics(z, batch).items():
      if metric != 'loss' or not (i or ending):
        result[f'{metric}{middle}{ending}'] = value
  return result
