"""The GroupNorm CNN equals one of flax's own layers."""

from absl.testing import absltest, parameterized
from flax import linen as nn

from fedjax_ext.models import GroupNormCNN, from_module, make_model
from tests.models.checks import draw, normal, quick_jit, value_and_gradient
from tests.problems import relative_error, x64


def flax_cnn(params, x, groups):
  """The same network from the parameters of ours."""
  at = lambda name: {'params': params[name]}
  for i in range(2):
    width = params[f'Conv_{i}']['kernel'].shape[-1]
    conv = nn.Conv(width, (3, 3), use_bias=False)
    x = conv.apply(at(f'Conv_{i}'), x)
    norm = nn.GroupNorm(groups, epsilon=1e-5)
    x = norm.apply({'params': params[f'Norm_{i}']['GroupNorm_0']}, x)
    x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
  dense = params['Dense_0']
  return x.reshape(len(x), -1) @ dense['kernel'] + dense['bias']


class GroupNormCnnTest(parameterized.TestCase):
  @parameterized.parameters(((8, 8, 3),), ((7, 9, 1),))
  def test_equals_flax(self, shape):
    """Logits and gradients by parameters and images; odd sizes, colours."""
    model = from_module(GroupNormCNN(5, (4, 6), 2), shape)
    with x64():
      params, x = draw(model.init, 0, 'float64'), normal((3, *shape), 'float64')
      got, expected = quick_jit(
        lambda *args: [
          value_and_gradient(model.apply, *args),
          value_and_gradient(lambda p, x: flax_cnn(p, x, 2), *args),
        ]
      )(params, x)
      self.assertLess(relative_error(got, expected), 1e-9)

  def test_an_example_depends_on_no_other(self):
    """Each row of a batch has the logits that it has alone."""
    model = make_model(
      'group_norm_cnn', input_shape=(8, 8), num_classes=3, widths=(4, 4)
    )
    params, x = draw(model.init), normal((4, 8, 8))
    apply = quick_jit(model.apply)
    together = apply(params, x)
    for i in range(4):
      alone = apply(params, x[i : i + 1])
      self.assertLess(relative_error(together[i], alone[0]), 1e-5)


if __name__ == '__main__':
  absltest.main()
