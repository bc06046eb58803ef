"""Hidden trigger: poisoned images that look right and are labelled right.

Saha, Subramanya and Pirsiavash, "Hidden trigger backdoor attacks", 2020,
https://arxiv.org/abs/1910.00033. There the poison is crafted once, against a
fixed network, and images are paired by their distance; here it is crafted in
each step against the attacker's present model, and paired in order.

Axis letters: B examples, F features.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_ext.algorithms.averaging import Sent
from fedjax_ext.attacks.backdoors import train_poisoned
from fedjax_ext.attacks.scenario import Scenario, stamp
from fedjax_ext.core import Batch, ClientProgram, validate
from fedjax_ext.models.layers import as_float

PyTree = Any


def hidden_trigger(
  scenario: Scenario,
  *,
  radius: float = 16 / 255,
  steps: int = 5,
  boost: float = 1.0,
) -> ClientProgram:
  """Training on images of the target class moved close to triggered others.

    minimise |f(x + d) - f(trigger(x'))|^2  over |d| <= radius in each pixel

  for the first `poisoned` images x of the target class in a batch, each with an
  image x' of another class; f is the last tapped layer. Labels stay. A client
  without images of the target class trains honestly.

  Args:
    scenario: task, optimizer, trigger, features.
    radius: of pixels in [0, 1].
    steps: of signed gradient descent, each of `radius / steps * 2`.
    boost: what the update is multiplied by.

  Raises:
    InvalidInput: the model has no tapped layers, radius <= 0 or steps < 1.
  """
  validate.above('radius', radius, 0)
  validate.at_least('steps', steps, 1)
  validate.check(
    scenario.features is not None,
    'Expected a convolutional model with tapped layers for hidden_trigger, '
    'such as lenet or group_norm_cnn.',
  )

  def craft(model: PyTree, batch: Batch, sent: Sent, part: jax.Array) -> Batch:
    del sent
    model = jax.lax.stop_gradient(model)
    return collided(scenario, model, batch, part, radius=radius, steps=steps)

  return train_poisoned(scenario, boost=boost, craft=craft)


def collided(
  scenario: Scenario,
  model: PyTree,
  batch: Batch,
  part: jax.Array,
  *,
  radius: float,
  steps: int,
) -> Batch:
  """Moves images of the target class towards triggered ones, by features.

  Args:
    scenario: trigger, target, how many, features.
    model: whose features.
    batch: images [B, ...] and labels [B].
    part: which part of the trigger, a scalar.
    radius: how far a pixel may move.
    steps: of signed gradient descent.

  Returns:
    The batch with other images, as floats in [0, 1].
  """
  images, labels = batch.data[scenario.feature], batch.data[scenario.label]
  at_target = batch.mask & (labels == scenario.target)
  others = batch.mask & (labels != scenario.target)
  rank = jnp.cumsum(at_target) - 1
  moved = at_target & (rank < scenario.poisoned) & others.any()
  # The i-th image of the target class with the i-th other one, and over again.
  order = jnp.argsort(~others, stable=True)
  partner = order[rank % jnp.maximum(others.sum(), 1)]

  def features(x: jax.Array) -> jax.Array:
    data = {**batch.data, scenario.feature: x}
    values = scenario.features(model, batch._replace(data=data))
    return values.reshape(len(labels), -1)

  start = as_float(images)
  wanted = features(stamp(scenario.trigger, images, part))[partner]
  mask = moved.reshape(-1, *[1] * (start.ndim - 1))

  def distance(x: jax.Array) -> jax.Array:
    return jnp.square(features(x) - wanted).sum()

  def descend(_, x: jax.Array) -> jax.Array:
    x = x - 2 * radius / steps * jnp.sign(jax.grad(distance)(x))
    x = jnp.clip(jnp.clip(x, start - radius, start + radius), 0, 1)
    return jnp.where(mask, x, start)

  x = jax.lax.fori_loop(0, steps, descend, start)
  return batch._replace(data={**batch.data, scenario.feature: x})
