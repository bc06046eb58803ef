"""The FedLoGe binary: every method, heads and masks in reports, bad input."""

import json
import pathlib
import signal
import tempfile

import pytest
from absl.testing import absltest

from tests.experiments import runs

MODULE = 'experiments.fedloge.run'
TINY = [
  '--data_source=digits',
  '--data_partition=multinomial_dirichlet:num_clients=8,alpha=0.5',
  '--eval=long_tail:imbalance=0.1,largest=120',
  '--model=group_norm_cnn:widths=4/12,groups=2,pool=mean',
  '--num_rounds=2',
  '--cohort_size=4',
  '--client_batch_size=16',
  '--eval_every=2',
  '--num_devices=1',
]
# Own heads, none, no averaging, own layers, a server that trains.
METHODS = ('fedloge', 'fed_avg', 'local_training', 'fed_bn', 'creff')
OTHERS = (
  'fed_prox',
  'ditto',
  'fed_per',
  'fed_rep',
  'fed_babu',
  'fed_rod',
  'fed_etf',
)
NO_GENERIC = ('local_training', 'fed_per', 'fed_rep')
FINE_TUNED = ('fed_avg', 'fed_prox', 'fed_babu', 'fed_etf')
BAD = {
  'classes': (['--model=group_norm_cnn:widths=4/8,pool=mean'], ['10', '8']),
  'features': (['--model=softmax_regression'], ['softmax_regression']),
  'partition': (['--data_partition=iid:num_clients=0'], ['num_clients', '0']),
  'imbalance': (['--eval=long_tail:imbalance=2'], ['imbalance', '2']),
  'eval': (['--eval=three_way'], ['--eval=long_tail']),
  'norms': (
    ['--algorithm=fed_bn', '--model=mlp:hidden=20'],
    ['normalisation', 'fed_bn'],
  ),
}


class FedLoGeTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )

  def check_methods(self, names):
    results = runs.several(
      *(
        [*TINY, f'--workdir={self.folder / name}', f'--algorithm={name}']
        for name in names
      ),
      module=MODULE,
    )
    for name, (code, stdout, stderr) in zip(names, results, strict=True):
      with self.subTest(name):
        self.assertEqual(code, 0, stderr)
        final = json.loads((self.folder / name / 'final.json').read_text())
        metrics = final['metrics']
        self.assertEqual(metrics['test/examples'], 360)
        self.assertEqual(
          'test/accuracy/pooled' in metrics, name not in NO_GENERIC
        )
        for metric in ('accuracy', 'accuracy_masked', 'balanced_accuracy'):
          value = metrics[f'personal:local_test/{metric}/mean']
          self.assertBetween(value, 0, 1)
          self.assertIn(f'personal:local_test_head/{metric}/mean', metrics)
        # Personal models say nothing of the pooled test set.
        self.assertNotIn('personal:test/accuracy/pooled', metrics)
        self.assertEqual(
          'fine_tuned:local_test/accuracy_masked/mean' in metrics,
          name in FINE_TUNED,
        )
        self.assertIn('personal=', stdout.splitlines()[-1])

  @pytest.mark.slow
  def test_other_methods(self):
    self.check_methods(OTHERS)

  def test_methods(self):
    self.check_methods(METHODS)
    heads = json.loads((self.folder / 'fedloge' / 'final.json').read_text())
    for name in (
      'test/accuracy_classifier/pooled',
      'test/balanced_accuracy_auxiliary/pooled',
      'test_tail/accuracy/pooled',
      'personal:local_test/accuracy_transfer_only_masked/mean',
      'personal:local_test_tail/accuracy_global_realigned/mean',
    ):
      self.assertIn(name, heads['metrics'])

  def test_bad_input(self):
    runs.check_refused(self, self.folder, BAD, base=TINY, module=MODULE)

  def test_a_killed_run_resumes_to_the_same_heads(self):
    flags = [MODULE, *TINY, '--num_rounds=8', '--checkpoint_every=2']
    whole, killed = self.folder / 'whole', self.folder / 'killed'
    self.assertEqual(runs.run(whole, *flags).returncode, 0)
    runs.stop(killed, signal.SIGKILL, runs.in_round(3), *flags)
    self.assertFalse((killed / 'final.json').exists())
    self.assertEqual(runs.run(killed, *flags).returncode, 0)
    self.assertEqual(runs.outcome(whole), runs.outcome(killed))
    for name in ('head_norms.csv', 'head_norms.png'):
      self.assertTrue((killed / name).stat().st_size > 0)
    heads = [(p / 'head_norms.csv').read_text() for p in (whole, killed)]
    self.assertEqual(*heads)
    self.assertEqual(
      heads[0].splitlines()[0],
      'class,train_examples,shared,own_present,own_absent',
    )


if __name__ == '__main__':
  absltest.main()
