"""A task: what is learned, as pure functions of params and a batch.

Axis letters: B examples, Y classes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_ext.core import Batch
from fedjax_ext.models import Model

PyTree = Any


class Task(NamedTuple):
  """What every algorithm needs to know of a model and its data.

  Attributes:
    init: key -> params, a pytree.
    loss: (params, batch) -> scalar, the mean over the batch's real examples.
    metrics: (params, batch) -> {name: (value [B], weight [B])}.
  """

  init: Callable[[jax.Array], PyTree]
  loss: Callable[[PyTree, Batch], jax.Array]
  metrics: Callable[[PyTree, Batch], dict[str, tuple[jax.Array, jax.Array]]]


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean of values [B] where mask [B] is True, a scalar; 0 if nowhere.

  A masked value changes nothing, even if it is not finite.
  """
  count = jnp.maximum(mask.sum(), 1)
  return jnp.where(mask, values, 0).sum() / count


def classification_task(
  model: Model, *, feature: str = 'image', label: str = 'label'
) -> Task:
  """Softmax cross-entropy; metrics 'accuracy' and 'loss' per example.

  Args:
    model: logits [B, Y].
    feature: name of the input feature.
    label: name of the label, int [B].
  """

  def cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, batch.data[label]
    )

  def loss(params: PyTree, batch: Batch) -> jax.Array:
    logits = model.apply(params, batch.data[feature], batch.info.key)
    return masked_mean(cross_entropy(logits, batch), batch.mask)

  def metrics(params: PyTree, batch: Batch) -> dict:
    logits = model.apply(params, batch.data[feature])
    correct = logits.argmax(-1) == batch.data[label]
    weight = batch.mask.astype(logits.dtype)
    return {
      'accuracy': (correct.astype(logits.dtype), weight),
      'loss': (cross_entropy(logits, batch), weight),
    }

  return Task(model.init, loss, metrics)
