"""The retrieval binary: every algorithm and control, bad input, resuming."""

import json
import pathlib
import tempfile

from absl.testing import absltest

from tests.experiments import runs

MODULE = 'experiments.retrieval.run'
TINY = [
  '--data_source=synthetic_retrieval:num_items=60,num_genres=4,num_clients=12,'
  'num_validation_clients=4,num_test_clients=5,timeline=13',
  '--num_rounds=2',
  '--cohort_size=4',
  '--client_batch_size=4',
  '--eval_every=1',
  '--num_devices=1',
]
VARIANTS = {
  'batch_softmax': [],
  'hinge': ['--loss=hinge', '--spreadout_table=0.01'],
  'pairs': ['--loss=hinge', '--spreadout_table=0.01', '--table_form=pairs'],
  'global': ['--loss=global_softmax', '--pad_is_candidate'],
  'shuffled': ['--shuffle_across_users'],
  'dense': ['--nosparse_rows'],
  'decayed': ['--client_weight_decay=0.5'],
  'decayed_dense': ['--client_weight_decay=0.5', '--nosparse_rows'],
  'centralised': [
    '--algorithm=centralised',
    '--cohort_size=1',
    '--client_steps=5',
    '--client_remainder=fill',
    '--client_optimizer=adam',
    '--client_learning_rate=0.01',
  ],
  'popularity': ['--algorithm=popularity'],
}
BAD = {
  'loss': (['--loss=hunge'], ['--loss', 'hunge']),
  'lambda': (['--loss=hinge', '--spreadout_table=-1'], ['spreadout', '-1']),
  'model': (['--model=mlp'], ['model', 'mlp', 'dual_encoder']),
  'towers': (['--model=dual_encoder:context_hidden=8'], ['towers', '8', '16']),
  'labels': (['--data_source=digits'], ['context', 'label']),
  'no file': (
    ['--data_source=movielens', '--data_dir=/nowhere'],
    ['--data_dir=/nowhere'],
  ),
  'steps': (
    ['--algorithm=centralised', '--cohort_size=1'],
    ['client_steps', '0'],
  ),
  'cohort': (['--algorithm=centralised'], ['cohort_size', '4']),
}


class RetrievalTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )

  def test_variants(self):
    at = lambda name: self.folder / name
    results = runs.several(
      *([*TINY, f'--workdir={at(n)}', *f] for n, f in VARIANTS.items()),
      module=MODULE,
    )
    found = {}
    for (name, _), (code, stdout, stderr) in zip(
      VARIANTS.items(), results, strict=True
    ):
      with self.subTest(name):
        self.assertEqual(code, 0, stderr)
        metrics = json.loads((at(name) / 'final.json').read_text())['metrics']
        found[name] = metrics
        for part in ('validation', 'test'):
          for k in (1, 5, 10):
            value = metrics[f'{part}/recall_at_{k}/pooled']
            self.assertIn(
              f'{part}_recall_at_{k}={value:.4f}', stdout.splitlines()[-1]
            )
        self.assertEqual(metrics['test/clients'], 5)
        self.assertEqual(metrics['test/examples'], 60)
    # Sparse clients are the same as dense ones; so are both table forms.
    for a, b in (
      ('batch_softmax', 'dense'),
      ('hinge', 'pairs'),
      ('decayed', 'decayed_dense'),
    ):
      self.assertAlmostEqual(
        found[a]['test/mrr/pooled'], found[b]['test/mrr/pooled'], delta=1e-4
      )
    different = [
      found[name]['test/mrr/pooled']
      for name in ('batch_softmax', 'hinge', 'global', 'shuffled', 'popularity')
    ]
    self.assertLen(set(different), len(different))

  def test_bad_input(self):
    runs.check_refused(self, self.folder, BAD, base=TINY, module=MODULE)

  def test_same_again(self):
    flags = [MODULE, *TINY, '--loss=hinge', '--spreadout_table=0.01']
    runs.check_same_again(self, self.folder, *flags, rounds=2)


if __name__ == '__main__':
  absltest.main()
