"""The federated averaging binary, started the way users start it."""

import json
import os
import pathlib
import re
import shutil
import signal
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from tests.experiments import runs

FINAL = re.compile(r'final: round=\d+ test_accuracy=0\.\d+ workdir=')
PROGRESS = re.compile(r'\d\d:\d\d:\d\d ')
SCAFFOLD = '--algorithm=scaffold'
BLOCKED = ('tqdm', 'tensorboardX', 'tensorflow_datasets', 'matplotlib')
BLOCKER = f"""
import sys

class Blocker:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in {BLOCKED}:
      raise ImportError(name + ' is blocked')

sys.meta_path.insert(0, Blocker())
"""


class TestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.folder = pathlib.Path(self.enterContext(folder))
    self.workdir = self.folder / 'run'

  def error_of(self, stderr: str) -> str:
    """The one line beside progress; there must be one, and no other."""
    lines = stderr.splitlines()
    rest = [line for line in lines if not PROGRESS.match(line)]
    self.assertLen(rest, 1, stderr)
    self.assertStartsWith(rest[0], 'error: ')
    return rest[0]

  def assertStartsWith(self, text: str, start: str) -> None:
    self.assertTrue(text.startswith(start), text)

  def check_finished(self, done, reference: pathlib.Path) -> None:
    """A run ended well, with the bits of a reference."""
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertRegex(done.stdout.splitlines()[-1], FINAL)
    self.assertEqual(runs.outcome(self.workdir), runs.outcome(reference))


class FinishedRunTest(TestCase):
  def test_last_line_and_files(self):
    workdir, stdout = runs.undisturbed()
    last = stdout.splitlines()[-1]
    self.assertRegex(last, FINAL)
    self.assertStartsWith(last, f'final: round={runs.NUM_ROUNDS} ')
    self.assertTrue(last.endswith(f'workdir={workdir}'))
    final = json.loads((workdir / 'final.json').read_text())
    accuracy = final['metrics']['test/accuracy/pooled']
    self.assertIn(f'test_accuracy={accuracy:.4f}', last)
    self.assertGreater(accuracy, 0.3)
    self.assertEqual(
      sorted(path.name for path in workdir.glob('[!.]*')),
      [
        'bands.png',
        'checkpoints',
        'curves.png',
        'final.json',
        'manifest.json',
        'metrics.csv',
        'metrics.jsonl',
        'partition.png',
        'report.json',
        'tensorboard',
      ],
    )
    self.assertEqual(runs.checkpoints(workdir), [12, 16])

  def test_uses_all_cores(self):
    workdir, _ = runs.undisturbed()
    manifest = json.loads((workdir / 'manifest.json').read_text())
    cores = len(os.sched_getaffinity(0))
    self.assertEqual(manifest['layout']['num_devices'], min(cores, 4))

  def test_same_command_twice(self):
    """In a workdir of its own, and then there once more, without prefetch."""
    reference, _ = runs.undisturbed()
    self.check_finished(runs.run(self.workdir), reference)
    done = runs.run(self.workdir, '--noprefetch')
    self.check_finished(done, reference)
    self.assertIn('Resuming after round 16 of', done.stderr)

  def test_without_optional_packages(self):
    """Bits do not depend on tqdm, tensorboardX, matplotlib and tfds."""
    (self.folder / 'sitecustomize.py').write_text(BLOCKER)
    reference, _ = runs.undisturbed()
    done = runs.run(self.workdir, PYTHONPATH=str(self.folder))
    self.check_finished(done, reference)
    self.assertIn('tensorboardX is not installed', done.stderr)
    self.assertIn('matplotlib is not installed', done.stderr)
    self.assertFalse((self.workdir / 'tensorboard').exists())
    self.assertFalse((self.workdir / 'curves.png').exists())


class StoppedRunTest(TestCase):
  def kill(self, moment, *flags):
    done = runs.stop(self.workdir, signal.SIGKILL, moment, *flags)
    self.assertEqual(done.returncode, -signal.SIGKILL, done.stderr)
    self.assertFalse((self.workdir / 'final.json').exists())

  def test_sigkill_three_times_with_client_states(self):
    """Killed before, between and while writing checkpoints."""
    reference, _ = runs.undisturbed(SCAFFOLD)
    self.kill(runs.set_up, SCAFFOLD)
    self.kill(runs.in_round(6), SCAFFOLD)
    self.kill(runs.writing_checkpoint(8), SCAFFOLD)
    self.assertNotIn(16, runs.checkpoints(self.workdir))
    done = runs.run(self.workdir, SCAFFOLD)
    self.check_finished(done, reference)
    self.assertRegex(done.stderr, r'Resuming after round (4|8|12) of ')
    rows = runs.client_rows(self.workdir)
    self.assertEqual(rows, runs.client_rows(reference))
    # All took part; the owner of the test rows never does.
    self.assertLen(set(rows.values()), runs.NUM_CLIENTS + 1)

  def test_sigkill_while_a_checkpoint_is_written(self):
    reference, _ = runs.undisturbed()
    self.kill(runs.writing_checkpoint(8))
    self.check_finished(runs.run(self.workdir), reference)

  def test_sigterm(self):
    reference, _ = runs.undisturbed()
    done = runs.stop(self.workdir, signal.SIGTERM, runs.in_round(2))
    self.assertEqual(done.returncode, 128 + signal.SIGTERM)
    line = self.error_of(done.stderr)
    found = re.match(r'error: Stopped by SIGTERM after round (\d+);', line)
    self.assertTrue(found, line)
    self.assertIn(str(self.workdir), line)
    round = int(found[1])
    self.assertEqual(runs.checkpoints(self.workdir)[-1], round)
    done = runs.run(self.workdir)
    self.assertIn(f'Resuming after round {round} of', done.stderr)
    self.check_finished(done, reference)

  def test_failed_write(self):
    """A limit on the size of files stands for a disk that fills up."""
    flags = ('--eval_every=1', '--checkpoint_every=2')
    limit = ('bash', '-c', 'ulimit -f 8; exec "$@"', 'bash')
    done = runs.run(self.workdir, *flags, prefix=limit)
    self.assertEqual(done.returncode, 1, done.stderr)
    self.assertIn('File too large', self.error_of(done.stderr))
    saved = runs.checkpoints(self.workdir)
    self.assertNotEmpty(saved)
    done = runs.run(self.workdir, *flags)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn(f'Resuming after round {saved[-1]} of', done.stderr)
    # Evaluating more often does not change what is trained.
    reference, _ = runs.undisturbed()
    got, expected = runs.outcome(self.workdir), runs.outcome(reference)
    self.assertEqual(got['final'], expected['final'])
    self.assertEqual(got['report'], expected['report'])
    self.assertLen(got['rows'], runs.NUM_ROUNDS)

  def test_unreadable_newest_checkpoint(self):
    reference, _ = runs.undisturbed()
    shutil.copytree(reference, self.workdir)
    newest = self.workdir / 'checkpoints' / '16'
    for path in newest.glob('server_state/d/*'):
      path.write_bytes(path.read_bytes()[:-10])
    done = runs.run(self.workdir)
    self.check_finished(done, reference)
    self.assertIn(f'Checkpoint {newest} is unreadable', done.stderr)
    self.assertIn('Resuming after round 12 of', done.stderr)
    self.assertTrue((self.workdir / 'unreadable_checkpoints' / '16.0').exists())


class RefusedTest(TestCase):
  """One line on stderr and exit code 2, for whatever users get wrong."""

  def write(self, name: str, **changes) -> list[str]:
    """Flags of a data file of 60 images, with some columns changed."""
    rng = np.random.default_rng(0)
    columns = {
      'image': rng.standard_normal((60, 4, 4, 1)).astype(np.float32),
      'label': rng.integers(0, 3, 60),
      'client': np.repeat(np.arange(6), 10),
    }
    columns = {k: v for k, v in (columns | changes).items() if v is not None}
    np.savez(self.folder / f'{name}.npz', **columns)
    return self.file(name)

  def file(self, name: str) -> list[str]:
    return [
      f'--data_source=npz:file={name}',
      f'--data_dir={self.folder}',
      '--data_partition=client',
      '--cohort_size=3',
    ]

  def cases(self) -> dict[str, tuple[list[str], list[str]]]:
    """{name: (flags, what the line must say)}."""
    broken = np.zeros((60, 4, 4, 1), np.float32)
    broken[7, 1, 2, 0] = np.nan
    (self.folder / 'junk.npz').write_text('not a zip file')
    return {
      'flag value': (['--algorithm=nope'], ['algorithm', 'nope', 'scaffold']),
      'not a number': (['--num_rounds=many'], ['num_rounds', 'many']),
      'unknown flag': (['--no_such_flag=1'], ['no_such_flag']),
      'stray argument': (['stray'], ['stray']),
      'no flag file': (['--flagfile=/no/such/file'], ['/no/such/file']),
      'no rounds': (['--num_rounds=0'], ['num_rounds >= 1', 'num_rounds=0']),
      'cohort': (['--cohort_size=11'], ['<= 10', 'cohort_size=11']),
      'empty cohort': (['--cohort_size=0'], ['cohort_size=0']),
      'batch': (['--client_batch_size=0'], ['client_batch_size=0']),
      'evaluation batch': (['--eval_batch_size=0'], ['eval_batch_size=0']),
      'rate': (['--client_learning_rate=nan'], ['client_learning_rate=nan']),
      'width': (['--model=mlp:hidden=a'], ['hidden', 'model', 'hidden=a']),
      'model': (['--model=nope'], ['model', 'nope', 'resnet8']),
      'model setting': (
        ['--model=mlp:depth=2'],
        ["'depth=2'", 'hidden'],
      ),
      'source': (['--data_source=nope'], ['data_source', 'nope', 'npz']),
      'source module': (
        ['--data_source=no_such_module.load'],
        ['no_such_module.load', 'importable'],
      ),
      'source function': (
        ['--data_source=fedjax_ext.data.nope'],
        ['nope', 'fedjax_ext.data'],
      ),
      'natural clients': (['--data_partition=client:n=1'], ['client:n=1']),
      'partition function': (
        ['--data_partition=numpy.arange'],
        ['numpy.arange', 'num_clients and seed'],
      ),
      'model function': (
        ['--model=fedjax_ext.data.load_digits'],
        ['load_digits', 'input_shape and num_classes'],
      ),
      'model of other inputs': (
        ['--model=char_lstm'],
        ['tokens', 'model=char_lstm', '[8, 8, 1]'],
      ),
      'no tokens': (['--expected_length=80'], ['expected_length=0']),
      'no folder there': (
        ['--data_source=npz:file=a', '--data_dir=/no/such'],
        ['--data_dir=/no/such'],
      ),
      'integers': (
        self.write('integers', image=np.full((60, 4, 4), 300)),
        ["'image'", '0..255', '300'],
      ),
      'rows': (
        self.write('rows', x=np.zeros((59, 4))),
        ['x of rows', '60 rows', '[59, 4]'],
      ),
      'partition': (['--data_partition=nope'], ['data_partition', 'shards']),
      'partition clients': (['--data_partition=iid'], ['num_clients']),
      'partition number': (
        ['--data_partition=dirichlet:num_clients=10,alpha=x'],
        ['alpha', 'float', 'alpha=x'],
      ),
      'skew': (['--data_skew=nope'], ['data_skew', 'rotate']),
      'preprocess': (
        ['--data_preprocess=random_flip+nope'],
        ['data_preprocess', 'nope', 'random_crop'],
      ),
      'crop': (
        ['--data_preprocess=random_crop:size=99'],
        ['size <= 16', 'size=99'],
      ),
      'keep': (['--keep_checkpoints=1'], ['keep_checkpoints >= 2']),
      'seed': (['--seed=-1'], ['seed', '-1']),
      'data seed': (['--data_seed=-1'], ['seed', '-1']),
      'sampling seed': (['--sampling_seed=-1'], ['sampling_seed', '-1']),
      'large seed': ([f'--training_seed={10**20}'], ['training_seed']),
      'optimizer': (
        [SCAFFOLD, '--client_optimizer=adam'],
        ['plain sgd', 'scaffold'],
      ),
      'devices': (['--num_devices=-1'], ['num_devices']),
      'no file': (self.file('missing'), [f'{self.folder}/missing.npz']),
      'no zip': (self.file('junk'), [f'{self.folder}/junk.npz']),
      'no folder': (['--data_source=npz:file=a'], ['--data_dir']),
      'no file name': (
        ['--data_source=npz', f'--data_dir={self.folder}'],
        ['data_source=npz with file'],
      ),
      'label': (
        self.write('labels') + ['--data_source=npz:file=labels,num_classes=2'],
        ['label of labels in 0..1', 'got 2'],
      ),
      'negative label': (
        self.write('negative', label=np.full(60, -1)),
        ['label of negative', 'got -1'],
      ),
      'NaN': (self.write('nan', image=broken), ["'image'", 'NaN', 'row 7']),
      'client column': (
        self.write('clients')
        + ['--data_source=npz:file=clients,client_column=writer'],
        ['client', 'clients'],
      ),
      'no client column': (
        self.write('nobody', client=None),
        ['client column in nobody'],
      ),
      'no image': (self.write('blind', image=None), ['image']),
      'text': (self.write('text', image=np.array(['a'] * 60)), ['image']),
      'group': (self.write('group') + ['--data_group_column=g'], ['g']),
    }

  def test_bad_flags_and_files(self):
    cases = self.cases()
    at = lambda name: self.folder / f'workdir {name}'
    results = runs.several(
      *(
        [*runs.TINY, '--num_rounds=1', f'--workdir={at(name)}', *flags]
        for name, (flags, _) in cases.items()
      )
    )
    for (name, (_, said)), result in zip(cases.items(), results, strict=True):
      with self.subTest(name):
        code, stdout, stderr = result
        line = self.error_of(stderr)
        for words in said:
          self.assertIn(words, line)
        self.assertEqual((code, stdout), (2, ''))
        self.assertFalse(at(name).exists())

  def test_tables_beside_the_examples_are_fine(self):
    flags = self.write('notes', note=np.array(3), names=np.array(['a', 'b']))
    flags += ['--num_rounds=1']
    ((code, stdout, stderr),) = runs.several(
      [f'--workdir={self.workdir}', *runs.TINY, *flags]
    )
    self.assertEqual(code, 0, stderr)
    self.assertIn('final: round=1', stdout)

  def test_workdirs(self):
    reference, _ = runs.undisturbed()
    self.workdir.mkdir()
    shutil.copy(reference / 'manifest.json', self.workdir)
    for folder in ('run', 'broken'):
      (self.folder / folder / 'checkpoints' / '4').mkdir(parents=True)
    broken, file = self.folder / 'broken', self.folder / 'file'
    (broken / 'manifest.json').write_text('{"flags": {"se')
    file.write_text('')
    other = ['--seed=3', '--client_learning_rate=0.2']
    none, another, unreadable, no_folder = runs.several(
      [*runs.TINY],
      [f'--workdir={self.workdir}', *runs.TINY, *other],
      [f'--workdir={broken}', *runs.TINY],
      [f'--workdir={file}', *runs.TINY],
    )
    for code, stdout, stderr in (none, another, unreadable, no_folder):
      self.error_of(stderr)
      self.assertEqual((code, stdout), (2, ''))
    self.assertIn('--workdir', none[2])
    self.assertIn(str(broken / 'manifest.json'), unreadable[2])
    self.assertIn(str(self.workdir), another[2])
    for difference in (
      'flags.seed: 0 in the workdir, now 3',
      'flags.client_learning_rate: 0.05 in the workdir, now 0.2',
    ):
      self.assertIn(difference, another[2])
    # A third one: the data's seed is --seed, so the partition is another.
    self.assertIn('Different: data: ', another[2])
    self.assertEqual(another[2].count(' in the workdir, now '), 3)
    self.assertEqual(
      sorted(path.name for path in self.workdir.glob('[!.]*')),
      ['checkpoints', 'manifest.json'],
    )
    self.assertIn(str(file), no_folder[2])

  def test_help(self):
    ((_, stdout, stderr),) = runs.several(['--help'])
    self.assertEqual(stderr, '')
    for name in (
      'algorithm',
      'client_batch_size',
      'client_epochs',
      'client_learning_rate',
      'cohort_size',
      'data_skew',
      'data_partition',
      'data_source',
      'num_rounds',
      'server_learning_rate',
      'server_optimizer',
      'workdir',
    ):
      self.assertRegex(stdout, rf'--(\[no\])?{name}:')


if __name__ == '__main__':
  absltest.main()
