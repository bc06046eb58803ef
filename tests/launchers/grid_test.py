"""Tests of launchers.grid: which cells a table has, and their commands."""

import shlex

from absl.testing import absltest, parameterized

from launchers import fields, grid, spec

TABLE = """
title = 'T'
paper = 'P'
metric = 'test/accuracy'
[presets.smoke]
seeds = [1]
datasets = ['b']
flags = ['--preset_flag']
[presets.small]
seeds = [1, 2, 3]
[[rows]]
name = 'Fed Avg'
flags = ['--row_flag=a b']
tune = { lr = [0.1, 1], mu = [0] }
[[rows]]
name = 'Local'
[[datasets]]
name = 'a'
flagfile = 'flags/a.flags'
[[datasets]]
name = 'b'
flagfile = 'flags/b.flags'
flags = ['--data_flag']
presets = { smoke = ['--data_preset_flag'], small = ['--other'] }
[tuning]
seed = 9
metric = 'validation/accuracy'
flags = ['--tuning_flag']
"""


class GridTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.spec = spec.parse_table(TABLE, file='table.toml')

  def plan(self, preset, seeds=None):
    return grid.make_plan(
      self.spec,
      name='demo',
      preset=preset,
      seeds=seeds,
      folder='experiments/demo',
      results_dir='results',
    )

  def test_the_grid_is_datasets_by_rows_by_seeds(self):
    cells = grid.report_cells(self.spec, self.plan('small'), {})
    self.assertEqual(
      [(cell.dataset, cell.row, cell.seed) for cell in cells],
      [
        (d, r, s) for d in 'ab' for r in ('Fed Avg', 'Local') for s in (1, 2, 3)
      ],
    )
    self.assertLen({cell.workdir for cell in cells}, 12)

  def test_flags_come_in_the_stated_order(self):
    choices = {('b', 'Fed Avg'): (('lr', '0.1'), ('mu', '0'))}
    cell = grid.report_cells(self.spec, self.plan('smoke'), choices)[0]
    self.assertEqual(
      cell.args,
      (
        '-m',
        'experiments.demo.run',
        '--flagfile=experiments/demo/flags/b.flags',
        '--data_flag',
        '--row_flag=a b',
        '--preset_flag',
        '--data_preset_flag',
        '--lr=0.1',
        '--mu=0',
        '--seed=1',
        '--workdir=results/demo/smoke/runs/b/fed_avg/seed_1',
      ),
    )
    self.assertEqual(shlex.split(cell.command('py'))[1:], list(cell.args))
    self.assertIn("'--row_flag=a b'", cell.command())

  def test_each_candidate_is_tried_with_the_tuning_seed_alone(self):
    cells = grid.tuning_cells(self.spec, self.plan('smoke'))
    self.assertEqual(
      [cell.values for cell in cells],
      [(('lr', '0.1'), ('mu', '0')), (('lr', '1'), ('mu', '0'))],
    )
    self.assertEqual({cell.seed for cell in cells}, {9})
    self.assertEqual(
      cells[0].args[-5:],
      (
        '--tuning_flag',
        '--lr=0.1',
        '--mu=0',
        '--seed=9',
        '--workdir=results/demo/smoke/tuning/b/fed_avg/lr=0.1-mu=0/seed_9',
      ),
    )

  def test_untuned_cells_have_a_placeholder(self):
    cell = grid.report_cells(self.spec, self.plan('smoke'), {})[0]
    self.assertIn('--lr=TUNED', cell.args)

  @parameterized.parameters(
    ('0.1', '0_1'), ('a/b', 'a_b'), ('x' * 90, 'x' * 91)
  )
  def test_candidates_never_share_a_folder(self, left, right):
    text = TABLE.replace('[0.1, 1]', f"['{left}', '{right}']")
    self.spec = spec.parse_table(text, file='table.toml')
    cells = grid.tuning_cells(self.spec, self.plan('smoke'))
    folders = [cell.workdir for cell in cells]
    self.assertLen(set(folders), 2)
    for folder in folders:
      self.assertEqual(folder.count('/'), 7)

  def test_seeds_may_be_replaced_but_not_by_the_tuning_seed(self):
    self.assertEqual(self.plan('small', seeds=(7, 8)).seeds, (7, 8))
    with self.assertRaisesRegex(fields.TableError, 'seed 9 is the tuning seed'):
      self.plan('small', seeds=(9,))

  def test_a_missing_preset_names_those_that_exist(self):
    with self.assertRaisesRegex(fields.TableError, 'it has smoke, small'):
      self.plan('paper')


if __name__ == '__main__':
  absltest.main()
