"""The mixed FL binary: modes, server data, bad input, resuming."""

import json
import pathlib
import signal
import tempfile

import numpy as np
from absl.testing import absltest

from fedjax_ext.algorithms import MODES
from tests.experiments import runs

MODULE = 'experiments.mixed_fl.run'
SMILE = [
  '--data_source=synthetic_smile:num_clients=12,num_test_clients=6,examples=8',
  '--model=softmax_regression',
  '--num_rounds=2',
  '--cohort_size=4',
  '--client_batch_size=4',
  '--num_devices=1',
]
MOVIE = [
  '--data_source=synthetic_retrieval:num_items=60,num_genres=4,num_clients=12,'
  'num_test_clients=5,timeline=13',
  '--model=dual_encoder',
  '--loss=hinge',
  '--server_spreadout=0.01',
  '--num_rounds=2',
  '--cohort_size=4',
  '--client_batch_size=4',
  '--num_devices=1',
]
BAD = {
  'mode': (['--mode=three_way'], ['--mode', 'three_way']),
  'no server': (['--server_data=client:name=nobody'], ["'nobody'"]),
  'selection': (['--server_data=classes'], ['server_data=classes', 'labels']),
  'nothing': (['--server_data=classes:labels=7'], ['for the server', 'none']),
  'all': (
    ['--server_data=classes:labels=0/1'],
    ['stay on clients', 'none'],
  ),
  'steps': (['--server_steps=-1'], ['server_steps=-1']),
  'batch': (['--server_batch_size=0'], ['server_batch_size=0']),
  'fresh': (['--gradients=fresh'], ['mode=two_way', 'parallel_training']),
  'client side': (['--mode=client_side'], ['client_side', 'oracle']),
  'merge': (['--merge_weights=1'], ['--merge_weights']),
  'source': (['--server_data_source=digits'], ["'x'", 'server']),
  'spreadout': (['--server_spreadout=0.1'], ['--server_spreadout']),
  'negative': (['--server_spreadout=-1'], ['server_spreadout=-1']),
  'batch norm': (
    ['--model=tests.experiments.mixed_fl_test.batch_norm_model'],
    ['BatchNorm'],
  ),
}


def batch_norm_model(*, num_classes, input_shape):
  """A model with moving statistics."""
  import jax.numpy as jnp
  from flax import linen as nn

  from fedjax_ext.models import from_module

  class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, mask=None):
      x = nn.BatchNorm(use_running_average=not train)(x, mask=mask)
      return nn.Dense(num_classes)(x.astype(jnp.float32))

  return from_module(Normed(), input_shape)


def saved(workdir):
  """A moment: a checkpoint is finished."""
  folder = workdir / 'checkpoints'
  return folder.is_dir() and bool(runs.checkpoints(workdir))


class MixedTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )

  def metrics(self, commands):
    """{name: metrics of final.json} of commands {name: flags}."""
    at = lambda name: self.folder / name
    results = runs.several(
      *([*f, f'--workdir={at(n)}'] for n, f in commands.items()),
      module=MODULE,
    )
    found = {}
    for name, (code, stdout, stderr) in zip(commands, results, strict=True):
      self.assertEqual(code, 0, f'{name}: {stderr}')
      self.assertIn('final: round=', stdout.splitlines()[-1])
      final = json.loads((at(name) / 'final.json').read_text())
      self.assertFalse(final['diverged'])
      found[name] = final['metrics']
    return found

  def test_modes(self):
    modes = [mode for mode in MODES if mode != 'client_side']
    commands = {mode: [*SMILE, f'--mode={mode}'] for mode in modes}
    commands['fresh'] = [*SMILE, '--mode=two_way', '--gradients=fresh']
    commands['warm'] = [*SMILE, '--mode=two_way', '--gradients=warm']
    commands['random'] = [*SMILE, '--server_data=random:fraction=0.3']
    found = self.metrics(commands)
    losses = {n: m['test/loss/pooled'] for n, m in found.items()}
    self.assertLen(set(losses.values()), len(losses), losses)
    self.assertEqual(found['one_way']['test/examples'], 240)
    rows = (self.folder / 'two_way' / 'metrics.jsonl').read_text().splitlines()
    row = json.loads(rows[-1])
    for name in ('central_loss', 'central_delta_norm', 'augmentation_norm'):
      self.assertGreater(row[name], 0)

  def test_regulariser(self):
    modes = ('fed_only', 'parallel_training', 'one_way', 'client_side')
    found = self.metrics({m: [*MOVIE, f'--mode={m}'] for m in modes})
    # An oracle of a loss without data is the same as client_side.
    same = self.metrics({'oracle': [*MOVIE, '--mode=oracle']})['oracle']
    self.assertEqual(same, found['client_side'])
    values = [m['test/mrr/pooled'] for m in found.values()]
    self.assertLen(set(values), len(values))
    costs = {
      m: json.loads((self.folder / m / 'costs.json').read_text()) for m in modes
    }
    model = 61 * 16 + 16 * 16 + 16
    self.assertEqual(costs['client_side']['floats_down'], model)
    self.assertEqual(costs['one_way']['floats_down'], model + 61 * 16)
    self.assertLess(costs['parallel_training']['floats_down'], model)
    extra = lambda m, form: (
      costs[m][f'multiply_adds_a_step_{form}']
      - costs[m]['multiply_adds_a_step']
    )
    self.assertEqual(extra('client_side', 'pairs'), 61 * 61 * 16)
    self.assertEqual(extra('client_side', 'gram'), 61 * 16 * 16)
    self.assertEqual(extra('one_way', 'pairs'), 0)

  def test_text_from_two_sources(self):
    rng = np.random.default_rng(0)
    for name, letters in (('roles', 'abcdef'), ('people', 'uvwxyz')):
      with (self.folder / f'{name}.jsonl').open('w') as file:
        for client in range(10):
          text = ''.join(rng.choice([*letters], 60))
          texts = [text] if name == 'roles' else {'topic': text}
          file.write(json.dumps({'client': client, 'texts': texts}) + '\n')
    source = 'text_jsonl:file={}.jsonl,text=texts,sequence_length=12'
    flags = [
      f'--data_source={source.format("roles")}',
      f'--server_data_source={source.format("people")}',
      f'--data_dir={self.folder}',
      '--data_test_fraction=0',
      '--data_unparticipating_fraction=0.3',
      '--model=char_lstm:hidden=8',
      '--num_rounds=2',
      '--cohort_size=3',
      '--client_batch_size=4',
      '--num_devices=1',
    ]
    metrics = self.metrics({'text': flags})['text']
    self.assertEqual(metrics['unparticipating/clients'], 3)
    self.assertGreater(metrics['server_test/loss/pooled'], 0)
    # Two of ten people are held out, six windows each.
    self.assertEqual(metrics['server_test/examples'], 12)

  def test_bad_input(self):
    results = runs.several(
      *(
        [*SMILE, f'--workdir={self.folder / name}', *flags]
        for name, (flags, _) in BAD.items()
      ),
      module=MODULE,
    )
    for (name, (_, said)), result in zip(BAD.items(), results, strict=True):
      with self.subTest(name):
        code, stdout, stderr = result
        line = stderr.splitlines()[-1]
        for words in said:
          self.assertIn(words, line)
        self.assertEqual((code, stdout), (2, ''), stderr)
        self.assertNotIn('Traceback', stderr)

  def test_two_way_resumes_with_its_gradients(self):
    flags = [MODULE, *SMILE, '--mode=two_way', '--num_rounds=16']
    flags += ['--checkpoint_every=2', '--eval_every=8']
    reference, workdir = self.folder / 'reference', self.folder / 'run'
    self.assertEqual(runs.run(reference, *flags).returncode, 0)
    done = runs.stop(workdir, signal.SIGKILL, saved, *flags)
    self.assertEqual(done.returncode, -signal.SIGKILL)
    done = runs.run(workdir, *flags)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn('Resuming after round', done.stderr)
    self.assertEqual(runs.outcome(workdir), runs.outcome(reference))


if __name__ == '__main__':
  absltest.main()
