"""Tests of launchers.sources: which edits count as a change of the code."""

import pathlib
import tempfile

from absl.testing import absltest, parameterized

from launchers import sources

FILES = {
  'fedjax_ext/core/engine.py': 'x = 1\n',
  'fedjax_ext/data/table.npz': 'bytes',
  'experiments/demo/run.py': 'y = 1\n',
  'experiments/demo/table.toml': 'title = 1\n',
  'experiments/demo/README.md': 'card\n',
  'experiments/demo/flags/a.flags': '# expected 96.0\n--lr=1\n',
  'experiments/common.py': 'z = 1\n',
  'experiments/other/run.py': 'w = 1\n',
}


class SourcesTest(parameterized.TestCase):
  def tree(self, edits=()):
    root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    for name, text in {**FILES, **dict(edits)}.items():
      (root / name).parent.mkdir(parents=True, exist_ok=True)
      (root / name).write_text(text)
    return sources.code_digest(root, root / 'experiments' / 'demo')

  @parameterized.parameters(
    ('fedjax_ext/core/engine.py', 'x = 2\n'),
    ('fedjax_ext/core/new.py', ''),
    ('fedjax_ext/data/table.npz', 'other'),
    ('experiments/demo/run.py', 'y = 2\n'),
    ('experiments/demo/flags/a.flags', '--lr=2\n'),
    ('experiments/common.py', 'z = 2\n'),
  )
  def test_a_change(self, name, text):
    self.assertNotEqual(self.tree(), self.tree({name: text}.items()))

  @parameterized.parameters(
    ('experiments/demo/table.toml', 'title = 2\n'),
    ('experiments/demo/README.md', 'measured 95.9\n'),
    ('experiments/demo/flags/a.flags', '# measured 95.9\n\n--lr=1\n'),
    ('experiments/other/run.py', 'w = 2\n'),
    ('fedjax_ext/core/__pycache__/engine.pyc', 'code'),
    ('fedjax_ext/core/.engine.py.swp', 'x'),
    ('fedjax_ext/core/BUILD', 'py_library()'),
    ('tests/engine_test.py', 'x'),
  )
  def test_no_change(self, name, text):
    self.assertEqual(self.tree(), self.tree({name: text}.items()))


if __name__ == '__main__':
  absltest.main()
