"""Costs of mixed federated learning: the specification's numbers."""

import jax
from absl.testing import absltest, parameterized

from fedjax_ext.algorithms import mixed_fl_costs as costs
from fedjax_ext.core import InvalidInput
from fedjax_ext.models import dual_encoder

# |x|, |supp g_c| (the item table), and what the mean user needs.
FULL = 63_520
TABLE = 3953 * 16
SPARSE = 165.6 * 16 + 272


class CommunicationTest(parameterized.TestCase):
  @parameterized.parameters(
    # The table of section 4: down, up, server gradients.
    ('fed_only', {}, (63_520, 63_520, 0)),
    ('parallel_training', {}, (63_520, 63_520, 7)),
    ('one_way', {}, (126_768, 63_520, 1)),
    ('two_way', {}, (126_768, 63_520, 7)),
    ('two_way', dict(raw_gradients=True), (126_768, 127_040, 7)),
    ('one_way', dict(raw_gradients=True), (126_768, 63_520, 1)),
    ('client_side', {}, (63_520, 63_520, 0)),
    ('central_only', {}, (0, 0, 7)),
    ('parallel_training', dict(sparse_floats=SPARSE), (2921.6, 2921.6, 7)),
    ('fed_only', dict(sparse_floats=SPARSE), (2921.6, 2921.6, 0)),
  )
  def test_modes(self, mode, settings, expected):
    got = costs.communication(
      mode,
      model_floats=FULL,
      augmentation_floats=TABLE,
      server_steps=7,
      **settings,
    )
    down, up, gradients = expected
    self.assertAlmostEqual(got.down, down, places=6)
    self.assertAlmostEqual(got.up, up, places=6)
    self.assertEqual(got.server_gradients, gradients)

  def test_worked_example(self):
    """MovieLens-1M: 95.4 % fewer floats travel."""
    encoder = dual_encoder(num_classes=3953, input_shape=(10,))
    params = jax.eval_shape(encoder.init, jax.random.key(0))
    model = sum(x.size for x in jax.tree.leaves(params))
    table = params['items'].size
    self.assertEqual((model, table), (FULL, TABLE))
    ratings = 1_000_209 / 6_040
    self.assertAlmostEqual(ratings, 165.6, places=2)
    sparse = 165.6 * 16 + (model - table)
    self.assertAlmostEqual(sparse, 2921.6, places=6)
    dense = costs.communication('client_side', model_floats=model)
    mine = costs.communication(
      'parallel_training', model_floats=model, sparse_floats=sparse
    )
    saved = 1 - (mine.down + mine.up) / (dense.down + dense.up)
    self.assertAlmostEqual(saved, 0.954, places=4)

  def test_defaults(self):
    got = costs.communication('one_way', model_floats=10.0)
    self.assertEqual(got, (10.0, 10.0, 1))
    got = costs.communication('two_way', model_floats=10.0)
    self.assertEqual(got.server_gradients, 1)

  @parameterized.parameters('one_way', 'two_way', 'client_side')
  def test_modes_that_need_the_whole_table(self, mode):
    with self.assertRaisesRegex(
      InvalidInput, f'sparse_floats=None for mode={mode}'
    ):
      costs.communication(mode, model_floats=10.0, sparse_floats=2.0)

  def test_unknown_names(self):
    with self.assertRaisesRegex(InvalidInput, 'got mode=three_way'):
      costs.communication('three_way', model_floats=1.0)
    with self.assertRaisesRegex(InvalidInput, 'got form=grams'):
      costs.spreadout_multiply_adds(3, 2, form='grams')


class ComputeTest(absltest.TestCase):
  def test_spreadout_by_counting(self):
    """A multiply-add for each term of each entry of X X' and of X' X."""
    rows, features = 5, 3
    pairs = sum(
      1 for _ in range(rows) for _ in range(rows) for _ in range(features)
    )
    gram = sum(
      1 for _ in range(features) for _ in range(features) for _ in range(rows)
    )
    self.assertEqual(
      costs.spreadout_multiply_adds(rows, features, form='pairs'), pairs
    )
    self.assertEqual(
      costs.spreadout_multiply_adds(rows, features, form='gram'), gram
    )

  def test_movielens(self):
    pairs = costs.spreadout_multiply_adds(3953, 16, form='pairs')
    gram = costs.spreadout_multiply_adds(3953, 16, form='gram')
    self.assertEqual(pairs, 250_019_344)  # half of 5.0e8: 2 V^2 D operations
    self.assertAlmostEqual(pairs / gram, 247, delta=0.1)
    batch = costs.dual_encoder_multiply_adds(
      batch_size=16, context=10, features=16, hidden=(16,)
    )
    self.assertEqual(batch, 16 * (160 + 256 + 16))
    self.assertBetween(batch, 1e3, 1e5)
    self.assertGreater(pairs / (pairs + batch), 0.99)
    # In the cheap form it is still most of the step.
    self.assertGreater(gram / (gram + batch), 0.9)

  def test_dual_encoder_by_counting(self):
    got = costs.dual_encoder_multiply_adds(
      batch_size=2, context=3, features=4, hidden=(5, 6)
    )
    self.assertEqual(got, 2 * (3 * 4 + 4 * 5 + 5 * 6 + 6))
    got = costs.dual_encoder_multiply_adds(
      batch_size=2, context=3, features=4, hidden=()
    )
    self.assertEqual(got, 2 * (3 * 4 + 4))


if __name__ == '__main__':
  absltest.main()
