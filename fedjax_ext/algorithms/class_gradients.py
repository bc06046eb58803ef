"""What clients know of a classifier without moving it: gradients by class.

Axis letters: D features, Y classes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_ext.core import Client, ClientOutput, ClientProgram
from fedjax_ext.losses.federated_features import class_gradients
from fedjax_ext.losses.headed import HeadedTask, body_of

PyTree = Any


def mean_class_gradients(task: HeadedTask) -> ClientProgram:
  """A client program: a head's mean gradient over each class's examples.

  `shared` is (model, head); the update ([Y, D, Y], whether the client has the
  class [Y]), for `core.total`.
  """
  classes = task.num_classes

  def init(shared: PyTree, client: Client, key: jax.Array) -> tuple:
    del shared, client, key
    zeros = jnp.zeros((classes, task.num_features, classes))
    return zeros, jnp.zeros(classes)

  def step(shared: PyTree, sums: tuple, batch) -> tuple:
    model, head = shared
    features = task.frozen_features(body_of(model), batch)
    labels, weights = task.labels(batch), batch.mask.astype(features.dtype)
    own = jax.nn.one_hot(labels, classes) * weights[:, None]
    gradients = class_gradients(head, features, labels, weights)
    return sums[0] + gradients, sums[1] + own.sum(0)

  def final(shared: PyTree, client: Client, sums: tuple) -> ClientOutput:
    del shared, client
    gradients, examples = sums
    mean = gradients / jnp.maximum(examples, 1)[:, None, None]
    return ClientOutput((mean, (examples > 0) * 1.0), jnp.ones(()))

  return ClientProgram(init, step, final)
