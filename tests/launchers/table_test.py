"""Tests of launchers.table from end to end, with a fake experiment."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

from absl.testing import absltest, parameterized

from launchers import fields, local, plot, reproduce

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLE = """
title = 'Fake'
paper = 'Nobody'
metric = 'test/accuracy'
[presets.smoke]
seeds = [1]
[presets.small]
seeds = [1, 2, 3]
flags = ['--rounds=5']
[[rows]]
name = 'Tuned'
flags = ['--bonus=0.2']
tune = { rate = [0.1, 0.2, 0.3] }
[[rows]]
name = 'Plain'
flags = ['--rate=0.1']
[[datasets]]
name = 'digits'
flagfile = 'digits.flags'
[tuning]
seed = 1000
metric = 'validation/accuracy'
[[claims]]
text = 'Tuning helps'
better = 'Tuned'
worse = 'Plain'
"""
# Validation is best at rate 0.2, test at 0.3.
RUN = """
import json, os, pathlib, signal, sys, time
flags = {'bonus': '0', 'rounds': '2', 'fail': '', 'diverge': '', 'wait': ''}
flags.update(arg[2:].split('=', 1) for arg in sys.argv[1:])
folder = pathlib.Path(flags['workdir'])
rate, seed = float(flags['rate']), int(flags['seed'])
with open('starts.txt', 'a') as file:
  print(folder, file=file)
if flags['fail'] == str(seed):
  raise ValueError('asked to fail')
if flags['wait'] == str(seed) and not (folder / 'saved').exists():
  def save(*_):
    (folder / 'saved').touch()
    sys.exit(1)
  signal.signal(signal.SIGTERM, save)
  (folder / 'ready').write_text(str(os.getpid()))
  time.sleep(60)
final = {
  'round': int(flags['rounds']), 'diverged': flags['diverge'] == str(seed),
  'metrics': {
    'validation/accuracy': 0.5 - abs(rate - 0.2),
    'test/accuracy': 0.3 + rate + float(flags['bonus']) + seed / 1000,
  },
  'clients': 3, 'examples': 30, 'examples_processed': 60, 'wall_seconds': 0.5,
  'device': 'cpu', 'versions': {'fake': '1'}, 'commit': 'abc',
}
(folder / 'final.json').write_text(json.dumps(final))
if seed == 1 or 'curve' in flags:
  rows = [{'round': r, 'test/accuracy': rate * r} for r in (1, 2)]
  rows += [{'round': 3, 'test/accuracy': float('nan')}, {'round': 4}]
  lines = [json.dumps(row) for row in rows]
  (folder / 'metrics.jsonl').write_text('\\n'.join([*lines, '{"cut']))
"""


class FakeExperiment(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.root = pathlib.Path(folder).resolve()
    self.paper = self.root / 'experiments' / 'fake'
    self.paper.mkdir(parents=True)
    (self.root / 'experiments' / '__init__.py').touch()
    (self.paper / '__init__.py').touch()
    (self.paper / 'run.py').write_text(RUN)
    (self.paper / 'table.toml').write_text(TABLE)
    (self.paper / 'digits.flags').touch()

  def edit(self, old, new):
    path = self.paper / 'table.toml'
    self.assertIn(old, path.read_text())
    path.write_text(path.read_text().replace(old, new))

  def options(self, preset='small', **changes):
    options = {
      'paper': 'fake',
      'preset': preset,
      'seeds': None,
      'make_runner': lambda root, folder, pass_fds: local.LocalRunner(
        root=root, jobs=4, pass_fds=pass_fds
      ),
      'retries': 0,
      'experiments_dir': self.root / 'experiments',
      'results_dir': self.root / 'results',
      'command': 'python -m launchers.table',
    }
    return reproduce.Options(**{**options, **changes})

  def starts(self):
    path = self.root / 'starts.txt'
    return path.read_text().splitlines() if path.exists() else []

  def result(self, name, preset='small'):
    return (self.root / 'results/fake' / preset / name).read_text()


class ReproduceTest(FakeExperiment):
  def test_a_table_from_nothing(self):
    self.assertEqual(reproduce.run(self.options()), 0)
    starts = self.starts()
    self.assertLen(starts, 9)
    for path in starts[:3]:
      self.assertStartsWith(path, 'results/fake/small/tuning/digits/tuned/')
    choice = json.loads(self.result('tuning.json'))['choices'][0]
    self.assertEqual(choice['chosen'], {'rate': '0.2'})
    self.assertEqual(
      [c['values']['rate'] for c in choice['candidates']], ['0.1', '0.2', '0.3']
    )
    text = self.result('table.md')
    self.assertIn('| Tuned | 70.20 ± 0.10 (n = 3) | not found |', text)
    self.assertIn('| Plain | 40.20 ± 0.10 (n = 3) | not found |', text)
    self.assertIn('**holds**', text)
    self.assertNotIn(str(self.root), text)
    self.assertIn('--rounds=5 --rate=0.2 --seed=3', text)
    self.assertTrue((self.root / 'results/fake/small/plot.png').exists())
    self.assertLen(self.result('table.csv').splitlines(), 7)

  def test_the_same_command_again_runs_nothing(self):
    reproduce.run(self.options())
    text = self.result('table.md')
    reproduce.run(self.options())
    self.assertLen(self.starts(), 9)
    self.assertEqual(self.result('table.md'), text)

  def test_only_what_changed_runs_again(self):
    reproduce.run(self.options())
    self.edit("'--rate=0.1'", "'--rate=0.3'")
    reproduce.run(self.options())
    again = self.starts()[9:]
    self.assertLen(again, 3)
    for path in again:
      self.assertIn('runs/digits/plain', path)
    reproduce.run(self.options(seeds=(1, 2, 3, 4)))
    self.assertLen(self.starts(), 14)
    (self.paper / 'run.py').write_text(RUN + '# changed\n')
    reproduce.run(self.options())
    self.assertLen(self.starts(), 23)

  def test_only_collect_takes_what_is_there_and_runs_nothing(self):
    collect = self.options(only_collect=True)
    with self.assertRaisesRegex(fields.TableError, 'no finished run'):
      reproduce.run(collect)
    reproduce.run(self.options())
    text = self.result('table.md')
    (self.paper / 'run.py').write_text(RUN + '# changed\n')
    (self.root / 'results/fake/small/table.md').unlink()
    self.assertEqual(reproduce.run(collect), 0)
    self.assertEqual(self.result('table.md'), text)
    cell = self.root / 'results/fake/small/runs/digits/plain/seed_2'
    (cell / 'final.json').unlink()
    self.assertEqual(reproduce.run(collect), 1)
    self.assertIn('| Plain | failed 1 of 3; ', self.result('table.md'))
    self.assertIn('Plain / seed 2: `not run`', self.result('table.md'))
    self.assertLen(self.starts(), 9)

  def test_a_column_that_was_not_run_is_named_and_left_out(self):
    reproduce.run(self.options('smoke'))
    second = "[[datasets]]\nname = 'more'\nflagfile = 'digits.flags'\n"
    self.edit('[tuning]', second + '[tuning]')
    collect = self.options('smoke', only_collect=True)
    self.assertEqual(reproduce.run(collect), 1)
    text = self.result('table.md', 'smoke')
    self.assertIn('Not run yet: more.', text)
    self.assertNotIn('more, published', text)
    self.assertIn('| Plain | 40.10', text)

  def test_curves(self):
    self.edit("title = 'Fake'", "title = 'Fake'\ncurves = ['test/accuracy']")
    with mock.patch.object(plot, 'curves', wraps=plot.curves) as draw:
      reproduce.run(self.options())
    series = draw.call_args.args[1]
    key = ('test/accuracy', 'digits', 'Plain')
    self.assertEqual(series[key], [[(1, 10.0), (2, 20.0)]])
    picture = (self.root / 'results/fake/small/curves.png').read_bytes()
    self.assertStartsWith(picture, b'\x89PNG')

  def test_the_table_in_latex(self):
    self.edit("title = 'Fake'", "title = 'Fake & 50 %_'")
    self.edit(
      "name = 'Plain'",
      "name = 'Plain'\n"
      "published = { digits = { value = 41.5, source = 'T1' } }",
    )
    reproduce.run(self.options())
    text = self.result('table.tex')
    self.assertIn(r' & digits \\' + '\n', text)
    self.assertIn('Plain & 40.20 $\\pm$ 0.10 (n = 3) [41.5] \\\\', text)
    self.assertIn(r'\caption{Fake \& 50 \%\_. Mean', text)
    self.assertEqual(text.count('{') - text.count('}'), 0)

  def test_a_failed_cell_is_listed_and_the_table_written(self):
    self.edit("'--rate=0.1'", "'--rate=0.1', '--fail=2'")
    self.assertEqual(reproduce.run(self.options()), 1)
    text = self.result('table.md')
    self.assertIn('| Plain | failed 1 of 3; ', text)
    self.assertIn('exit code 1: ValueError: asked to fail', text)

  def test_a_diverged_cell_is_a_result(self):
    self.edit("'--rate=0.1'", "'--rate=0.1', '--diverge=2'")
    self.assertEqual(reproduce.run(self.options()), 0)
    self.assertIn('| Plain | diverged 1 of 3; ', self.result('table.md'))
    reproduce.run(self.options())
    self.assertLen(self.starts(), 9)

  def test_a_metric_that_is_absent_is_a_failure(self):
    self.edit("'test/accuracy'", "'test/f1'")
    self.assertEqual(reproduce.run(self.options('smoke')), 1)
    self.assertIn('| Plain | failed |', self.result('table.md', 'smoke'))

  def test_where_tuning_fails_the_row_fails_and_the_others_go_on(self):
    self.edit("'--bonus=0.2'", "'--bonus=0.2', '--fail=1000'")
    self.assertEqual(reproduce.run(self.options()), 1)
    self.assertLen(self.starts(), 6)
    text = self.result('table.md')
    self.assertIn('| Tuned | failed 3 of 3 |', text)
    self.assertIn('| Plain | 40.20', text)
    self.assertIn('tuning failed: exit code 1: ValueError: asked', text)

  def test_dry_run_shows_placeholders_then_what_tuning_chose(self):
    lines = reproduce.dry_run(self.options())
    self.assertLen(lines, 9)
    self.assertEqual(self.starts(), [])
    self.assertFalse((self.root / 'results').exists())
    self.assertIn('--rate=TUNED --seed=1 ', lines[3])
    reproduce.run(self.options())
    lines = reproduce.dry_run(self.options())
    self.assertIn('--rate=0.2 --seed=1 ', lines[3])

  def test_without_matplotlib_the_table_has_no_plot(self):
    with mock.patch.dict(sys.modules, {'matplotlib': None}):
      self.assertEqual(reproduce.run(self.options('smoke')), 0)
    self.assertIn('| Plain | 40.10', self.result('table.md', 'smoke'))
    self.assertFalse((self.root / 'results/fake/smoke/plot.png').exists())

  def other(self):
    """A second table of the paper, with another title and one row."""
    start = TABLE.index("[[rows]]\nname = 'Tuned'")
    end = TABLE.index("[[rows]]\nname = 'Plain'")
    text = TABLE[:start] + TABLE[end : TABLE.index('[tuning]')]
    path = self.paper / 'other.toml'
    path.write_text(text.replace("'Fake'", "'Another'"))

  def test_another_table_of_the_paper(self):
    self.other()
    options = self.options('smoke', table='other')
    self.assertEqual(reproduce.run(options), 0)
    folder = self.root / 'results/fake/other/smoke'
    text = (folder / 'table.md').read_text()
    self.assertStartsWith(text, '# Another\n')
    self.assertIn('| Plain | 40.10', text)
    self.assertNotIn('Tuned', text)
    self.assertIn(' -m experiments.fake.run ', text)
    self.assertEqual(
      self.starts(), ['results/fake/other/smoke/runs/digits/plain/seed_1']
    )
    self.assertFalse((self.root / 'results/fake/smoke').exists())
    self.assertIn(
      'fake/other', (folder / 'table.csv').read_text().splitlines()[1]
    )
    # The first table is none of its business.
    self.edit("title = 'Fake'", "title = 'Fake'\nsubtitle = 'x'")
    self.assertEqual(reproduce.run(options), 0)
    self.assertLen(self.starts(), 1)

  @parameterized.parameters(
    ({'table': 'other'}, '--table: no .*other.toml; tables of fake: '),
    ({'table': '../fake/table'}, r"--table: .* got '\.\./fake/table'"),
    ({'table': 'table.toml'}, "--table: .* got 'table.toml'"),
    ({'table': ''}, "--table: .* got ''"),
    ({'paper': 'fkae'}, 'papers with a table: fake'),
    ({'paper': '../fake'}, r"got '\.\./fake'"),
    ({'preset': 'paper'}, 'no preset'),
    ({'seeds': (1, 1)}, 'seed 1 stands there twice'),
    ({'seeds': (1000,)}, 'tuning seed'),
  )
  def test_mistakes(self, changes, message):
    with self.assertRaisesRegex(fields.TableError, message):
      reproduce.run(self.options(**changes))


class CommandLineTest(FakeExperiment):
  def command(self, *flags):
    return (
      sys.executable,
      '-m',
      'launchers.table',
      f'--experiments_dir={self.root}/experiments',
      f'--results_dir={self.root}/results',
      *flags,
    )

  def call(self, *flags):
    return subprocess.run(
      self.command(*flags),
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
    )

  @parameterized.parameters(
    (('--preset=smoke',), '--paper'),
    (('--paper=fake', '--preset=tiny'), 'tiny'),
    (('--paper=fake', '--preset=smoke', '--jbos=2'), 'jbos'),
    (('--paper=fake', '--preset=smoke', '--jobs=0'), 'jobs'),
    (('--paper=fake', '--preset=smoke', '--seeds=a'), "got 'a'"),
    (('--paper=fake', '--preset=smoke', 'extra'), "'extra'"),
    (('--paper=none', '--preset=smoke'), 'papers with a table: fake'),
    (('--paper=fake', '--preset=smoke', '--table=a/b'), '--table: expected'),
    (('--paper=fake', '--preset=smoke', '--runner=pbs'), 'pbs'),
    (('--paper=fake', '--preset=smoke', '--runner=tpu_vm'), '--tpu_name'),
    (
      ('--paper=fake', '--preset=smoke', '--gpus=0,1', '--jobs=3'),
      '2 GPUs, got jobs=3',
    ),
    (
      (
        *('--paper=fake', '--preset=smoke', '--runner=slurm'),
        '--slurm_options=gpu',
      ),
      "expected NAME=VALUE, got 'gpu'",
    ),
  )
  def test_a_bad_flag_is_one_line_and_exit_code_2(self, flags, message):
    ended = self.call(*flags)
    self.assertEqual(ended.returncode, 2)
    self.assertEqual(ended.stdout, '')
    self.assertLen(ended.stderr.splitlines(), 1)
    self.assertStartsWith(ended.stderr, 'error: ')
    self.assertIn(message, ended.stderr)

  def test_an_unknown_key_is_one_line_and_exit_code_2(self):
    self.edit("title = 'Fake'", "title = 'Fake'\nsubtitle = 'x'")
    ended = self.call('--paper=fake', '--preset=smoke')
    self.assertEqual(ended.returncode, 2)
    self.assertLen(ended.stderr.splitlines(), 1)
    self.assertStartsWith(
      ended.stderr, 'error: experiments/fake/table.toml: subtitle: unknown key'
    )

  def test_help_lists_the_flags(self):
    self.assertIn('--[no]dry_run', self.call('--help').stdout)

  def test_a_reader_of_commands_may_stop(self):
    ended = subprocess.run(
      f'{shlex.join(self.command("--paper=fake", "--preset=smoke"))} --dry_run '
      '| true',
      shell=True,
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual((ended.returncode, ended.stderr), (0, ''))

  def test_dry_run_prints_commands_that_a_shell_can_run(self):
    ended = self.call('--paper=fake', '--preset=smoke', '--dry_run')
    self.assertEqual(ended.returncode, 0)
    lines = ended.stdout.splitlines()
    self.assertLen(lines, 5)
    words = shlex.split(lines[-1])
    self.assertEqual(words[:3], [sys.executable, '-m', 'experiments.fake.run'])
    self.assertEqual(self.starts(), [])

  def test_another_table(self):
    path = self.paper / 'other.toml'
    path.write_text(TABLE.replace("'Fake'", "'Another'"))
    flags = ('--paper=fake', '--table=other', '--preset=smoke')
    ended = self.call(*flags, '--dry_run')
    self.assertEqual(ended.returncode, 0, ended.stderr)
    for line in ended.stdout.splitlines():
      self.assertIn('--workdir=results/fake/other/smoke/', line)
    ended = self.call(*flags, '--verbosity=-1')
    self.assertEqual(ended.returncode, 0, ended.stderr)
    text = (self.root / 'results/fake/other/smoke/table.md').read_text()
    command = 'python -m launchers.table --paper=fake --table=other '
    self.assertIn(f'{command}--preset=smoke\n', text)

  def test_all_papers(self):
    second = self.root / 'experiments' / 'other'
    shutil.copytree(self.paper, second)
    flags = ('--paper=all', '--preset=smoke', '--verbosity=-1')
    ended = self.call(*flags, '--dry_run')
    self.assertLen(ended.stdout.splitlines(), 10)
    ended = self.call(*flags)
    self.assertEqual(ended.returncode, 0, ended.stderr)
    self.assertEqual(
      ended.stdout.splitlines(),
      [f'results/{name}/smoke/table.md' for name in ('fake', 'other')],
    )
    table = second / 'table.toml'
    table.write_text(TABLE.replace('[presets.smoke]\nseeds = [1]\n', ''))
    ended = self.call(*flags)
    self.assertEqual(ended.returncode, 2)
    self.assertIn("of other has no preset 'smoke'", ended.stderr)

  def test_a_table_survives_sigkill_of_launcher_and_run(self):
    self.edit("'--rate=0.1'", "'--rate=0.1', '--wait=2'")
    flags = ('--paper=fake', '--preset=small', '--verbosity=-1')
    plain = self.root / 'results/fake/small/runs/digits/plain'
    with subprocess.Popen(self.command(*flags), cwd=ROOT) as process:
      files = (plain / 'seed_2/ready', plain / 'seed_3/final.json')
      while not all(f.exists() for f in files) and process.poll() is None:
        time.sleep(0.01)
      process.kill()
    self.assertEqual(process.returncode, -signal.SIGKILL)
    self.assertLen(self.starts(), 9)
    os.kill(int((plain / 'seed_2/ready').read_text()), signal.SIGKILL)
    (plain / 'seed_2/saved').touch()  # As if the run had saved its state.
    ended = self.call(*flags)
    self.assertEqual(ended.returncode, 0, ended.stderr)
    again = 'results/fake/small/runs/digits/plain/seed_2'
    self.assertEqual(self.starts()[9:], [again])

  def test_ctrl_c_exits_with_130_and_one_line_and_resumes(self):
    self.edit("'--rate=0.1'", "'--rate=0.1', '--wait=2'")
    flags = ('--paper=fake', '--preset=small', '--verbosity=-1')
    with subprocess.Popen(
      self.command(*flags), cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
      cell = self.root / 'results/fake/small/runs/digits/plain/seed_2'
      while not (cell / 'ready').exists() and process.poll() is None:
        time.sleep(0.01)
      process.send_signal(signal.SIGINT)
      _, errors = process.communicate(timeout=30)
    self.assertEqual(process.returncode, 130)
    self.assertRegex(errors, r'^interrupted: \d of 6 cells finished; .*\n$')
    self.assertTrue((cell / 'saved').exists())
    self.assertEqual(self.call(*flags).returncode, 0)
    finished = self.starts()
    self.assertEqual(sum('plain/seed_2' in path for path in finished), 2)
    self.assertEqual(sum('tuned/seed_1' in path for path in finished), 1)

  def test_launchers_import_neither_jax_nor_the_package(self):
    code = (
      'import sys, launchers.table\n'
      "bad = {'jax', 'fedjax_ext', 'scipy', 'matplotlib'} & set(sys.modules)\n"
      'sys.exit(str(bad) if bad else 0)'
    )
    ended = subprocess.run(
      [sys.executable, '-c', code],
      cwd=ROOT,
      env={**os.environ, 'PYTHONPATH': ''},
      check=False,
    )
    self.assertEqual(ended.returncode, 0)


# The base class has no tests of its own.
del FakeExperiment

if __name__ == '__main__':
  absltest.main()
