"""Layouts: the rule, its errors, placement, and padded sizes."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import example, given
from hypothesis import strategies as st

from fedjax_ext import core
from fedjax_ext.core.layout import LANES_BY_PLATFORM, LANES_ELSEWHERE, bucket


class MakeLayoutTest(parameterized.TestCase):
  @parameterized.parameters(
    ({}, (8, 1, None)),
    (dict(num_devices=0, lanes=0, wave_clients=0), (8, 1, None)),
    (dict(num_devices=3), (3, 1, None)),
    (dict(num_devices=8, lanes=5, wave_clients=7), (8, 5, 7)),
  )
  def test_settings_and_rule(self, settings, expected):
    layout = core.make_layout(**settings)
    got = layout.num_devices, layout.lanes, layout.wave_clients
    self.assertEqual(got, expected)
    self.assertEqual(layout.mesh.devices.tolist(), jax.devices()[: expected[0]])

  def test_other_platforms_get_more_lanes(self):
    self.assertNotIn('gpu', LANES_BY_PLATFORM)
    self.assertGreater(LANES_ELSEWHERE, LANES_BY_PLATFORM['cpu'])

  def test_describe_is_plain(self):
    layout = core.make_layout(num_devices=2, lanes=3, wave_clients=4)
    self.assertEqual(
      layout.describe(),
      {'platform': 'cpu', 'num_devices': 2, 'lanes': 3, 'wave_clients': 4},
    )

  @parameterized.parameters('num_devices', 'lanes', 'wave_clients')
  def test_negative_number(self, name):
    with self.assertRaisesRegex(
      core.InvalidInput, f'^Expected {name} >= 0, got {name}=-1.$'
    ):
      core.make_layout(**{name: -1})

  def test_more_devices_than_there_are(self):
    with self.assertRaisesRegex(
      core.InvalidInput,
      r'num_devices <= 8 \(the cpu devices.*\), got num_devices=9',
    ):
      core.make_layout(num_devices=9)

  def test_layouts_compare_by_value(self):
    settings = dict(num_devices=2, lanes=3)
    same = core.make_layout(**settings)
    self.assertEqual(core.make_layout(**settings), same)
    self.assertNotEqual(core.make_layout(num_devices=2), same)


class PlacementTest(absltest.TestCase):
  def tree(self):
    return {'a': np.arange(12.0).reshape(4, 3), 'b': (jnp.arange(4),)}

  def test_replicate(self):
    layout = core.make_layout(num_devices=4)
    placed = layout.replicate(self.tree())
    for whole, leaf in zip(
      jax.tree.leaves(self.tree()), jax.tree.leaves(placed), strict=True
    ):
      self.assertLen(leaf.addressable_shards, 4)
      for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole)

  def test_shard(self):
    layout = core.make_layout(num_devices=4)
    placed = layout.shard(self.tree())
    for whole, leaf in zip(
      jax.tree.leaves(self.tree()), jax.tree.leaves(placed), strict=True
    ):
      np.testing.assert_array_equal(leaf, whole)
      for d, shard in enumerate(leaf.addressable_shards):
        self.assertEqual(shard.device, jax.devices()[d])
        np.testing.assert_array_equal(shard.data, whole[d : d + 1])

  def test_shard_needs_a_multiple_of_the_devices(self):
    with self.assertRaises(ValueError):
      core.make_layout(num_devices=4).shard(np.zeros((6, 2)))

  def test_empty_trees(self):
    layout = core.make_layout(num_devices=2)
    self.assertEqual(layout.shard(()), ())
    self.assertEqual(layout.replicate({}), {})


class BucketTest(absltest.TestCase):
  def test_first_sizes(self):
    self.assertEqual(
      [bucket(size) for size in range(18)],
      [1, 1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16, 24],
    )

  def test_numpy_sizes(self):
    self.assertEqual([bucket(np.int64(n)) for n in (0, 5, 9)], [1, 6, 12])

  @given(st.integers(1, 2**62))
  @example(2**49 + 1)  # a float's logarithm rounds down here
  def test_invariants(self, size):
    padded = bucket(size)
    self.assertIsInstance(padded, int)
    self.assertGreaterEqual(padded, size)
    self.assertLessEqual(3 * (padded - size), padded)  # waste <= a third
    self.assertEqual(bucket(padded), padded)
    odd = padded // (padded & -padded)  # without its powers of two
    self.assertIn(odd, (1, 3))

  @given(st.integers(1, 40), st.sampled_from((1, 3)))
  def test_grows_one_past_a_bucket(self, exponent, odd):
    size = odd << exponent
    self.assertEqual(bucket(size), size)
    self.assertEqual(
      bucket(size + 1), size * 4 // 3 if odd == 3 else size * 3 // 2
    )

  def test_few_shapes(self):
    self.assertLen({bucket(size) for size in range(1, 10_000)}, 27)


if __name__ == '__main__':
  absltest.main()
