"""Metric rows: what is written, grown, dropped and mended."""

import csv
import json
import logging
import pathlib
import struct
import subprocess
import sys
import tempfile
from unittest import mock

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from fedjax_ext.training.writers import (
  MetricWriter,
  read_rows,
  write_atomically,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Writes until the size of files hits a limit, as the training loop does.
FILLS_THE_DISK = """
import pathlib, resource, sys
from fedjax_ext.training.writers import MetricWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
writer = MetricWriter(pathlib.Path(sys.argv[1]), after_round=0)
try:
  for round in range(1, 200):
    writer.write(round, {f'metric_{i}': 0.5 for i in range(10)})
except OSError as error:
  print(error)
  sys.exit(7)
finally:
  writer.close()
"""


def events(folder: pathlib.Path) -> list:
  """(step, {tag: value}) of all summaries in a folder of TensorBoard files."""
  from tensorboardX.proto import event_pb2

  found = []
  for path in sorted(folder.iterdir()):
    raw, at = path.read_bytes(), 0
    while at < len(raw):
      (size,) = struct.unpack_from('<Q', raw, at)
      event = event_pb2.Event.FromString(raw[at + 12 : at + 12 + size])
      at += size + 16
      found += [
        (event.step, v.tag, v.simple_value) for v in event.summary.value
      ]
  return found


class WriterTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.workdir = pathlib.Path(self.enterContext(folder))

  def open(self, after_round=0, tensorboard=False) -> MetricWriter:
    return MetricWriter(
      self.workdir, after_round=after_round, tensorboard=tensorboard
    )

  def jsonl(self) -> list:
    lines = (self.workdir / 'metrics.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines]

  def csv(self) -> list:
    with (self.workdir / 'metrics.csv').open(newline='') as file:
      return list(csv.reader(file))

  def test_rows(self):
    writer = self.open()
    writer.write(1, {'loss': np.float32(0.5), 'clients': np.int64(3)})
    writer.write(2, {'loss': jnp.float32(0.25), 'clients': 4})
    rows = [
      {'round': 1, 'loss': 0.5, 'clients': 3},
      {'round': 2, 'loss': 0.25, 'clients': 4},
    ]
    self.assertEqual(self.jsonl(), rows)
    self.assertEqual(writer.rows, rows)
    self.assertEqual(read_rows(self.workdir / 'metrics.jsonl'), rows)
    self.assertEqual(
      self.csv(),
      [['round', 'loss', 'clients'], ['1', '0.5', '3'], ['2', '0.25', '4']],
    )

  def test_rows_are_there_before_close(self):
    writer = self.open()
    for round in range(1, 4):
      writer.write(round, {'loss': 1.0})
      self.assertLen(self.jsonl(), round)
      self.assertLen(self.csv(), round + 1)

  def test_csv_grows_columns(self):
    writer = self.open()
    writer.write(1, {'loss': 1.0})
    writer.write(2, {'loss': 2.0, 'accuracy': 0.5})
    writer.write(3, {'accuracy': 0.75})
    self.assertEqual(
      self.csv(),
      [
        ['round', 'loss', 'accuracy'],
        ['1', '1.0', ''],
        ['2', '2.0', '0.5'],
        ['3', '', '0.75'],
      ],
    )

  def test_names_with_commas_and_quotes(self):
    self.open().write(1, {'test,"a"': 1.0})
    self.assertEqual(self.csv(), [['round', 'test,"a"'], ['1', '1.0']])

  def test_resuming_drops_later_rows(self):
    writer = self.open()
    for round in range(1, 6):
      extra = {'only_late': 1} if round > 3 else {}
      writer.write(round, {'loss': float(round)} | extra)
    writer.close()
    writer = self.open(after_round=3)
    self.assertEqual([row['round'] for row in self.jsonl()], [1, 2, 3])
    self.assertEqual(self.csv()[0], ['round', 'loss'])
    self.assertLen(self.csv(), 4)
    writer.write(4, {'loss': 40.0})
    self.assertEqual([row['loss'] for row in self.jsonl()], [1, 2, 3, 40])
    self.assertEqual(self.csv()[-1], ['4', '40.0'])
    self.assertEqual(writer.rows, self.jsonl())

  def test_starting_over_drops_all_rows(self):
    self.open().write(1, {'loss': 1.0})
    self.open(after_round=0)
    self.assertEqual(self.jsonl(), [])

  def test_torn_last_line_is_cut(self):
    writer = self.open()
    writer.write(1, {'loss': 1.0})
    writer.write(2, {'loss': 2.0})
    path = self.workdir / 'metrics.jsonl'
    whole = path.read_text()
    first = whole.index('\n') + 1
    for end in range(first, len(whole)):
      path.write_text(whole[:end])
      rows = [r['round'] for r in read_rows(path)]
      # Only the newline is missing from the very last one.
      self.assertEqual(rows, [1, 2] if end == len(whole) - 1 else [1])
    path.write_text(whole[:-3])
    self.open(after_round=2).write(2, {'loss': 3.0})
    self.assertEqual([row['loss'] for row in self.jsonl()], [1.0, 3.0])

  def test_no_file(self):
    self.assertEqual(read_rows(self.workdir / 'nothing.jsonl'), [])

  def test_non_finite_numbers_are_text(self):
    values = {'a': float('nan'), 'b': np.float32('inf'), 'c': -jnp.inf}
    self.open().write(1, values)
    text = (self.workdir / 'metrics.jsonl').read_text()
    row = json.loads(text, parse_constant=self.fail)
    self.assertEqual(row, {'round': 1, 'a': 'nan', 'b': 'inf', 'c': '-inf'})
    self.assertEqual(self.csv()[1], ['1', 'nan', 'inf', '-inf'])
    self.assertTrue(np.isnan(float(row['a'])))

  def test_without_tensorboard_x(self):
    with (
      mock.patch.dict(sys.modules, {'tensorboardX': None}),
      self.assertLogs('fedjax_ext', logging.INFO) as logs,
    ):
      writer = self.open(tensorboard=True)
    writer.write(1, {'loss': 1.0})
    writer.close()
    self.assertIn('tensorboardX is not installed', logs.output[0])
    self.assertFalse((self.workdir / 'tensorboard').exists())
    self.assertEqual(self.jsonl(), [{'round': 1, 'loss': 1.0}])

  def test_tensorboard(self):
    writer = self.open(tensorboard=True)
    writer.write(1, {'loss': 0.5, 'worst': float('nan')})
    writer.write(2, {'loss': 0.25, 'clients': 3})
    writer.close()
    self.assertEqual(
      events(self.workdir / 'tensorboard'),
      [(1, 'loss', 0.5), (2, 'loss', 0.25), (2, 'clients', 3.0)],
    )

  def test_full_disk_is_an_error_and_no_hang(self):
    done = subprocess.run(
      [sys.executable, '-c', FILLS_THE_DISK, str(self.workdir)],
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=50,
      check=False,
    )
    self.assertEqual(done.stderr, '')
    self.assertEqual(done.returncode, 7)
    self.assertIn('File too large', done.stdout)


class WriteAtomicallyTest(absltest.TestCase):
  def test_failure_leaves_the_old_file(self):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'final.json'
      write_atomically(path, 'old')
      with (
        mock.patch('os.fsync', side_effect=OSError('disk full')),
        self.assertRaisesRegex(OSError, 'disk full'),
      ):
        write_atomically(path, 'new')
      self.assertEqual(path.read_text(), 'old')
      self.assertEqual(list(path.parent.iterdir()), [path])
      write_atomically(path, 'newer')
      self.assertEqual(path.read_text(), 'newer')


if __name__ == '__main__':
  absltest.main()
