"""Every model by name: sizes, jit, lanes, masked rows, bad input."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.models import MODELS, make_model, stats_of
from tests.models.checks import (
  draw,
  lane,
  num_params,
  quick_jit,
  stack,
  train_step,
  whole_error,
)
from tests.problems import is_finite, relative_error, x64

IMAGE, TEXT = (8, 8, 1), (6,)
CLASSES = 3

# Small models of 8x8 images or six tokens and three classes.
SMALL = {
  'softmax_regression': ('softmax_regression', {}),
  'mlp': ('mlp', {'hidden': (6, 5)}),
  'emnist_cnn': ('emnist_cnn', {}),
  'group_norm_cnn': ('group_norm_cnn', {'widths': (4, 6), 'groups': 2}),
  'lenet': ('lenet', {'widths': (4,), 'dense': 6}),
  'resnet8': ('resnet8', {'width': 4, 'groups': 2}),
  'resnet8_batch': ('resnet8', {'width': 4, 'norm': 'batch'}),
  'char_lstm': ('char_lstm', {'hidden': 5, 'num_layers': 2}),
  'word_lstm': (
    'word_lstm',
    {'hidden': 5, 'embedding': 4, 'projection': 3},
  ),
  'vision_transformer': (
    'vision_transformer',
    {'width': 8, 'depth': 1, 'heads': 2, 'pool': 'cls'},
  ),
  'text_transformer': (
    'text_transformer',
    {'width': 8, 'depth': 1, 'heads': 2},
  ),
}


# Name, settings, input shape, classes, parameters.
SIZES = (
  ('softmax_regression', {}, (28, 28), 10, 7_850),
  ('mlp', {'hidden': (200, 200)}, (28, 28, 1), 10, 199_210),
  ('emnist_cnn', {'dropout': True}, (28, 28), 62, 1_206_590),
  # Convolutions 9*1*32 + 9*32*64 + 9*64*64 = 55,584; norms 2 (32 + 64 + 64);
  # 3 * 3 * 64 pixels to ten classes.
  ('group_norm_cnn', {}, (28, 28, 1), 10, 55_584 + 320 + 5_770),
  # 9*3*32 instead of 9*1*32; 4 * 4 * 64 pixels.
  ('group_norm_cnn', {}, (32, 32, 3), 10, 56_160 + 320 + 10_250),
  # Stem 432 + 32; stages 4,672; 14,528 and 57,728 with projections; dense 650.
  # 25*20 + 20, 25*20*50 + 50, 800*500 + 500 and 500*10 + 10.
  ('lenet', {}, (28, 28, 1), 10, 431_080),
  ('resnet8', {}, (32, 32, 3), 10, 464 + 4_672 + 14_528 + 57_728 + 650),
  ('resnet8', {'norm': 'batch'}, (32, 32, 3), 10, 78_042),
  ('resnet18', {}, (32, 32, 3), 10, 11_173_962),
  ('resnet18', {'norm': 'batch'}, (32, 32, 3), 10, 11_173_962),
  # As torchvision's.
  ('resnet18', {'stem': 'imagenet'}, (64, 64, 3), 1000, 11_689_512),
  ('resnet34', {}, (32, 32, 3), 100, 21_328_292),
  ('resnet34', {'norm': 'batch'}, (32, 32, 3), 100, 21_328_292),
  ('char_lstm', {'num_layers': 2, 'hidden': 256}, (80,), 90, 820_522),
  ('word_lstm', {}, (20,), 10_004, 4_050_748),
  # A block of width D: norms 4D, attention 4D(D+1), MLP 8D*D + 5D; here 49,984.
  # Patches 4*4*3*64 + 64; positions 64*64; last norm 128; dense 650.
  (
    'vision_transformer',
    {},
    (32, 32, 3),
    10,
    4 * 49_984 + 3_136 + 4_096 + 128 + 650,
  ),
  # One more token and its position.
  ('vision_transformer', {'pool': 'cls'}, (32, 32, 3), 10, 207_946 + 128),
  # Embedding 90*64; positions 80*64; last norm; dense 64*90 + 90.
  (
    'text_transformer',
    {},
    (80,),
    90,
    2 * 49_984 + 5_760 + 5_120 + 128 + 5_850,
  ),
)


@functools.cache
def small(case):
  """A small model."""
  name, settings = SMALL[case]
  text = 'lstm' in name or 'text' in name
  return make_model(
    name,
    input_shape=TEXT if text else IMAGE,
    num_classes=CLASSES,
    **settings,
  )


def examples(case, count, seed=0):
  """Images or tokens [B, ...] for a small model, as wide as the floats."""
  rng = np.random.default_rng(seed)
  if 'lstm' in case or 'text' in case:
    return jnp.asarray(rng.integers(0, CLASSES, (count, *TEXT)))
  return jnp.asarray(rng.standard_normal((count, *IMAGE)))


class RegistryTest(parameterized.TestCase):
  @parameterized.parameters(*SIZES)
  def test_parameter_counts(self, name, settings, shape, classes, expected):
    """As in the papers or by hand; logits have the shape they should."""
    model = make_model(name, input_shape=shape, num_classes=classes, **settings)
    self.assertEqual(num_params(model.init), expected)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    dtype = jnp.float32 if len(shape) > 1 else jnp.int32
    x = jnp.zeros((5, *shape), dtype)
    logits, stats = jax.eval_shape(
      model.train, variables, x, jax.random.key(0), jnp.ones(5, bool)
    )
    steps = shape if len(shape) == 1 else ()
    self.assertEqual(logits.shape, (5, *steps, classes))
    of = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    self.assertEqual(of(stats), of(stats_of(variables)))

  @parameterized.parameters(*SMALL)
  def test_lanes_and_masked_rows(self, case):
    """Two clients under vmap equal each alone, without its masked rows.

    The rows that do not count hold garbage and stand between the others.
    """
    model, key = small(case), jax.random.key(0)
    real = np.array([[1, 0, 1, 1, 0], [0, 1, 0, 1, 1]], bool)
    with x64():
      lanes = [draw(model.init, c, 'float64') for c in range(2)]
      x = jnp.stack([examples(case, 5, c) for c in range(2)])
      if jnp.issubdtype(x.dtype, jnp.floating):
        x = x.at[~real].mul(1e3)
      step = functools.partial(train_step, model)
      got = quick_jit(jax.vmap(step, (0, 0, None, 0)))(
        stack(lanes), x, key, jnp.asarray(real)
      )
      alone = quick_jit(step)
      for c in range(2):
        logits, stats, grads = lane(got, c)
        expected = alone(lanes[c], x[c, real[c]], key, jnp.ones(3, bool))
        self.assertLess(relative_error(logits[real[c]], expected[0]), 1e-12)
        self.assertLess(relative_error(stats, expected[1]), 1e-12)
        self.assertLess(whole_error(grads, expected[2]), 1e-12)
        self.assertGreater(
          min(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)), 0
        )

  @parameterized.parameters(*(case for case in SMALL if case != 'resnet8'))
  def test_jit_equals_eager(self, case):
    """Compiling changes nothing, in evaluation and in training."""
    model = small(case)
    both = lambda variables, x: (
      model.apply(variables, x),
      model.train(variables, x, jax.random.key(0), jnp.ones(3, bool)),
    )
    with x64():
      args = draw(model.init, 0, 'float64'), examples(case, 3)
      self.assertLess(relative_error(jax.jit(both)(*args), both(*args)), 1e-9)

  def test_init(self):
    """Finite, and of its key alone."""
    init = jax.jit(small('group_norm_cnn').init)
    one, again, two = (init(jax.random.key(seed)) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    self.assertGreater(relative_error(one, two), 0.1)
    self.assertTrue(is_finite(one))

  @parameterized.parameters(*MODELS)
  def test_builders_take_simple_keywords(self, name):
    """Keywords only, each with a plain type, so that flags can name them."""
    builder = MODELS[name]
    self.assertEqual(builder.__name__, name)
    parameters = inspect.signature(builder).parameters
    self.assertEqual(list(parameters)[:2], ['num_classes', 'input_shape'])
    for key, parameter in parameters.items():
      self.assertEqual(parameter.kind, parameter.KEYWORD_ONLY)
      self.assertIn(
        parameter.annotation, (int, float, bool, str, tuple[int, ...])
      )
      if key not in ('num_classes', 'input_shape'):
        self.assertIsNot(parameter.default, parameter.empty)

  @parameterized.parameters(
    ({'name': 'resnet'}, 'emnist_cnn, .*got model=resnet'),
    ({'num_classes': 0}, 'num_classes=0'),
    ({'depth': 3}, r"model=mlp among \['hidden'\], got depth"),
    ({'hidden': (5, 0)}, 'hidden=0'),
    ({'name': 'emnist_cnn', 'input_shape': (64,)}, r'got shape \[64\]'),
    ({'name': 'emnist_cnn', 'input_shape': (5, 9, 1)}, r'6x6 .*\[5, 9, 1\]'),
    ({'name': 'emnist_cnn', 'input_shape': (9, 5)}, r'6x6 .*\[9, 5\]'),
    ({'name': 'emnist_cnn', 'input_shape': (2, 9, 9, 1)}, r'\[2, 9, 9, 1\]'),
    ({'name': 'group_norm_cnn', 'input_shape': (7, 8)}, r'8x8 .*\[7, 8\]'),
    ({'name': 'group_norm_cnn', 'widths': (0,)}, 'widths=0'),
    ({'name': 'group_norm_cnn', 'groups': 0}, 'groups=0'),
    ({'name': 'resnet8', 'input_shape': (80,)}, r'model=resnet8.*\[80\]'),
    ({'name': 'resnet8', 'norm': 'layer'}, 'group, batch, got norm=layer'),
    ({'name': 'resnet18', 'groups': 0}, 'groups=0'),
    ({'name': 'resnet18', 'stem': 'none'}, 'cifar, imagenet, got stem=none'),
    ({'name': 'resnet34', 'width': 0}, 'width=0'),
    ({'name': 'resnet34', 'input_shape': (80,)}, r'model=resnet34.*\[80\]'),
    (
      {'name': 'char_lstm'},
      r'of shape \[T\], for model=char_lstm.*\[8, 8, 1\]',
    ),
    ({'name': 'word_lstm', 'input_shape': (0,)}, r'model=word_lstm.*\[0\]'),
    (
      {'name': 'char_lstm', 'input_shape': (5,), 'num_layers': 0},
      'num_layers=0',
    ),
    (
      {'name': 'word_lstm', 'input_shape': (5,), 'projection': -1},
      'projection=-1',
    ),
    ({'name': 'vision_transformer', 'patch': 3}, r'patch=3, .*\[8, 8, 1\]'),
    ({'name': 'vision_transformer', 'pool': 'max'}, 'mean, cls, got pool=max'),
    ({'name': 'vision_transformer', 'heads': 5}, 'heads=5, got width=64'),
    ({'name': 'vision_transformer', 'dropout': 1.0}, 'dropout=1.0'),
    ({'name': 'text_transformer'}, r'model=text_transformer.*\[8, 8, 1\]'),
    (
      {'name': 'text_transformer', 'input_shape': (5,), 'depth': 0},
      'depth=0',
    ),
  )
  def test_bad_input(self, settings, message):
    """What no model can be built for is named."""
    common = {'name': 'mlp', 'input_shape': IMAGE, 'num_classes': 3}
    with self.assertRaisesRegex(InvalidInput, message):
      make_model(**{**common, **settings})


if __name__ == '__main__':
  absltest.main()
