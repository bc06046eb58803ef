"""Cohorts: features on the devices, plans and keys by name, sub-cohorts."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from fedjax_ext import core
from fedjax_ext.core.cohort import cohort_inputs
from fedjax_ext.core.plans import client_batches
from tests.problems import SIZES, make_problem

LAYOUT = dict(num_devices=2, lanes=2)


class Shell:
  plans = {
    'work': core.PlanSpec((core.Phase(epochs=2, batch_size=4),)),
    'same': core.PlanSpec((core.Phase(epochs=2, batch_size=4),)),
  }


class Server:
  """A plan of the cohort's, and one of two clients' in every round."""

  plans = {
    'work': Shell.plans['work'],
    'server': core.PlanSpec((core.Phase(batch_size=4),), clients=(12, 5)),
  }


class CohortTest(absltest.TestCase):
  def cohort(self, clients=(9, 4, 2, 3), algorithm=Shell, **settings):
    layout = core.make_layout(**LAYOUT)
    return make_problem().cohort(algorithm(), clients, layout, **settings)

  def batches(self, cohort, client, plan='work'):
    for wave in cohort.plans(plan):
      if client in wave.clients:
        return [
          (rows[:count].tolist(), int(info['step']))
          for rows, count, info in client_batches(wave, client)
        ]
    raise AssertionError(f'no client {client}')

  def test_clients_are_sorted_integers(self):
    cohort = self.cohort([9, 4, 2])
    self.assertEqual(cohort.clients.tolist(), [2, 4, 9])
    self.assertEqual(cohort.clients.dtype, np.int64)
    self.assertEqual(self.cohort([]).clients.dtype, np.int64)

  def test_plans_are_made_once_and_differ_by_name(self):
    cohort = self.cohort()
    self.assertIs(cohort.plans('work'), cohort.plans('work'))
    self.assertNotEqual(
      self.batches(cohort, 4), self.batches(cohort, 4, 'same')
    )

  def test_batches_depend_on_seed_round_and_client_only(self):
    batches = self.batches(self.cohort(), 4)
    self.assertEqual(self.batches(self.cohort([0, 4, 5, 8]), 4), batches)
    self.assertNotEqual(self.batches(self.cohort(round=2), 4), batches)
    self.assertNotEqual(self.batches(self.cohort(seed=4), 4), batches)
    rows = [row for batch, _ in batches for row in batch]
    self.assertLen(rows, 2 * SIZES[4])

  def test_keys_differ_by_seed_round_and_plan(self):
    data = lambda key: tuple(jax.random.key_data(key).tolist())
    keys = [
      data(self.cohort(seed=seed, round=round).plan_key(name))
      for seed in (0, 1)
      for round in (1, 2)
      for name in ('work', 'same')
    ]
    self.assertLen(set(keys), 8)
    self.assertEqual(
      data(self.cohort().plan_key('work')),
      data(self.cohort([1]).plan_key('work')),
    )

  def test_select(self):
    cohort = self.cohort()
    cohort.plans('work')  # its plans must not be handed on
    some = cohort.select(cohort.clients != 3)
    self.assertEqual(some.clients.tolist(), [2, 4, 9])
    self.assertEqual(cohort.clients.tolist(), [2, 3, 4, 9])
    planned = np.concatenate([w.clients for w in some.plans('work')])
    self.assertEqual(sorted(planned[planned >= 0].tolist()), [2, 4, 9])
    for client in (2, 4, 9):
      self.assertEqual(self.batches(some, client), self.batches(cohort, client))
    np.testing.assert_array_equal(
      jax.random.key_data(some.plan_key('work')),
      jax.random.key_data(cohort.plan_key('work')),
    )

  def test_select_all_none_and_by_numbers(self):
    cohort = self.cohort()
    everybody = cohort.select(np.ones(4, bool))
    self.assertEqual(everybody.clients.tolist(), cohort.clients.tolist())
    nobody = cohort.select(np.zeros(4))
    self.assertEqual(nobody.clients.tolist(), [])
    self.assertTrue((nobody.plans('work')[0].clients == -1).all())
    ones = cohort.select(jnp.array([1, 0, 0, 1]))
    self.assertEqual(ones.clients.tolist(), [2, 9])

  def test_inputs_follow_their_clients_into_slots(self):
    cohort = self.cohort([9, 4, 2, 3, 17])
    inputs = {
      'number': cohort.clients * 10,
      'matrix': np.arange(10.0).reshape(5, 2),
    }
    for plan in cohort.plans('work'):
      got = cohort_inputs(cohort.clients, plan, inputs)
      real = plan.clients >= 0
      np.testing.assert_array_equal(
        got['number'][real], plan.clients[real] * 10
      )
      at = np.searchsorted(cohort.clients, plan.clients[real])
      np.testing.assert_array_equal(got['matrix'][real], inputs['matrix'][at])
      self.assertLen(got['matrix'], len(plan.clients))

  def test_clients_of_a_plan(self):
    """A plan's own clients run it, whatever the cohort is."""
    for clients in ((9, 4, 2, 3), (5, 1), ()):
      cohort = self.cohort(clients, Server)
      self.assertEqual(cohort.clients_of('work').tolist(), sorted(clients))
      self.assertEqual(cohort.clients_of('server').tolist(), [5, 12])
      for name, expected in (('work', sorted(clients)), ('server', [5, 12])):
        planned = np.concatenate([w.clients for w in cohort.plans(name)])
        self.assertEqual(sorted(planned[planned >= 0].tolist()), expected)
    # Their batches are those of any plan of that name, and of this cohort.
    batches = self.batches(cohort, 12, 'server')
    rows = [row for batch, _ in batches for row in batch]
    mine = make_problem().federated.client_rows(12).tolist()
    self.assertEqual(sorted(rows), sorted(mine))
    nobody = self.cohort(algorithm=Server).select(np.zeros(4, bool))
    self.assertEqual(nobody.clients_of('server').tolist(), [5, 12])
    self.assertEqual(self.batches(nobody, 12, 'server'), batches)

  def test_inputs_of_a_plan_s_clients(self):
    """They have a row for each of these, not of the cohort."""
    program = core.ClientProgram(
      lambda shared, client, key: client.inputs,
      lambda shared, state, batch: state,
      lambda shared, client, state: core.ClientOutput(
        {'input': state}, jnp.ones(())
      ),
    )
    reducer = core.collect()
    run = core.for_each_client(
      program, reducer, layout=core.make_layout(**LAYOUT)
    )
    cohort = self.cohort(algorithm=Server)
    output, _ = run((), cohort, 'server', inputs=np.array([50.0, 120.0]))
    collected, _ = core.finish(reducer, output)
    found = {
      int(client): float(value)
      for client, value in zip(
        output.clients, collected.update['input'], strict=True
      )
      if client >= 0
    }
    self.assertEqual(found, {5: 50.0, 12: 120.0})
    with self.assertRaisesRegex(core.InvalidInput, 'leading axis K=2'):
      run((), cohort, 'server', inputs=np.zeros(4))

  def test_unknown_plan_split_and_client(self):
    cohort = self.cohort()
    for function in (cohort.plans, cohort.clients_of):
      with self.assertRaisesRegex(core.InvalidInput, 'one of work, same'):
        function('other')
    with self.assertRaisesRegex(core.InvalidInput, 'distinct'):
      self.cohort([4, 4]).plans('work')
    with self.assertRaisesRegex(core.InvalidInput, r'0\.\.18'):
      self.cohort([4, 19]).plans('work')


if __name__ == '__main__':
  absltest.main()
