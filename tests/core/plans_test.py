"""Plans: every batch of every client, packed onto lanes."""

import dataclasses

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_ext import data
from fedjax_ext.core import (
  InvalidInput,
  Phase,
  PlanSpec,
  make_layout,
  plan_round,
)
from fedjax_ext.core.plans import client_batches, lane_utilisation

SIZES = np.array([5, 0, 1, 12, 20, 7, 33])


def federated(sizes=SIZES):
  owner = np.repeat(np.arange(len(sizes)), sizes)
  order = np.random.default_rng(0).permutation(len(owner))
  return data.from_assignment(
    {'x': np.arange(len(owner))[order]},
    owner[order],
    client_ids=np.arange(len(sizes)),
  )


def batches(plans, client):
  for plan in plans:
    if client in plan.clients:
      return [
        (rows[:n].tolist(), info)
        for rows, n, info in client_batches(plan, client)
      ]
  raise AssertionError(client)


def plan(view, phases, clients, layout, round=1, seed=0):
  return plan_round(
    PlanSpec(phases),
    {'train': view},
    np.asarray(clients),
    seed=seed,
    round=round,
    layout=layout,
  )


class PlanTest(parameterized.TestCase):
  def check_events(self, plans):
    """Replays the events of every lane: one client at a time, start to end."""
    for p in plans:
      for d in range(p.slot.shape[0]):
        running = {}
        seen = set(p.empty[d, : p.num_empty[d]].tolist())
        for s in range(p.num_steps[d]):
          for lane in p.start[d, s, : p.num_start[d, s]]:
            self.assertNotIn(lane, running)
            running[lane] = p.slot[d, s, lane]
            self.assertEqual(p.step[d, s, lane], 0)
          for lane in range(p.slot.shape[2]):
            self.assertEqual(p.count[d, s, lane] > 0, lane in running)
            if lane in running:
              self.assertEqual(p.slot[d, s, lane], running[lane])
          for lane in p.end[d, s, : p.num_end[d, s]]:
            seen.add(int(running.pop(lane)))
        self.assertEmpty(running)
        self.assertEqual(seen, set(np.flatnonzero(p.client[d] >= 0).tolist()))
        self.assertEqual(p.num_start[d, p.num_steps[d] :].sum(), 0)

  @parameterized.parameters((10, 4), (50, 20), (500, 20))
  def test_a_ragged_run_needs_few_programs(self, cohort, batch_size):
    """200 rounds of log-normal clients have at most 4 shapes of plans."""
    rng = np.random.default_rng(0)
    sizes = np.rint(rng.lognormal(4, 0.6, 2_000)).astype(int).clip(3, 180)
    view = data.from_segments(
      {}, np.cumsum(sizes) - sizes, sizes, client_ids=np.arange(len(sizes))
    )
    layout = make_layout(num_devices=2, lanes=1)
    shapes = {
      tuple(
        leaf.shape
        for leaf in plan(
          view,
          (Phase(batch_size=batch_size),),
          rng.choice(len(sizes), cohort, replace=False),
          layout,
          round=round,
        )[0]
      )
      for round in range(200)
    }
    self.assertLessEqual(len(shapes), 4)

  def test_rows_in_stretches_are_planned_as_rows_one_by_one(self):
    """A client that owns successive rows gets the same batches either way."""
    starts = np.array([40, 0, 7, 12])
    sizes = np.array([9, 7, 0, 20])
    stretches = data.from_segments({}, starts, sizes, client_ids=np.arange(4))
    single = dataclasses.replace(stretches, rows=np.asarray(stretches.rows))
    layout = make_layout(num_devices=2, lanes=2)
    phases = (Phase(batch_size=4, epochs=2),)
    for a, b in zip(
      plan(stretches, phases, range(4), layout)[0],
      plan(single, phases, range(4), layout)[0],
      strict=True,
    ):
      np.testing.assert_array_equal(a, b)

  @parameterized.product(
    devices=[1, 3],
    lanes=[1, 4],
    wave=[None, 3],
    remainder=['mask', 'drop', 'fill'],
  )
  def test_every_epoch_is_a_permutation_of_the_client(
    self, devices, lanes, wave, remainder
  ):
    view = federated()
    layout = make_layout(num_devices=devices, lanes=lanes, wave_clients=wave)
    phase = Phase(epochs=3, batch_size=4, remainder=remainder)
    plans = plan(view, (phase,), range(7), layout)
    self.check_events(plans)
    self.assertLen(plans, 3 if wave else 1)
    for client, size in enumerate(SIZES):
      mine = batches(plans, client)
      rows = [r for batch, _ in mine for r in batch]
      own = sorted(view.client_rows(client).tolist())
      if remainder == 'mask':
        self.assertLen(mine, 3 * -(-size // 4))
        for e in range(3):
          self.assertEqual(sorted(rows[e * size : (e + 1) * size]), own)
        ends = [bool(i['epoch_end']) for _, i in mine]
        self.assertEqual(sum(ends), 3 if size else 0)
      elif remainder == 'drop':
        self.assertLen(mine, 3 * (size // 4))
        self.assertTrue(all(len(batch) == 4 for batch, _ in mine))
        self.assertLessEqual(set(rows), set(own))
      else:  # FedJAX: one stream of epochs cut into full batches
        self.assertLen(mine, -(-3 * size // 4))
        self.assertTrue(all(len(batch) == 4 for batch, _ in mine))
        for e in range(len(rows) // size if size else 0):
          self.assertEqual(sorted(rows[e * size : (e + 1) * size]), own)
      self.assertEqual(
        [int(i['step']) for _, i in mine], list(range(len(mine)))
      )

  def test_unshuffled_fill_is_fedjax_order(self):
    view = federated(np.array([5, 1, 3]))
    phase = Phase(epochs=2, batch_size=4, remainder='fill', shuffle=False)
    plans = plan(view, (phase,), range(3), make_layout())
    place = {r: i for i, r in enumerate(view.rows[:5].tolist())}
    got = [[place[r] for r in b] for b, _ in batches(plans, 0)]
    self.assertEqual(got, [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]])
    self.assertLen(batches(plans, 1), 1)
    self.assertLen(set(batches(plans, 1)[0][0]), 1)

  def test_steps_repeat_passes(self):
    plans = plan(
      federated(), (Phase(steps=7, batch_size=4),), range(7), make_layout()
    )
    for client, size in enumerate(SIZES):
      self.assertLen(batches(plans, client), 7 if size else 0)

  def test_phases_follow_each_other(self):
    phases = (
      Phase(epochs=2, batch_size=4),
      Phase(
        epochs=lambda n: np.where(n > 10, 1, 0), batch_size=4, shuffle=False
      ),
    )
    plans = plan(federated(), phases, range(7), make_layout(lanes=2))
    for client, size in enumerate(SIZES):
      infos = [i for _, i in batches(plans, client)]
      per_epoch = -(-size // 4)
      expected = [0] * 2 * per_epoch + [1] * (per_epoch if size > 10 else 0)
      self.assertEqual([int(i['phase']) for i in infos], expected)
      self.assertEqual(
        [int(i['step']) for i in infos], list(range(len(expected)))
      )
      self.assertEqual(
        [int(i['epoch']) for i in infos][: 2 * per_epoch],
        [0] * per_epoch + [1] * per_epoch,
      )

  def test_cap_takes_the_first_examples(self):
    view = federated()
    plans = plan(
      view, (Phase(batch_size=4, max_examples=6),), range(7), make_layout()
    )
    for client, size in enumerate(SIZES):
      rows = sorted(r for b, _ in batches(plans, client) for r in b)
      self.assertEqual(rows, sorted(view.client_rows(client)[:6].tolist()))
      examples = plans[0].num_examples[plans[0].client == client]
      self.assertEqual(examples, min(size, 6))

  def test_batches_depend_on_seed_round_and_client_only(self):
    view = federated()
    phases = (Phase(epochs=2, batch_size=4),)
    whole = plan(
      view, phases, [6, 4, 3, 0], make_layout(lanes=3, num_devices=2)
    )
    alone = plan(view, phases, [4], make_layout())
    get = lambda plans: [b for b, _ in batches(plans, 4)]
    self.assertEqual(get(whole), get(alone))
    self.assertNotEqual(
      get(plan(view, phases, [4], make_layout(), round=2)), get(alone)
    )
    self.assertNotEqual(
      get(plan(view, phases, [4], make_layout(), seed=1)), get(alone)
    )
    epochs = np.array([r for b in get(alone) for r in b]).reshape(2, -1)
    self.assertFalse((epochs[0] == epochs[1]).all())

  def test_padding_repeats_the_batch_itself(self):
    p = plan(federated(), (Phase(batch_size=4),), [0], make_layout())[0]
    rows, count, _ = list(client_batches(p, 0))[1]
    self.assertEqual(count, 1)
    self.assertTrue((rows == rows[0]).all())

  def test_empty_cohort_and_all_empty_clients(self):
    for clients in ([], [1]):
      p = plan(federated(), (Phase(),), clients, make_layout(num_devices=2))[0]
      self.assertEqual(p.num_steps.sum(), 0)
      self.assertEqual(p.num_empty.sum(), len(clients))

  @parameterized.parameters(1, 4)
  def test_short_rounds_share_one_shape(self, lanes):
    """Rounds of different length, and steps of padding that nobody runs."""
    shapes, longest = set(), []
    for clients in ([0], [2, 4], range(7)):
      layout = make_layout(lanes=lanes)
      (p,) = plan(federated(), (Phase(batch_size=4),), clients, layout)
      shapes.add(p.example.shape[:2])
      longest.append(int(p.num_steps[0]))
      self.assertFalse(p.num_start[0, p.num_steps[0] :].any())
    self.assertLen(set(longest), 3)
    self.assertLen(shapes, 1)

  def test_waves_share_one_shape(self):
    plans = plan(
      federated(), (Phase(batch_size=4),), range(7), make_layout(wave_clients=2)
    )
    self.assertLen({tuple(a.shape for a in p) for p in plans}, 1)
    clients = np.concatenate([p.clients for p in plans])
    self.assertEqual(sorted(clients[clients >= 0].tolist()), list(range(7)))

  def test_shuffles_are_uniform(self):
    """Each of 24 orders of 4 examples appears 1/24 of the time: chi-square."""
    view = federated(np.full(4800, 4))
    layout = make_layout(num_devices=1)
    p = plan(view, (Phase(batch_size=4),), range(4800), layout)[0]
    where = np.empty(len(view.rows), int)
    where[view.rows] = np.arange(len(view.rows)) % 4
    orders = where[p.example[0, p.count[0, :, 0] > 0, 0]]
    codes = orders @ np.array([64, 16, 4, 1])
    _, counts = np.unique(codes, return_counts=True)
    self.assertLen(counts, 24)
    chi2 = ((counts - 200) ** 2 / 200).sum()
    self.assertLess(chi2, 49.7)  # 23 degrees of freedom, p = 0.001

  def test_packing_is_balanced(self):
    sizes = np.random.default_rng(1).integers(1, 60, 500)
    plans = plan(
      federated(sizes),
      (Phase(batch_size=1),),
      range(500),
      make_layout(num_devices=4, lanes=8),
    )
    self.assertGreater(lane_utilisation(plans), 0.99)

  @settings(max_examples=40, deadline=None)
  @given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    batch=st.integers(1, 5),
    epochs=st.integers(0, 3),
    lanes=st.integers(1, 4),
    devices=st.integers(1, 3),
  )
  def test_counts_add_up(self, sizes, batch, epochs, lanes, devices):
    view = federated(np.array(sizes))
    layout = make_layout(num_devices=devices, lanes=lanes)
    plans = plan(
      view, (Phase(epochs=epochs, batch_size=batch),), range(len(sizes)), layout
    )
    self.check_events(plans)
    self.assertEqual(sum(p.count.sum() for p in plans), epochs * sum(sizes))

  @parameterized.parameters(
    (dict(batch_size=0), 'Expected batch_size >= 1, got batch_size=0.'),
    (dict(epochs=-1), 'Expected epochs >= 0, got epochs=-1.'),
    (dict(split='nope'), 'Expected split to be one of train, got split=nope.'),
    (dict(remainder='keep'), 'Expected remainder to be one of'),
    (dict(max_examples=0), 'Expected max_examples >= 1'),
  )
  def test_bad_phase(self, fields, message):
    with self.assertRaisesRegex(InvalidInput, message):
      plan(federated(), (Phase(**fields),), [0], make_layout())

  def test_bad_clients(self):
    with self.assertRaisesRegex(InvalidInput, 'distinct'):
      plan(federated(), (Phase(),), [1, 1], make_layout())
    with self.assertRaisesRegex(InvalidInput, 'in 0..6'):
      plan(federated(), (Phase(),), [7], make_layout())


if __name__ == '__main__':
  absltest.main()
