"""Classification with a backbone and several heads on its features.

Axis letters: B examples, C clients, D features, Y classes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_ext.core import Batch
from fedjax_ext.losses.task import (
  Task,
  image_inputs,
  masked_mean,
  with_stats,
)
from fedjax_ext.models import params_of, stats_of, with_params
from fedjax_ext.models.heads import Backbone, Head, apply_head, linear_head

PyTree = Any
ABSENT = -1e30  # Added to the logits of classes that a client does not have.


class HeadedTask(NamedTuple):
  """A backbone's task; heads are up to the algorithm.

  Attributes:
    num_features: D.
    num_classes: Y.
    init: key -> the backbone's variables.
    features: (variables, batch) -> (features [B, D], new stats), in training.
    frozen_features: (variables, batch) -> features [B, D], in evaluation.
    labels: batch -> int [B].
    metrics: (logits [B, Y], batch) -> {'accuracy', 'balanced_accuracy', 'loss':
      (value [B], weight [B])}.
  """

  num_features: int
  num_classes: int
  init: Callable[[jax.Array], PyTree]
  features: Callable[[PyTree, Batch], tuple[jax.Array, PyTree]]
  frozen_features: Callable[[PyTree, Batch], jax.Array]
  labels: Callable[[Batch], jax.Array]
  metrics: Callable[[jax.Array, Batch], dict[str, tuple[jax.Array, jax.Array]]]

  def head(self, key: jax.Array) -> Head:
    """A fresh linear head."""
    return linear_head(key, self.num_features, self.num_classes)

  def cross_entropy(self, logits: jax.Array, batch: Batch) -> jax.Array:
    """Mean over the batch's real examples, a scalar."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, self.labels(batch)
    )
    return masked_mean(losses, batch.mask)


def headed_task(
  backbone: Backbone,
  *,
  num_classes: int,
  feature: str = 'image',
  label: str = 'label',
  preprocess: Callable[[jax.Array | None, jax.Array], jax.Array] | None = None,
  test_counts: np.ndarray | None = None,
) -> HeadedTask:
  """Builds the task of a backbone.

  Args:
    backbone: features of inputs.
    num_classes: Y.
    feature: name of the input feature.
    label: name of the label, int [B].
    preprocess: as for `classification_task`.
    test_counts: test examples of each class [Y]; 'balanced_accuracy' weighs an
      example by 1 / its class's, so that a pooled mean is the mean over
      classes. None weighs alike.
  """
  inputs = image_inputs(feature, preprocess)
  model = backbone.model
  counts = np.ones(num_classes) if test_counts is None else test_counts
  class_weights = jnp.asarray(
    counts.sum() / len(counts) / np.maximum(counts, 1), jnp.float32
  )

  def metrics(logits: jax.Array, batch: Batch) -> dict:
    labels = batch.data[label]
    correct = (logits.argmax(-1) == labels).astype(logits.dtype)
    weight = batch.mask.astype(logits.dtype)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {
      'accuracy': (correct, weight),
      'balanced_accuracy': (correct, weight * class_weights[labels]),
      'loss': (loss, weight),
    }

  return HeadedTask(
    backbone.num_features,
    num_classes,
    model.init,
    lambda variables, batch: model.train(
      variables, inputs(batch, train=True), batch.info.key, batch.mask
    ),
    lambda variables, batch: model.apply(variables, inputs(batch, train=False)),
    lambda batch: batch.data[label],
    metrics,
  )


def with_head(task: HeadedTask) -> Task:
  """The plain task of one backbone with one linear head, for FedAvg and others.

  Params are {'body': the backbone's, 'head': `linear_head`'s}.
  """

  def init(key: jax.Array) -> PyTree:
    body, head = jax.random.split(key)
    variables = task.init(body)
    params = {'body': params_of(variables), 'head': task.head(head)}
    return join(variables, params)

  def loss(variables: PyTree, batch: Batch) -> Any:
    params = params_of(variables)
    features, stats = task.features(body_of(variables), batch)
    value = task.cross_entropy(apply_head(params['head'], features), batch)
    return with_stats(value, stats)

  def metrics(variables: PyTree, batch: Batch) -> dict:
    features = task.frozen_features(body_of(variables), batch)
    logits = apply_head(params_of(variables)['head'], features)
    return task.metrics(logits, batch)

  return Task(init, loss, metrics)


def body_of(variables: PyTree) -> PyTree:
  """The backbone's variables of a model with params {'body': ..., ...}."""
  return join(variables, params_of(variables)['body'])


def join(variables: PyTree, params: PyTree) -> PyTree:
  """Params with the moving statistics of variables, if these have any."""
  return with_params(variables, params, stats_of(variables))


def balanced_softmax(logits: jax.Array, counts: jax.Array) -> jax.Array:
  """Logits [B, Y] for training on class counts [Y]: logits + log(counts).

  Classes without examples get -1e30. Ren et al., "Balanced meta-softmax for
  long-tailed visual recognition", 2020, https://arxiv.org/abs/2007.10740.
  """
  some = counts > 0
  return logits + jnp.where(some, jnp.log(jnp.where(some, counts, 1)), ABSENT)


def mask_absent(logits: jax.Array, counts: jax.Array) -> jax.Array:
  """Logits [B, Y] with those of classes without examples (counts [Y]) out."""
  return jnp.where(counts > 0, logits, ABSENT)
