"""The loop: same bits with prefetch, after interruptions and failures."""

import functools
import json
import logging
import os
import pathlib
import resource
import signal
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext import core
from fedjax_ext.training import loop
from fedjax_ext.training.checkpoints import digest
from fedjax_ext.training.writers import MetricWriter
from tests.training import small_runs


@functools.cache
def reference(name: str) -> dict:
  """The outcome of a run that nothing stopped."""
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder)
    result = small_runs.train(workdir, small_runs.algorithm(name))
    return small_runs.outcome(result, workdir)


def send(number: int):
  return lambda: os.kill(os.getpid(), number)


def fail():
  raise ZeroDivisionError('a bug in the algorithm')


class TestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.workdir = pathlib.Path(self.enterContext(folder))

  def finish(self, name: str, **schedule):
    """Runs to the end without interference."""
    result = small_runs.train(
      self.workdir, small_runs.algorithm(name), **schedule
    )
    return small_runs.outcome(result, self.workdir)

  def interfere(self, name, round, act, error, **schedule):
    """Runs until something in a round raises; returns what."""
    algorithm = small_runs.during(small_runs.algorithm(name), round, act)
    with self.assertRaises(error) as caught:
      small_runs.train(self.workdir, algorithm, **schedule)
    return caught.exception


class SameBitsTest(TestCase):
  @parameterized.parameters('scaffold', 'fed_avg')
  def test_without_prefetch(self, name):
    self.assertEqual(self.finish(name, prefetch=False), reference(name))

  def test_the_reference_is_not_trivial(self):
    got = reference('scaffold')
    self.assertLen(got['rows'], 6)
    self.assertEqual(got['rows'], got['result rows'])
    losses = [r['test/loss/pooled'] for r in got['rows'] if 'test/clients' in r]
    self.assertLess(losses[-1], losses[0])
    self.assertNotEqual(got['state'], reference('fed_avg')['state'])

  @parameterized.parameters('scaffold', 'fed_avg')
  def test_stopped_after_every_round(self, name):
    for round in range(1, 6):
      stop = self.interfere(name, round, send(signal.SIGTERM), loop.Interrupted)
      self.assertEqual(stop.signal, signal.SIGTERM)
      self.assertIn(f'SIGTERM after round {round};', str(stop))
      self.assertIn(str(self.workdir), str(stop))
      self.assertEqual(small_runs.saved_rounds(self.workdir)[-1], round)
      self.assertFalse((self.workdir / 'final.json').exists())
    self.assertEqual(self.finish(name), reference(name))

  @parameterized.parameters((signal.SIGTERM, False), (signal.SIGINT, True))
  def test_signal_from_a_metric_writer(self, number, prefetch):
    before = signal.getsignal(number)
    write = MetricWriter.write

    def write_and_send(writer, round, values):
      write(writer, round, values)
      if round == 3:
        os.kill(os.getpid(), number)

    with (
      mock.patch.object(MetricWriter, 'write', write_and_send),
      self.assertRaises(loop.Interrupted) as caught,
    ):
      small_runs.train(
        self.workdir, small_runs.algorithm('scaffold'), prefetch=prefetch
      )
    self.assertEqual(caught.exception.signal, number)
    self.assertIs(signal.getsignal(number), before)
    self.assertEqual(small_runs.saved_rounds(self.workdir), [2, 3])
    self.assertEqual(self.finish('scaffold'), reference('scaffold'))

  def test_signal_in_the_last_round_does_not_stop_the_run(self):
    algorithm = small_runs.during(
      small_runs.algorithm('fed_avg'), 6, send(signal.SIGTERM)
    )
    result = small_runs.train(self.workdir, algorithm)
    self.assertEqual(
      small_runs.outcome(result, self.workdir), reference('fed_avg')
    )

  def test_second_ctrl_c_stops_at_once(self):
    # A suite that runs in the background may have been told to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    self.addCleanup(signal.signal, signal.SIGINT, before)

    def twice():
      noting = signal.getsignal(signal.SIGINT)
      os.kill(os.getpid(), signal.SIGINT)
      while signal.getsignal(signal.SIGINT) == noting:
        time.sleep(0.001)  # two pending signals would be handled as one
      os.kill(os.getpid(), signal.SIGINT)

    self.interfere('scaffold', 5, twice, KeyboardInterrupt)
    self.assertEqual(small_runs.saved_rounds(self.workdir), [2, 4])
    self.assertEqual(self.finish('scaffold'), reference('scaffold'))

  @parameterized.parameters(
    ('scaffold', 1, True),
    ('scaffold', 4, False),
    ('scaffold', 5, True),
    ('fed_avg', 5, True),
  )
  def test_failing_algorithm(self, name, round, prefetch):
    error = self.interfere(
      name, round, fail, ZeroDivisionError, prefetch=prefetch
    )
    self.assertIn('a bug in the algorithm', str(error))
    saved = list(range(2, round, 2))
    self.assertEqual(small_runs.saved_rounds(self.workdir), saved)
    rows = (self.workdir / 'metrics.jsonl').read_text().splitlines()
    self.assertLen(rows, round - 1)
    self.assertEqual(self.finish(name), reference(name))

  def test_second_process_is_kept_out(self):
    refused = []

    def start_another():
      with self.assertRaisesRegex(core.InvalidInput, 'in use') as caught:
        small_runs.train(self.workdir, small_runs.algorithm('fed_avg'))
      refused.append(str(caught.exception))

    algorithm = small_runs.during(
      small_runs.algorithm('fed_avg'), 3, start_another
    )
    result = small_runs.train(self.workdir, algorithm)
    self.assertLen(refused, 1)
    self.assertIn(str(self.workdir), refused[0])
    self.assertEqual(
      small_runs.outcome(result, self.workdir), reference('fed_avg')
    )

  @parameterized.parameters(True, False)
  def test_failing_sampler(self, prefetch):
    with (
      mock.patch.object(loop, 'sample_cohort', side_effect=OSError('no')),
      self.assertRaisesRegex(OSError, 'no'),
    ):
      small_runs.train(
        self.workdir, small_runs.algorithm('fed_avg'), prefetch=prefetch
      )

  @parameterized.parameters('scaffold', 'fed_avg')
  def test_finished_run_is_reported_again_without_training(self, name):
    self.finish(name)
    algorithm = small_runs.algorithm(name)._replace(apply=fail)
    result = small_runs.train(self.workdir, algorithm)
    self.assertEqual(small_runs.outcome(result, self.workdir), reference(name))

  def test_unreadable_newest_checkpoint(self):
    self.interfere('scaffold', 5, fail, ZeroDivisionError)
    newest = self.workdir / 'checkpoints' / '4'
    for path in newest.rglob('*'):
      if path.is_file():
        path.write_bytes(path.read_bytes()[:-1])
    with self.assertLogs('fedjax_ext', logging.WARNING) as logs:
      got = self.finish('scaffold')
    self.assertIn(str(newest), '\n'.join(logs.output))
    self.assertEqual(got, reference('scaffold'))
    self.assertEqual(small_runs.saved_rounds(self.workdir), [4, 6])

  @parameterized.parameters('scaffold', 'fed_avg')
  def test_full_disk(self, name):
    """A limit on the size of files stands for a disk that fills up."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, old)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50, old[1]))
    self.interfere(name, 4, limit, OSError)
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    self.assertEqual(self.finish(name), reference(name))

  @parameterized.parameters('scaffold', 'fed_avg')
  def test_checkpoint_that_cannot_be_written(self, name):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, old)
    save = loop.Checkpoints.save

    def limited(checkpoints, round, *args):
      if round == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, old[1]))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, old)
      try:
        save(checkpoints, round, *args)
        checkpoints.wait()
      finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)

    with (
      mock.patch.object(loop.Checkpoints, 'save', limited),
      self.assertRaisesRegex(OSError, 'Could not write the checkpoint'),
    ):
      small_runs.train(self.workdir, small_runs.algorithm(name))
    self.assertEqual(self.finish(name), reference(name))


class RecordTest(TestCase):
  def test_final_and_report(self):
    result = small_runs.train(self.workdir, small_runs.algorithm('scaffold'))
    final = json.loads((self.workdir / 'final.json').read_text())
    dataset = small_runs.dataset()
    sizes = dataset.splits['train'].sizes(dataset.participating)
    self.assertEqual(final, json.loads(json.dumps(result.summary)))
    self.assertEqual(final['round'], 6)
    self.assertFalse(final['diverged'])
    self.assertEqual(final['clients'], 6)
    self.assertEqual(final['examples'], sizes.sum())
    self.assertEqual(
      final['examples_processed'], sum(row['examples'] for row in result.rows)
    )
    self.assertEqual(final['state_sha256'], digest(result.server_state))
    self.assertEqual(final['layout'], small_runs.layout().describe())
    self.assertIn('jax', final['versions'])
    for name in ('device', 'commit', 'wall_seconds'):
      self.assertIn(name, final)
    last = result.rows[-1]
    self.assertEqual(
      final['metrics'], {k: v for k, v in last.items() if '/' in k}
    )
    report = json.loads((self.workdir / 'report.json').read_text())
    self.assertEqual(list(report), ['global'])
    self.assertEqual(sorted(report['global']), ['test', 'train'])
    train = report['global']['train']
    self.assertEqual(train['client'], dataset.participating.tolist())
    self.assertEqual(train['client_id'], ['0', '1', '2', '3', '4', '5'])
    self.assertEqual(train['examples'], sizes.tolist())
    self.assertEqual(train['accuracy/weight'], sizes.tolist())
    for part, columns in report['global'].items():
      for metric in ('accuracy', 'loss'):
        pooled = sum(columns[f'{metric}/sum']) / sum(columns['examples'])
        self.assertAlmostEqual(
          pooled, final['metrics'][f'{part}/{metric}/pooled'], places=5
        )
    self.assertEqual(
      sorted(path.name for path in self.workdir.glob('[!.]*')),
      [
        'bands.png',
        'checkpoints',
        'client_states',
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

  @parameterized.parameters(False, True)
  def test_what_is_evaluated_when(self, eval_train):
    result = small_runs.train(
      self.workdir,
      small_runs.algorithm('fed_avg'),
      num_rounds=5,
      eval_train=eval_train,
    )
    with_test = [r['round'] for r in result.rows if 'test/loss/pooled' in r]
    with_train = [r['round'] for r in result.rows if 'train/loss/pooled' in r]
    self.assertEqual([row['round'] for row in result.rows], [1, 2, 3, 4, 5])
    self.assertEqual(with_test, [2, 4, 5])
    self.assertEqual(with_train, [2, 4, 5] if eval_train else [5])
    self.assertEqual(small_runs.saved_rounds(self.workdir), [4, 5])

  def test_examples_of_a_round(self):
    dataset = small_runs.dataset()
    sampler = core.uniform_sampler(dataset.participating, cohort_size=3)
    for row in reference('fed_avg')['rows']:
      cohort = core.sample_cohort(sampler, 2, row['round'])
      self.assertEqual(
        row['examples'], dataset.splits['train'].sizes(cohort).sum()
      )
      self.assertEqual(row['clients'], 3)

  def test_dropped_clients_are_named_in_a_warning(self):
    algorithm = small_runs.algorithm('fed_avg', learning_rate=float('inf'))
    with self.assertLogs('fedjax_ext', logging.WARNING) as logs:
      result = small_runs.train(self.workdir, algorithm, num_rounds=2)
    self.assertIn('Round 1: 3 of 3 clients dropped', '\n'.join(logs.output))
    self.assertEqual([r['clients_dropped'] for r in result.rows], [3, 3])
    self.assertFalse(result.summary['diverged'])

  def test_diverged_run_ends_and_says_so(self):
    algorithm = small_runs.algorithm('fed_avg')

    def apply(server_state, client_states, cohort):
      state, states, metrics = algorithm.apply(
        server_state, client_states, cohort
      )
      metrics = metrics | {'train_loss': jnp.inf}
      return jax.tree.map(lambda x: x * jnp.nan, state), states, metrics

    result = small_runs.train(
      self.workdir, algorithm._replace(apply=apply), num_rounds=2
    )
    self.assertTrue(result.summary['diverged'])
    self.assertIsNone(result.summary['metrics']['test/loss/pooled'])
    self.assertTrue(np.isfinite(result.summary['metrics']['test/clients']))

    def refuse(name):
      self.fail(f'{name} is not JSON')

    for name in ('final.json', 'report.json', 'manifest.json'):
      text = (self.workdir / name).read_text()
      json.loads(text, parse_constant=refuse)
    for line in (self.workdir / 'metrics.jsonl').read_text().splitlines():
      row = json.loads(line, parse_constant=refuse)
      self.assertEqual(row['train_loss'], 'inf')

  def test_wall_time_adds_up(self):
    self.interfere('fed_avg', 5, fail, ZeroDivisionError)
    first = json.loads((self.workdir / 'manifest.json').read_text())
    self.assertGreater(first['wall_seconds'], 0)
    self.finish('fed_avg')
    second = json.loads((self.workdir / 'manifest.json').read_text())
    self.assertGreater(second['wall_seconds'], first['wall_seconds'])


class ScheduleTest(parameterized.TestCase):
  @parameterized.parameters(
    ('num_rounds', 0),
    ('eval_every', 0),
    ('checkpoint_every', 0),
    ('keep_checkpoints', 1),
    ('eval_batch_size', 0),
  )
  def test_refuses(self, name, value):
    least = 2 if name == 'keep_checkpoints' else 1
    with self.assertRaisesRegex(
      core.InvalidInput, f'Expected {name} >= {least}, got {name}={value}.'
    ):
      loop.Schedule(**{'num_rounds': 1, name: value})


if __name__ == '__main__':
  absltest.main()
