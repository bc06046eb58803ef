"""The binary on other data than arrays: text, SQLite, streams, a new file."""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.data import write_sqlite
from tests.experiments import runs

DOCS = runs.ROOT / 'docs' / 'add_a_data_set.md'
TEXT = (
  '--model=char_lstm:hidden=16',
  '--data_partition=client',
  '--data_test_fraction=0',
  '--data_unparticipating_fraction=0.25',
  '--client_learning_rate=1.0',
  '--num_rounds=3',
  '--cohort_size=3',
)


def roles() -> dict[str, list[str]]:
  """Texts of eight roles, ragged."""
  rng = np.random.default_rng(0)
  words = ['to', 'be', 'or', 'not,', 'Sir;', 'the', 'question!']
  return {
    f'play/ROLE {i}': [
      ' '.join(rng.choice(words, rng.integers(1, 60)))
      for _ in range(rng.integers(1, 5))
    ]
    for i in range(8)
  }


class SourcesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.folder = pathlib.Path(self.enterContext(folder))

  def outcome(self, *flags: str, **env: str) -> tuple[str, dict]:
    """SHA-256 of the server state, and the report, of a finished run."""
    workdir = self.folder / f'run {len(list(self.folder.iterdir()))}'
    done = runs.run(workdir, f'--data_dir={self.folder}', *flags, **env)
    self.assertEqual(done.returncode, 0, done.stderr)
    final = json.loads((workdir / 'final.json').read_text())
    report = json.loads((workdir / 'report.json').read_text())
    return final['state_sha256'], report

  def test_text_and_sqlite_give_the_same_numbers(self):
    """One set of roles as JSON lines, and in FedJAX's format."""
    with (self.folder / 'roles.jsonl').open('w') as file:
      for client, texts in roles().items():
        file.write(json.dumps({'client': client, 'speeches': texts}) + '\n')
    write_sqlite(
      self.folder / 'roles.sqlite',
      [
        (client, {'snippets': np.array([t.encode() for t in texts], object)})
        for client, texts in reversed(roles().items())
      ],
    )
    text = self.outcome('--data_source=text_jsonl:file=roles.jsonl', *TEXT)
    sqlite = self.outcome('--data_source=text_sqlite:file=roles.sqlite', *TEXT)
    self.assertEqual(text, sqlite)
    part = text[1]['global']['unparticipating']
    self.assertLen(part['client'], 2)

  def test_streamed_and_placed_train_to_the_same_bits(self):
    """A lazy SQLite file, the same rows as arrays, and a budget of nothing."""
    rng = np.random.default_rng(0)
    sizes = (9, 3, 14, 6)
    clients = [
      (
        f'c{i}',
        {
          'image': rng.integers(0, 255, (n, 4, 4, 1)).astype(np.uint8),
          'label': rng.integers(0, 3, n),
        },
      )
      for i, n in enumerate(sizes)
    ]
    write_sqlite(self.folder / 'images.sqlite', clients)
    np.savez(
      self.folder / 'images.npz',
      client=np.repeat([c for c, _ in clients], sizes),
      **{
        name: np.concatenate([features[name] for _, features in clients])
        for name in ('image', 'label')
      },
    )
    common = (
      '--data_partition=client',
      '--data_test_fraction=0',
      '--data_preprocess=random_crop:padding=1+random_flip',
      '--num_rounds=4',
      '--cohort_size=3',
      '--wave_clients=2',
    )
    states, reports = zip(
      self.outcome('--data_source=npz:file=images', *common),
      self.outcome(
        '--data_source=npz:file=images', '--data_memory_gb=0', *common
      ),
      self.outcome(
        '--data_source=sqlite:file=images.sqlite,num_classes=3', *common
      ),
      strict=True,
    )
    self.assertLen(set(states), 1)
    columns = [report['global']['train'] for report in reports]
    for other in columns[1:]:
      self.assertEqual(other['client_id'], columns[0]['client_id'])
      self.assertEqual(other['accuracy/sum'], columns[0]['accuracy/sum'])
      np.testing.assert_allclose(
        other['loss/sum'], columns[0]['loss/sum'], rtol=1e-5
      )

  def test_the_example_of_the_docs(self):
    """docs/add_a_data_set.md: its file, its flags, and nothing else."""
    text = DOCS.read_text()
    module, more = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    command = re.search(r'    python -m experiments(.*?)\n\n', text, re.DOTALL)
    (self.folder / 'my_sensors.py').write_text(
      module + '\n\nfrom fedjax_ext import models\n\n\n' + more
    )
    rng = np.random.default_rng(0)
    for user in range(6):
      label = rng.integers(0, 3, 30)
      x = rng.standard_normal((30, 6)) + 3 * np.eye(6)[label]
      np.savetxt(self.folder / f'u{user}.csv', np.c_[x, label], delimiter=',')
    flags = [
      flag
      for flag in command.group(1).replace('\\\n', ' ').split()
      if flag.startswith('--')
      and not flag.startswith(('--workdir', '--data_dir', '--num_rounds'))
    ]
    self.assertGreater(len(flags), 3)
    _, report = self.outcome(
      *flags, '--num_rounds=20', PYTHONPATH=str(self.folder)
    )
    test = report['global']['test']
    self.assertLen(test['client'], 6)
    correct = sum(test['accuracy/sum']) / sum(test['accuracy/weight'])
    self.assertGreater(correct, 0.6)
    _, report = self.outcome(
      *flags,
      '--data_partition=my_sensors.halves:num_clients=4',
      '--model=my_sensors.wider:width=8',
      '--cohort_size=4',
      '--num_rounds=2',
      PYTHONPATH=str(self.folder),
    )
    self.assertLen(report['global']['train']['client'], 4)

  def test_conversion(self):
    """Any source as memory-mapped columns: the same run from the folder."""
    out = self.folder / 'digits'
    done = subprocess.run(
      [
        sys.executable,
        '-m',
        'fedjax_ext.training.convert_data',
        '--data_source=digits',
        f'--out={out}',
      ],
      cwd=runs.ROOT,
      env=runs.environment(),
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn('1797 rows', done.stdout)
    flags = ('--num_rounds=2',)
    converted = self.outcome('--data_source=npz:file=digits', *flags)
    self.assertEqual(converted, self.outcome(*flags))


if __name__ == '__main__':
  absltest.main()
