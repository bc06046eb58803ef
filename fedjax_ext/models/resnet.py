"""Residual networks of basic blocks.

He, Zhang, Ren and Sun, "Deep residual learning for image recognition", 2016,
https://arxiv.org/abs/1512.03385. The shortcut of a block that changes the
shape is a 1x1 convolution and a norm (option B), also for CIFAR, where the
paper pads with zeros (option A).

Axis letters: B examples, H height, W width, D features, Y classes.
"""

from collections.abc import Sequence

import jax
from flax import linen as nn

from fedjax_ext.core import validate
from fedjax_ext.models.layers import (
  Conv,
  Norm,
  as_float_image,
  classify,
  overlapping_max_pool,
)
from fedjax_ext.models.model import tap

STEMS = ('cifar', 'imagenet')


class ConvNorm(nn.Module):
  """A SAME convolution without bias, drawn He-normal, and a norm.

  Attributes:
    width: output channels.
    size: of the square kernel.
    stride: steps between windows.
    norm: 'group' or 'batch'.
    groups: of GroupNorm.
  """

  width: int
  size: int = 3
  stride: int = 1
  norm: str = 'group'
  groups: int = 32

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps [B, H, W, D] to [B, ceil(H/stride), ceil(W/stride), width]."""
    x = Conv(
      self.width,
      (self.size, self.size),
      'SAME',
      (self.stride, self.stride),
      use_bias=False,
      kernel_init=nn.initializers.he_normal(),
    )(x)
    return Norm(self.norm, self.groups)(x, train, mask)


class BasicBlock(nn.Module):
  """relu(x + norm(conv(relu(norm(conv(x)))))), He et al. 2016, figure 5 left.

  Attributes:
    width: output channels.
    stride: of the first convolution.
    norm: 'group' or 'batch'.
    groups: of GroupNorm.
  """

  width: int
  stride: int = 1
  norm: str = 'group'
  groups: int = 32

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps [B, H, W, D] to [B, ceil(H/stride), ceil(W/stride), width]."""
    kind = (self.norm, self.groups)
    y = ConvNorm(self.width, 3, self.stride, *kind)(x, train, mask)
    y = ConvNorm(self.width, 3, 1, *kind)(nn.relu(y), train, mask)
    if x.shape != y.shape:
      shortcut = ConvNorm(self.width, 1, self.stride, *kind, name='shortcut')
      x = shortcut(x, train, mask)
    return nn.relu(x + y)


class ResNetFeatures(nn.Module):
  """A residual network without its classifier.

  Stage s has `width * 2**s` channels and, but for the first, halves H and W.
  The output of every stage is tapped, see `model.tap`.

  Attributes:
    stage_sizes: blocks of each stage.
    width: channels of the first stage.
    stem: 'cifar', a 3x3 convolution; or 'imagenet', a 7x7 one with stride 2 and
      3x3 max-pool with stride 2.
    norm: 'group' or 'batch'.
    groups: of GroupNorm.
  """

  stage_sizes: Sequence[int] = (2, 2, 2, 2)
  width: int = 64
  stem: str = 'cifar'
  norm: str = 'group'
  groups: int = 32

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps images [B, H, W] or [B, H, W, D] to pooled features [B, D]."""
    validate.one_of('stem', self.stem, STEMS)
    kind = (self.norm, self.groups)
    size, stride = (3, 1) if self.stem == 'cifar' else (7, 2)
    stem = ConvNorm(self.width, size, stride, *kind, name='stem')
    x = nn.relu(stem(as_float_image(x), train, mask))
    if self.stem == 'imagenet':
      x = overlapping_max_pool(x)
    for stage, blocks in enumerate(self.stage_sizes):
      for block in range(blocks):
        stride = 2 if stage > 0 and block == 0 else 1
        name = f'stage{stage}_block{block}'
        layer = BasicBlock(self.width * 2**stage, stride, *kind, name=name)
        x = layer(x, train, mask)
      x = tap(self, stage, x)
    return x.mean((1, 2))


class ResNet(nn.Module):
  """A residual network; by default ResNet-18 for CIFAR.

  ResNet-18 with 10 classes has 11,173,962 parameters; ResNet-34, stage_sizes
  (3, 4, 6, 3), with 100 classes 21,328,292. Variables are in two parts:
  `features`, those of `ResNetFeatures`, and `classifier`, a dense layer.

  Attributes:
    num_classes: Y; 0 returns the features.
    stage_sizes: blocks of each stage.
    width: channels of the first stage.
    stem: 'cifar' or 'imagenet'.
    norm: 'group' or 'batch'.
    groups: of GroupNorm.
  """

  num_classes: int
  stage_sizes: Sequence[int] = (2, 2, 2, 2)
  width: int = 64
  stem: str = 'cifar'
  norm: str = 'group'
  groups: int = 32

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps images [B, H, W] or [B, H, W, D] to logits [B, Y]."""
    features = ResNetFeatures(
      self.stage_sizes,
      self.width,
      self.stem,
      self.norm,
      self.groups,
      name='features',
    )
    x = features(x, train, mask)
    return classify(x, self.num_classes, name='classifier')


def cifar_resnet(
  num_classes: int,
  depth: int = 8,
  *,
  width: int = 16,
  norm: str = 'group',
  groups: int = 8,
) -> ResNet:
  """He et al.'s CIFAR network of depth 6n+2: three stages of n blocks.

  ResNet-8 with 10 classes has 78,042 parameters.

  Args:
    num_classes: Y.
    depth: 8, 14, 20, 32, ...
    width: channels of the first stage.
    norm: 'group' or 'batch'.
    groups: of GroupNorm.

  Raises:
    InvalidInput: another depth.
  """
  validate.check(
    depth >= 8 and depth % 6 == 2,
    f'Expected depth 6n+2 (8, 14, 20, ...), got depth={depth}.',
  )
  stages = 3 * ((depth - 2) // 6,)
  return ResNet(num_classes, stages, width, 'cifar', norm, groups)
