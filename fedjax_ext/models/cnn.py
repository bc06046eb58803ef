"""Small convolutional networks.

Axis letters: B examples, H height, W width, D features, Y classes.
"""

from collections.abc import Sequence

import jax
from flax import linen as nn

from fedjax_ext.models.layers import (
  Conv,
  Norm,
  as_float_image,
  classify,
  max_pool,
)
from fedjax_ext.models.model import tap


class GroupNormCNN(nn.Module):
  """Blocks of 3x3 convolution, GroupNorm, relu and 2x2 max-pool; then dense.

  GroupNorm keeps no statistics of batches, which suits clients with few and
  skewed examples: Hsieh et al., "The non-IID data quagmire of decentralized
  machine learning", 2020, https://arxiv.org/abs/1910.00189.

  Attributes:
    num_classes: Y; 0 returns the features before the last layer.
    widths: channels of each block.
    groups: of GroupNorm.
    pool: 'flatten' hands all places to the last layer, 'mean' their mean.
  """

  num_classes: int
  widths: Sequence[int] = (32, 64, 64)
  groups: int = 8
  pool: str = 'flatten'

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps images [B, H, W] or [B, H, W, D] to logits [B, Y]."""
    del train, mask
    x = as_float_image(x)
    for layer, width in enumerate(self.widths):
      x = Conv(width, (3, 3), 'SAME', use_bias=False)(x)
      x = nn.relu(Norm('group', self.groups)(x))
      x = max_pool(tap(self, layer, x))
    if self.pool == 'mean':
      x = x.mean((1, 2))
    return classify(x.reshape(x.shape[0], -1), self.num_classes)


class LeNet(nn.Module):
  """Blocks of 5x5 convolution, relu and 2x2 max-pool; then a dense layer.

  By default the network of DBA's MNIST experiments, 431,080 parameters for
  images of 28x28 and 10 classes: Xie, Huang, Chen and Li, "DBA: distributed
  backdoor attacks against federated learning", 2020,
  https://openreview.net/forum?id=rkgyS0VFvr; after LeCun, Bottou, Bengio and
  Haffner, "Gradient-based learning applied to document recognition", 1998,
  https://doi.org/10.1109/5.726791.

  Attributes:
    num_classes: Y; 0 returns the dense layer's output.
    widths: channels of each block.
    dense: width of the dense layer.
  """

  num_classes: int
  widths: Sequence[int] = (20, 50)
  dense: int = 500

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps images [B, H, W] or [B, H, W, D] to logits [B, Y]."""
    del train, mask
    x = as_float_image(x)
    for layer, width in enumerate(self.widths):
      x = max_pool(tap(self, layer, nn.relu(Conv(width, (5, 5))(x))))
    x = nn.relu(nn.Dense(self.dense)(x.reshape(x.shape[0], -1)))
    return classify(x, self.num_classes)
