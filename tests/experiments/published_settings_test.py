"""The published settings, run on small files of the formats that they name."""

import pathlib
import tempfile

import numpy as np
import pytest
from absl.testing import absltest

from fedjax_ext.data import write_sqlite
from tests.experiments import runs

SHORT = (
  '--num_rounds=2',
  '--cohort_size=2',
  '--eval_every=2',
  '--checkpoint_every=2',
)


def objects(texts: list[str]) -> np.ndarray:
  """Texts as an array of bytes objects."""
  return np.array([t.encode() for t in texts], object)


@pytest.mark.slow
class PublishedSettingsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.folder = pathlib.Path(self.enterContext(folder))

  def check(self, name: str, *flags: str) -> None:
    done = runs.run(
      self.folder / 'run',
      f'--flagfile=experiments/fed_avg/flags/{name}.flags',
      f'--data_dir={self.folder}',
      *SHORT,
      *flags,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertRegex(done.stdout, r'final: round=2 test_accuracy=0\.\d+')

  def test_federated_emnist(self):
    rng = np.random.default_rng(0)
    for split, size in (('train', 7), ('test', 3)):
      write_sqlite(
        self.folder / f'federated_emnist_{split}.sqlite',
        [
          (
            f'f{i:04d}_00',
            {
              'pixels': rng.random((size, 28, 28), np.float32),
              'label': rng.integers(0, 62, size).astype(np.int32),
            },
          )
          for i in range(4)
        ],
      )
    self.check('federated_emnist')

  def test_shakespeare(self):
    for split, text in (('train', 'To be, or not to be.'), ('test', 'Aye!')):
      write_sqlite(
        self.folder / f'shakespeare_{split}.sqlite',
        [(f'ROLE {i}', {'snippets': objects([text] * i)}) for i in (1, 2, 3)],
      )
    self.check('shakespeare')

  def test_stackoverflow(self):
    (self.folder / 'stackoverflow.word_count').write_text('the 3\na 2\nof 1\n')
    for split in ('train', 'held_out', 'test'):
      write_sqlite(
        self.folder / f'stackoverflow_{split}.sqlite',
        [
          (f'{split} {i}', {'tokens': objects(['the a of', 'a new one'] * i)})
          for i in (1, 2, 3)
        ],
      )
    self.check('stackoverflow', '--data_source=stackoverflow:vocab_size=3')


if __name__ == '__main__':
  absltest.main()
