"""Long tails, the official split bit for bit, local tests, groups."""

import dataclasses

import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import (
  Columns,
  class_counts,
  make_columns,
  multinomial_dirichlet_partition,
)
from fedjax_ext.data.long_tail import (
  group_classes,
  long_tail,
  long_tail_counts,
  long_tail_rows,
  proportional_counts,
)

OFFICIAL_SEED = 3407
# (classes, largest, imbalance, clients, alpha) -> local tests, group sizes
SETTINGS = {
  'a': ((10, 5000, 0.02, 40, 0.5), 9850, (4, 3, 3)),
  'b': ((10, 5000, 0.01, 40, 0.5), 9829, (3, 3, 4)),
  'c': ((10, 5000, 0.02, 40, 1.0), 9828, (4, 3, 3)),
  'd': ((10, 5000, 0.01, 40, 1.0), 9823, (3, 3, 4)),
  'e': ((100, 500, 0.02, 20, 0.5), 9261, (31, 31, 38)),
  'f': ((100, 500, 0.01, 20, 0.5), 9199, (27, 26, 47)),
  'g': ((100, 500, 0.02, 20, 1.0), 9142, (31, 30, 39)),
  'h': ((100, 500, 0.01, 20, 1.0), 9097, (27, 25, 48)),
  'readme': ((100, 500, 0.01, 40, 0.5), 8636, (25, 25, 50)),
}
SIZES = {
  'b': (
    215, 141, 207, 171, 243, 132, 178, 751, 618, 173, 602, 559, 821, 446, 221,
    157, 127, 436, 273, 246, 171, 124, 90, 190, 252, 91, 656, 129, 194, 482,
    1106, 528, 243, 102, 215, 267, 348, 153, 172, 176,
  ),
  'f': (
    573, 766, 469, 733, 726, 766, 466, 320, 676, 410, 554, 546, 535, 512, 586,
    396, 460, 448, 431, 474,
  ),
  'readme': (264, 285, 233, 378, 283, 185),
}  # fmt: skip


def official(name):
  """Labels [N], owners [N] and C of a setting of the official logs."""
  (classes, largest, imbalance, clients, alpha), *_ = SETTINGS[name]
  counts = long_tail_counts(
    largest=largest, num_classes=classes, imbalance=imbalance
  )
  label = np.repeat(np.arange(classes), counts)
  owner = multinomial_dirichlet_partition(
    label, num_clients=clients, alpha=alpha, legacy=True, seed=OFFICIAL_SEED
  )
  return label, owner, clients


class LongTailTest(parameterized.TestCase):
  def test_counts(self):
    """Oracle T1."""
    counts = lambda classes, largest, imbalance: long_tail_counts(
      largest=largest, num_classes=classes, imbalance=imbalance
    ).tolist()
    self.assertEqual(
      counts(10, 5000, 0.01),
      [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
    )
    self.assertEqual(
      counts(10, 5000, 0.02),
      [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100],
    )
    for classes, largest, imbalance, total in (
      (10, 5000, 0.1, 20431),
      (100, 500, 0.01, 10847),
      (100, 500, 0.02, 12608),
      (100, 500, 0.1, 19573),
    ):
      self.assertEqual(sum(counts(classes, largest, imbalance)), total)
    hundred = counts(100, 500, 0.01)
    self.assertEqual(
      hundred[:4] + hundred[-5:], [500, 477, 455, 434, 6, *[5] * 4]
    )

  def test_rows(self):
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 100))
    first = long_tail_rows(label, imbalance=0.1)
    self.assertEqual(np.bincount(label[first]).tolist(), [100, 46, 21, 10])
    for y in range(4):
      mine = first[label[first] == y]
      np.testing.assert_array_equal(
        mine, np.flatnonzero(label == y)[: len(mine)]
      )
    one, two = (long_tail_rows(label, imbalance=0.1, seed=s) for s in (0, 1))
    self.assertFalse(np.array_equal(one, two))
    # A long tail of a longer one, as of packed data.
    again = long_tail_rows(label[first], imbalance=0.05, largest=100)
    self.assertEqual(
      np.bincount(label[first][again]).tolist(), [100, 36, 13, 5]
    )
    with self.assertRaisesRegex(InvalidInput, 'class'):
      long_tail_rows(label[first], imbalance=0.5, largest=100)


class OfficialSplitTest(parameterized.TestCase):
  @parameterized.parameters(*SETTINGS)
  def test_local_tests_and_groups(self, name):
    """Oracles T3 and T4."""
    label, owner, clients = official(name)
    counts = class_counts(
      label, owner, num_clients=clients, num_classes=label.max() + 1
    )
    tests = proportional_counts(counts, size=10_000)
    self.assertEqual(tests.sum(), SETTINGS[name][1])
    groups = np.bincount(group_classes(tests.sum(0)), minlength=3)
    self.assertEqual(tuple(groups), SETTINGS[name][2])
    if name == 'b':
      self.assertEqual(counts[0].tolist(), [72, 83, 9, 1, 40, 5, 5, 0, 0, 0])
      self.assertEqual(tests[0].tolist(), [58, 66, 7, 0, 32, 4, 4, 0, 0, 0])
      self.assertEqual(
        tests.sum(0).tolist(),
        [4012, 2394, 1429, 848, 504, 295, 172, 95, 53, 27],
      )

  @parameterized.parameters(*SIZES)
  def test_client_sizes(self, name):
    """Oracle T2."""
    _, owner, clients = official(name)
    sizes = np.bincount(owner, minlength=clients)
    self.assertEqual(tuple(sizes[: len(SIZES[name])]), SIZES[name])

  def test_own_version(self):
    label = np.repeat(np.arange(5), 1000)
    draw = lambda seed, alpha=0.5: multinomial_dirichlet_partition(
      label, num_clients=8, alpha=alpha, seed=seed
    )
    np.testing.assert_array_equal(draw(0), draw(0))
    self.assertFalse(np.array_equal(draw(0), draw(1)))
    even = class_counts(label, draw(0, 1e5), num_clients=8, num_classes=5)
    np.testing.assert_allclose(even, 125, atol=50)
    with self.assertRaisesRegex(InvalidInput, 'alpha=0'):
      draw(0, 0)


class GroupsTest(parameterized.TestCase):
  @parameterized.parameters(
    ([50, 30, 10, 5, 3, 2], [0, 0, 1, 1, 2, 2]),
    ([100, 0, 0], [0, 2, 2]),
    ([2, 3, 5, 10, 30, 50], [2, 2, 1, 1, 0, 0]),
    ([0, 0], [2, 2]),
  )
  def test_by_cumulative_share(self, counts, expected):
    self.assertEqual(group_classes(np.array(counts)).tolist(), expected)


class DatasetTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    label = np.concatenate(
      [rng.permutation(np.tile(np.arange(4), n)) for n in (200, 100)]
    )
    self.columns = make_columns(
      'data',
      {
        'x': np.arange(1200, dtype=np.float32),
        'label': label,
        'split': (np.arange(1200) >= 800).astype(int),
      },
    )

  def make(self, **more):
    settings = dict(
      partition=multinomial_dirichlet_partition,
      num_clients=6,
      imbalance=0.1,
      seed=0,
    )
    return long_tail(self.columns, **settings | more)

  def labels(self, view):
    return np.asarray(view.features['label'])[np.asarray(view.rows)]

  def test_train_is_long_tailed_and_tests_are_not(self):
    data = self.make()
    train = np.bincount(self.labels(data.splits['train']))
    self.assertEqual(train[0], 200)
    self.assertEqual(train.tolist(), sorted(train, reverse=True))
    self.assertLess(train[-1], 25)
    test = data.splits['test']
    self.assertEqual(test.num_examples, 400)
    self.assertEqual(np.bincount(self.labels(test)).tolist(), [100] * 4)

  def test_local_tests_are_in_proportion(self):
    data = self.make()
    train, local = data.splits['train'], data.splits['local_test']
    counts = lambda view: class_counts(
      self.labels(view), view.owners(), num_clients=7, num_classes=4
    )
    wanted = proportional_counts(counts(train), size=400)
    pools = np.bincount(self.labels(data.splits['test']))
    np.testing.assert_array_equal(counts(local), np.minimum(wanted, pools))
    test_rows = set(np.asarray(data.splits['test'].rows).tolist())
    for c in range(6):
      rows = local.client_rows(c).tolist()
      self.assertLen(set(rows), len(rows))
      self.assertContainsSubset(rows, test_rows)

  def test_groups_divide_the_tests(self):
    data = self.make()
    for whole in ('test', 'local_test'):
      view = data.splits[whole]
      names = {f'{whole}_{g}' for g in ('head', 'middle', 'tail')}
      parts = [data.parts[name] for name in names & data.parts.keys()]
      self.assertGreater(len(parts), 1)
      np.testing.assert_array_equal(sum(part.only for part in parts), 1)
      for part in parts:
        self.assertEqual(part.split, whole)
        sizes = view.filter(part.only).sizes()
        self.assertEqual(part.clients.tolist(), np.flatnonzero(sizes).tolist())
    chosen = data.splits['test'].filter(data.parts['test_head'].only)
    head = set(self.labels(chosen).tolist())
    self.assertIn(0, head)
    self.assertNotIn(3, head)

  def test_validation_is_of_train_rows(self):
    whole, data = self.make(), self.make(validation_fraction=0.25)
    rows = lambda d, *names: sorted(
      x for n in names for x in np.asarray(d.splits[n].rows).tolist()
    )
    self.assertEqual(rows(data, 'train', 'validation'), rows(whole, 'train'))
    self.assertEqual(rows(data, 'local_test'), rows(whole, 'local_test'))
    self.assertNotIn(6, data.participating)

  def test_bad_input(self):
    with self.assertRaisesRegex(InvalidInput, 'partition'):
      self.make(partition=None)
    with self.assertRaisesRegex(InvalidInput, 'imbalance'):
      self.make(imbalance=0.0)
    columns = Columns('data', {'x': np.ones(4)}, 2)
    with self.assertRaisesRegex(InvalidInput, '"label"'):
      long_tail(columns, partition=multinomial_dirichlet_partition)

  def test_a_source_without_a_split(self):
    columns = dataclasses.replace(self.columns, split=None)
    data = long_tail(
      columns,
      partition=multinomial_dirichlet_partition,
      num_clients=5,
      largest=200,
      imbalance=0.1,
    )
    self.assertEqual(data.splits['test'].num_examples, 240)
    self.assertEqual(data.splits['train'].num_examples, 200 + 92 + 43 + 20)


if __name__ == '__main__':
  absltest.main()
