"""Client programs' helpers: keys, the finiteness check, dtypes, run_one."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext import core
from fedjax_ext.core import Client, ClientOutput, ClientProgram
from fedjax_ext.core.programs import accept, as_types, client_keys
from tests.problems import x64


def output(**changes):
  """A finite output with leaves of several dtypes."""
  values = dict(
    update={
      'w': jnp.array([3.0, 4.0]),
      'n': jnp.int32(7),
      'on': jnp.bool(True),
    },
    weight=jnp.float32(2),
    state={'h': jnp.array([1.0, 2.0]), 't': jnp.int32(9)},
    metrics={'loss': (jnp.float32(5), jnp.float32(2))},
  )
  return ClientOutput(**(values | changes))


OLD_ROW = {'h': jnp.array([-1.0, -2.0]), 't': jnp.int32(1)}


def assert_equal_trees(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


class ClientKeysTest(absltest.TestCase):
  def test_init_and_steps_keys(self):
    key = jax.random.key(4)
    expected = jax.random.split(jax.random.fold_in(key, 11))
    got = client_keys(key, jnp.int32(11))
    for a, b in zip(got, expected, strict=True):
      assert_equal_trees(jax.random.key_data(a), jax.random.key_data(b))

  def test_all_keys_differ(self):
    seen = {
      tuple(np.asarray(jax.random.key_data(key)).tolist())
      for seed in range(3)
      for number in range(5)
      for key in client_keys(jax.random.key(seed), number)
    }
    self.assertLen(seen, 3 * 5 * 2)


class AcceptTest(parameterized.TestCase):
  def test_a_finite_client_passes_unchanged(self):
    update, weight, row, metrics, norm, dropped = accept(output(), OLD_ROW)
    assert_equal_trees(update, output().update)
    assert_equal_trees(row, output().state)
    self.assertEqual(metrics, {'loss': (5, 2)})
    self.assertEqual(weight, 2)
    self.assertEqual(norm, 5)  # of floating leaves only
    self.assertFalse(dropped)
    self.assertEqual(update['n'].dtype, jnp.int32)
    self.assertEqual(update['on'].dtype, jnp.bool)

  @parameterized.product(
    where=('update', 'weight', 'state'), bad=(np.nan, np.inf, -np.inf)
  )
  def test_a_non_finite_client_counts_as_absent(self, where, bad):
    changes = {
      'update': {'update': output().update | {'w': jnp.array([1.0, bad])}},
      'weight': {'weight': jnp.float32(bad)},
      'state': {'state': output().state | {'h': jnp.array([bad, 0.0])}},
    }[where]
    update, weight, row, metrics, norm, dropped = accept(
      output(**changes), OLD_ROW
    )
    zeros = jax.tree.map(jnp.zeros_like, output().update)
    assert_equal_trees(update, zeros)
    assert_equal_trees(row, OLD_ROW)
    self.assertEqual(metrics, {'loss': (0, 0)})
    self.assertEqual((weight, norm), (0, 0))
    self.assertTrue(dropped)

  def test_a_non_finite_metric_drops_nobody(self):
    bad = output(metrics={'loss': (jnp.float32(jnp.nan), jnp.float32(2))})
    update, weight, _, metrics, _, dropped = accept(bad, OLD_ROW)
    self.assertFalse(dropped)
    self.assertEqual(weight, 2)
    assert_equal_trees(update, output().update)
    self.assertTrue(jnp.isnan(metrics['loss'][0]))

  def test_empty_update_and_plain_numbers(self):
    update, weight, row, metrics, norm, dropped = accept(
      ClientOutput((), 3, metrics={'rows': (np.int32(4), 1)}), ()
    )
    self.assertEqual((update, row), ((), ()))
    self.assertEqual((weight, norm), (3, 0))
    self.assertEqual(metrics, {'rows': (4, 1)})
    self.assertFalse(dropped)
    for x in (weight, norm, *metrics['rows']):
      self.assertEqual(x.dtype, jnp.float32)

  def test_norm_of_complex_numbers(self):
    update = {'z': jnp.array([3 + 4j])}
    self.assertEqual(accept(output(update=update), OLD_ROW)[4], 5)

  def test_under_vmap(self):
    rows = jnp.array([[1.0, 2.0], [jnp.nan, 0.0], [3.0, 4.0]])
    one = lambda w: accept(ClientOutput({'w': w}, jnp.float32(1)), ())
    update, weight, *_, dropped = jax.vmap(one)(rows)
    self.assertEqual(dropped.tolist(), [False, True, False])
    self.assertEqual(weight.tolist(), [1, 0, 1])
    np.testing.assert_array_equal(update['w'], [[1, 2], [0, 0], [3, 4]])

  def test_float64(self):
    with x64():
      accepted = accept(output(update={'w': jnp.full(2, 1e200)}), OLD_ROW)
      self.assertEqual(accepted[0]['w'].dtype, jnp.float64)
      self.assertEqual(accepted[1].dtype, jnp.float64)


class AsTypesTest(absltest.TestCase):
  def test_converts_each_leaf_and_drops_weak_types(self):
    types = {
      'f': jax.ShapeDtypeStruct((), jnp.float32),
      'i': jax.ShapeDtypeStruct((2,), jnp.int32),
      'b': jax.ShapeDtypeStruct((), jnp.bool),
      'h': jax.ShapeDtypeStruct((), jnp.bfloat16),
    }
    tree = {'f': jnp.asarray(2), 'i': np.array([1.0, 2.0]), 'b': 1, 'h': 0.5}
    got = as_types(tree, types)
    for name, kind in types.items():
      self.assertEqual(got[name].dtype, kind.dtype)
      self.assertFalse(got[name].weak_type)
    self.assertEqual(got['i'].tolist(), [1, 2])
    self.assertEqual((got['f'], got['b'], got['h']), (2, True, 0.5))

  def test_random_keys_pass(self):
    key = jax.random.key(3)
    got = as_types({'key': key, 'x': 1}, {'key': key, 'x': jnp.float32(0)})
    assert_equal_trees(
      jax.random.key_data(got['key']), jax.random.key_data(key)
    )
    self.assertEqual(got['x'].dtype, jnp.float32)

  def test_another_structure(self):
    with self.assertRaises(ValueError):
      as_types({'a': 1.0}, {'b': jnp.float32(0)})


class RunOneTest(absltest.TestCase):
  """What each step gets to know; engine_test.py compares with the engine."""

  def run_one(self, num_steps):
    def init(shared, client, key):
      return {
        'seen': shared * client.num_examples,
        'init_draw': jax.random.uniform(key),
        'draws': jnp.zeros(4),
        'ends': jnp.zeros(4, bool),
        'sum': 0.0,  # weakly typed
      }

    def step(shared, state, batch):
      info = batch.info
      return state | {
        'draws': state['draws'].at[info.step].set(jax.random.uniform(info.key)),
        'ends': state['ends'].at[info.step].set(info.epoch_end),
        'sum': state['sum'] + jnp.where(batch.mask, batch.data['x'], 0).sum(),
      }

    def final(shared, client, state):
      return ClientOutput(state, client.num_examples, client.state + 1)

    return jax.jit(core.run_one, static_argnums=0)(
      ClientProgram(init, step, final),
      jnp.float32(2),
      Client(jnp.int32(6), jnp.int32(5), jnp.float32(40)),
      jax.random.key(1),
      {'x': jnp.arange(num_steps * 2.0).reshape(num_steps, 2)},
      jnp.arange(num_steps * 2).reshape(num_steps, 2) < 5,
    )

  def test_three_steps(self):
    got = self.run_one(3)
    init_key, steps_key = client_keys(jax.random.key(1), 6)
    self.assertEqual(got.update['seen'], 10)
    self.assertEqual(got.update['sum'], 0 + 1 + 2 + 3 + 4)
    self.assertEqual(got.update['ends'].tolist(), [False, False, True, False])
    self.assertEqual(got.update['init_draw'], jax.random.uniform(init_key))
    expected = [
      float(jax.random.uniform(jax.random.fold_in(steps_key, s)))
      for s in range(3)
    ]
    self.assertEqual(got.update['draws'].tolist(), [*expected, 0])
    self.assertEqual((got.weight, got.state), (5, 41))

  def test_no_steps(self):
    got = self.run_one(0)
    self.assertEqual(got.update['sum'], 0)
    self.assertFalse(got.update['ends'].any())
    self.assertEqual(got.state, 41)


if __name__ == '__main__':
  absltest.main()
