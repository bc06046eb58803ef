"""Tests of the launchers for TPU VMs and Kubernetes, without either."""

import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile

from absl.testing import absltest, parameterized

from launchers import fields, grid, tpu_vm

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Called as gcloud: runs what it is told to run on all workers here.
GCLOUD = """#!{python}
import subprocess, sys
words = sys.argv[1:]
assert words[:4] == ['compute', 'tpus', 'tpu-vm', 'ssh'], words
assert words[4:8] == ['pod', '--zone=z', '--project=p', '--worker=all'], words
assert words[9:] == ['--', '-tt'], words
command = words[8].removeprefix('--command=')
command = command.replace('exec python3', 'exec {python}')
sys.exit(subprocess.call(['bash', '-c', command]))
"""


class TpuVmTest(parameterized.TestCase):
  def test_the_command_starts_the_cell_on_every_worker(self):
    make = tpu_vm.gcloud_command(
      name='pod', zone='z', root=pathlib.Path('/shared/a b'), project='p'
    )
    cell = grid.Cell('d', 'r', 1, (), 'w', ('-m', 'run', '--x=1 2'))
    command = make(cell)
    self.assertEqual(command[5], 'pod')
    remote = command[9].removeprefix('--command=')
    self.assertEqual(
      shlex.split(remote),
      [
        *('cd', '/shared/a b', '&&', 'exec', 'python3', '-m', 'run'),
        *('--x=1 2', '--coordinator_address=auto'),
      ],
    )

  @parameterized.parameters(('', 'z'), ('pod', ''))
  def test_name_and_zone_are_needed(self, name, zone):
    with self.assertRaisesRegex(fields.TableError, '--tpu_name and --tpu_zone'):
      tpu_vm.gcloud_command(name=name, zone=zone, root=pathlib.Path('/'))


RUN = """
import json, pathlib, sys
flags = dict(arg[2:].split('=', 1) for arg in sys.argv[1:])
assert flags.get('coordinator_address', 'auto') == 'auto', flags
final = {'metrics': {'m': 1.0, 'validation/m': 1.0}}
pathlib.Path(flags['workdir'], 'final.json').write_text(json.dumps(final))
"""
TABLE = """
title = 'Fake'
paper = 'Nobody'
metric = 'm'
[presets.smoke]
seeds = [1, 2]
[[rows]]
name = 'Row'
tune = { rate = [1, 2] }
[[datasets]]
name = 'digits'
flagfile = 'digits.flags'
[tuning]
seed = 9
metric = 'validation/m'
"""


class CommandLineTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.root = pathlib.Path(folder).resolve()
    paper = self.root / 'experiments' / 'fake'
    paper.mkdir(parents=True)
    for path in (paper.parent / '__init__.py', paper / '__init__.py'):
      path.touch()
    (paper / 'run.py').write_text(RUN)
    (paper / 'table.toml').write_text(TABLE)
    (paper / 'digits.flags').touch()

  def call(self, module, *flags):
    return subprocess.run(
      [
        *(sys.executable, '-m', f'launchers.{module}', '--paper=fake'),
        *('--preset=smoke', f'--experiments_dir={self.root}/experiments'),
        *(f'--results_dir={self.root}/results', *flags),
      ],
      cwd=ROOT,
      env={**os.environ, 'PATH': f'{self.root}/bin:{os.environ["PATH"]}'},
      capture_output=True,
      text=True,
      check=False,
    )

  def test_a_table_through_gcloud(self):
    gcloud = self.root / 'bin' / 'gcloud'
    gcloud.parent.mkdir()
    gcloud.write_text(GCLOUD.format(python=sys.executable))
    gcloud.chmod(0o755)
    flags = ('--runner=tpu_vm', '--tpu_name=pod', '--tpu_zone=z')
    ended = self.call('table', *flags, '--tpu_project=p')
    self.assertEqual(ended.returncode, 0, ended.stderr)
    self.assertIn('results/fake/smoke/table.md', ended.stdout)
    ended = self.call('table', *flags, '--jobs=2')
    self.assertEqual(ended.returncode, 2)
    self.assertIn('one cell at a time, got jobs=2', ended.stderr)

  def sets(self, *flags):
    ended = self.call('jobset', '--image=me/image', *flags)
    self.assertEqual(ended.returncode, 0, ended.stderr)
    return json.loads(ended.stdout)['items']

  def run_sets(self, sets):
    """Does what the pods would."""
    for item in sets:
      job = item['spec']['replicatedJobs'][0]['template']['spec']
      command = job['template']['spec']['containers'][0]['command']
      self.assertEqual(command[:2], ['bash', '-c'])
      run = command[2].replace('exec python', f'exec {sys.executable}')
      subprocess.run(['bash', '-c', run], check=True)

  def test_job_sets_of_the_tuning_then_of_the_cells_then_none(self):
    tuning = self.sets()
    self.assertLen(tuning, 2)
    self.assertEqual(self.sets(), tuning)
    self.run_sets(tuning)
    cells = self.sets()
    self.assertEqual(
      [item['metadata']['annotations']['cell'] for item in cells],
      ['digits / Row / seed 1 / rate=1', 'digits / Row / seed 2 / rate=1'],
    )
    self.run_sets(cells)
    self.assertEqual(self.sets(), [])
    ended = self.call('table', '--only_collect')
    self.assertEqual(ended.returncode, 0, ended.stderr)

  def test_a_cell_of_several_hosts(self):
    [item, _] = self.sets(
      *('--hosts=2', '--resources=cpu=4,nvidia.com/gpu=1'),
      *('--claim=disk', '--mount=/shared', '--node_selector=pool=gpu'),
    )
    name = item['metadata']['name']
    job = item['spec']['replicatedJobs'][0]['template']['spec']
    self.assertEqual((job['parallelism'], job['completions']), (2, 2))
    pod = job['template']['spec']
    self.assertEqual(pod['nodeSelector'], {'pool': 'gpu'})
    container = pod['containers'][0]
    self.assertEndsWith(
      container['command'][2],
      f' --coordinator_address={name}-host-0-0.{name}:9876 '
      '--num_processes=2 --process_id=$JOB_COMPLETION_INDEX',
    )
    self.assertEqual(
      container['resources']['limits'], {'cpu': '4', 'nvidia.com/gpu': '1'}
    )
    self.assertEqual(container['volumeMounts'][0]['mountPath'], '/shared')
    ended = self.call('jobset', '--image=i', '--resources=cpu')
    self.assertEqual(ended.returncode, 2)
    self.assertEqual(
      ended.stderr, "error: --resources: expected NAME=VALUE, got 'cpu'\n"
    )


if __name__ == '__main__':
  absltest.main()
