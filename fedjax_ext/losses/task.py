"""A task: what is learned, as pure functions of a model and a batch.

Axis letters: B examples, T time steps, Y classes, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_ext.core import Batch, validate
from fedjax_ext.models import Model
from fedjax_ext.models.layers import as_float

PyTree = Any


class Task(NamedTuple):
  """What every algorithm needs to know of a model and its data.

  The model is a pytree of params or, where it keeps moving statistics,
  `models.Variables`.

  Attributes:
    init: key -> model.
    loss: (model, batch) -> scalar, the mean over the batch's real examples; for
      `Variables`, (scalar, the new stats).
    metrics: (model, batch) -> {name: (value [B], weight [B])}.
  """

  init: Callable[[jax.Array], PyTree]
  loss: Callable[[PyTree, Batch], Any]
  metrics: Callable[[PyTree, Batch], dict[str, tuple[jax.Array, jax.Array]]]


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean of values [B] where mask [B] is True, a scalar; 0 if nowhere.

  A masked value changes nothing, even if it is not finite.
  """
  count = jnp.maximum(mask.sum(), 1)
  return jnp.where(mask, values, 0).sum() / count


def with_stats(value: jax.Array, stats: PyTree) -> Any:
  """What a loss returns: value, and new moving statistics if there are any."""
  return (value, stats) if jax.tree.leaves(stats) else value


def image_inputs(
  feature: str,
  preprocess: Callable[[jax.Array | None, jax.Array], jax.Array] | None,
) -> Callable[..., jax.Array]:
  """What a model sees of a batch, (batch, *, train) -> floats [B, ...].

  Integers are pixels and are divided by 255.

  Args:
    feature: name of the input feature.
    preprocess: as for `classification_task`.
  """

  def inputs(batch: Batch, *, train: bool) -> jax.Array:
    x = batch.data[feature]
    if preprocess is not None:
      key = jax.random.fold_in(batch.info.key, 1) if train else None
      x = preprocess(key, x)
    return as_float(x)

  return inputs


def classification_task(
  model: Model,
  *,
  feature: str = 'image',
  label: str = 'label',
  preprocess: Callable[[jax.Array | None, jax.Array], jax.Array] | None = None,
) -> Task:
  """Softmax cross-entropy; metrics 'accuracy' and 'loss' per example.

  The model sees floats: integers are pixels and are divided by 255.

  Args:
    model: logits [B, Y].
    feature: name of the input feature.
    label: name of the label, int [B].
    preprocess: (key, x [B, ...]) -> x [B, ...] in every step; key None in
      evaluation. See `data.preprocess`.
  """

  inputs = image_inputs(feature, preprocess)

  def cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, batch.data[label]
    )

  def loss(variables: PyTree, batch: Batch) -> Any:
    logits, stats = model.train(
      variables, inputs(batch, train=True), batch.info.key, batch.mask
    )
    value = masked_mean(cross_entropy(logits, batch), batch.mask)
    return with_stats(value, stats)

  def metrics(variables: PyTree, batch: Batch) -> dict:
    logits = model.apply(variables, inputs(batch, train=False))
    correct = logits.argmax(-1) == batch.data[label]
    weight = batch.mask.astype(logits.dtype)
    return {
      'accuracy': (correct.astype(logits.dtype), weight),
      'loss': (cross_entropy(logits, batch), weight),
    }

  return Task(model.init, loss, metrics)


def next_token_task(
  model: Model,
  *,
  vocab_size: int,
  feature: str = 'tokens',
  pad: int = 0,
  bos: int = 1,
  eos: int = 2,
  num_oov: int = 1,
  expected_length: float = 0.0,
) -> Task:
  """Next-token prediction: cross-entropy over the targets that are not padding.

  tokens [B, T+1]: inputs are the first T, targets the last T. Metrics, each a
  client's mean over tokens with their number as its weight: 'accuracy' without
  padding and end-of-sequence; 'accuracy_in_vocab' on the same targets when the
  model may only predict words of the vocabulary, so that an unknown word is
  always a mistake (FedJAX's metric for Stack Overflow); 'loss' without padding.

  Args:
    model: int tokens [B, T] -> logits [B, T, V].
    vocab_size: V, special tokens included.
    feature: name of the tokens.
    pad: padding, never a target.
    bos: beginning of a sequence.
    eos: end of a sequence.
    num_oov: tokens for unknown words, the last ones of the vocabulary.
    expected_length: 0 divides a batch's summed loss by its number of targets.
      A positive number divides each example's summed loss by it and takes the
      mean over examples, so that short sequences count less, as FedJAX's models
      do: T for Shakespeare, 13.3 for Stack Overflow.
  """
  validate.at_least('expected_length', expected_length, 0)
  special = jnp.array([pad, bos, eos, *range(vocab_size - num_oov, vocab_size)])

  def inputs_and_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    tokens = batch.data[feature].astype(jnp.int32)
    return tokens[:, :-1], tokens[:, 1:]

  def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.where(targets != pad, losses, 0)

  def loss(variables: PyTree, batch: Batch) -> Any:
    inputs, targets = inputs_and_targets(batch)
    logits, stats = model.train(variables, inputs, batch.info.key, batch.mask)
    losses = cross_entropy(logits, targets)
    if expected_length:
      value = masked_mean(losses.sum(-1) / expected_length, batch.mask)
    else:
      value = masked_mean(losses, (targets != pad) & batch.mask[:, None])
    return with_stats(value, stats)

  def mean_over(
    values: jax.Array, counted: jax.Array, batch: Batch
  ) -> tuple[jax.Array, jax.Array]:
    """Each example's mean over counted tokens [B, T], and their number."""
    dtype = jnp.result_type(float)
    weight = counted.sum(-1).astype(dtype)
    sums = jnp.where(counted, values, 0).sum(-1).astype(dtype)
    return sums / jnp.maximum(weight, 1), jnp.where(batch.mask, weight, 0)

  def metrics(variables: PyTree, batch: Batch) -> dict:
    inputs, targets = inputs_and_targets(batch)
    logits = model.apply(variables, inputs)
    real = targets != pad
    words = real & (targets != eos)
    in_vocab = logits.at[..., special].set(-jnp.inf)
    return {
      'accuracy': mean_over(logits.argmax(-1) == targets, words, batch),
      'accuracy_in_vocab': mean_over(
        in_vocab.argmax(-1) == targets, words, batch
      ),
      'loss': mean_over(cross_entropy(logits, targets), real, batch),
    }

  return Task(model.init, loss, metrics)
