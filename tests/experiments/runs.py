"""Starts, watches, stops and compares runs of experiment binaries."""

import atexit
import csv
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl.testing import absltest

from fedjax_ext import algorithms, core
from fedjax_ext.losses import classification_task
from fedjax_ext.models import make_model
from fedjax_ext.training.checkpoints import Checkpoints, digest

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODULE = 'experiments.fed_avg.run'
NUM_CLIENTS = 10
NUM_ROUNDS = 16
TINY = (
  '--model=softmax_regression',
  f'--data_partition=dirichlet:num_clients={NUM_CLIENTS},alpha=0.5',
  f'--num_rounds={NUM_ROUNDS}',
  '--cohort_size=4',
  '--eval_every=4',
  '--checkpoint_every=4',
  '--client_learning_rate=0.05',
)
TIMEOUT = 120

Moment = Callable[[pathlib.Path], bool]


def environment(**more: str) -> dict[str, str]:
  """The environment of a user's shell, without what conftest.py sets."""
  hidden = (
    'XLA_FLAGS',
    'JAX_PLATFORMS',
    'JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS',
  )
  kept = {k: v for k, v in os.environ.items() if k not in hidden}
  return kept | {'JAX_PLATFORMS': 'cpu'} | more


def command(workdir: pathlib.Path, *flags: str) -> list[str]:
  """The command line of a tiny run.

  Of fed_avg on the digits, unless the first flag is a module to run with the
  other flags alone.
  """
  module, base = MODULE, TINY
  if flags and flags[0].startswith('experiments.'):
    (module, *flags), base = flags, ()
  return [
    sys.executable,
    '-m',
    module,
    f'--workdir={workdir}',
    *base,
    *flags,
  ]


def run(
  workdir: pathlib.Path, *flags: str, prefix: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess:
  """Runs to the end."""
  return subprocess.run(
    [*prefix, *command(workdir, *flags)],
    cwd=ROOT,
    env=environment(**env),
    capture_output=True,
    text=True,
    timeout=TIMEOUT,
    check=False,
  )


@functools.cache
def undisturbed(*flags: str) -> tuple[pathlib.Path, str]:
  """Workdir and stdout of a run that nothing stopped; shared, so only read."""
  workdir = pathlib.Path(tempfile.mkdtemp(prefix='fed_avg_test_'))
  atexit.register(shutil.rmtree, workdir, ignore_errors=True)
  done = run(workdir, *flags)
  if done.returncode:
    raise AssertionError(f'{flags} ended with {done.returncode}: {done.stderr}')
  return workdir, done.stdout


def several(
  *commands: list[str], module: str = MODULE
) -> list[tuple[int, str, str]]:
  """(exit code, stdout, stderr) of each list of flags, out of one start."""
  done = subprocess.run(
    [sys.executable, '-m', 'tests.experiments.forks', module],
    input=json.dumps(commands),
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
    timeout=TIMEOUT + 30 * len(commands),
    check=True,
  )
  return [tuple(result) for result in json.loads(done.stdout)]


def check_refused(
  test: absltest.TestCase,
  folder: pathlib.Path,
  cases: Mapping[str, tuple[Sequence[str], Sequence[str]]],
  *,
  base: Sequence[str],
  module: str,
) -> None:
  """Each case {name: (flags, words)} ends with one line, before a workdir is.

  The line has those words; the exit code is 2, and nothing is printed.
  """
  results = several(
    *(
      [*base, f'--workdir={folder / name}', *flags]
      for name, (flags, _) in cases.items()
    ),
    module=module,
  )
  for (name, (_, words)), result in zip(cases.items(), results, strict=True):
    with test.subTest(name):
      code, stdout, stderr = result
      line = stderr.splitlines()[-1]
      test.assertRegex(line, '^error: ')
      for word in words:
        test.assertIn(word, line)
      test.assertEqual((code, stdout), (2, ''), stderr)
      test.assertNotIn('Traceback', stderr)
      test.assertFalse((folder / name).exists())


def check_same_again(
  test: absltest.TestCase, folder: pathlib.Path, *flags: str, rounds: int
) -> None:
  """Two runs end alike; a third of the first's workdir has nothing to do."""
  first, second = folder / 'a', folder / 'b'
  for workdir in (first, second):
    test.assertEqual(run(workdir, *flags).returncode, 0)
  test.assertEqual(outcome(first), outcome(second))
  again = run(first, *flags)
  test.assertIn(f'Resuming after round {rounds}', again.stderr)
  test.assertEqual(outcome(first), outcome(second))


def stop(
  workdir: pathlib.Path, number: int, moment: Moment, *flags: str
) -> subprocess.CompletedProcess:
  """Sends a signal to a run at a moment; tries again if the run was faster.

  The run is frozen first, so that the moment is not over when the signal comes.
  """
  before = workdir.with_name(f'{workdir.name}_before')
  for _ in range(4):
    if workdir.exists():
      shutil.rmtree(before, ignore_errors=True)
      shutil.copytree(workdir, before)
    done = _stop_once(workdir, number, moment, *flags)
    if done is not None:
      return done
    shutil.rmtree(workdir)
    if before.exists():
      shutil.copytree(before, workdir)
  raise AssertionError('the run was always over before it could be stopped')


def _stop_once(
  workdir: pathlib.Path, number: int, moment: Moment, *flags: str
) -> subprocess.CompletedProcess | None:
  arguments = command(workdir, *flags)
  with subprocess.Popen(
    arguments,
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
      if moment(workdir) and _freeze(process):
        if moment(workdir):
          process.send_signal(number)
          process.send_signal(signal.SIGCONT)
          break
        process.send_signal(signal.SIGCONT)
      time.sleep(0.001)
    out, err = process.communicate(timeout=TIMEOUT)
  if process.returncode == 0:
    return None
  return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def _freeze(process: subprocess.Popen) -> bool:
  process.send_signal(signal.SIGSTOP)
  options = os.WSTOPPED | os.WEXITED | os.WNOWAIT
  state = os.waitid(os.P_PID, process.pid, options)
  return state is not None and state.si_code == os.CLD_STOPPED


def set_up(workdir: pathlib.Path) -> bool:
  """The manifest is there; jax compiles, no checkpoint yet."""
  return (workdir / 'manifest.json').exists()


def in_round(round: int) -> Moment:
  """A moment: a round's row is written, the next rounds are under way."""

  def moment(workdir: pathlib.Path) -> bool:
    try:
      return f'{{"round": {round},' in (workdir / 'metrics.jsonl').read_text()
    except FileNotFoundError:
      return False

  return moment


def writing_checkpoint(round: int) -> Moment:
  """A moment: the checkpoint of a round, or a later one, is half written."""

  def moment(workdir: pathlib.Path) -> bool:
    folder = workdir / 'checkpoints'
    return any(
      int(path.name.split('.')[0]) >= round
      for path in folder.glob('*.orbax-checkpoint-tmp*')
    )

  return moment


def checkpoints(workdir: pathlib.Path) -> list[int]:
  """Rounds with a finished checkpoint."""
  names = [path.name for path in (workdir / 'checkpoints').iterdir()]
  return sorted(int(name) for name in names if name.isdigit())


def outcome(workdir: pathlib.Path) -> dict[str, Any]:
  """All that two runs of the same command must agree on."""
  final = json.loads((workdir / 'final.json').read_text())
  of_machine = ('wall_seconds', 'commit', 'versions', 'device')
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  with (workdir / 'metrics.csv').open(newline='') as file:
    table = list(csv.DictReader(file))
  return {
    'final': {k: v for k, v in final.items() if k not in of_machine},
    'rows': [_untimed(json.loads(line)) for line in lines],
    'table': [_untimed(row) for row in table],
    'report': (workdir / 'report.json').read_text(),
    'checkpoints': checkpoints(workdir),
  }


def _untimed(row: dict[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in row.items() if k != 'seconds'}


def client_rows(workdir: pathlib.Path) -> dict[int, str]:
  """{client: digest of its row} in the newest checkpoint of a SCAFFOLD run."""
  model = make_model(
    'softmax_regression', input_shape=(8, 8, 1), num_classes=10
  )
  algorithm = algorithms.scaffold(
    classification_task(model),
    client_learning_rate=0.05,
    num_clients=NUM_CLIENTS,
    layout=core.make_layout(num_devices=1),
  )
  key = jax.random.key(0)
  clients = np.arange(NUM_CLIENTS + 1)  # the last one holds the test rows
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder) / 'run'  # restoring may move things
    shutil.copytree(workdir, copy)
    saved = Checkpoints(copy)
    restored = saved.restore(
      algorithm.init(key),
      core.make_client_states(
        algorithm.init_client,
        num_clients=len(clients),
        key=jax.random.fold_in(key, 1),
        directory=copy / 'client_states',
      ),
    )
    saved.close()
    final = json.loads((workdir / 'final.json').read_text())
    if digest(restored.server_state) != final['state_sha256']:
      raise AssertionError(f'{workdir} holds another state than it says')
    rows = restored.client_states.gather(clients)
  return {
    client: digest(jax.tree.map(lambda x: x[i], rows))
    for i, client in enumerate(clients.tolist())
  }
