"""What a command prints for --help and for flags that are wrong."""

import pathlib
import subprocess
import sys

from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).resolve().parents[2]


def start(*flags: str) -> subprocess.CompletedProcess:
  """Of a command that imports no jax, so that it starts at once."""
  return subprocess.run(
    [sys.executable, '-m', 'launchers.table', *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


class CommandLineTest(parameterized.TestCase):
  @parameterized.parameters('--help', '-h', '--helpfull')
  def test_help_has_all_of_our_flags_by_what_they_are_about(self, flag):
    done = start(flag)
    self.assertEqual((done.returncode, done.stderr), (0, ''))
    own, runners, options = (
      done.stdout.index(title)
      for title in (
        'Flags of this command.',
        'Where cells run, ',
        'Which table is meant: ',
      )
    )
    self.assertTrue(done.stdout.startswith("Makes a paper's table"))
    for name, section in (
      ('--retries:', own),
      ('--runner:', runners),
      ('--slurm_hours:', runners),
      ('--paper:', options),
    ):
      self.assertGreater(done.stdout.index(f'  {name}'), section, name)
    self.assertEqual('--verbosity:' in done.stdout, flag == '--helpfull')

  @parameterized.parameters(
    (('--nothing=1',), 'nothing'),
    (('--retries=-1',), 'retries'),
    (('--preset=huge',), 'preset'),
    (('--paper=bdpfl', '--preset=smoke', 'word'), "Unexpected argument 'word'"),
  )
  def test_a_mistake_is_one_line(self, flags, word):
    done = start(*flags)
    self.assertEqual((done.returncode, done.stdout), (2, ''))
    [line] = done.stderr.splitlines()
    self.assertStartsWith(line, 'error: ')
    self.assertIn(word, line)


if __name__ == '__main__':
  absltest.main()
