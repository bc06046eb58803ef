"""Residual networks equal ones of flax's own layers; features and taps."""

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from flax import linen as nn

from fedjax_ext.core import InvalidInput
from fedjax_ext.models import (
  ResNet,
  ResNetFeatures,
  Variables,
  cifar_resnet,
  from_module,
)
from tests.models.checks import (
  draw,
  normal,
  num_params,
  quick_jit,
  train_step,
)
from tests.problems import relative_error, x64


class FlaxResNet:
  """The network in flax's layers, called with the variables of ours."""

  def __init__(self, stage_sizes, stem, groups):
    self.stage_sizes, self.stem, self.groups = stage_sizes, stem, groups

  def __call__(self, variables, x, train=False):
    """(logits, taps, stats); every example counts."""
    has_stats = isinstance(variables, Variables)
    params, stats = variables if has_stats else (variables, None)

    def conv_norm(path, x, size, stride):
      at, old = params['features'], stats and stats['features']
      for name in path:
        at, old = at[name], old and old[name]
      width = at['Conv_0']['kernel'].shape[-1]
      conv = nn.Conv(width, (size, size), (stride, stride), use_bias=False)
      x = conv.apply({'params': at['Conv_0']}, x)
      if old is None:
        norm = nn.GroupNorm(self.groups, epsilon=1e-5)
        return norm.apply({'params': at['Norm_0']['GroupNorm_0']}, x)
      norm = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5)
      at, old = at['Norm_0']['BatchNorm_0'], old['Norm_0']['BatchNorm_0']
      x, new = norm.apply(
        {'params': at, 'batch_stats': old}, x, mutable=['batch_stats']
      )
      nested = {'Norm_0': {'BatchNorm_0': new['batch_stats']}}
      for name in reversed(path[1:]):
        nested = {name: nested}
      updated.setdefault(path[0], {}).update(nested)
      return x

    updated, taps = {}, []
    if self.stem == 'imagenet':
      x = nn.relu(conv_norm(['stem'], x, 7, 2))
      x = nn.max_pool(x, (3, 3), (2, 2), padding='SAME')
    else:
      x = nn.relu(conv_norm(['stem'], x, 3, 1))
    for stage, blocks in enumerate(self.stage_sizes):
      for block in range(blocks):
        stride = 2 if stage > 0 and block == 0 else 1
        name = f'stage{stage}_block{block}'
        y = nn.relu(conv_norm([name, 'ConvNorm_0'], x, 3, stride))
        y = conv_norm([name, 'ConvNorm_1'], y, 3, 1)
        if stride == 2:
          x = conv_norm([name, 'shortcut'], x, 1, 2)
        x = nn.relu(x + y)
      taps.append(x)
    dense = params['classifier']
    logits = x.mean((1, 2)) @ dense['kernel'] + dense['bias']
    return logits, taps, {'features': updated} if updated else ()


class ResNetTest(parameterized.TestCase):
  @parameterized.parameters(
    # stages, stem, norm, image
    ((1, 2), 'cifar', 'group', (9, 8, 3)),
    ((1, 2), 'cifar', 'batch', (9, 8, 3)),
    ((1, 1), 'imagenet', 'batch', (25, 24, 1)),
  )
  def test_equals_flax(self, stages, stem, norm, shape):
    """Evaluation; logits, new statistics and gradients of training."""
    module = ResNet(3, stages, 4, stem, norm, 2)
    model, flax = from_module(module, shape), FlaxResNet(stages, stem, 2)
    flax_model = model._replace(
      train=lambda variables, x, key, mask: flax(variables, x, True)[::2]
    )
    with x64():
      variables = draw(model.init, 0, 'float64')
      x = normal((3, *shape), 'float64')
      key, mask = jax.random.key(0), jnp.ones(3, bool)

      def all_of(model, apply):
        return apply(variables, x), train_step(model, variables, x, key, mask)

      (logits, (trained, stats, grads)), expected = quick_jit(
        lambda: [
          all_of(model, model.apply),
          all_of(flax_model, lambda *args: flax(*args)[0]),
        ]
      )()
      flax_logits, (flax_trained, flax_stats, flax_grads) = expected
      self.assertLess(relative_error(logits, flax_logits), 1e-9)
      self.assertLess(relative_error(trained, flax_trained), 1e-9)
      self.assertLess(relative_error(grads, flax_grads), 1e-9)
      self.assertEqual(
        jax.tree.structure(stats), jax.tree.structure(flax_stats)
      )
      self.assertLess(relative_error(stats, flax_stats), 1e-9)

  def test_depths(self):
    """ResNet-20 and -32 of the paper's table 6, and the shortcuts' params."""
    shortcuts = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    for depth, paper in ((20, 269_722), (32, 464_154)):
      init = from_module(cifar_resnet(10, depth), (32, 32, 3)).init
      self.assertEqual(num_params(init), paper + shortcuts)

  @parameterized.parameters(7, 2, 10, 18)
  def test_bad_depth(self, depth):
    with self.assertRaisesRegex(InvalidInput, f'6n.2 .*got depth={depth}'):
      cifar_resnet(10, depth)

  def test_bad_stem(self):
    with self.assertRaisesRegex(InvalidInput, 'cifar, imagenet, got stem=x'):
      from_module(ResNet(10, stem='x'), (8, 8, 3)).init(jax.random.key(0))

  def test_features_and_stages(self):
    """The classifier's input and the four stages' outputs, from its params."""
    module = ResNet(3, (1, 1, 1, 1), width=2, groups=2)
    model, flax = from_module(module, (8, 8, 3)), FlaxResNet((1,) * 4, '', 2)
    with x64():
      params, x = (
        draw(model.init, 0, 'float64'),
        normal((2, 8, 8, 3), 'float64'),
      )
      body = ResNetFeatures((1, 1, 1, 1), width=2, groups=2)

      def parts(params):
        pooled, own = from_module(body, (8, 8, 3)).tapped(
          params['features'], x, None
        )
        logits, whole = model.tapped(params, x, None)
        expected, stages, _ = flax(params, x)
        return pooled, logits, own, whole, expected, stages

      pooled, logits, own, whole, expected, stages = quick_jit(parts)(params)
      dense = params['classifier']
      again = pooled @ dense['kernel'] + dense['bias']
      for got in (logits, again):
        self.assertLess(relative_error(got, expected), 1e-9)
      self.assertEqual(
        [stage.shape for stage in whole],
        [(2, 8, 8, 2), (2, 4, 4, 4), (2, 2, 2, 8), (2, 1, 1, 16)],
      )
      for got in (own, whole):
        self.assertLess(relative_error(got, tuple(stages)), 1e-9)


if __name__ == '__main__':
  absltest.main()
