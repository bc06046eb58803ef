"""What one model can learn from another: predictions, features, heat maps.

Axis letters: B examples, H height, W width, D channels, Y classes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_ext.core import validate
from fedjax_ext.models import Model

PyTree = Any
NORMS = ('l2sq', 'l2', 'mse')
_EPSILON = 1e-12


def kl_divergence(
  teacher: jax.Array, student: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
  """KL(q_teacher || q_student) of softened predictions, [B].

    q = softmax(logits / temperature)

  Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network",
  2015, https://arxiv.org/abs/1503.02531, without its factor temperature^2.

  Args:
    teacher: logits [B, Y].
    student: logits [B, Y].
    temperature: > 0.
  """
  validate.above('temperature', temperature, 0)
  q = jax.nn.log_softmax(teacher / temperature)
  p = jax.nn.log_softmax(student / temperature)
  return (jnp.exp(q) * (q - p)).sum(-1)


def distance(a: jax.Array, b: jax.Array, *, norm: str = 'l2sq') -> jax.Array:
  """Distance of each example's maps, [B].

  'l2sq' is |a - b|^2, 'l2' |a - b| (with gradient 0 where they are equal),
  'mse' |a - b|^2 over the number of entries.

  Args:
    a: [B, ...].
    b: like a.
    norm: of NORMS.
  """
  validate.one_of('norm', norm, NORMS)
  squares = jnp.square(a - b).reshape(a.shape[0], -1)
  if norm == 'mse':
    return squares.mean(-1)
  total = squares.sum(-1)
  if norm == 'l2':
    some = total > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, total, 1)), 0)
  return total


def normalise(maps: jax.Array) -> jax.Array:
  """Each example's map [B, ...] to Euclidean norm 1; zero stays zero."""
  axes = tuple(range(1, maps.ndim))
  squares = jnp.square(maps).sum(axes, keepdims=True)
  return maps * jax.lax.rsqrt(jnp.maximum(squares, _EPSILON**2))


def heat_maps(
  model: Model, variables: PyTree, x: jax.Array, classes: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
  """Grad-CAM: where the tapped layers speak for a class.

    alpha_k = mean_ij d z_class / d A_ijk,  H = relu(sum_k alpha_k A_k)

  Selvaraju et al., "Grad-CAM: visual explanations from deep networks via
  gradient-based localization", 2017, https://arxiv.org/abs/1610.02391. Maps are
  not resized. Differentiable by `variables`, which takes second derivatives.

  Args:
    model: with taps; BatchNorm uses its moving statistics.
    variables: of the model.
    x: inputs [B, ...].
    classes: int [B]; None takes the predicted ones.

  Returns:
    (logits [B, Y], feature maps of the layers [B, H, W, D], heat maps of the
    layers [B, H, W]), shallow to deep.

  Raises:
    InvalidInput: the model has no taps.
  """
  maps = ()
  if model.tapped is not None:
    _, maps = jax.eval_shape(lambda v: model.tapped(v, x, None), variables)
  validate.check(
    bool(maps),
    'Expected a convolutional model with tapped layers for heat maps, such as '
    'lenet, group_norm_cnn or resnet8, computing in float32.',
  )

  def score(shifts: tuple[jax.Array, ...]):
    logits, features = model.tapped(variables, x, shifts)
    of = classes
    if of is None:
      of = jax.lax.stop_gradient(logits).argmax(-1)
    chosen = jnp.take_along_axis(logits, of[:, None].astype(int), -1)
    return chosen.sum(), (logits, features)

  zeros = tuple(jnp.zeros(m.shape, m.dtype) for m in maps)
  slopes, (logits, features) = jax.grad(score, has_aux=True)(zeros)
  heat = tuple(
    jax.nn.relu((g.mean((1, 2), keepdims=True) * a).sum(-1))
    for g, a in zip(slopes, features, strict=True)
  )
  return logits, features, heat


def attention(features: jax.Array, *, power: int = 2) -> jax.Array:
  """Attention map [B, H, W] of features [B, H, W, D], of Euclidean norm 1.

    sum_k |A_k|^power, over its norm + 1e-6

  Zagoruyko and Komodakis, "Paying more attention to attention", 2017,
  https://arxiv.org/abs/1612.03928.
  """
  summed = (jnp.abs(features) ** power).sum(-1)
  squares = jnp.square(summed).sum((1, 2), keepdims=True)
  some = squares > 0
  norm = jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1)), 0)
  return summed / (norm + 1e-6)
