"""Columns that are numbers: their seeds, rows, plot, slopes and claims."""

from absl.testing import absltest, parameterized

from launchers import (
  claims,
  fields,
  grid,
  plot,
  results,
  spec,
  summary,
  tables,
  verdicts,
)
from launchers import report as report_lib

TABLE = """
title = 'Gaps'
paper = 'Someone, 2022'
metric = 'gap'
scale = 1.0
x_label = 'clients'
[presets.small]
seeds = [1, 2, 3]
[[rows]]
name = 'A'
tune = { lr = [0.1, 0.2] }
tune_on = '2'
[[rows]]
name = 'B'
datasets = ['1', '4']
[[datasets]]
name = '1'
flagfile = 'f'
x = 1
[[datasets]]
name = '2'
flagfile = 'f'
x = 2
[[datasets]]
name = '4'
flagfile = 'f'
seeds = { small = [1, 2] }
x = 4
[tuning]
seed = 9
metric = 'validation/accuracy'
[[claims]]
text = 'A has a gap'
better = 'A'
margin = 0.1
[[claims]]
text = 'B has none'
better = 'B'
kind = 'zero'
margin = 0.1
[[claims]]
text = 'A more than B'
better = 'A'
worse = 'B'
[[slopes]]
text = 'It shrinks'
row = 'A'
sign = 'positive'
[[limits]]
row = 'A'
datasets = ['1']
at_least = 7.0
of = 'mean'
"""


def make_report(value):
  """A report in which a cell's figure is value(row, x, seed)."""
  table = spec.parse_table(TABLE, file='table.toml')
  plan = grid.make_plan(
    table,
    name='demo',
    preset='small',
    seeds=None,
    folder='experiments/demo',
    results_dir='results',
  )
  ended = []
  for cell in grid.report_cells(table, plan, {('2', 'A'): (('lr', '0.2'),)}):
    figure = value(cell.row, int(cell.dataset), cell.seed)
    final = results.Final(
      {'gap': figure}, False, 1, 1, 1, 1, 1.0, 'cpu', {}, 'abc'
    )
    ended.append(results.Result(cell, final, 'code'))
  return report_lib.Report(
    spec=table,
    plan=plan,
    results=ended,
    tuning_cells=grid.tuning_cells(table, plan),
    choices=(),
    command='python -m launchers.table',
  )


class ColumnsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    # Slope 8 in A, with intercept 0.01 * seed; noise around 0 in B. Seed 3 has
    # no column 4, so that slopes are over columns 1 and 2.
    self.report = make_report(
      lambda row, x, seed: 8 / x + 0.01 * seed if row == 'A' else seed - 2
    )

  def test_cells(self):
    cells = [
      (r.cell.dataset, r.cell.row, r.cell.seed) for r in self.report.results
    ]
    self.assertEqual(
      cells,
      [
        *(('1', row, seed) for row in 'AB' for seed in (1, 2, 3)),
        *(('2', 'A', seed) for seed in (1, 2, 3)),
        *(('4', row, seed) for row in 'AB' for seed in (1, 2)),
      ],
    )

  def test_one_column_is_tuned_for_all(self):
    tuned = self.report.tuning_cells
    self.assertEqual([(c.dataset, c.row) for c in tuned], [('2', 'A')] * 2)
    for result in self.report.results:
      chosen = (('lr', '0.2'),) if result.cell.row == 'A' else ()
      self.assertEqual(result.cell.values, chosen)

  def test_seeds_on_the_command_line_hold_for_all_columns(self):
    plan = grid.make_plan(
      self.report.spec,
      name='demo',
      preset='small',
      seeds=(5,),
      folder='experiments/demo',
      results_dir='results',
    )
    cells = grid.report_cells(self.report.spec, plan, {})
    self.assertEqual({cell.seed for cell in cells}, {5})

  def test_slope_by_seed(self):
    verdict = claims.judge_slope(
      self.report.spec.slopes[0], self.report.spec, self.report.results
    )
    self.assertLen(verdict.values, 3)
    for _, slope in verdict.values:
      self.assertAlmostEqual(slope, 8)
    self.assertEqual(verdict.outcome, 'holds')

  def test_a_slope_without_one_of_its_cells(self):
    report = make_report(
      lambda row, x, seed: None if (x, seed) == (2, 3) else 8 / x
    )
    verdict = claims.judge_slope(
      report.spec.slopes[0], report.spec, report.results
    )
    self.assertEqual(verdict.outcome, 'undecided')
    self.assertIn('2, seed 3', verdict.reason)

  @parameterized.parameters(
    (lambda x, s: -8 / x + 0.01 * s * x, 'fails'),
    (lambda x, s: (s - 2) * x, 'undecided'),
  )
  def test_other_slopes(self, value, outcome):
    report = make_report(lambda row, x, seed: value(x, seed))
    verdict = claims.judge_slope(
      report.spec.slopes[0], report.spec, report.results
    )
    self.assertEqual(verdict.outcome, outcome)

  def test_claims_against_zero(self):
    verdicts = claims.judge_all(self.report.spec, self.report.results)
    self.assertEqual(
      [(v.claim.text, v.dataset, v.outcome) for v in verdicts],
      [
        *(('A has a gap', d, 'holds') for d in '124'),
        *(('B has none', d, 'not contradicted') for d in '14'),
        ('A more than B', '1', 'holds'),
        ('A more than B', '4', 'undecided'),
      ],
    )
    self.assertEqual(verdicts[0].differences[0], (1, 8.01))

  @parameterized.parameters(
    (-0.3, 0.5, 'not contradicted'),
    (0.01, 0.15, 'not contradicted'),
    (0.01, 0.09, 'holds'),
    (-0.1, 0.1, 'holds'),
    (0.01, 0.5, 'fails'),
    (-0.5, -0.2, 'fails'),
  )
  def test_no_effect(self, low, high, expected):
    interval = claims.Interval((low + high) / 2, low, high)
    got = claims.outcome(interval, margin=0.1, kind='zero')
    self.assertEqual(got, expected)

  def test_table(self):
    text = tables.markdown(self.report)
    for line in (
      'seeds 1, 2, 3.',
      '4: seeds 1, 2.',
      '| B | 0.0000 ± 1.0000 (n = 3) | not found |  |  | -0.5000',
      '| A has a gap | 1 | A > 0: +8.0100, +8.0200, +8.0300 |',
      '| B has none | 1 | B ~ 0: -1.0000',
      '| It shrinks | A | +8, +8, +8 |',
      '| 1, 2 | positive | **holds** |',
      '| A | 1 | mean >= 7 | 8.0100, 8.0200, 8.0300; mean 8.0200 |',
    ):
      self.assertIn(line, text)
    self.assertEqual(verdicts.broken_limits(self.report), [])

  def test_a_limit_on_the_mean(self):
    """One seed below, the mean above; then the mean below."""
    values = {1: 5.0, 2: 8.0, 3: 9.0}
    report = make_report(lambda row, x, seed: values[seed])
    self.assertEqual(verdicts.broken_limits(report), [])
    report = make_report(lambda row, x, seed: values[seed] - 1)
    self.assertLen(verdicts.broken_limits(report), 1)

  def test_plot(self):
    groups = summary.summarise(self.report.spec, self.report.results)
    chart = plot.line_chart(self.report.spec, groups, subtitle='small')
    self.assertStartsWith(chart, b'\x89PNG')

  @parameterized.parameters(
    ('x = 2\n', '', 'expected an x in each of them'),
    ("datasets = ['1', '4']", "datasets = ['5']", 'rows[1].datasets'),
    ("tune_on = '2'", "tune_on = '5'", 'rows[0].tune_on'),
    ('small = [1, 2] }', 'small = [1, 9] }', 'tuning seed'),
    ("sign = 'positive'", "sign = 'up'", 'slopes[0].sign'),
    ("of = 'mean'", "of = 'all'", 'limits[0].of'),
    ('seeds = { small = [1, 2] }', 'seeds = { small = 3 }', 'seeds.small'),
    ('seeds = { small', 'seeds = { paper', 'no preset paper'),
    ('tune = { lr = [0.1, 0.2] }\n', '', 'nothing to tune'),
    ('scale = 1.0', "direction = 'neither'", 'direction: missing key'),
  )
  def test_mistakes(self, old, new, message):
    with self.assertRaises(fields.TableError) as caught:
      spec.parse_table(TABLE.replace(old, new, 1), file='t')
    self.assertIn(message, str(caught.exception))


if __name__ == '__main__':
  absltest.main()
