"""The README's program runs and learns, and its commands exist."""

import contextlib
import io
import pathlib
import re

from absl.testing import absltest

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / 'README.md').read_text()


class ReadmeTest(absltest.TestCase):
  def test_the_algorithm_example_trains(self):
    blocks = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    self.assertLen(blocks, 2)
    algorithm = blocks[0]
    body = algorithm[algorithm.index('def step') :]
    lines = [line for line in body.splitlines() if line.strip()]
    self.assertLessEqual(len(lines), 20)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
      exec(compile('\n'.join(blocks), 'README.md', 'exec'), {})
    self.assertGreater(float(said.getvalue()), 0.9)

  def test_make_targets_exist(self):
    makefile = (ROOT / 'Makefile').read_text()
    for target in re.findall(r'^    make (\w+)', README, re.MULTILINE):
      self.assertRegex(makefile, rf'(?m)^{target}:')


if __name__ == '__main__':
  absltest.main()
