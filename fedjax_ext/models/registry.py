"""Models by name, with settings of simple types.

A builder takes keywords only: the shape of one example, the number of classes
(for text the vocabulary), and its own settings.

Axis letters: H height, W width, D features, T time steps.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from fedjax_ext.core import validate
from fedjax_ext.models.classifiers import MLP, EmnistCNN, SoftmaxRegression
from fedjax_ext.models.cnn import GroupNormCNN, LeNet
from fedjax_ext.models.layers import NORMS
from fedjax_ext.models.model import Model, from_module
from fedjax_ext.models.recurrent import LanguageLSTM
from fedjax_ext.models.resnet import STEMS, ResNet, cifar_resnet
from fedjax_ext.models.transformer import (
  POOLS,
  TextTransformer,
  VisionTransformer,
)

# The paper's rates, after the pool and after the dense layer.
EMNIST_CNN_DROPOUT = (0.25, 0.5)


def softmax_regression(
  *, num_classes: int, input_shape: tuple[int, ...]
) -> Model:
  """`SoftmaxRegression` on images or vectors."""
  return from_module(SoftmaxRegression(num_classes), input_shape)


def mlp(
  *,
  num_classes: int,
  input_shape: tuple[int, ...],
  hidden: tuple[int, ...] = (200,),
) -> Model:
  """`MLP` on images or vectors."""
  for width in hidden:
    validate.at_least('hidden', width, 1)
  return from_module(MLP(num_classes, hidden), input_shape)


def emnist_cnn(
  *,
  num_classes: int,
  input_shape: tuple[int, ...],
  dropout: bool = False,
) -> Model:
  """`EmnistCNN`; dropout: whether with the paper's rates, 0.25 and 0.5."""
  _check_image('emnist_cnn', input_shape, 6)
  rates = EMNIST_CNN_DROPOUT if dropout else ()
  return from_module(EmnistCNN(num_classes, rates), input_shape)


def group_norm_cnn(
  *,
  num_classes: int,
  input_shape: tuple[int, ...],
  widths: tuple[int, ...] = (32, 64, 64),
  groups: int = 8,
  pool: str = 'flatten',
) -> Model:
  """`GroupNormCNN`: one block for each width."""
  validate.one_of('pool', pool, ('flatten', 'mean'))
  for width in widths:
    validate.at_least('widths', width, 1)
  validate.at_least('groups', groups, 1)
  _check_image('group_norm_cnn', input_shape, 2 ** len(widths))
  module = GroupNormCNN(num_classes, widths, groups, pool)
  return from_module(module, input_shape)


def lenet(
  *,
  num_classes: int,
  input_shape: tuple[int, ...],
  widths: tuple[int, ...] = (20, 50),
  dense: int = 500,
) -> Model:
  """`LeNet`: one block for each width."""
  for width in widths:
    validate.at_least('widths', width, 1)
  validate.at_least('dense', dense, 1)
  # Each block takes a side n to (n - 4) // 2, and 1 has to be left.
  _check_image('lenet', input_shape, 5 * 2 ** len(widths) - 4)
  return from_module(LeNet(num_classes, widths, dense), input_shape)


def resnet8(
  *,
  num_classes: int,
  input_shape: tuple[int, ...],
  norm: str = 'group',
  groups: int = 8,
  width: int = 16,
) -> Model:
  """`cifar_resnet` of depth 8."""
  _check_image('resnet8', input_shape, 4)
  _check_resnet(norm, groups, width)
  module = cifar_resnet(num_classes, 8, width=width, norm=norm, groups=groups)
  return from_module(module, input_shape)


def resnet18(
  *,
  num_classes: int,
  input_shape: tuple[int, ...],
  norm: str = 'group',
  groups: int = 32,
  width: int = 64,
  stem: str = 'cifar',
) -> Model:
  """`ResNet` with stages of 2, 2, 2 and 2 basic blocks."""
  _check_image('resnet18', input_shape, 8)
  module = _resnet(num_classes, (2, 2, 2, 2), width, stem, norm, groups)
  return from_module(module, input_shape)


def resnet34(
  *,
  num_classes: int,
  input_shape: tuple[int, ...],
  norm: str = 'group',
  groups: int = 32,
  width: int = 64,
  stem: str = 'cifar',
) -> Model:
  """`ResNet` with stages of 3, 4, 6 and 3 basic blocks."""
  _check_image('resnet34', input_shape, 8)
  module = _resnet(num_classes, (3, 4, 6, 3), width, stem, norm, groups)
  return from_module(module, input_shape)


def char_lstm(
  *,
  num_classes: int,
  input_shape: tuple[int, ...],
  num_layers: int = 1,
  hidden: int = 128,
  embedding: int = 8,
) -> Model:
  """`LanguageLSTM` of characters; num_classes is the vocabulary."""
  return _lstm(
    'char_lstm', num_classes, input_shape, num_layers, hidden, embedding, 0
  )


def word_lstm(
  *,
  num_classes: int,
  input_shape: tuple[int, ...],
  num_layers: int = 1,
  hidden: int = 670,
  embedding: int = 96,
  projection: int = 96,
) -> Model:
  """`LanguageLSTM` of words, by default Stack Overflow's sizes."""
  return _lstm(
    'word_lstm',
    num_classes,
    input_shape,
    num_layers,
    hidden,
    embedding,
    projection,
  )


def vision_transformer(
  *,
  num_classes: int,
  input_shape: tuple[int, ...],
  patch: int = 4,
  width: int = 64,
  depth: int = 4,
  heads: int = 4,
  mlp_ratio: int = 4,
  pool: str = 'mean',
  dropout: float = 0.0,
) -> Model:
  """`VisionTransformer`; the image's sides divide by the patch."""
  _check_image('vision_transformer', input_shape, 1)
  validate.at_least('patch', patch, 1)
  validate.check(
    not any(side % patch for side in input_shape[:2]),
    f'Expected image sides that divide by patch={patch}, got shape '
    f'{list(input_shape)}.',
  )
  validate.one_of('pool', pool, POOLS)
  _check_transformer(width, depth, heads, mlp_ratio, dropout)
  module = VisionTransformer(
    num_classes, patch, width, depth, heads, mlp_ratio, pool, dropout
  )
  return from_module(module, input_shape)


def text_transformer(
  *,
  num_classes: int,
  input_shape: tuple[int, ...],
  width: int = 64,
  depth: int = 2,
  heads: int = 4,
  mlp_ratio: int = 4,
  dropout: float = 0.0,
) -> Model:
  """`TextTransformer`; num_classes is the vocabulary."""
  _check_tokens('text_transformer', input_shape)
  _check_transformer(width, depth, heads, mlp_ratio, dropout)
  module = TextTransformer(num_classes, width, depth, heads, mlp_ratio, dropout)
  return from_module(module, input_shape, jnp.int32)


MODELS: dict[str, Callable[..., Model]] = {
  builder.__name__: builder
  for builder in (
    softmax_regression,
    mlp,
    emnist_cnn,
    group_norm_cnn,
    lenet,
    resnet8,
    resnet18,
    resnet34,
    char_lstm,
    word_lstm,
    vision_transformer,
    text_transformer,
  )
}


def make_model(
  name: str, *, input_shape: Sequence[int], num_classes: int, **settings: Any
) -> Model:
  """Builds a model by name.

  Args:
    name: one of MODELS.
    input_shape: shape of one example, without B: (H, W), (H, W, D) or (T,).
    num_classes: Y; for text the vocabulary V.
    **settings: keywords of the builder, e.g. hidden, norm.

  Raises:
    InvalidInput: the name or a setting is unknown or out of range, or the model
      cannot take such inputs.
  """
  validate.one_of('model', name, list(MODELS))
  validate.at_least('num_classes', num_classes, 1)
  common = {'num_classes': num_classes, 'input_shape': tuple(input_shape)}
  known = [*inspect.signature(MODELS[name]).parameters]
  known = [key for key in known if key not in common]
  for key in settings:
    validate.check(
      key in known,
      f'Expected settings of model={name} among {known}, got {key}.',
    )
  return MODELS[name](**common, **settings)


def _resnet(
  num_classes: int,
  stage_sizes: tuple[int, ...],
  width: int,
  stem: str,
  norm: str,
  groups: int,
) -> ResNet:
  validate.one_of('stem', stem, STEMS)
  _check_resnet(norm, groups, width)
  return ResNet(num_classes, stage_sizes, width, stem, norm, groups)


def _lstm(
  name: str,
  vocabulary: int,
  input_shape: tuple[int, ...],
  num_layers: int,
  hidden: int,
  embedding: int,
  projection: int,
) -> Model:
  _check_tokens(name, input_shape)
  validate.at_least('num_layers', num_layers, 1)
  validate.at_least('hidden', hidden, 1)
  validate.at_least('embedding', embedding, 1)
  validate.at_least('projection', projection, 0)
  module = LanguageLSTM(vocabulary, embedding, hidden, num_layers, projection)
  return from_module(module, input_shape, jnp.int32)


def _check_image(
  name: str, input_shape: tuple[int, ...], smallest: int
) -> None:
  validate.check(
    len(input_shape) in (2, 3) and min(input_shape[:2]) >= smallest,
    f'Expected images of at least {smallest}x{smallest} for model={name}, got '
    f'shape {list(input_shape)}.',
  )


def _check_tokens(name: str, input_shape: tuple[int, ...]) -> None:
  validate.check(
    len(input_shape) == 1 and input_shape[0] >= 1,
    f'Expected sequences of tokens, of shape [T], for model={name}, got shape '
    f'{list(input_shape)}.',
  )


def _check_resnet(norm: str, groups: int, width: int) -> None:
  validate.one_of('norm', norm, NORMS)
  validate.at_least('groups', groups, 1)
  validate.at_least('width', width, 1)


def _check_transformer(
  width: int, depth: int, heads: int, mlp_ratio: int, dropout: float
) -> None:
  validate.at_least('depth', depth, 1)
  validate.at_least('heads', heads, 1)
  validate.at_least('mlp_ratio', mlp_ratio, 1)
  validate.check(
    width >= 1 and width % heads == 0,
    f'Expected width to divide by heads={heads}, got width={width}.',
  )
  validate.check(
    0 <= dropout < 1, f'Expected 0 <= dropout < 1, got dropout={dropout}.'
  )
