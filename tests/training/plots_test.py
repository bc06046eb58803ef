"""curves.png, with and without matplotlib."""

import logging
import pathlib
import struct
import sys
import tempfile
from unittest import mock

from absl.testing import absltest

from fedjax_ext.training.plots import plot_curves

ROWS = [
  {
    'round': round,
    'train_loss': 1 / round if round != 2 else 'nan',
    'test/accuracy/pooled': 0.1 * round,
    'train/accuracy/pooled': 0.2 * round,
    'personal:test/accuracy/pooled': 0.3 * round,
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
    self.assertEqual(list(self.path.parent.iterdir()), [self.path])

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


if __name__ == '__main__':
  absltest.main()
