"""Rows of memory maps: what plain indexing gives."""

import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import memory_maps

ROWS = 50


class MemoryMapsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.values = rng.integers(0, 99, (ROWS, 3, 2)).astype(np.int16)
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(folder) / 'column.npy'
    np.save(self.path, self.values)

  @parameterized.parameters(
    dict(rows=np.arange(ROWS)),
    dict(rows=np.r_[30:50, 3:20]),
    dict(rows=np.arange(0, ROWS, 7)),
    dict(rows=np.array([4, 4, 4])),
    dict(rows=np.array([], np.int64)),
    dict(rows=np.r_[0:10, 9, 10:20]),
  )
  def test_rows(self, rows):
    column = np.load(self.path, mmap_mode='r')
    memory_maps.expect_random_access(column)
    read = memory_maps.read_rows(column, rows)
    np.testing.assert_array_equal(read, self.values[rows])
    self.assertEqual(read.dtype, self.values.dtype)

  def test_views_and_arrays(self):
    rows = np.arange(10)
    for column in (
      np.load(self.path, mmap_mode='r')[5:],
      self.values[5:],
    ):
      memory_maps.expect_random_access(column)
      np.testing.assert_array_equal(
        memory_maps.read_rows(column, rows), self.values[5:15]
      )

  def test_what_was_written_to_the_map(self):
    column = np.load(self.path, mmap_mode='r+')
    column[7] = 5
    read = memory_maps.read_rows(column, np.arange(20))
    np.testing.assert_array_equal(read, column[:20])
    self.assertTrue((read[7] == 5).all())

  def test_a_copy_on_write_map(self):
    column = np.load(self.path, mmap_mode='c')
    column[7] = 5
    read = memory_maps.read_rows(column, np.arange(20))
    np.testing.assert_array_equal(read, column[:20])

  def test_out_of_range(self):
    column = np.load(self.path, mmap_mode='r')
    with self.assertRaisesRegex(IndexError, r'0\.\.49, got 40\.\.59'):
      memory_maps.read_rows(column, np.arange(40, 60))

  def test_a_file_that_was_cut_short(self):
    column = np.load(self.path, mmap_mode='r')
    with self.path.open('r+b') as file:
      file.truncate(300)
    with self.assertRaisesRegex(OSError, 'column.npy ends before byte'):
      memory_maps.read_rows(column, np.arange(ROWS))


if __name__ == '__main__':
  absltest.main()
