"""Features made up at the server so that they train a classifier as data would.

Shang, Lu, Huang and Wang, "Federated learning on heterogeneous and long-tailed
data via classifier re-training with federated features", 2022,
https://arxiv.org/abs/2204.13399.

Axis letters: D features, Y classes, M features made up of each class, N rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_ext.models.heads import Head, apply_head


class Retraining(NamedTuple):
  """How a classifier is trained anew at the server, each round.

  Attributes:
    features_per_class: M.
    match_steps: of SGD on the features.
    match_learning_rate: of it.
    head_steps: of full-batch SGD on the head.
    head_learning_rate: of it.
  """

  features_per_class: int = 100
  match_steps: int = 100
  match_learning_rate: float = 0.1
  head_steps: int = 300
  head_learning_rate: float = 0.01


def retrained(
  features: jax.Array,
  head: Head,
  average: Head,
  gradients: tuple[jax.Array, jax.Array],
  *,
  how: Retraining,
) -> tuple[jax.Array, Head]:
  """What a round makes of the features and of the classifier.

  Args:
    features: [Y, M, D].
    head: of which clients took gradients.
    average: the round's averaged classifier.
    gradients: clients' means by class summed [Y, D, Y], and how many clients
      have the class [Y].
    how: steps and rates.

  Returns:
    Features whose gradients agree with the clients', and the averaged
    classifier trained on them.
  """
  sums, clients = gradients
  features = match_features(
    features,
    head,
    sums / jnp.maximum(clients, 1)[:, None, None],
    clients > 0,
    steps=how.match_steps,
    learning_rate=how.match_learning_rate,
  )
  return features, train_head(
    average,
    features,
    steps=how.head_steps,
    learning_rate=how.head_learning_rate,
  )


def class_gradients(
  head: Head, features: jax.Array, labels: jax.Array, weights: jax.Array
) -> jax.Array:
  """Sums by class of cross-entropy's gradients in the kernel.

  Args:
    head: of which to take gradients.
    features: [N, D].
    labels: int [N].
    weights: of examples, [N].

  Returns:
    [Y, D, Y].
  """
  classes = head['bias'].size
  error = jax.nn.softmax(apply_head(head, features)) - jax.nn.one_hot(
    labels, classes
  )
  own = jax.nn.one_hot(labels, classes) * weights[:, None]
  return jnp.einsum('ny,nd,nz->ydz', own, features, error)


def match_features(
  features: jax.Array,
  head: Head,
  wanted: jax.Array,
  some: jax.Array,
  *,
  steps: int,
  learning_rate: float,
) -> jax.Array:
  """Moves features until their mean gradients point as the wanted ones do.

  SGD on the sum over classes and class vectors of 1 - cosine.

  Args:
    features: [Y, M, D].
    head: of which gradients are taken.
    wanted: mean gradients by class [Y, D, Y].
    some: classes that count, bool [Y].
    steps: of SGD.
    learning_rate: of it.
  """
  _, each, width = features.shape
  labels = _labels(features)
  alike = jnp.full(labels.shape, 1 / each)

  def mismatch(features: jax.Array) -> jax.Array:
    got = class_gradients(head, features.reshape(-1, width), labels, alike)
    norms = jnp.linalg.norm(got, axis=1) * jnp.linalg.norm(wanted, axis=1)
    cosines = (got * wanted).sum(1) / (norms + 1e-6)  # [Y, Y]
    return jnp.where(some[:, None], 1 - cosines, 0).sum()

  step = lambda _, x: x - learning_rate * jax.grad(mismatch)(x)
  return jax.lax.fori_loop(0, steps, step, features)


def train_head(
  head: Head, features: jax.Array, *, steps: int, learning_rate: float
) -> Head:
  """Full-batch SGD of a head on features [Y, M, D] and their classes."""
  flat, labels = features.reshape(-1, features.shape[-1]), _labels(features)
  loss = lambda head: optax.softmax_cross_entropy_with_integer_labels(
    apply_head(head, flat), labels
  ).mean()
  step = lambda _, head: jax.tree.map(
    lambda h, g: h - learning_rate * g, head, jax.grad(loss)(head)
  )
  return jax.lax.fori_loop(0, steps, step, head)


def _labels(features: jax.Array) -> jax.Array:
  """Classes of features [Y, M, D], row by row [Y * M]."""
  return jnp.repeat(jnp.arange(features.shape[0]), features.shape[1])
