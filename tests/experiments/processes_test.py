"""Runs of 2 and 4 processes give the bits of one process."""

import json
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time

from absl.testing import absltest, parameterized

from tests.experiments import runs

FLAGS = ('--num_devices=4', '--num_rounds=6', '--checkpoint_every=2')
SCAFFOLD = (*FLAGS, '--algorithm=scaffold', '--data_memory_gb=0')


def free_port() -> int:
  """A port that nobody listens on."""
  with socket.socket() as one:
    one.bind(('localhost', 0))
    return one.getsockname()[1]


def start(
  workdir: pathlib.Path, count: int, *flags: str
) -> list[subprocess.Popen]:
  """Starts a run of `count` processes."""
  address = f'localhost:{free_port()}'
  return [
    subprocess.Popen(
      runs.command(
        workdir,
        *flags,
        f'--coordinator_address={address}',
        f'--num_processes={count}',
        f'--process_id={number}',
      ),
      cwd=runs.ROOT,
      env=runs.environment(),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(count)
  ]


def finish(processes: list[subprocess.Popen]) -> list[str]:
  """Waits; each process's stdout."""
  said = [p.communicate(timeout=runs.TIMEOUT) for p in processes]
  for process, (_, err) in zip(processes, said, strict=True):
    if process.returncode:
      raise AssertionError(f'exit code {process.returncode}: {err[-3000:]}')
  return [out for out, _ in said]


def outcome(workdir: pathlib.Path) -> tuple[str, str]:
  """The model's hash and the report of every client."""
  final = json.loads((workdir / 'final.json').read_text())
  return final['state_sha256'], (workdir / 'report.json').read_text()


class ProcessesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(folder) / 'run'

  def test_four_processes_of_one_device(self):
    one, _ = runs.undisturbed(*FLAGS)
    said = finish(start(self.workdir, 4, *FLAGS))
    self.assertEqual(outcome(self.workdir), outcome(one))
    self.assertIn('final: round=6', said[0])
    lines = ''.join(said[1:]).splitlines()
    self.assertEqual([x for x in lines if not x.startswith('[Gloo]')], [])

  def test_two_processes_with_client_states_and_streamed_data(self):
    """Also after both were killed, and stopped by a signal to one of them."""
    one, _ = runs.undisturbed(*SCAFFOLD)
    expected = outcome(one)
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
      processes = start(self.workdir, 2, *SCAFFOLD, '--num_rounds=6')
      deadline = time.monotonic() + runs.TIMEOUT
      while not (self.workdir / 'checkpoints' / '2').exists():
        self.assertLess(time.monotonic(), deadline)
        time.sleep(0.005)
      processes[1].send_signal(number)
      if number == signal.SIGKILL:
        processes[0].send_signal(number)
      for process in processes:
        process.communicate(timeout=runs.TIMEOUT)
        self.assertIn(process.returncode, (code, 0))
      finish(start(self.workdir, 2, *SCAFFOLD))
      self.assertEqual(outcome(self.workdir), expected)
      # The next turn begins with what one process has left.
      shutil.rmtree(self.workdir)

  def test_one_that_cannot_start_ends_all(self):
    """Process 1 finds its folder in use."""
    own = self.workdir / 'process_1'
    own.mkdir(parents=True)
    with subprocess.Popen(['flock', own / '.lock', 'sleep', '60']) as holder:
      while not (own / '.lock').exists():
        time.sleep(0.01)
      processes = start(self.workdir, 2, *FLAGS)
      said = [p.communicate(timeout=runs.TIMEOUT)[1] for p in processes]
      holder.terminate()
    self.assertEqual([p.returncode for p in processes], [2, 2])
    self.assertIn('process_1 is in use by another process', said[1])
    self.assertIn('Another process could not start: [1]', said[0])


if __name__ == '__main__':
  absltest.main()
