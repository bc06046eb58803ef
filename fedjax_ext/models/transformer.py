"""Small transformers: images to classes, tokens to next tokens.

Vaswani et al., "Attention is all you need", 2017,
https://arxiv.org/abs/1706.03762; norms stand before the layers: Xiong et al.,
"On layer normalization in the transformer architecture", 2020,
https://arxiv.org/abs/2002.04745.

Axis letters: B examples, T tokens, H height, W width, D features, Y classes,
V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_ext.core import validate
from fedjax_ext.models.layers import Conv, as_float_image

POOLS = ('mean', 'cls')


class TransformerBlock(nn.Module):
  """x + attention(norm(x)), then x + MLP(norm(x)).

  Attributes:
    heads: of attention; they share D.
    mlp_width: hidden width of the MLP.
    dropout: rate, on attention weights and on what is added to x.
  """

  heads: int
  mlp_width: int
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    train: bool = False,
    attends: jax.Array | None = None,
  ) -> jax.Array:
    """Maps [B, T, D] to [B, T, D].

    Args:
      x: [B, T, D].
      train: whether to drop.
      attends: bool [1, 1, T, T], which token looks at which; None for all.
    """
    attention = nn.MultiHeadDotProductAttention(
      self.heads, dropout_rate=self.dropout, deterministic=not train
    )
    drop = nn.Dropout(self.dropout, deterministic=not train)
    x = x + drop(attention(nn.LayerNorm()(x), mask=attends))
    y = nn.gelu(nn.Dense(self.mlp_width)(nn.LayerNorm()(x)))
    return x + drop(nn.Dense(x.shape[-1])(y))


class Transformer(nn.Module):
  """Learned positions, blocks and a last norm.

  Attributes:
    depth: number of blocks.
    heads: of attention; they share D.
    mlp_ratio: hidden width of the MLPs over D.
    dropout: rate.
    causal: whether tokens see only themselves and earlier ones.
  """

  depth: int
  heads: int
  mlp_ratio: int = 4
  dropout: float = 0.0
  causal: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps [B, T, D] to [B, T, D]."""
    tokens, width = x.shape[1:]
    position = self.param(
      'position', nn.initializers.normal(0.02), (tokens, width), jnp.float32
    )
    x = nn.Dropout(self.dropout, deterministic=not train)(x + position)
    attends = None
    if self.causal:
      attends = nn.make_causal_mask(jnp.zeros((1, tokens)), dtype=bool)
    for _ in range(self.depth):
      block = TransformerBlock(self.heads, self.mlp_ratio * width, self.dropout)
      x = block(x, train, attends)
    return nn.LayerNorm()(x)


class VisionTransformer(nn.Module):
  """An image as a sequence of patches.

  Dosovitskiy et al., "An image is worth 16x16 words", 2021,
  https://arxiv.org/abs/2010.11929; pooling by mean: Beyer et al., "Better plain
  ViT baselines for ImageNet-1k", 2022, https://arxiv.org/abs/2205.01580.

  Attributes:
    num_classes: Y.
    patch: height and width of a patch; the image's divide by it.
    width: D.
    depth: number of blocks.
    heads: of attention; they share D.
    mlp_ratio: hidden width of the MLPs over D.
    pool: 'mean' of the tokens, or 'cls', a token of its own.
    dropout: rate.
  """

  num_classes: int
  patch: int = 4
  width: int = 64
  depth: int = 4
  heads: int = 4
  mlp_ratio: int = 4
  pool: str = 'mean'
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps images [B, H, W] or [B, H, W, D] to logits [B, Y]."""
    del mask
    validate.one_of('pool', self.pool, POOLS)
    square = (self.patch, self.patch)
    x = Conv(self.width, square, strides=square)(as_float_image(x))
    x = x.reshape(x.shape[0], -1, self.width)
    if self.pool == 'cls':
      cls = self.param(
        'cls', nn.initializers.zeros_init(), (self.width,), jnp.float32
      )
      cls = jnp.broadcast_to(cls, (x.shape[0], 1, self.width))
      x = jnp.concatenate([cls, x], axis=1)
    body = Transformer(self.depth, self.heads, self.mlp_ratio, self.dropout)
    x = body(x, train)
    x = x.mean(1) if self.pool == 'mean' else x[:, 0]
    return nn.Dense(self.num_classes, name='classifier')(x)


class TextTransformer(nn.Module):
  """Predicts each next token from itself and those before it.

  A decoder as in Radford et al., "Language models are unsupervised multitask
  learners", 2019,
  https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf,
  whose output layer does not share the embedding.

  Attributes:
    vocabulary: V.
    width: D.
    depth: number of blocks.
    heads: of attention; they share D.
    mlp_ratio: hidden width of the MLPs over D.
    dropout: rate.
  """

  vocabulary: int
  width: int = 64
  depth: int = 2
  heads: int = 4
  mlp_ratio: int = 4
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps tokens int [B, T] to logits [B, T, V] of the next tokens."""
    del mask
    x = nn.Embed(self.vocabulary, self.width, name='embedding')(x)
    body = Transformer(
      self.depth, self.heads, self.mlp_ratio, self.dropout, causal=True
    )
    return nn.Dense(self.vocabulary, name='output')(body(x, train))
