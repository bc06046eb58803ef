"""Every command and Python block of the documents runs, or at least parses.

Documents are README.md, docs/ and the reproduction cards. `RUN` and `PARSE`
hold the beginnings of all commands in them; each command belongs to exactly
one. It runs as a reader would run it, in a folder that has the repository's
packages and the files that the documents tell one to write (Python blocks whose
first line is `# NAME.py`). Runs are cut short by flags at their end, which win.
README.md's own program is run by readme_test.py.
"""

import itertools
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

from fedjax_ext import algorithms, core, data, defenses, losses, models
from fedjax_ext.algorithms.averaging import Averaging
from tests.experiments import runs

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTS = (
  ROOT / 'README.md',
  *sorted(ROOT.glob('docs/**/*.md')),
  *sorted(ROOT.glob('experiments/*/README.md')),
)
# What a reader finds where commands are run.
FOLDERS = ('benchmarks', 'docs', 'experiments', 'fedjax_ext', 'launchers')
FOLDERS += ('tests', 'tools', 'Makefile', 'pyproject.toml')
TIMEOUT = 600
_SPAN = re.compile(r'`((?:[^`\n]|\n(?!\n))+)`')
_BEGIN = re.compile(r'(python -m|make|pip|git|pytest|gcloud|sbatch|kubectl) ')

SHORT = ('--num_rounds=2', '--eval_every=2', '--checkpoint_every=2')
SMALL = (*SHORT, '--cohort_size=4', '--client_epochs=1')
FED_AVG = 'python -m experiments.fed_avg.run '
MIXED = 'python -m experiments.mixed_fl.run '
GAP = 'python -m experiments.participation_gap.run '
RETRIEVAL = 'python -m experiments.retrieval.run '
FEDLOGE = 'python -m experiments.fedloge.run '
BDPFL = 'python -m experiments.bdpfl.run '
THREATS = (
  BDPFL + '--workdir=runs/threats '
  '--flagfile=experiments/bdpfl/flags/digits.flags '
)


class Run(NamedTuple):
  """How a command is run.

  Attributes:
    more: flags to add at its end.
    replace: texts in place of placeholders.
  """

  more: tuple[str, ...] = SHORT
  replace: Mapping[str, str] = {}


# Beginning of a command -> how to run it.
RUN: dict[str, Run] = {
  FED_AVG + '--workdir=runs/cifar': Run(
    (*SHORT, '--data_source=digits', '--cohort_size=2')  # no download
  ),
  FED_AVG + '--workdir=runs/sensors': Run(replace={'DIR': 'sensors'}),
  FED_AVG + '--workdir=runs/attacked': Run(),
  FED_AVG + '--workdir=W': Run(replace={'NAME': 'synthetic_femnist'}),
  MIXED + '--mode=one_way --workdir=runs/smile': Run(
    (*SHORT, '--mode=two_way')
  ),
  MIXED + '--mode=one_way --workdir=runs/mixed_smile': Run(),
  GAP + '--workdir=W': Run(
    (*SHORT, '--algorithm=fed_avg', '--cohort_size=5'), {'NAME': 'synthetic'}
  ),
  GAP + '--workdir=runs/participation_gap': Run(),
  RETRIEVAL + '--workdir=runs/retrieval ': Run((*SHORT, '--nosparse_rows')),
  RETRIEVAL + '--workdir=runs/retrieval_hinge': Run(),
  RETRIEVAL + '--workdir=runs/retrieval_softmax': Run(),
  FEDLOGE + '--workdir=W': Run((*SMALL, '--algorithm=fed_rep')),
  FEDLOGE + '--workdir=runs/fedloge_digits': Run(SMALL),
  BDPFL + '--workdir=W': Run(
    (*SMALL, '--algorithm=fed_avg', '--tuning_epochs=1'), {'NAME': 'digits'}
  ),
  BDPFL + '--workdir=runs/bdpfl_digits': Run(SMALL),
  BDPFL + '--workdir=runs/learned': Run(SMALL),
  THREATS + '--attack=my_threats': Run((*SMALL, '--workdir=runs/threats_1')),
  THREATS + '--attack=my_square': Run((*SMALL, '--workdir=runs/threats_2')),
  THREATS + '--defense=my_threats': Run(
    (*SMALL, '--algorithm=fed_prox', '--tuning_epochs=1')
  ),
  'python -m fair ': Run(),
  'python -m pytest q_fed_avg_test.py': Run(('-q', '-p', 'no:cacheprovider')),
  'python -m fedjax_ext.training.convert_data ': Run(
    (), {'...': 'digits', 'DIR': '.', 'FOLDER': 'converted'}
  ),
  'python -m tools.partition_pictures ': Run(
    (), {'docs/partitions': 'pictures'}
  ),
}

FIGURES = 'takes minutes, and its figures need an idle machine'
HOSTS = 'needs several hosts; tests/experiments/processes_test.py runs many'
# Beginning of a command -> why it is not run here, but parsed.
PARSE: dict[str, str] = {
  'make demo': 'installs the project anew',
  'make docs': 'site_test.py builds the site',
  'make test': 'runs this test',
  'pip install ': 'installs',
  'pytest tests/core/plans_test.py': 'in the suite already',
  'gcloud ': 'needs a TPU',
  FED_AVG + '--help': 'shows the flags',
  FED_AVG + '--workdir=/shared': HOSTS,
  FED_AVG + '... --process_id=1': HOSTS,
  FED_AVG + '--coordinator_address=auto': HOSTS,
  RETRIEVAL + '--workdir=runs/movielens': 'needs MovieLens',
  FEDLOGE + '--flagfile': 'hours on an accelerator',
  BDPFL + '--flagfile': 'hours on an accelerator',
  'python -m benchmarks.': FIGURES,
  'python -m fedjax_ext.data.download ': 'downloads',
  'python -m launchers.jobset ': 'needs Kubernetes',
  'python -m launchers.table': 'takes hours; smoke_table_test.py makes one',
  'python -m tools.balanced_gap ': 'needs runs of a table',
  'python -m tools.build_files': 'writes into the repository',
  'python -m tools.mixed_fl_orderings': 'needs runs of a table',
}
# Placeholders in commands that are parsed.
_FILL = {'NAME': 'shakespeare', '...': '', '$JOB_COMPLETION_INDEX': '0'}


def commands(text: str) -> Iterator[str]:
  """Yields the commands of a document, one line each."""
  fence, line, prose = '', '', []
  for raw in text.splitlines():
    if raw.startswith('```'):
      fence = '' if fence else raw
      continue
    if not fence and not raw.startswith('    '):
      prose.append(raw)
      continue
    prose.append('')
    if fence == '```python':
      continue
    line += ' ' + re.sub(r'(^|\s)#.*', '', raw).strip()
    if line.endswith('\\'):
      line = line[:-1]
      continue
    yield from _command(line)
    line = ''
  for span in _SPAN.findall('\n'.join(prose)):
    yield from _command(span)


def _command(text: str) -> Iterator[str]:
  """The command that a line is or has in it, if any."""
  text = ' '.join(text.split())
  text = re.sub(r'^.*\b(?=python -m )', '', text).rstrip('"')
  text = text.partition(' | ')[0]
  if _BEGIN.match(text + ' '):
    yield text


def all_commands() -> list[str]:
  """The commands of all documents, each once."""
  found = (c for path in DOCUMENTS for c in commands(path.read_text()))
  return list(dict.fromkeys(found))


def entries_of(command: str) -> list[str]:
  """The entries of both tables that a command begins with."""
  return [e for e in (*RUN, *PARSE) if command.startswith(e)]


def python_blocks() -> tuple[dict[str, str], dict[str, str]]:
  """The Python blocks of docs/: files by name, and all others by page."""
  files: dict[str, str] = {}
  others: dict[str, str] = {}
  for path in DOCUMENTS[1:]:
    text = path.read_text()
    for block in re.findall(r'^```python\n(.*?)^```', text, re.M | re.S):
      named = re.match(r'# (\w+\.py)\n', block)
      where, name = (files, named[1]) if named else (others, path.name)
      where[name] = where.get(name, '') + block
  return files, others


def make_folder(folder: pathlib.Path) -> None:
  """Makes a folder in which the documents' commands can be run."""
  for name in FOLDERS:
    (folder / name).symlink_to(ROOT / name)
  for name, text in python_blocks()[0].items():
    (folder / name).write_text(text)
  (folder / 'sensors').mkdir()
  rng = np.random.default_rng(0)
  for user in range(5):
    rows = [[*rng.normal(size=6), i % 3] for i in range(12)]
    np.savetxt(folder / f'sensors/u{user:02}.csv', rows, delimiter=',')


def named(entries: Iterable[str]) -> list[tuple[str, str]]:
  """Entries with names of tests that run them."""
  return [(re.sub(r'\W+', '_', e), e) for e in entries]


def filled(command: str, replace: Mapping[str, str]) -> str:
  """A command without its optional parts, its placeholders replaced."""
  command = re.sub(r' \[--[^\]]*\]', '', command)
  for placeholder, text in replace.items():
    command = command.replace(placeholder, text)
  return command


class TablesTest(absltest.TestCase):
  def test_each_command_is_in_one_table(self):
    for command in all_commands():
      with self.subTest(command):
        self.assertLen(entries_of(command), 1)

  def test_no_entry_is_stale(self):
    used = {e for command in all_commands() for e in entries_of(command)}
    self.assertEmpty({*RUN, *PARSE} - used)

  def test_commands_are_found(self):
    text = (
      'Say `make all`.\n\n    python -m a --b=1 \\\n      --c=2 | d  # e\n\n'
      '```bash\n#SBATCH --nodes=2\nsrun python -m d\n```\n'
      '```python\npython -m e\n```\n`python -m\nf` and `make_it`\n'
    )
    self.assertCountEqual(
      commands(text),
      ['make all', 'python -m a --b=1 --c=2', 'python -m d', 'python -m f'],
    )


class FolderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    make_folder(self.folder)

  def start(self, *arguments: str) -> subprocess.CompletedProcess:
    """Runs Python in the folder, to the end."""
    return subprocess.run(
      [sys.executable, *arguments],
      cwd=self.folder,
      env=runs.environment(),
      capture_output=True,
      text=True,
      timeout=TIMEOUT,
      check=False,
    )


class PythonBlocksTest(FolderTest):
  def load(self, name: str) -> SimpleNamespace:
    """What a file of the documents defines."""
    return SimpleNamespace(**runpy.run_path(str(self.folder / name)))

  def test_all_compile(self):
    for name, text in itertools.chain(*(b.items() for b in python_blocks())):
      compile(text, name, 'exec')

  def test_sensors(self):
    sensors = self.load('my_sensors.py')
    columns = sensors.load(data_dir=str(self.folder / 'sensors'))
    self.assertEqual(columns.features['x'].shape, (60, 6))
    owner = sensors.halves(np.arange(4), num_clients=4, seed=0)
    self.assertEqual(owner.tolist(), [0, 1, 2, 3])
    model = sensors.wider(input_shape=(6,), num_classes=3, width=8)
    logits = model.apply(model.init(jax.random.key(0)), jnp.ones((2, 6)))
    self.assertEqual(logits.shape, (2, 3))
    images = np.ones((2, 4, 4, 1))
    self.assertEqual(sensors.louder(factor=3)(None, images).max(), 3)
    shifted = sensors.shifted(images, np.array([0, 1]), num_clients=2, seed=0)
    self.assertEqual(shifted.max(), 1.1)

  def test_ported_algorithm(self):
    """A round of the port equals federated averaging of clipped updates."""
    exec(compile(python_blocks()[1]['port_from_fedjax.md'], 'port', 'exec'), {})
    clipped = self.load('clipped.py').clipped_averaging
    rng = np.random.default_rng(0)
    view = data.from_client_column(
      {
        'image': rng.normal(size=(24, 4)).astype(np.float32),
        'label': rng.integers(0, 3, 24).astype(np.int32),
      },
      np.repeat(np.arange(3), [5, 12, 7]),
    )
    model = models.make_model(
      'softmax_regression', input_shape=(4,), num_classes=3
    )
    common = dict(
      client_optimizer=optax.sgd(0.3),
      server_optimizer=optax.sgd(1.0),
      phase=core.Phase(batch_size=4),
      layout=core.make_layout(num_devices=1),
    )
    task = losses.classification_task(model)
    rule = Averaging(reducer=defenses.norm_clipping(bound=0.1))
    after = []
    for algorithm in (
      clipped(task, bound=0.1, **common),
      algorithms.fed_avg(task, averaging=rule, **common),
    ):
      state = algorithm.init(jax.random.key(0))
      cohort = core.make_cohort(
        np.arange(3),
        round=1,
        seed=0,
        specs=algorithm.plans,
        data={'train': view},
        features=core.place_features(view.features, common['layout']),
        layout=common['layout'],
      )
      after.append(algorithm.apply(state, None, cohort)[0][0])
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *after
    )

  @pytest.mark.slow
  def test_others_run(self):
    for page, text in python_blocks()[1].items():
      with self.subTest(page):
        done = self.start('-c', text)
        self.assertEqual(done.returncode, 0, done.stderr)


@pytest.mark.slow
class RunTest(FolderTest):
  @parameterized.named_parameters(*named(RUN))
  def test_runs(self, entry: str):
    [command] = [c for c in all_commands() if c.startswith(entry)]
    how = RUN[entry]
    words = shlex.split(filled(command, how.replace))
    self.assertEqual(words[:2], ['python', '-m'])
    done = self.start(*words[1:], *how.more)
    self.assertEqual(done.returncode, 0, done.stderr)
    if '--num_rounds=2' in how.more:
      self.assertIn('final: round=2 ', done.stdout)


@pytest.mark.slow
class ParseTest(FolderTest):
  @parameterized.named_parameters(*named(PARSE))
  def test_parses(self, entry: str):
    for command in all_commands():
      if command.startswith(entry):
        with self.subTest(command):
          self.check(shlex.split(filled(command, _FILL)))

  def check(self, words: list[str]) -> None:
    program, *rest = words
    if program == 'make':
      command = ['make', '--dry-run', *rest]
      subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    elif program == 'pip':
      self.check_extras(rest[-1])
    elif program == 'pytest':
      done = self.start('-m', 'pytest', '--collect-only', *rest)
      self.assertEqual(done.returncode, 0, done.stdout)
    elif program == 'python':
      self.check_flags(rest[1], rest[2:])

  def check_extras(self, requirement: str) -> None:
    name, _, extra = requirement.rstrip(']').partition('[')
    if name in ('.', 'fedjax_ext'):
      project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
      known = project['optional-dependencies']
    else:
      known = metadata.metadata(name).get_all('Provides-Extra')
    if extra:
      self.assertIn(extra, known)

  def check_flags(self, module: str, flags: list[str]) -> None:
    if module == 'launchers.table':
      if not flags:
        flags = ['--paper=fed_avg', '--preset=small']
      done = self.start('-m', module, *flags, '--dry_run')
      self.assertEqual(done.returncode, 0, done.stderr)
      return
    # absl parses all flags before it shows help; argparse does not.
    done = self.start('-m', module, *flags, '--help')
    self.assertIn(done.returncode, (0, 1), done.stderr)
    self.assertNotRegex(done.stderr, '^error: |Traceback')
    for flag in flags:
      name = re.match(r'--(\w+)', flag)
      if name and name[1] not in ('flagfile', 'help'):
        self.assertRegex(done.stdout, rf'--(\[no\])?{name[1]}\b')


if __name__ == '__main__':
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  absltest.main()
