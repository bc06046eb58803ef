"""Every flag file: its flags exist, and what they name takes its arguments."""

import pathlib

from absl import flags
from absl.testing import absltest

from experiments.fed_avg import run
from fedjax_ext import data
from fedjax_ext.models import MODELS
from fedjax_ext.training import calls
from fedjax_ext.training import flags as shared

FOLDER = pathlib.Path(run.__file__).parent / 'flags'
NAMED = {
  'data_source': data.SOURCES,
  'data_partition': data.PARTITIONERS,
  'data_skew': data.SKEWS,
  'model': MODELS,
}
GIVEN = (*shared.GIVEN, *shared.GIVEN_MODEL)


class FlagFilesTest(absltest.TestCase):
  def check(self, name: str, value: str) -> None:
    if name == 'data_preprocess':
      named = [(text, data.PREPROCESS) for text in value.split('+')]
    elif name in NAMED and value != 'client':
      named = [(value, NAMED[name])]
    else:
      flags.FLAGS[name].parser.parse(value)
      return
    for text, registry in named:
      function = calls.resolve(name, text, registry)
      settings = calls.arguments(name, text, function)
      left = set(calls.missing(function, settings)) - set(GIVEN)
      self.assertEmpty(left, f'{name}={text}')

  def test_flag_files(self):
    paths = sorted(FOLDER.glob('*.flags'))
    self.assertNotEmpty(paths)
    for path in paths:
      lines = path.read_text().splitlines()
      header = '\n'.join(line for line in lines if line.startswith('#'))
      with self.subTest(path.name):
        self.assertIn(f'flags/{path.name}', header.replace('\\\n', ''))
        for line in lines:
          if line and not line.startswith('#'):
            name, equals, value = line.removeprefix('--').partition('=')
            self.assertTrue(line.startswith('--') and equals, line)
            self.assertIn(name, flags.FLAGS)
            self.check(name, value)


if __name__ == '__main__':
  absltest.main()
