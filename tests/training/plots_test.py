"""Curves and partitions as pictures, with and without matplotlib."""

import logging
import pathlib
import struct
import sys
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized
from matplotlib import image as mpl_image

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import from_assignment
from fedjax_ext.training import plots
from fedjax_ext.training.plots import plot_curves, plot_partition

ROWS = [
  {
    'round': round,
    'train_loss': 1 / round if round != 2 else 'nan',
    'test/accuracy/pooled': 0.1 * round,
    'train/accuracy/pooled': 0.2 * round,
    'personal:test/accuracy/pooled': 0.3 * round,
    'test/loss/pooled': 0.5 / round,
    'test/accuracy/p5': 0.0,
    'seconds': 0.1,
  }
  for round in range(1, 5)
]


class PlotTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = folder / 'curves.png'

  def test_writes_a_picture(self):
    self.assertTrue(plot_curves(ROWS, self.path, title='run'))
    raw = self.path.read_bytes()
    self.assertEqual(raw[:8], b'\x89PNG\r\n\x1a\n')
    width, height = struct.unpack('>II', raw[16:24])
    self.assertEqual((width, height), (1200, 456))  # two panels
    panels = plots._panels(ROWS, ['accuracy'])
    self.assertEqual(list(panels), ['loss', 'accuracy'])
    self.assertEqual(set(panels['loss']), {'local training', 'test'})
    self.assertEqual(list(self.path.parent.iterdir()), [self.path])

  def test_metrics_that_were_asked_for_in_rows_of_four(self):
    rows = [
      {'round': 1, 'train_loss': 1.0}
      | {f'test/m{i}/pooled': 0.1 * i for i in range(20)}
    ]

    def size(**settings):
      self.assertTrue(plot_curves(rows, self.path, title='run', **settings))
      return struct.unpack('>II', self.path.read_bytes()[16:24])

    self.assertEqual(size(metrics=['m3']), (1200, 456))
    self.assertEqual(size(metrics=['m3', 'other']), (1200, 456))
    self.assertEqual(size(metrics=['m3', 'm9', 'm1', 'm2']), (2400, 912))
    with self.assertLogs('fedjax_ext', logging.INFO) as logs:
      self.assertEqual(size(), (2400, 912))
    self.assertIn('8 of 21 metrics', logs.output[0])

  def test_many_lines(self):
    rows = [
      {'round': round} | {f'part{i}/m/pooled': 0.1 * i for i in range(25)}
      for round in (1, 2)
    ]
    self.assertTrue(plot_curves(rows, self.path, title='run'))
    self.assertEqual(self.path.read_bytes()[1:4], b'PNG')

  def test_replaces_a_picture(self):
    self.path.write_text('old')
    self.assertTrue(plot_curves(ROWS[:1], self.path, title=''))
    self.assertEqual(self.path.read_bytes()[1:4], b'PNG')

  def test_nothing_to_draw(self):
    for rows in ([], [{'round': 1, 'seconds': 0.1}]):
      self.assertFalse(plot_curves(rows, self.path, title='run'))
    self.assertFalse(self.path.exists())

  def test_without_matplotlib(self):
    blocked = {
      name: None for name in sys.modules if name.startswith('matplotlib')
    }
    with (
      mock.patch.dict(sys.modules, {'matplotlib': None} | blocked),
      self.assertLogs('fedjax_ext', logging.INFO) as logs,
    ):
      self.assertFalse(plot_curves(ROWS, self.path, title='run'))
    self.assertIn('matplotlib is not installed', logs.output[0])
    self.assertFalse(self.path.exists())


class PartitionTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = folder / 'partition.png'

  def draw(self, counts, **settings):
    """The picture as floats [height, width, 3]."""
    self.assertTrue(plot_partition(self.path, counts, title='x', **settings))
    self.assertEqual(list(self.path.parent.iterdir()), [self.path])
    return mpl_image.imread(self.path)[..., :3]

  @parameterized.parameters(
    (1, 1), (10, 2), (20, 10), (50, 50), (51, 2), (10, 100), (1000, 100)
  )
  def test_writes_a_picture(self, num_clients, num_classes):
    """Of a readable size, whatever the number of clients and classes."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, (num_clients, num_classes))
    height, width, _ = self.draw(counts).shape
    self.assertBetween(height, 300, 1000)
    self.assertBetween(width, 500, 1000)

  @parameterized.parameters(4, 60)
  def test_shows_the_counts(self, num_clients):
    """Blue is where examples are: right half, lower half of the grid."""
    counts = np.zeros((num_clients, 4), int)
    counts[num_clients // 2 :, :2] = 5
    pixels = self.draw(counts)
    blue = pixels[..., 2] - pixels[..., 0] > 0.3
    height, width = blue.shape
    grid = blue[:, : int(width * 0.75)]  # without the legend
    rows, columns = np.nonzero(grid)
    self.assertGreater(len(rows), 1000)
    self.assertGreater(rows.min(), height * 0.5)
    self.assertGreater(columns.min(), width * 0.35)

  def test_no_examples(self):
    self.draw(np.zeros((3, 2), int))
    self.draw(np.zeros((300, 2), int))

  @parameterized.parameters(
    ((3, 4, 4), np.float32),
    ((2, 4, 4, 1), np.uint8),
    ((3, 4, 4, 3), np.uint8),
    ((3, 4, 4, 3), np.float64),
  )
  def test_images(self, shape, dtype):
    """A strip below the classes, of the clients that have a picture."""
    counts = np.ones((3, 5), int)
    without = self.draw(counts)
    drawn = self.draw(counts, images=np.ones(shape, dtype))
    self.assertGreater(drawn.shape[0], without.shape[0] + 30)

  def test_names(self):
    """Names of clients and classes change the picture."""
    counts = np.ones((2, 2), int)
    plain = self.draw(counts)
    for settings in (
      {'client_ids': np.array(['f0001_41', 'f0002_13'])},
      {'class_names': ['cat', 'dog']},
    ):
      named = self.draw(counts, **settings)
      self.assertFalse(np.array_equal(plain, named))

  def test_order_of_many_clients(self):
    """By largest class, then by its share."""
    counts = np.array([[0, 9], [3, 1], [0, 0], [9, 0], [1, 3]])
    self.assertEqual(
      plots._sort(counts).tolist(), [[9, 0], [3, 1], [0, 0], [0, 9], [1, 3]]
    )

  def test_bad_input(self):
    for message, counts, settings in (
      (r'\[C, Y\], got shape \[3\]', np.ones(3), {}),
      (r'got shape \[0, 2\]', np.ones((0, 2)), {}),
      ('Expected 3 client_ids, got 2', np.ones((3, 2)), {'client_ids': 'ab'}),
      (
        'Expected 2 class_names, got 3',
        np.ones((3, 2)),
        {'class_names': 'abc'},
      ),
      (r'got shape \[2, 4\]', np.ones((3, 2)), {'images': np.ones((2, 4))}),
      ('images of 1..3', np.ones((3, 2)), {'images': np.ones((4, 5, 5))}),
      ('D = 1, 3 or 4', np.ones((3, 2)), {'images': np.ones((3, 5, 5, 2))}),
    ):
      with self.assertRaisesRegex(InvalidInput, message):
        plot_partition(self.path, counts, title='', **settings)
    self.assertFalse(self.path.exists())

  def test_without_matplotlib(self):
    blocked = {
      name: None for name in sys.modules if name.startswith('matplotlib')
    }
    with (
      mock.patch.dict(sys.modules, {'matplotlib': None} | blocked),
      self.assertLogs('fedjax_ext', logging.INFO) as logs,
    ):
      self.assertFalse(plot_partition(self.path, np.ones((2, 2)), title=''))
    self.assertIn('no partition.png', logs.output[0])
    self.assertFalse(self.path.exists())


class ParticipantsTest(absltest.TestCase):
  def draw(self, label, **changes):
    """Three clients, of whom 0 and 2 take part; the picture's counts."""
    rows = np.array([4, 0, 1, 5, 2, 3])
    train = from_assignment(
      {'label': np.zeros(6)}, np.array([0, 0, 1, 1, 2, 2]),
      client_ids=np.arange(3), rows=rows,
    )  # fmt: skip
    seen = []

    def plot(path, counts, **settings):
      del path
      seen.append((counts.tolist(), settings['client_ids'].tolist()))
      return True

    with mock.patch.object(plots, 'plot_partition', plot):
      drawn = plots.plot_participants(
        pathlib.Path('unused'), label, train, np.array([0, 2]), title=''
      )
    return drawn, seen

  def test_counts_of_those_who_train(self):
    drawn, seen = self.draw(np.array([0, 1, 2, 2, 0, 1]))
    self.assertTrue(drawn)
    self.assertEqual(seen, [([[2, 0, 0], [0, 0, 2]], [0, 2])])

  def test_labels_that_are_not_at_hand(self):
    for label in (None, np.zeros((6, 2), int), np.zeros(6, np.float32)):
      self.assertEqual(self.draw(label), (False, []))


if __name__ == '__main__':
  absltest.main()
