"""The BDPFL binary: algorithms, attacks and defences, one of a user's own.

And that a killed run resumes to the same personal models.
"""

import json
import pathlib
import signal
import tempfile

import pytest
from absl.testing import absltest

from tests.experiments import runs

MODULE = 'experiments.bdpfl.run'
TINY = [
  '--data_source=digits',
  '--data_partition=dirichlet:num_clients=10,alpha=0.5,min_examples=8',
  '--eval=long_tail',
  '--model=group_norm_cnn:widths=4/8,groups=2',
  '--classifier=Dense_0',
  '--num_rounds=2',
  '--cohort_size=5',
  '--client_batch_size=16',
  '--attack=backdoor',
  '--attackers=2',
  '--attack_poisoned=4',
  '--trigger=grid:size=2,margin=0',
  '--tuning_epochs=1',
  '--eval_every=2',
  '--num_devices=1',
]
GOOD = {
  'bdpfl': ['--algorithm=bdpfl'],
  'tuned': [
    '--algorithm=fed_avg',
    '--client_defenses=fine_tuned',
    '--client_defenses=simple_tuned',
    '--client_defenses=distilled',
    '--defense=fools_gold:layers=Dense_0',
    '--attack=pfedba:size=2,top=5,left=5,loss_steps=4',
  ],
}
OTHERS = {
  'features': [
    '--algorithm=bdpfl',
    '--match=features',
    '--layers=1',
    '--personal_start=init',
  ],
  'late': [
    '--algorithm=fed_prox',
    '--attack=neurotoxin:keep=0.5',
    '--attack_start=2',
    '--attack_epochs=2',
    '--attack_learning_rate=0.01',
    '--defense=multi_krum:keep=2',
  ],
  'alone': [
    '--algorithm=local_training',
    '--attack=pfedba:size=2,top=5,left=5',
  ],
}
BAD = {
  'attack': (['--attack=nothing'], ['attack', 'nothing']),
  'defense': (['--defense=nothing'], ['defense', 'nothing']),
  'trigger': (['--trigger=grid:size=9'], ['trigger', '8x8', '10']),
  'square': (['--attack=pfedba:top=0'], ['within 8x8', 'size=10']),
  'target': (['--attack_target=10'], ['attack_target', '10']),
  'attackers': (['--attackers=5'], ['attackers', '5']),
  'poisoned': (['--attack_poisoned=17'], ['attack_poisoned', '17']),
  'krum': (
    ['--algorithm=fed_avg', '--defense=krum:num_malicious=2'],
    ['cohort_size >= 7', 'cohort_size=5'],
  ),
  'layers': (['--layers=2'], ['layers', '2']),
  'taps': (['--model=mlp:hidden=8'], ['tapped layers', 'mlp']),
  'norm': (['--model=resnet8:norm=batch,width=4'], ['norm=batch']),
  'classifier': (
    ['--algorithm=fed_avg', '--client_defenses=simple_tuned', '--classifier=x'],
    ['classifier', 'Dense_0'],
  ),
  'alone': (
    ['--algorithm=local_training', '--defense=median'],
    ['no defense', 'local_training'],
  ),
  'eval': (['--eval=standard'], ['long_tail']),
}
OWN = """
import jax
import jax.numpy as jnp

from fedjax_ext.attacks.backdoors import train_poisoned
from fedjax_ext.core import weighted_mean
from fedjax_ext.core.reducers import premap


def upside_down(scenario, *, boost: float = 2.0):
  return train_poisoned(scenario, boost=-boost)


def halved(*, share: float = 0.5):
  half = lambda update, weight: jax.tree.map(lambda x: share * x, update)
  return premap(half, weighted_mean())


def white(*, rows: int = 1):
  return lambda x, part: x.at[:, :rows].set(1.0)
"""


class BdpflTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )

  def final(self, name):
    return json.loads((self.folder / name / 'final.json').read_text())

  def test_algorithms(self):
    self.check_algorithms(GOOD)

  @pytest.mark.slow
  def test_other_algorithms(self):
    self.check_algorithms(OTHERS)

  def check_algorithms(self, algorithms):
    results = runs.several(
      *(
        [*TINY, f'--workdir={self.folder / name}', *flags]
        for name, flags in algorithms.items()
      ),
      module=MODULE,
    )
    for name, result in zip(algorithms, results, strict=True):
      with self.subTest(name):
        code, stdout, stderr = result
        self.assertEqual(code, 0, stderr)
        metrics = self.final(name)['metrics']
        kinds = {
          'bdpfl': ['personal'],
          'features': ['personal'],
          'tuned': ['fine_tuned', 'simple_tuned', 'distilled'],
          'late': ['fine_tuned'],
          'alone': [],
        }[name]
        for kind in kinds:
          # Of ten clients two attack, and are not in the means.
          key = f'{kind}:local_test/attack_success/mean'
          self.assertBetween(metrics[key], 0, 1)
          self.assertBetween(metrics[f'{kind}:taken_over'], 0, 1)
          self.assertLessEqual(metrics[f'{kind}:local_test/clients'], 8)
        self.assertIn('attack_success by predictor', stdout)
        if name != 'alone':
          self.assertIn('test/target_rate/pooled', metrics)
        self.assertTrue((self.folder / name / 'heat_maps.png').exists())

  def test_bad_input(self):
    runs.check_refused(self, self.folder, BAD, base=TINY, module=MODULE)

  def test_an_attack_and_a_defence_of_a_users_own(self):
    """One file, named on the command line."""
    (self.folder / 'my_threats.py').write_text(OWN)
    path = str(self.folder)
    digests = set()
    own = [
      '--attack=my_threats.upside_down:boost=3',
      '--trigger=my_threats.white:rows=2',
    ]
    for name, flags in {
      'attack': own,
      'both': [*own, '--defense=my_threats.halved:share=0.25'],
    }.items():
      done = runs.run(
        self.folder / name,
        MODULE,
        *TINY,
        '--algorithm=fed_avg',
        *flags,
        PYTHONPATH=path,
      )
      self.assertEqual(done.returncode, 0, done.stderr)
      digests.add(self.final(name)['state_sha256'])
    self.assertLen(digests, 2)
    manifest = json.loads((self.folder / 'both' / 'manifest.json').read_text())
    # A run notices when a user's function changes.
    for flag in ('attack', 'trigger', 'defense'):
      self.assertLen(manifest['flags'][f'{flag} source'], 1)

  def test_a_killed_run_resumes_to_the_same_models(self):
    """What attackers have learned included."""
    flags = [MODULE, *TINY, '--match=none', '--num_rounds=8']
    flags += ['--checkpoint_every=2', '--attack=pfedba:size=2,top=5,left=5']
    whole, killed = self.folder / 'whole', self.folder / 'killed'
    self.assertEqual(runs.run(whole, *flags).returncode, 0)
    runs.stop(killed, signal.SIGKILL, runs.in_round(3), *flags)
    self.assertFalse((killed / 'final.json').exists())
    self.assertEqual(runs.run(killed, *flags).returncode, 0)
    self.assertEqual(runs.outcome(whole), runs.outcome(killed))


if __name__ == '__main__':
  absltest.main()
