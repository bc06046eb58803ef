"""What attacks are built of, and what a test sees of them.

Malicious clients run a client program of their own and return updates shaped
like everybody's. A builder makes that program of a `Scenario`; so an attack is
one function in one file.

Axis letters: B examples, H height, W width, D colours.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_ext.algorithms.averaging import Learning
from fedjax_ext.attacks.triggers import Trigger
from fedjax_ext.core import Batch, ClientProgram, Predictor
from fedjax_ext.losses import Task
from fedjax_ext.models.layers import as_float, as_float_image

PyTree = Any


class Scenario(NamedTuple):
  """What an attack may be built of.

  Attributes:
    task: of the model.
    optimizer: of the attackers.
    trigger: what is stamped; attacks that learn theirs do not use it.
    target: the label that triggered images should get.
    poisoned: how many examples of each batch are poisoned, the first ones.
    feature: name of the images.
    label: name of the labels.
    features: (model, batch) -> the last tapped layer [B, ...], None where the
      model has none.
    image_shape: (H, W) or (H, W, D) of an image; for triggers that are learned.
  """

  task: Task
  optimizer: optax.GradientTransformation
  trigger: Trigger
  target: int
  poisoned: int
  feature: str = 'image'
  label: str = 'label'
  features: Callable[[PyTree, Batch], jax.Array] | None = None
  image_shape: tuple[int, ...] = ()


class LearnedAttack(NamedTuple):
  """What an attack with a trigger of its own making consists of.

  Attributes:
    program: poisoned training; the trigger is `Sent.learned`.
    learning: how the trigger is learned.
  """

  program: ClientProgram
  learning: Learning


def stamp(
  trigger: Trigger, images: jax.Array, part: jax.Array | int
) -> jax.Array:
  """A trigger on images, of the same shape but as floats in [0, 1]."""
  return trigger(as_float_image(images), part).reshape(images.shape)


def poison(scenario: Scenario, batch: Batch, part: jax.Array) -> Batch:
  """Stamps the first `poisoned` examples of a batch and gives them the target.

  Before the task's preprocessing: a painted pixel is 1 in [0, 1].

  Args:
    scenario: trigger, target and how many.
    batch: images [B, H, W] or [B, H, W, D] and labels [B].
    part: which part of the trigger, a scalar.
  """
  images, labels = batch.data[scenario.feature], batch.data[scenario.label]
  which = jnp.arange(len(labels)) < scenario.poisoned
  stamped = stamp(scenario.trigger, images, part)
  mask = which.reshape(-1, *[1] * (images.ndim - 1))
  target = jnp.asarray(scenario.target, labels.dtype)
  data = {
    scenario.feature: jnp.where(mask, stamped, as_float(images)),
    scenario.label: jnp.where(which, target, labels),
  }
  return batch._replace(data={**batch.data, **data})


def with_attack_success(
  predictors: Mapping[str, Predictor],
  *,
  trigger: Trigger,
  target: int,
  feature: str = 'image',
  label: str = 'label',
  learning: Learning | None = None,
) -> dict[str, Predictor]:
  """Adds two metrics to predictors that have an 'accuracy'.

  'attack_success' (ASR): how often a triggered image is taken for the target;
  'target_rate': how often the same image is without its trigger. Both leave out
  examples of the target class.

  Args:
    predictors: by name; their metrics must depend on images and labels alone.
    trigger: all parts of it are stamped.
    target: the attack's label.
    feature: name of the images.
    label: name of the labels.
    learning: attackers with a trigger of their own making, which is stamped
      instead; server states then have `memory.learned`.
  """

  def metrics_of(predictor: Predictor) -> Callable[[PyTree, Batch], dict]:
    def metrics(params: PyTree, batch: Batch) -> dict:
      shown = trigger
      if learning is not None:
        params, learned = params
        shown = functools.partial(learning.stamp, learned)
      result = predictor.metrics(params, batch)
      labels = batch.data[label]
      counted = (labels != target).astype(jnp.result_type(float))
      asked = {**batch.data, label: jnp.full_like(labels, target)}
      stamped = stamp(shown, batch.data[feature], -1)
      for name, data in (
        ('attack_success', {**asked, feature: stamped}),
        ('target_rate', asked),
      ):
        value, weight = predictor.metrics(params, batch._replace(data=data))[
          'accuracy'
        ]
        result[name] = (value, weight * counted)
      return result

    return metrics

  def scored(predictor: Predictor) -> Predictor:
    if learning is None:
      return predictor._replace(metrics=metrics_of(predictor))
    return beside(predictor, lambda state: state.memory.learned)._replace(
      metrics=metrics_of(predictor)
    )

  return {name: scored(predictor) for name, predictor in predictors.items()}


def beside(predictor: Predictor, more: Callable[[PyTree], PyTree]) -> Predictor:
  """The same models, each as a pair (model, more(server_state)).

  Its metrics are still those of models alone.

  Args:
    predictor: of models.
    more: server_state -> what goes with every model, any pytree.
  """
  params, adapt = predictor.params, predictor.adapt
  if params is not None:
    pair = lambda shared, client: (params(shared[0], client), shared[1])
    predictor = predictor._replace(params=pair)
  if adapt is not None:
    own = adapt.program
    program = ClientProgram(
      lambda shared, *rest: (own.init(shared[0], *rest), shared[1]),
      lambda shared, state, batch: (
        own.step(shared[0], state[0], batch),
        state[1],
      ),
      lambda shared, client, state: own.final(shared[0], client, state[0]),
    )
    predictor = predictor._replace(
      adapt=adapt._replace(
        program=program, params=lambda state: (adapt.params(state[0]), state[1])
      )
    )
  shared = predictor.shared
  return predictor._replace(shared=lambda state: (shared(state), more(state)))
