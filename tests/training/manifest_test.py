"""What a workdir was made by, and which differences are refused."""

import json
import logging
import pathlib
import tempfile

from absl.testing import absltest

from fedjax_ext.core import InvalidInput
from fedjax_ext.training.manifest import (
  differences,
  make_manifest,
  open_workdir,
  write_manifest,
)


def manifest(**flags) -> dict:
  """The manifest of a run with some flags."""
  return make_manifest(
    flags={'seed': 0, 'hidden': ('200', '100'), 'rate': 0.1} | flags,
    data='d1',
    layout={'lanes': 1, 'wave_clients': None},
  )


class DifferencesTest(absltest.TestCase):
  def test_names_what_differs(self):
    old = {'flags': {'seed': 1, 'gone': 2, 'same': [1, 2]}, 'data': 'a'}
    new = {'flags': {'seed': 2, 'same': [1, 2], 'fresh': 3}, 'data': 'b'}
    self.assertEqual(
      differences(old, new),
      [
        'data: a in the workdir, now b',
        'flags.fresh: None in the workdir, now 3',
        'flags.gone: 2 in the workdir, now None',
        'flags.seed: 1 in the workdir, now 2',
      ],
    )

  def test_same(self):
    self.assertEqual(differences({'a': {'b': 1}}, {'a': {'b': 1}}), [])


class WorkdirTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.workdir = pathlib.Path(self.enterContext(folder)) / 'a' / 'run'

  def begin(self) -> None:
    """As after a first checkpoint."""
    (self.workdir / 'checkpoints' / '4').mkdir(parents=True)

  def read(self) -> dict:
    return json.loads((self.workdir / 'manifest.json').read_text())

  def test_fresh_workdir(self):
    made = open_workdir(self.workdir, manifest())
    self.assertEqual(self.read(), made)
    self.assertEqual(made['wall_seconds'], 0)
    self.assertEqual(
      set(made),
      {
        'flags',
        'data',
        'layout',
        'versions',
        'device',
        'commit',
        'wall_seconds',
      },
    )
    self.assertIn('jax', made['versions'])

  def test_same_run(self):
    first = open_workdir(self.workdir, manifest())
    self.begin()
    write_manifest(self.workdir, dict(first, wall_seconds=12.5))
    with self.assertNoLogs('fedjax_ext', logging.WARNING):
      again = open_workdir(self.workdir, manifest())
    self.assertEqual(again, dict(first, wall_seconds=12.5))

  def test_another_run_is_refused_with_every_difference(self):
    open_workdir(self.workdir, manifest())
    self.begin()
    before = (self.workdir / 'manifest.json').read_bytes()
    other = manifest(seed=7, rate=0.2, hidden=['50'], added='x')
    other['data'] = 'd2'
    other['layout'] = {'lanes': 4, 'wave_clients': None}
    with self.assertRaises(InvalidInput) as caught:
      open_workdir(self.workdir, other)
    message = str(caught.exception)
    self.assertNotIn('\n', message)
    self.assertIn(str(self.workdir), message)
    for difference in (
      'flags.seed: 0 in the workdir, now 7',
      'flags.rate: 0.1 in the workdir, now 0.2',
      "flags.hidden: ['200', '100'] in the workdir, now ['50']",
      'flags.added: None in the workdir, now x',
      'data: d1 in the workdir, now d2',
      'layout.lanes: 1 in the workdir, now 4',
    ):
      self.assertIn(difference, message)
    self.assertNotIn('wave_clients', message)
    self.assertEqual((self.workdir / 'manifest.json').read_bytes(), before)

  def test_a_run_without_a_checkpoint_may_be_corrected(self):
    """Its flags bind nobody: there is nothing yet that they could spoil."""
    open_workdir(self.workdir, manifest())
    other = manifest(seed=7)
    self.assertEqual(open_workdir(self.workdir, other), other)
    self.assertEqual(self.read(), other)

  def test_other_versions_only_warn(self):
    old = manifest()
    old['versions'] = old['versions'] | {'jax': '0.0.1'}
    old['commit'] = 'abc'
    open_workdir(self.workdir, old)
    self.begin()
    with self.assertLogs('fedjax_ext', logging.WARNING) as logs:
      got = open_workdir(self.workdir, manifest())
    text = '\n'.join(logs.output)
    self.assertLen(logs.output, 2)
    self.assertIn('versions.jax: 0.0.1 in the workdir, now', text)
    self.assertIn('commit: abc in the workdir, now', text)
    self.assertEqual(got['versions'], manifest()['versions'])

  def test_broken_manifest(self):
    self.begin()
    for text in ('{"flags": ', '', '[]', '3'):
      (self.workdir / 'manifest.json').write_text(text)
      with self.subTest(text), self.assertRaises(InvalidInput) as caught:
        open_workdir(self.workdir, manifest())
      self.assertIn('manifest.json', str(caught.exception))

  def test_workdir_that_cannot_be(self):
    self.workdir.parent.mkdir(parents=True)
    self.workdir.write_text('a file')
    with self.assertRaises(OSError):
      open_workdir(self.workdir, manifest())


if __name__ == '__main__':
  absltest.main()
