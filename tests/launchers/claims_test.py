"""Tests of launchers.claims against intervals computed by hand.

The quantiles t(0.975, 1), t(0.975, 2) and t(0.975, 4) are 12.7062, 4.302653
and 2.776445 in printed tables.
"""

import dataclasses

from absl.testing import absltest, parameterized

from launchers import claims, grid, results, spec

METRIC = 'test/accuracy'
CLAIM = spec.Claim('A beats B', 'A', 'B', ('d',), 1.0)
EQUAL = dataclasses.replace(CLAIM, text='A equals B', kind='equal')


def result(row, seed, value, *, diverged=False, dataset='d'):
  final = results.Final(
    metrics={} if value is None else {METRIC: value},
    diverged=diverged,
    round=2,
    clients=3,
    examples=4,
    examples_processed=5,
    wall_seconds=6.0,
    device='cpu',
    versions={},
    commit='',
  )
  cell = grid.Cell(dataset, row, seed, (), f'{row}/{seed}', ())
  return results.Result(cell, final, 'code')


def table(*, direction='higher', scale=1.0, rows=(), figures=None):
  return spec.TableSpec(
    title='',
    paper='',
    metric=METRIC,
    direction=direction,
    scale=scale,
    presets={},
    rows=rows,
    datasets=(),
    tuning=None,
    claims=(),
    figures=figures or {},
  )


def judge(pairs, *, direction='higher', scale=1.0, claim=CLAIM):
  ended = []
  for seed, (left, right) in enumerate(pairs, 1):
    ended += [result('A', seed, left), result('B', seed, right)]
  made = table(direction=direction, scale=scale)
  return claims.judge(claim, 'd', ended, spec=made)


class ClaimsTest(parameterized.TestCase):
  @parameterized.parameters(
    # mean 2, s = 1: 4.302653 / sqrt(3) = 2.484138.
    ((1.0, 2.0, 3.0), 2.0, 2.484138, 'undecided'),
    # s = 0.1: half a width of 0.2484138.
    ((1.9, 2.0, 2.1), 2.0, 0.2484138, 'holds'),
    ((-1.9, -2.0, -2.1), -2.0, 0.2484138, 'fails'),
    # Contains 0 and lies inside +-1: equal, so "better" fails.
    ((-0.1, 0.0, 0.1), 0.0, 0.2484138, 'fails'),
    # 12.7062 * sqrt(2) / sqrt(2).
    ((1.0, 3.0), 2.0, 12.7062, 'undecided'),
    # s = 1.581139; 2.776445 * 1.581139 / sqrt(5) = 1.963243.
    ((1.0, 2.0, 3.0, 4.0, 5.0), 3.0, 1.963243, 'holds'),
    ((0.0, 0.0, 0.0), 0.0, 0.0, 'fails'),
  )
  def test_verdict_of_differences(self, gains, mean, half, outcome):
    verdict = judge([(gain, 0.0) for gain in gains])
    self.assertAlmostEqual(verdict.interval.mean, mean, places=6)
    self.assertAlmostEqual(verdict.interval.low, mean - half, places=4)
    self.assertAlmostEqual(verdict.interval.high, mean + half, places=4)
    self.assertEqual(verdict.outcome, outcome)
    self.assertEqual(verdict.reason, '')

  @parameterized.parameters(
    (0.01, 0.5, 'holds'),
    (-0.5, -0.01, 'fails'),
    (-1.0, 1.0, 'fails'),
    (-1.01, 0.5, 'undecided'),
    (-0.5, 1.01, 'undecided'),
    (0.0, 0.5, 'fails'),
    (0.0, 1.5, 'undecided'),
  )
  def test_rule(self, low, high, expected):
    interval = claims.Interval((low + high) / 2, low, high)
    self.assertEqual(claims.outcome(interval, margin=1.0), expected)

  @parameterized.parameters(
    # Half a width of 0.2484138 around 0, 2, -2, 0.75 and 1; of 2.484138.
    ((-0.1, 0.0, 0.1), 1.0, 'holds'),
    ((1.9, 2.0, 2.1), 1.0, 'fails'),
    ((-1.9, -2.0, -2.1), 1.0, 'fails'),
    ((0.65, 0.75, 0.85), 1.0, 'holds'),
    ((0.9, 1.0, 1.1), 1.0, 'undecided'),
    ((1.0, 2.0, 3.0), 1.0, 'undecided'),
    ((1.9, 2.0, 2.1), 2.25, 'holds'),
    ((1.9, 2.0, 2.1), 2.24, 'undecided'),
    ((1.9, 2.0, 2.1), 1.75, 'fails'),
    ((1.9, 2.0, 2.1), 1.76, 'undecided'),
    ((0.0, 0.0, 0.0), 1.0, 'holds'),
  )
  def test_claims_of_equality(self, gains, margin, expected):
    claim = dataclasses.replace(EQUAL, margin=margin)
    verdict = judge([(gain, 0.0) for gain in gains], claim=claim)
    self.assertEqual(verdict.outcome, expected)
    # Which row is called better does not matter.
    verdict = judge([(0.0, gain) for gain in gains], claim=claim)
    self.assertEqual(verdict.outcome, expected)

  @parameterized.parameters(
    (-1.0, 1.0, 'holds'),
    (0.5, 1.0, 'holds'),
    (-1.01, 1.0, 'undecided'),
    (-1.0, 1.01, 'undecided'),
    (-3.0, 3.0, 'undecided'),
    (1.0, 2.0, 'undecided'),
    (1.01, 2.0, 'fails'),
    (-2.0, -1.0, 'undecided'),
    (-2.0, -1.01, 'fails'),
  )
  def test_rule_of_equality(self, low, high, expected):
    interval = claims.Interval((low + high) / 2, low, high)
    self.assertEqual(
      claims.outcome(interval, margin=1.0, kind='equal'), expected
    )

  def test_equality_needs_seeds_too(self):
    verdict = judge([(1.0, 1.0)], claim=EQUAL)
    self.assertEqual(verdict.outcome, 'undecided')
    self.assertIn('at least 2', verdict.reason)
    missing = judge([(1.0, 1.0), (1.0, 1.0), (1.0, None)], claim=EQUAL)
    self.assertEqual(missing.outcome, 'undecided')
    self.assertEqual(missing.reason, 'B, seed 3: failed')

  def test_differences_are_paired_by_seed(self):
    # Seeds spread over 30 points, yet the difference is 2 in each of them.
    verdict = judge([(0.62, 0.60), (0.77, 0.75), (0.92, 0.90)], scale=100.0)
    self.assertEqual(verdict.outcome, 'holds')
    self.assertEqual([seed for seed, _ in verdict.differences], [1, 2, 3])
    for _, gain in verdict.differences:
      self.assertAlmostEqual(gain, 2.0)

  def test_lower_is_better_turns_the_sign(self):
    pairs = [(1.0, 3.0), (1.1, 3.0), (0.9, 3.0)]
    self.assertEqual(judge(pairs, direction='lower').outcome, 'holds')
    self.assertEqual(judge(pairs, direction='higher').outcome, 'fails')

  def test_figures_of_one_row_of_other_names_and_a_level(self):
    """A's own 'more' against its metric; against 4; and lower is better."""
    row = spec.Row('A', (), (), {}, ('d',), figures={'M': 'a/more'})
    made = table(rows=(row,), figures={'M': 'more', 'own': METRIC})
    ended = []
    for seed, value in enumerate((1.0, 1.1, 0.9), 1):
      one = result('A', seed, value)
      metrics = {METRIC: value, 'a/more': value + 5, 'more': 0.0}
      final = dataclasses.replace(one.final, metrics=metrics)
      ended.append(dataclasses.replace(one, final=final))
    claim = spec.Claim('', 'A', 'A', ('d',), 1.0, figure='M', against='own')
    verdict = claims.judge(claim, 'd', ended, spec=made)
    self.assertEqual(verdict.outcome, 'holds')
    for _, gain in verdict.differences:
      self.assertAlmostEqual(gain, 5)
    claim = spec.Claim('', 'A', '', ('d',), 1.0, figure='M', level=4.0)
    verdict = claims.judge(claim, 'd', ended, spec=made)
    self.assertAlmostEqual(verdict.interval.mean, 2)
    self.assertEqual(verdict.outcome, 'holds')
    claim = dataclasses.replace(claim, direction='lower')
    verdict = claims.judge(claim, 'd', ended, spec=made)
    self.assertAlmostEqual(verdict.interval.mean, -2)
    self.assertEqual(verdict.outcome, 'fails')

  def test_one_seed_decides_nothing(self):
    verdict = judge([(9.0, 1.0)])
    self.assertEqual(verdict.outcome, 'undecided')
    self.assertIsNone(verdict.interval)
    self.assertIn('at least 2', verdict.reason)

  def test_a_diverged_seed_leaves_the_claim_undecided_and_is_named(self):
    ended = [result('A', seed, 5.0 + seed / 10) for seed in (1, 2, 3)]
    ended += [result('B', 1, 1.0), result('B', 2, 1.0)]
    ended += [result('B', 3, 1.0, diverged=True)]
    verdict = claims.judge(CLAIM, 'd', ended, spec=table())
    self.assertEqual(verdict.outcome, 'undecided')
    self.assertEqual(verdict.reason, 'B, seed 3: diverged')
    self.assertLen(verdict.differences, 2)

  def test_other_data_sets_have_no_say(self):
    ended = [result('A', s, 5.0 + s / 10) for s in (1, 2, 3)]
    ended += [result('B', s, 1.0) for s in (1, 2, 3)]
    other = [result(r, 1, 0.0, dataset='e') for r in 'AB']
    verdict = claims.judge(CLAIM, 'd', ended + other, spec=table())
    self.assertEqual(verdict.outcome, 'holds')


if __name__ == '__main__':
  absltest.main()
