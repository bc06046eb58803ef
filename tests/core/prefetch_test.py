"""Cohorts come in order, one round ahead, with the errors of their making."""

import threading

from absl.testing import absltest, parameterized

from fedjax_ext.core import prefetch


class PrefetchTest(parameterized.TestCase):
  @parameterized.product(ahead=[False, True], count=[0, 1, 4])
  def test_order(self, ahead, count):
    rounds = range(3, 3 + count)
    got = list(prefetch(lambda round: round, rounds, ahead=ahead))
    self.assertEqual(got, list(rounds))

  @parameterized.parameters(False, True)
  def test_steps_of_a_range(self, ahead):
    rounds = range(1, 10, 3)
    got = list(prefetch(lambda round: round, rounds, ahead=ahead))
    self.assertEqual(got, [1, 4, 7])

  def test_one_round_ahead(self):
    begun = [threading.Event() for _ in range(4)]

    def prepare(round):
      begun[round].set()
      return round

    cohorts = prefetch(prepare, range(4))
    self.assertEqual(next(cohorts), 0)
    self.assertTrue(begun[1].wait(10))
    self.assertFalse(begun[2].is_set())
    self.assertEqual(list(cohorts), [1, 2, 3])

  def test_not_ahead(self):
    prepared = []
    cohorts = prefetch(prepared.append, range(3), ahead=False)
    next(cohorts)
    self.assertEqual(prepared, [0])

  @parameterized.parameters(False, True)
  def test_error(self, ahead):
    def prepare(round):
      if round == 2:
        raise ValueError('round 2')
      return round

    cohorts = prefetch(prepare, range(4), ahead=ahead)
    self.assertEqual([next(cohorts), next(cohorts)], [0, 1])
    with self.assertRaisesRegex(ValueError, 'round 2'):
      next(cohorts)


if __name__ == '__main__':
  absltest.main()
