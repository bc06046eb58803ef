"""Samplers: pure in (seed, round), distinct, with the right frequencies."""

import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import (
  InvalidInput,
  fixed_sampler,
  poisson_sampler,
  sample_cohort,
  uniform_sampler,
  weighted_sampler,
)

POOL = np.array([2, 3, 5, 8, 13, 21])
WEIGHTS = np.array([1.0, 2, 3, 0, 4, 5])


def samplers():
  return {
    'uniform': uniform_sampler(POOL, cohort_size=3),
    'poisson': poisson_sampler(POOL, probability=0.5),
    'weighted': weighted_sampler(POOL, weights=WEIGHTS, cohort_size=3),
    'fixed': fixed_sampler(POOL[::-1]),
  }


class SamplingTest(parameterized.TestCase):
  @parameterized.parameters('uniform', 'poisson', 'weighted', 'fixed')
  def test_pure_sorted_and_from_the_pool(self, name):
    sampler = samplers()[name]
    rounds = [sample_cohort(sampler, 4, r) for r in range(1, 30)]
    for r, cohort in enumerate(rounds, 1):
      np.testing.assert_array_equal(cohort, sample_cohort(sampler, 4, r))
      self.assertTrue((np.diff(cohort) > 0).all())
      self.assertTrue(np.isin(cohort, POOL).all())
    if name != 'fixed':
      self.assertGreater(len({tuple(c) for c in rounds}), 5)
      other = [sample_cohort(sampler, 5, r) for r in range(1, 30)]
      self.assertFalse(
        all(np.array_equal(a, b) for a, b in zip(rounds, other, strict=True))
      )

  def frequencies(self, sampler, rounds=3000):
    counts = np.zeros(22)
    for r in range(rounds):
      counts[sample_cohort(sampler, 0, r)] += 1
    return counts[POOL] / rounds

  def test_uniform_frequencies(self):
    got = self.frequencies(samplers()['uniform'])
    np.testing.assert_allclose(got, 0.5, atol=0.04)

  def test_poisson_frequencies_and_sizes(self):
    sampler = samplers()['poisson']
    np.testing.assert_allclose(self.frequencies(sampler), 0.5, atol=0.04)
    sizes = [len(sample_cohort(sampler, 0, r)) for r in range(500)]
    self.assertEqual((min(sizes), max(sizes)), (0, 6))

  def test_weighted_frequencies(self):
    """One draw picks proportionally; weight 0 never comes."""
    sampler = weighted_sampler(POOL, weights=WEIGHTS, cohort_size=1)
    np.testing.assert_allclose(
      self.frequencies(sampler), WEIGHTS / WEIGHTS.sum(), atol=0.03
    )

  def test_a_million_clients(self):
    cohort = sample_cohort(uniform_sampler(1_000_000, cohort_size=100), 0, 1)
    self.assertLen(set(cohort.tolist()), 100)

  def test_bad_input(self):
    for make, message in (
      (lambda: uniform_sampler(POOL, cohort_size=7), 'cohort_size <= 6'),
      (lambda: uniform_sampler(POOL, cohort_size=0), 'cohort_size >= 1'),
      (lambda: poisson_sampler(POOL, probability=1.5), 'probability=1.5'),
      (lambda: poisson_sampler(POOL, probability=0), 'probability > 0'),
      (
        lambda: weighted_sampler(POOL, weights=WEIGHTS, cohort_size=6),
        'cohort_size <= 5',
      ),
      (
        lambda: weighted_sampler(POOL, weights=WEIGHTS[1:], cohort_size=1),
        'shape',
      ),
      (
        lambda: weighted_sampler(POOL, weights=-WEIGHTS, cohort_size=1),
        'weights >= 0',
      ),
      (lambda: sample_cohort(fixed_sampler([1, 1]), 0, 1), 'distinct'),
    ):
      with self.assertRaisesRegex(InvalidInput, message):
        make()


if __name__ == '__main__':
  absltest.main()
