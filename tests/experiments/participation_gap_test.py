"""The participation-gap binary: reports, controls, bad input, resuming."""

import json
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest

from experiments.participation_gap import sources
from tests.experiments import runs

MODULE = 'experiments.participation_gap.run'
TINY = [
  '--data_source=synthetic_styles:num_clients=12,examples=6',
  '--data_partition=client',
  '--model=mlp:hidden=8',
  '--num_rounds=4',
  '--cohort_size=4',
  '--eval_every=2',
  '--client_learning_rate=0.05',
  '--num_devices=1',
]
SEMANTIC = '--data_partition=semantic:num_clients=6,feature=x,components=2'
VARIANTS = {
  'fed_avg': [],
  'centralised': ['--algorithm=centralised'],
  'label': ['--data_partition=dirichlet_client:num_clients=12,sizes=natural'],
  'kl': [SEMANTIC + ',regularisation=0.1'],
  'random': [SEMANTIC + ',regularisation=0.1,matching=random'],
  'few': ['--eval=three_way:participating_clients=4'],
}
BAD = {
  'eval': (['--eval=two_way'], ['eval', 'two_way', 'three_way']),
  'setting': (['--eval=three_way:share=1'], ['share', 'unparticipating']),
  'number': (
    ['--eval=three_way:participating_clients=99'],
    ['participating_clients=99'],
  ),
  'column': (['--eval=three_way:stratify_column=hsf'], ['hsf']),
  'twice': (['--data_test_fraction=0.3'], ['data_test_fraction', '--eval']),
  'embedding': (
    [SEMANTIC + ',embedding=my.encoder'],
    ['embedding=my.encoder'],
  ),
  'sizes': (
    ['--data_partition=dirichlet_client:num_clients=5,sizes=natural'],
    ['num_clients=12', 'num_clients=5'],
  ),
  'no file': (
    [
      '--data_source=experiments.participation_gap.sources.writers',
      '--data_dir=/nowhere',
    ],
    ['/nowhere/mnist_writers.npz'],
  ),
}


class WritersTest(absltest.TestCase):
  def test_made_up_writers(self):
    made = sources.writers()
    self.assertEqual(made.name, 'made_up_writers')
    image, label = made.features['image'], made.features['label']
    self.assertEqual((image.shape, image.dtype), ((18264, 28, 28), np.uint8))
    np.testing.assert_array_equal(np.unique(label), np.arange(10))
    self.assertGreater(image.max(), 200)
    writers, sizes = np.unique(made.client, return_counts=True)
    self.assertLen(writers, 761)
    self.assertEqual(set(sizes), {24})
    # A writer belongs to one population.
    hsf = made.features['hsf'].reshape(761, 24)
    self.assertTrue((hsf == hsf[:, :1]).all())
    some = sources.writers(num_writers=190)
    self.assertLen(np.unique(some.client), 190)


class ParticipationGapTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )

  def test_variants(self):
    results = runs.several(
      *(
        [*TINY, f'--workdir={self.folder / name}', *flags]
        for name, flags in VARIANTS.items()
      ),
      module=MODULE,
    )
    gaps = set()
    for name, (code, stdout, stderr) in zip(VARIANTS, results, strict=True):
      with self.subTest(name):
        self.assertEqual(code, 0, stderr)
        workdir = self.folder / name
        final = json.loads((workdir / 'final.json').read_text())
        metrics = final['metrics']
        self._check_gaps(metrics, workdir)
        gap = metrics['gap/accuracy/participation']
        gaps.add(gap)
        self.assertIn(f'participation_gap={gap:.4f}', stdout.splitlines()[-1])
        self.assertIn(f'participation gap {gap:+.4f} [', stdout)
        self.assertTrue((workdir / 'bands.png').read_bytes()[1:4] == b'PNG')
    self.assertGreater(len(gaps), 3)
    few = json.loads((self.folder / 'few' / 'final.json').read_text())
    self.assertEqual(few['clients'], 4)

  def _check_gaps(self, metrics, workdir):
    """The gaps are differences of the parts, and parts are disjoint."""
    of = lambda part: metrics[f'{part}/accuracy/pooled']
    self.assertAlmostEqual(
      metrics['gap/accuracy/out_of_sample'], of('train') - of('validation'), 6
    )
    self.assertAlmostEqual(
      metrics['gap/accuracy/participation'],
      of('validation') - of('unparticipating'),
      6,
    )
    loss = lambda part: metrics[f'{part}/loss/pooled']
    self.assertAlmostEqual(
      metrics['gap/loss/participation'],
      loss('unparticipating') - loss('validation'),
      5,
    )
    report = json.loads((workdir / 'report.json').read_text())['global']
    clients = {name: set(part['client']) for name, part in report.items()}
    self.assertEqual(clients['train'], clients['validation'])
    self.assertFalse(clients['train'] & clients['unparticipating'])
    rows = [
      json.loads(line)
      for line in (workdir / 'metrics.jsonl').read_text().splitlines()
    ]
    measured = ['gap/accuracy/participation' in row for row in rows]
    self.assertEqual(measured, [False, True, False, True])

  def test_bad_input(self):
    runs.check_refused(self, self.folder, BAD, base=TINY, module=MODULE)

  def test_same_again(self):
    flags = [MODULE, *TINY]
    runs.check_same_again(self, self.folder, *flags, rounds=4)

  def test_another_experiment_takes_the_flag(self):
    """--eval=three_way is everybody's."""
    workdir = self.folder / 'fed_avg'
    done = runs.run(workdir, '--eval=three_way', '--num_rounds=4')
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn('participation gap', done.stdout)
    metrics = json.loads((workdir / 'final.json').read_text())['metrics']
    self.assertTrue(np.isfinite(metrics['gap/accuracy/participation_low']))


if __name__ == '__main__':
  absltest.main()
