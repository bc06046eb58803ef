"""Gaps: by hand, against a plain bootstrap, and against theory."""

import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext import core
from fedjax_ext.core import generalization, parts
from fedjax_ext.data import from_assignment

PARTS = ('train', 'validation', 'unparticipating')


def part(clients, values, weights, metric='accuracy'):
  values, weights = np.array(values, float), np.array(weights, float)
  return core.PartReport(
    np.array(clients),
    weights.astype(int),
    {metric: values * weights},
    {metric: weights},
  )


def by_hand(metric='accuracy'):
  """Oracle G2 of the paper's statistics."""
  return {
    'train': part([0, 1, 2], [0.9, 0.8, 1.0], [10, 30, 60], metric),
    'validation': part([0, 1, 2], [0.7, 0.8, 0.9], [10, 10, 20], metric),
    'unparticipating': part([3, 4], [0.5, 0.8], [30, 10], metric),
  }


class GapsTest(parameterized.TestCase):
  def test_by_hand(self):
    report = by_hand()
    summary = core.summarize_report(report)
    for name, weighted, mean in (
      ('train', 0.93, 0.9),
      ('validation', 0.825, 0.8),
      ('unparticipating', 0.575, 0.65),
    ):
      self.assertAlmostEqual(summary[f'{name}/accuracy/pooled'], weighted)
      self.assertAlmostEqual(
        summary[f'{name}/accuracy/weighted_mean'], weighted
      )
      self.assertAlmostEqual(summary[f'{name}/accuracy/mean'], mean)
    gaps = core.generalization_gaps(report)
    self.assertAlmostEqual(gaps.out_of_sample.value, 0.105)
    self.assertAlmostEqual(gaps.participation.value, 0.25)
    alike = core.generalization_gaps(report, weighting='mean')
    self.assertAlmostEqual(alike.out_of_sample.value, 0.1)
    self.assertAlmostEqual(alike.participation.value, 0.15)

  def test_a_loss_has_the_other_sign(self):
    gaps = core.generalization_gaps(by_hand('loss'), 'loss')
    self.assertAlmostEqual(gaps.out_of_sample.value, -0.105)
    self.assertAlmostEqual(gaps.participation.value, -0.25)

  def test_fixed_data(self):
    """Oracle G11: clients {0,2},{4,6}; {1},{8}; {-3}; w = 3."""
    loss = lambda xs: [np.mean([(3 - x) ** 2 / 2 for x in c]) for c in xs]
    report = {
      'train': part([0, 1], loss([[0, 2], [4, 6]]), [2, 2], 'loss'),
      'validation': part([0, 1], loss([[1], [8]]), [1, 1], 'loss'),
      'unparticipating': part([2], loss([[-3]]), [1], 'loss'),
    }
    means = [report[p].summary()['loss/mean'] for p in PARTS]
    np.testing.assert_allclose(means, [2.5, 7.25, 18.0])
    gaps = core.generalization_gaps(report, 'loss', weighting='mean')
    self.assertAlmostEqual(gaps.out_of_sample.value, 4.75)
    self.assertAlmostEqual(gaps.participation.value, 10.75)

  @parameterized.parameters('pooled', 'mean')
  def test_interval_against_a_plain_bootstrap(self, weighting):
    rng = np.random.default_rng(0)
    sizes = lambda n: rng.integers(5, 50, n)
    values = lambda n: rng.uniform(0.4, 1, n)
    report = {
      'train': part(range(20), values(20), sizes(20)),
      'validation': part(range(20), values(20), sizes(20)),
      'unparticipating': part(range(30, 42), values(12), sizes(12)),
    }

    def mean(name, rows):
      sums = report[name].sums['accuracy'][rows]
      weights = report[name].weights['accuracy'][rows]
      if weighting == 'mean':
        return (sums / weights).mean()
      return sums.sum() / weights.sum()

    plain = []
    for _ in range(4000):
      seen, unseen = rng.integers(20, size=20), rng.integers(12, size=12)
      plain.append(
        (
          mean('train', seen) - mean('validation', seen),
          mean('validation', seen) - mean('unparticipating', unseen),
        )
      )
    low, high = np.percentile(plain, (2.5, 97.5), axis=0)
    got = core.generalization_gaps(
      report, weighting=weighting, num_samples=4000
    )
    width = high - low
    for i, gap in enumerate(got):
      self.assertLess(abs(gap.low - low[i]), 0.08 * width[i])
      self.assertLess(abs(gap.high - high[i]), 0.08 * width[i])
      self.assertBetween(gap.value, gap.low, gap.high)

  def test_participating_clients_are_drawn_with_both_of_their_parts(self):
    """Equal values in both parts: that gap is 0 in every sample."""
    values = np.linspace(0.2, 0.9, 15)
    report = {
      'train': part(range(15), values, [10] * 15),
      'validation': part(range(15), values, [4] * 15),
      'unparticipating': part(range(20, 30), values[:10], [4] * 10),
    }
    gap = core.generalization_gaps(report).out_of_sample
    np.testing.assert_allclose(gap, 0, atol=1e-12)

  def test_a_client_without_validation_examples(self):
    report = by_hand() | {'validation': part([0, 2], [0.7, 0.9], [10, 20])}
    gaps = core.generalization_gaps(report)
    self.assertAlmostEqual(gaps.participation.value, 25 / 30 - 0.575)

  def test_blocks_change_nothing_but_the_draws(self):
    report = by_hand()
    whole = core.generalization_gaps(report, num_samples=500)
    before = generalization._BLOCK
    try:
      generalization._BLOCK = 7
      blocks = core.generalization_gaps(report, num_samples=500)
    finally:
      generalization._BLOCK = before
    self.assertEqual(whole.participation.value, blocks.participation.value)
    self.assertAlmostEqual(
      whole.participation.low, blocks.participation.low, delta=0.05
    )

  def test_same_seed_same_interval(self):
    values = np.linspace(0, 1, 11)
    report = {
      'train': part(range(11), values, [9] * 11),
      'validation': part(range(11), values**2, [9] * 11),
      'unparticipating': part(range(20, 31), values**3, [9] * 11),
    }
    one, two, other = (
      core.generalization_gaps(report, seed=seed) for seed in (1, 1, 2)
    )
    self.assertEqual(one, two)
    self.assertNotEqual(one, other)

  def test_metrics(self):
    got = core.gap_metrics(by_hand())
    self.assertAlmostEqual(got['gap/accuracy/participation'], 0.25)
    self.assertAlmostEqual(got['gap/accuracy/participation_mean'], 0.15)
    self.assertLen(got, 8)
    self.assertEqual(core.gap_metrics({'train': by_hand()['train']}), {})

  def test_validation_clients_of_another_kind_make_no_gap(self):
    report = by_hand() | {'validation': part([0, 7], [0.7, 0.9], [10, 20])}
    self.assertEqual(core.gap_metrics(report), {})
    with self.assertRaisesRegex(core.InvalidInput, r'1 others, such as \[7\]'):
      core.generalization_gaps(report)

  def test_no_intervals(self):
    got = core.gap_metrics(by_hand(), num_samples=0)
    self.assertLen(got, 4)
    self.assertAlmostEqual(got['gap/accuracy/participation'], 0.25)

  def test_many_clients_have_fewer_samples(self):
    before = generalization._MOST
    try:
      generalization._MOST = 0
      report = by_hand()
      few = core.generalization_gaps(report, num_samples=1000)
      hundred = core.generalization_gaps(report, num_samples=100)
    finally:
      generalization._MOST = before
    self.assertEqual(few, hundred)

  def test_bad_input(self):
    report = by_hand()
    with self.assertRaisesRegex(core.InvalidInput, 'recall'):
      core.generalization_gaps(report, 'recall')
    with self.assertRaisesRegex(core.InvalidInput, 'weighting'):
      core.generalization_gaps(report, weighting='tokens')
    with self.assertRaisesRegex(core.InvalidInput, "Expected parts .*'train'"):
      core.generalization_gaps({'train': report['train']})
    both = report | {'unparticipating': part([2, 4], [0.5, 0.8], [30, 10])}
    with self.assertRaisesRegex(core.InvalidInput, 'got 1 in both'):
      core.generalization_gaps(both)


class StatisticsTest(absltest.TestCase):
  TEN = (0.10, 0.20, 0.35, 0.50, 0.55, 0.60, 0.72, 0.80, 0.90, 0.95)

  def summary(self, values):
    return part(range(len(values)), values, [10] * len(values)).summary()

  def test_nearest_percentiles(self):
    got = self.summary(self.TEN)
    for p, value in ((5, 0.10), (25, 0.35), (50, 0.55), (75, 0.80), (95, 0.95)):
      self.assertAlmostEqual(got[f'accuracy/p{p}'], value)
    self.assertAlmostEqual(got['accuracy/variance'], 0.074101)

  def test_odd_number_of_clients(self):
    got = self.summary(np.arange(1, 22) / 100)
    percentiles = [got[f'accuracy/p{p}'] for p in parts.PERCENTILES]
    np.testing.assert_allclose(percentiles, [0.02, 0.06, 0.11, 0.16, 0.20])


class TheoryTest(absltest.TestCase):
  """Mean estimation: the gaps are sigma^2/(mn) and tau^2/m.

  Client means are N(0, tau^2), examples N(mean, sigma^2), the model is the
  pooled mean of m clients with n examples each, the loss 1/2 (w - x)^2.
  """

  def test_monte_carlo(self):
    tau, sigma, m, n, repeats = 1.5, 2.0, 5, 4, 4000
    rng = np.random.default_rng(0)
    # Of each repeat: m clients with n train and n fresh examples, m unseen.
    means = tau * rng.standard_normal((repeats, 2 * m, 1))
    x = means + sigma * rng.standard_normal((repeats, 2 * m, 2 * n))
    w = x[:, :m, :n].mean((1, 2))
    repeat, client, place = np.indices(x.shape)
    split = np.where(client < m, place >= n, 2 * (place >= n)).reshape(-1)
    owner = (repeat * 2 * m + client).reshape(-1)
    columns = {
      'x': x.reshape(-1).astype(np.float32),
      'repeat': repeat.reshape(-1).astype(np.int32),
    }
    everything = from_assignment(
      columns, owner, client_ids=np.arange(repeats * 2 * m)
    )
    of = split[everything.rows]
    seen = (np.arange(repeats * 2 * m) % (2 * m)) < m
    seen, unseen = np.flatnonzero(seen), np.flatnonzero(~seen)
    layout = core.make_layout(num_devices=1)

    def metrics(w, batch):
      loss = (w[batch.data['repeat']] - batch.data['x']) ** 2 / 2
      return {'loss': (loss, batch.mask.astype(loss.dtype))}

    report, gaps = core.evaluate_generalization(
      core.Predictor(metrics, shared=lambda state: state),
      w.astype(np.float32),
      metrics=('loss',),
      num_samples=1,
      data={
        'train': everything.filter(of == 0),
        'validation': everything.filter(of > 0),
      },
      parts={
        'train': core.Part(seen, 'train'),
        'validation': core.Part(seen, 'validation'),
        'unparticipating': core.Part(unseen, 'validation'),
      },
      features=core.place_features(columns, layout),
      layout=layout,
      batch_size=1024,
    )
    by_repeat = {
      name: (one.sums['loss'] / one.weights['loss']).reshape(repeats, m).mean(1)
      for name, one in report.items()
    }
    train, validation, unseen_loss = (by_repeat[p] for p in PARTS)
    spread = tau**2 + sigma**2
    a, b = tau**2 / m, sigma**2 / (m * n)
    for measured, expected in (
      (train, (spread - a - b) / 2),
      (validation, (spread + b - a) / 2),
      (unseen_loss, (spread + a + b) / 2),
      (validation - train, b),
      (unseen_loss - validation, a),
    ):
      error = measured.std(ddof=1) / np.sqrt(repeats)
      self.assertLess(abs(measured.mean() - expected), 3 * error)
    np.testing.assert_allclose(
      ((spread - a - b) / 2, (spread + b - a) / 2, (spread + a + b) / 2),
      (2.8, 3.0, 3.45),
    )
    got = gaps['loss']
    self.assertAlmostEqual(
      got.out_of_sample.value, (validation - train).mean(), places=4
    )
    self.assertAlmostEqual(
      got.participation.value, (unseen_loss - validation).mean(), places=4
    )

  def test_parts_are_needed(self):
    with self.assertRaisesRegex(core.InvalidInput, 'Expected parts'):
      core.evaluate_generalization(None, None, parts={})


if __name__ == '__main__':
  absltest.main()
