"""Reducers through the real engine, against numpy over collected updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_ext import core
from fedjax_ext.core import ClientOutput, ClientProgram, Reducer, reducers
from tests.problems import SIZES, make_problem

LAYOUTS = {
  '1x1': dict(num_devices=1, lanes=1),
  '4x3': dict(num_devices=4, lanes=3),
  'waves': dict(num_devices=2, lanes=1, wave_clients=5),
}
EVERYBODY = np.arange(len(SIZES))
CLIP = 2.0


class Shell:
  plans = {'work': core.PlanSpec((core.Phase(batch_size=8),))}


def program(weight=lambda client: client.num_examples) -> ClientProgram:
  """Updates {'a': [3], 'b': {'c': [], 'number': int}}; weight of a client."""

  def init(shared, client, key):
    del shared
    return jax.random.normal(key, (3,)) * (1 + client.number)

  def step(shared, state, batch):
    del shared
    pixels = jnp.where(batch.mask, batch.data['image'][:, 0, 0, 0], 0)
    return state + pixels.sum() * jnp.arange(3.0)

  def final(shared, client, state):
    del shared
    update = {
      'a': state,
      'b': {'c': state[0] * state[1], 'number': client.number},
    }
    return ClientOutput(update, weight(client))

  return ClientProgram(init, step, final)


PROGRAM = program()


@functools.cache
def problem():
  return make_problem()


_COMPILED = {}


def compiled(one, reducer, layout):
  """Compiles once; a reducer that holds a dict cannot be hashed."""
  names = id(one.final), id(reducer.finish), layout
  if names not in _COMPILED:
    run = core.for_each_client(
      one, reducer, layout=core.make_layout(**LAYOUTS[layout])
    )
    _COMPILED[names] = run, one, reducer  # the last two keep the ids taken
  return _COMPILED[names][0]


def run_round(
  reducer, layout='4x3', *, clients=EVERYBODY, one=PROGRAM, round=1
):
  """A RoundOutput of the engine."""
  cohort = problem().cohort(
    Shell(), clients, core.make_layout(**LAYOUTS[layout]), round=round
  )
  output, _ = compiled(one, reducer, layout)(jnp.float32(0), cohort, 'work')
  return output


COLLECT = core.collect()


@functools.cache
def updates(round=1):
  """Everybody's updates in client order: (leaves [C, ...], weights [C])."""
  output = run_round(COLLECT, '1x1', round=round)
  order = np.argsort(output.clients, kind='stable')
  order = order[output.clients[order] >= 0]
  got = jax.tree.map(lambda x: np.asarray(x, np.float64)[order], output.acc)
  return got.update, got.weight


def weighted_sum(rows, weights):
  return jax.tree.map(lambda x: np.tensordot(weights, x, 1), rows)


def clip(update, weight):
  """Scales an update to norm <= CLIP; drops its int leaf."""
  del weight
  update = {'a': update['a'], 'c': update['b']['c']}
  norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(update)))
  scale = jnp.minimum(1, CLIP / norm)
  return jax.tree.map(lambda x: x * scale, update)


def clipped_rows(rows):
  a, c = rows['a'], rows['b']['c']
  norm = np.sqrt((a**2).sum(1) + c**2)
  scale = CLIP / np.maximum(norm, CLIP)
  return {'a': a * scale[:, None], 'c': c * scale}


def assert_close(got, expected, rtol=1e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol),
    got,
    expected,
  )


def by_client(output, collected):
  """{client: (update, weight)} of what was collected, without empty slots."""
  return {
    int(c): jax.tree.map(lambda x: np.asarray(x)[slot], collected)
    for slot, c in enumerate(output.clients)
    if c >= 0
  }


class EngineTest(parameterized.TestCase):
  """Each rule on several layouts."""

  @parameterized.parameters(*LAYOUTS)
  def test_collect(self, layout):
    output = run_round(COLLECT, layout)
    collected, memory = core.finish(COLLECT, output)
    self.assertIsInstance(collected, core.Collected)
    self.assertEqual(memory, ())
    got = by_client(output, collected)
    self.assertEqual(sorted(got), EVERYBODY.tolist())
    rows, weights = updates()
    np.testing.assert_array_equal(weights, SIZES)
    for client, (update, weight) in got.items():
      self.assertEqual(weight, SIZES[client])
      if weight:
        self.assertEqual(update['b']['number'], client)
      assert_close(update, jax.tree.map(lambda x: x[client], rows))
    empty = output.clients < 0
    self.assertGreater(empty.sum(), 0)
    for leaf in jax.tree.leaves(collected):
      self.assertFalse(np.asarray(leaf)[empty].any())
    self.assertEqual(collected.update['b']['number'].dtype, jnp.int32)

  def test_collect_against_run_one(self):
    output = run_round(COLLECT)
    update, _ = by_client(output, output.acc)[2]
    layout = core.make_layout(num_devices=1)
    cohort = problem().cohort(Shell(), EVERYBODY, layout)
    rows = problem().federated.client_rows(2)  # 9 examples
    rows = np.concatenate([rows, rows[:1].repeat(7)]).reshape(2, 8)
    alone = core.run_one(
      PROGRAM,
      jnp.float32(0),
      core.Client(jnp.int32(2), jnp.int32(9)),
      cohort.plan_key('work'),
      {k: x[rows] for k, x in problem().federated.features.items()},
      jnp.arange(16).reshape(2, 8) < 9,
    )
    assert_close(update, alone.update)

  @parameterized.parameters(*LAYOUTS)
  def test_total_and_weighted_mean(self, layout):
    rows, weights = updates()
    expected = weighted_sum(rows, weights)
    output = run_round(TOTAL, layout)
    (summed, weight), memory = core.finish(TOTAL, output)
    self.assertEqual(memory, ())
    self.assertEqual(weight, sum(SIZES))
    assert_close(summed, expected)
    # The mean folds as the sum does, so it needs no run of its own.
    mean, memory = core.finish(core.weighted_mean(), output)
    self.assertEqual(memory, ())
    expected['b']['number'] //= sum(SIZES)  # integers stay integers
    for path in (lambda t: t['a'], lambda t: t['b']['c']):
      assert_close(path(mean), path(expected) / sum(SIZES))
    self.assertEqual(mean['b']['number'], expected['b']['number'])
    self.assertEqual(
      jax.tree.map(lambda x: x.dtype, mean),
      jax.tree.map(lambda x: x.dtype, summed),
    )

  @parameterized.parameters('4x3', 'waves')
  def test_weighted_mean_of_clipped_updates(self, layout):
    rows, weights = updates()
    rows = clipped_rows(rows)
    self.assertTrue((np.linalg.norm(updates()[0]['a'], axis=1) > CLIP).any())
    mean, _ = core.finish(CLIPPED_MEAN, run_round(CLIPPED_MEAN, layout))
    assert_close(
      mean,
      jax.tree.map(lambda x: x / weights.sum(), weighted_sum(rows, weights)),
    )

  @parameterized.parameters(*LAYOUTS)
  def test_by_key(self, layout):
    output = run_round(MIXED, layout, one=KEYED)
    self.assertEqual(output.acc.keys(), MIXED.merge.keys())
    result, memory = core.finish(MIXED, output)
    rows, weights = updates()
    expected = weighted_sum(rows, weights)
    assert_close(result['mean'], expected['a'] / weights.sum())
    assert_close(result['sum'][0], expected['b'])
    self.assertEqual(result['sum'][1], weights.sum())
    assert_close(
      result['unit'][0], clipped_rows(rows)['a'].T @ weights, rtol=1e-4
    )
    got = by_client(output, result['all'])
    self.assertEqual(sorted(got), EVERYBODY.tolist())
    for client, (update, weight) in got.items():
      assert_close(update, rows['b']['c'][client])
      self.assertEqual(weight, SIZES[client])
    self.assertEqual(memory.keys(), result.keys())

  def test_combine_equals_one_call(self):
    """Clients 0..9 and 10..18 in calls of their own."""
    whole = run_round(MIXED, one=KEYED)
    halves = [
      run_round(MIXED, one=KEYED, clients=EVERYBODY[part])
      for part in (slice(10), slice(10, None))
    ]
    both = core.combine(MIXED, *halves)
    got, _ = core.finish(MIXED, both)
    expected, _ = core.finish(MIXED, whole)
    for name in ('mean', 'sum', 'unit'):
      assert_close(got[name], expected[name])
    got = by_client(both, got['all'])
    expected = by_client(whole, expected['all'])
    self.assertEqual(got.keys(), expected.keys())
    for client in got:
      assert_close(got[client], expected[client])
    self.assertLen(both.clients, len(both.acc['all'].weight))
    self.assertLen(both.diagnostics['dropped'], len(both.clients))

  def test_combine_of_another_cohort_and_round_concatenates(self):
    a = run_round(COLLECT, clients=[3, 4, 8])
    b = run_round(COLLECT, clients=[4, 8, 9], round=2)
    both = core.combine(COLLECT, a, b)
    present = both.clients[both.clients >= 0]
    self.assertEqual(sorted(present.tolist()), [3, 4, 4, 8, 8, 9])
    first, second = updates(), updates(round=2)
    for slot, client in enumerate(both.clients):
      if client >= 0:
        rows, _ = first if slot < len(a.clients) else second
        assert_close(both.acc.update['a'][slot], rows['a'][client])


def _keyed(shared, client, state):
  output = PROGRAM.final(shared, client, state)
  a, b = output.update['a'], output.update['b']
  return output._replace(
    update={'mean': a, 'sum': b, 'all': b['c'], 'unit': output.update}
  )


KEYED = PROGRAM._replace(final=_keyed)
TOTAL = core.total()
CLIPPED_MEAN = core.premap(clip, core.weighted_mean())
MIXED = core.by_key(
  mean=core.weighted_mean(),
  sum=core.total(),
  all=core.collect(),
  unit=core.premap(lambda u, w: clip(u, w)['a'], core.total()),
)


class AbsentTest(absltest.TestCase):
  """Zero weights, dropped clients and nobody at all."""

  def test_zero_total_weight(self):
    one = program(lambda client: client.num_examples * 0)
    output = run_round(TOTAL, one=one)
    (summed, weight), _ = core.finish(TOTAL, output)
    mean, _ = core.finish(core.weighted_mean(), output)
    self.assertEqual(weight, 0)
    for leaf in jax.tree.leaves((summed, mean)):
      self.assertFalse(np.asarray(leaf).any())
    self.assertEqual(core.summarize(output)['clients_dropped'], 0)

  def test_empty_cohort_collects_nobody(self):
    output = run_round(COLLECT, clients=np.array([], int))
    self.assertTrue((output.clients == -1).all())
    collected, _ = core.finish(COLLECT, output)
    for leaf in jax.tree.leaves(collected):
      self.assertFalse(np.asarray(leaf).any())

  def absent(self):
    """A program where clients 4, 8, 12, 16 have weight 0 and huge updates."""
    one = program(
      lambda client: jnp.where(client.number % 4 == 0, 0, client.num_examples)
    )

    def final(shared, client, state):
      output = one.final(shared, client, state)
      huge = jnp.where(client.number % 4 == 0, 1e20, 0)
      update = output.update | {'a': output.update['a'] + huge}
      return output._replace(update=update)

    return one._replace(final=final)

  def test_weight_0_leaves_a_client_out(self):
    output = run_round(TOTAL, 'waves', one=self.absent())
    rows, weights = updates()
    weights = np.where(EVERYBODY % 4 == 0, 0, weights)
    (summed, weight), _ = core.finish(TOTAL, output)
    self.assertEqual(weight, weights.sum())
    assert_close(summed, weighted_sum(rows, weights))
    mean, _ = core.finish(core.weighted_mean(), output)
    assert_close(mean['a'], weights @ rows['a'] / weights.sum())

  def test_a_dropped_client_is_collected_as_zeros(self):
    one = self.absent()

    def final(shared, client, state):
      output = one.final(shared, client, state)
      nan = jnp.where(client.number % 4 == 0, jnp.nan, 0)
      update = output.update | {'a': output.update['a'] + nan}
      return output._replace(update=update, weight=jnp.float32(1))

    output = run_round(COLLECT, one=one._replace(final=final))
    for client, (update, weight) in by_client(output, output.acc).items():
      dropped = client % 4 == 0
      self.assertEqual(weight, not dropped)
      self.assertEqual(update['b']['number'], 0 if dropped else client)
      for leaf in jax.tree.leaves(update['a']):
        self.assertEqual(leaf.any(), not dropped)

  def test_a_map_that_divides_by_the_norm(self):
    """Zeros of an absent client must not become NaN in the sum."""

    def final(shared, client, state):
      output = PROGRAM.final(shared, client, state)
      bad = jnp.where(client.number == 8, jnp.nan, 1.0)
      absent = jnp.where(client.num_examples == 0, 0.0, 1.0)
      return output._replace(update=output.update['a'] * bad * absent)

    direction = lambda update, weight: update / jnp.linalg.norm(update)
    reducer = core.premap(direction, core.weighted_mean())
    one = PROGRAM._replace(final=final)
    output = run_round(reducer, one=one)
    mean, _ = core.finish(reducer, output)
    rows, weights = updates()
    weights = np.where(EVERYBODY == 8, 0, weights)
    norms = np.linalg.norm(rows['a'], axis=1, keepdims=True)
    units = rows['a'] / np.where(weights[:, None] > 0, norms, 1)
    assert_close(mean, weights @ units / weights.sum())


def last_seen() -> Reducer:
  """Averages everybody's latest update, also of clients not in the round."""

  def finish(acc, memory, clients, key):
    del key
    # A row of no client goes out of bounds, which jax leaves out.
    at = jnp.where(clients < 0, len(memory['seen']), clients)
    memory = {
      'rows': jax.tree.map(
        lambda m, u: m.at[at].set(u), memory['rows'], acc.update
      ),
      'seen': memory['seen'].at[at].set(True),
    }
    count = jnp.maximum(memory['seen'].sum(), 1)
    return jax.tree.map(lambda m: m.sum(0) / count, memory['rows']), memory

  def memory(template, num_clients):
    return {
      'rows': jax.tree.map(
        lambda t: jnp.zeros((num_clients, *t.shape), t.dtype), template
      ),
      'seen': jnp.zeros(num_clients, bool),
    }

  return core.collect()._replace(finish=finish, memory=memory)


def noisy(scale=1.0) -> Reducer:
  """A mean with noise from the key, as differential privacy wants it."""

  def finish(acc, memory, clients, key):
    mean, memory = core.weighted_mean().finish(acc, memory, clients, None)
    noise = jax.random.normal(key, mean.shape)
    return mean + scale * noise, memory

  return core.weighted_mean()._replace(finish=finish)


def _only_a(shared, client, state):
  output = PROGRAM.final(shared, client, state)
  return output._replace(update=output.update['a'])


ONLY_A = PROGRAM._replace(final=_only_a)
VECTOR = jax.ShapeDtypeStruct((3,), jnp.float32)


class MemoryAndKeyTest(parameterized.TestCase):
  @parameterized.parameters('4x3', 'waves')
  def test_a_rule_with_memory_over_rounds(self, layout):
    reducer = LAST_SEEN
    memory = reducer.memory(VECTOR, len(SIZES))
    expected = {}
    for round, clients in enumerate(([2, 4, 9], [4, 5, 6], [10, 12, 1]), 1):
      output = run_round(
        reducer, layout, clients=clients, one=ONLY_A, round=round
      )
      result, memory = core.finish(reducer, output, memory)
      rows, _ = updates(round=round)
      expected |= {c: rows['a'][c] for c in clients}
      assert_close(result, np.mean(list(expected.values()), axis=0))
      self.assertEqual(
        np.flatnonzero(memory['seen']).tolist(), sorted(expected)
      )
    for client, row in expected.items():
      assert_close(memory['rows'][client], row)

  def test_a_rule_that_draws(self):
    reducer = noisy()
    output = run_round(TOTAL)
    summed, weight = output.acc
    output = output._replace(acc=(summed['a'], weight))
    keys = jax.random.split(jax.random.key(5))
    draws = [core.finish(reducer, output, key=key)[0] for key in keys]
    again, _ = core.finish(reducer, output, key=keys[0])
    np.testing.assert_array_equal(draws[0], again)
    self.assertTrue((draws[0] != draws[1]).all())
    mean, _ = core.finish(core.weighted_mean(), output)
    assert_close(draws[1], mean + jax.random.normal(keys[1], (3,)))

  def test_by_key_keeps_memories_apart(self):
    reducer = core.by_key(a=LAST_SEEN, b=LAST_SEEN, c=core.weighted_mean())
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    template = {'a': VECTOR, 'b': scalar, 'c': scalar}
    memory = reducer.memory(template, len(SIZES))
    self.assertEqual(memory['a']['rows'].shape, (len(SIZES), 3))
    self.assertEqual(memory['b']['rows'].shape, (len(SIZES),))
    for round, clients in ((1, [2, 4]), (2, [4, 6])):
      output = run_round(
        reducer, clients=clients, one=KEYED_MEMORY, round=round
      )
      result, memory = core.finish(reducer, output, memory)
    (first, _), (second, weights) = updates(), updates(round=2)
    mean = lambda x, y: (x[2] + y[4] + y[6]) / 3
    assert_close(result['a'], mean(first['a'], second['a']))
    assert_close(result['b'], mean(first['b']['c'], second['b']['c']))
    chosen = weights * np.isin(EVERYBODY, [4, 6])
    assert_close(result['c'], chosen @ second['b']['c'] / chosen.sum())
    self.assertEqual(memory.keys(), template.keys())

  def test_by_key_gives_each_key_its_own_noise(self):
    reducer = core.by_key(a=noisy(), b=noisy())
    output = core.RoundOutput(
      {n: (jnp.zeros(3), jnp.float32(0)) for n in 'ab'}, np.array([-1]), {}, {}
    )
    result, _ = core.finish(reducer, output, key=jax.random.key(2))
    self.assertTrue((result['a'] != result['b']).all())
    other, _ = core.finish(reducer, output, key=jax.random.key(3))
    self.assertTrue((result['a'] != other['a']).all())

  def test_by_key_without_key_hands_on_none(self):
    seen = []
    spy = core.total()._replace(
      finish=lambda acc, memory, clients, key: (seen.append(key), memory)
    )
    output = core.RoundOutput({'a': (), 'b': ()}, np.array([-1]), {}, {})
    core.finish(core.by_key(a=spy, b=spy), output)
    self.assertEqual(seen, [None, None])

  def test_nested_by_key_without_memory(self):
    inner = core.by_key(x=core.total(), y=core.weighted_mean())
    reducer = core.by_key(inner=inner, all=core.collect())
    template = {'inner': {'x': VECTOR, 'y': VECTOR}, 'all': VECTOR}
    acc = reducer.init(template, 2)
    for slot in range(2):
      update = jax.tree.map(lambda t: jnp.full(t.shape, slot + 1.0), template)
      acc = reducer.add(acc, update, jnp.float32(2), slot)
    output = core.RoundOutput(acc, np.array([0, 1]), {}, {})
    result, memory = core.finish(reducer, output)
    self.assertEqual(result['inner']['x'][0].tolist(), [6, 6, 6])
    self.assertEqual(result['inner']['y'].tolist(), [1.5, 1.5, 1.5])
    self.assertEqual(result['all'].weight.tolist(), [2, 2])
    # What finish returned fits the next round.
    again, _ = core.finish(reducer, output, memory)
    assert_close(again, result)

  def test_memory_of_a_mapped_update_has_its_shape(self):
    """premap maps the template for the rule's memory as for its init."""
    reducer = core.premap(lambda update, weight: update['a'] * 2, LAST_SEEN)
    template = {'a': VECTOR, 'b': jax.ShapeDtypeStruct((7,), jnp.float32)}
    memory = reducer.memory(template, 4)
    self.assertEqual(memory['rows'].shape, (4, 3))
    acc = reducer.init(template, 1)
    update = {'a': jnp.arange(3.0), 'b': jnp.zeros(7)}
    acc = reducer.add(acc, update, jnp.float32(1), 0)
    output = core.RoundOutput(acc, np.array([2]), {}, {})
    _, memory = core.finish(reducer, output, memory)
    self.assertEqual(memory['rows'][2].tolist(), [0, 2, 4])


LAST_SEEN = last_seen()


def _keyed_memory(shared, client, state):
  output = PROGRAM.final(shared, client, state)
  c = output.update['b']['c']
  return output._replace(update={'a': output.update['a'], 'b': c, 'c': c})


KEYED_MEMORY = PROGRAM._replace(final=_keyed_memory)


class PremapTest(absltest.TestCase):
  def fold(self, reducer, updates, weights):
    acc = reducer.init(jax.eval_shape(lambda: updates[0]), len(updates))
    for slot, (update, weight) in enumerate(zip(updates, weights, strict=True)):
      acc = reducer.add(acc, update, jnp.float32(weight), jnp.int32(slot))
    clients = np.arange(len(updates))
    return reducer.finish(acc, (), clients, None)[0]

  def test_the_outer_map_comes_first(self):
    reducer = core.premap(
      lambda u, w: u + 1, core.premap(lambda u, w: u * 10, core.total())
    )
    summed, _ = self.fold(reducer, [jnp.float32(1), jnp.float32(2)], [1, 3])
    self.assertEqual(summed, 20 + 3 * 30)

  def test_the_map_gets_the_weight(self):
    reducer = core.premap(lambda u, w: u / w, core.total())
    summed, weight = self.fold(reducer, [jnp.arange(3.0)] * 2, [2, 4])
    self.assertEqual(summed.tolist(), [0, 2, 4])
    self.assertEqual(weight, 6)
    self.assertEqual(summed.dtype, jnp.float32)

  def test_the_map_may_change_structure_and_dtype(self):
    reducer = core.premap(
      lambda u, w: {'half': u.astype(jnp.bfloat16), 'sign': u > 0},
      core.collect(),
    )
    rows = [jnp.array([1.5, -2.0]), jnp.array([-0.5, 3.0])]
    collected = self.fold(reducer, rows, [1, 2])
    self.assertEqual(collected.update['half'].dtype, jnp.bfloat16)
    self.assertEqual(
      collected.update['sign'].tolist(), [[True, False], [False, True]]
    )
    np.testing.assert_array_equal(collected.update['half'], np.stack(rows))


class MergeTest(absltest.TestCase):
  MERGE = {'s': 'sum', 'c': 'concat', 'n': {'s': 'sum', 'c': 'concat'}}

  def acc(self, value, slots):
    one = {'s': (np.full(2, value), value), 'c': np.full((slots, 2), value)}
    return {**one, 'n': one}

  def test_merge_accumulators(self):
    got = reducers.merge_accumulators(
      self.MERGE, self.acc(1.0, 2), self.acc(3.0, 1)
    )
    for part in (got, got['n']):
      self.assertEqual(part['s'][0].tolist(), [4, 4])
      self.assertEqual(part['s'][1], 4)
      self.assertEqual(part['c'].tolist(), [[1, 1], [1, 1], [3, 3]])

  def test_map_merge(self):
    got = reducers.map_merge(
      self.MERGE, self.acc(2.0, 1), lambda x: 'sum', lambda x: 'concat'
    )
    one = {'s': ('sum', 'sum'), 'c': 'concat'}
    self.assertEqual(got, {**one, 'n': one})

  @settings(max_examples=20, deadline=None)
  @given(
    st.lists(
      st.tuples(st.integers(-9, 9), st.integers(0, 5)), min_size=1, max_size=6
    ),
    st.data(),
  )
  def test_how_clients_are_split_does_not_matter(self, clients, data):
    """Small integers, so that sums are exact."""
    cut = data.draw(st.integers(0, len(clients)))
    reducer = core.by_key(mean=core.weighted_mean(), all=core.collect())
    template = {n: jax.ShapeDtypeStruct((), jnp.float32) for n in reducer.merge}

    def fold(chosen):
      acc = reducer.init(template, len(chosen))
      for slot, (value, weight) in enumerate(chosen):
        update = {n: jnp.float32(value) for n in template}
        acc = reducer.add(acc, update, jnp.float32(weight), slot)
      return acc

    whole = fold(clients)
    parts = fold(clients[:cut]), fold(clients[cut:])
    merged = reducers.merge_accumulators(reducer.merge, *parts)
    jax.tree.map(np.testing.assert_array_equal, merged, whole)
    values, weights = np.array(clients, np.float64).T
    output = core.RoundOutput(whole, np.arange(len(clients)), {}, {})
    mean = core.finish(reducer, output)[0]['mean']
    self.assertAlmostEqual(
      float(mean), (values * weights).sum() / max(weights.sum(), 1), places=5
    )


if __name__ == '__main__':
  absltest.main()
