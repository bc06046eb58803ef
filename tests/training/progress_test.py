"""Progress: a bar on a terminal, lines elsewhere."""

import io
import logging
import re
import sys
from unittest import mock

from absl.testing import absltest

from fedjax_ext.training.progress import Progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


class ProgressTest(absltest.TestCase):
  def lines(self, *, initial=0, pause=1000.0, important=()) -> list[str]:
    with self.assertLogs('fedjax_ext', logging.INFO) as logs:
      with Progress(
        6, initial=initial, seconds_between_lines=pause
      ) as progress:
        for round in range(initial + 1, 7):
          progress.update(f'loss={round}', important=round in important)
      return [record.getMessage() for record in logs.records]

  def test_a_line_for_what_is_important_and_for_the_end(self):
    lines = self.lines(important=(2, 3))
    self.assertLen(lines, 3)
    for line, round in zip(lines, (2, 3, 6), strict=True):
      pattern = rf'round {round}/6, \d+ s left: loss={round}'
      self.assertTrue(re.fullmatch(pattern, line), line)
    self.assertIn(', 0 s left', lines[-1])

  def test_a_line_when_the_last_is_old(self):
    self.assertLen(self.lines(pause=0.0), 6)

  def test_resumed(self):
    lines = self.lines(initial=4, important=(5,))
    self.assertTrue(lines[0].startswith('round 5/6'), lines[0])
    self.assertLen(lines, 2)

  def test_bar_on_a_terminal(self):
    with (
      mock.patch.object(sys, 'stderr', Terminal()) as terminal,
      Progress(6, initial=4) as progress,
    ):
      progress.update('loss=0.5')
      progress.update('loss=0.4')
    self.assertIn('6/6', terminal.getvalue())
    self.assertIn('loss=0.4', terminal.getvalue())

  def test_lines_on_a_terminal_without_tqdm(self):
    with (
      mock.patch.object(sys, 'stderr', Terminal()) as terminal,
      mock.patch.dict(sys.modules, {'tqdm': None}),
    ):
      self.assertLen(self.lines(important=(2,)), 2)
    self.assertEqual(terminal.getvalue(), '')

  def test_an_error_passes(self):
    with self.assertRaises(ZeroDivisionError), Progress(6):
      raise ZeroDivisionError


if __name__ == '__main__':
  absltest.main()
