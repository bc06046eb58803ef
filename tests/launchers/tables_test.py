"""Tests of launchers.tables: what table.md, table.csv and the plot say."""

import csv
import io

from absl.testing import absltest

from launchers import grid, plot, results, spec, summary, tables, tuning
from launchers import report as report_lib

TABLE = """
title = 'Baselines'
paper = 'Someone, 2017'
metric = 'test/accuracy'
[presets.small]
seeds = [1, 2, 3]
[presets.smoke]
seeds = [1]
[[rows]]
name = 'FedAvg'
tune = { lr = [0.1] }
published = { digits = { value = 96.1, source = 'Table 2' } }
[[rows]]
name = 'Local'
[[datasets]]
name = 'digits'
flagfile = 'digits.flags'
[tuning]
seed = 9
metric = 'validation/accuracy'
[[claims]]
text = 'FedAvg beats | Local'
better = 'FedAvg'
worse = 'Local'
"""
METRIC = 'test/accuracy'
MORE = (
  TABLE.replace('[presets.small]', "also = ['test/loss']\n[presets.small]")
  + """
[[claims]]
text = 'They are the same'
better = 'FedAvg'
worse = 'Local'
kind = 'equal'
margin = 6.2
[[relatives]]
text = 'Better by'
row = 'FedAvg'
reference = 'Local'
kind = 'gain'
published = '7 %'
source = 'abstract'
[[relatives]]
text = 'Behind by'
row = 'FedAvg'
reference = 'Local'
kind = 'gap'
[[limits]]
row = 'FedAvg'
at_least = 96.0
source = 'ours'
[[limits]]
row = 'FedAvg'
at_least = 96.1
[[limits]]
row = 'Local'
at_most = 90.3
[[limits]]
row = 'Local'
at_most = 90.25
"""
)


def final(value, *, diverged=False, commit='abc', loss=None):
  return results.Final(
    metrics={METRIC: value} | ({} if loss is None else {'test/loss': loss}),
    diverged=diverged,
    round=50,
    clients=1000,
    examples=20000,
    examples_processed=123456,
    wall_seconds=12.5,
    device='cpu',
    versions={'jax': '0.10.2', 'absl': '2.5'},
    commit=commit,
  )


def report(figures, *, preset='small', text=TABLE):
  """A report whose figures are finals or reasons of failure, by cell."""
  table = spec.parse_table(text, file='table.toml')
  plan = grid.make_plan(
    table,
    name='demo',
    preset=preset,
    seeds=None,
    folder='experiments/demo',
    results_dir='results',
  )
  values = (('lr', '0.1'),)
  cells = grid.report_cells(table, plan, {('digits', 'FedAvg'): values})
  ended = [
    results.Result(cell, None, '', figure)
    if isinstance(figure, str)
    else results.Result(cell, figure, 'code1')
    for cell, figure in zip(cells, figures, strict=True)
  ]
  candidate = tuning.Candidate(values, results.Measure('ok', 0.9))
  choice = tuning.Choice('digits', 'FedAvg', (candidate,), values, '')
  return report_lib.Report(
    spec=table,
    plan=plan,
    results=ended,
    tuning_cells=grid.tuning_cells(table, plan),
    choices=[choice],
    command='python -m launchers.table',
  )


class TablesTest(absltest.TestCase):
  def test_a_full_table(self):
    fed_avg = [final(0.96), final(0.962), final(0.964)]
    local = [final(0.90), final(0.902), final(0.903)]
    made = report(fed_avg + local)
    text = tables.markdown(made)
    # s of 96.0, 96.2, 96.4 is 0.2; of 90.0, 90.2, 90.3 it is 0.1528.
    for expected in (
      '# Baselines\n\nSomeone, 2017\n\nPreset `small`, seeds 1, 2, 3.',
      'neither confirms nor refutes the scale of the paper',
      '| FedAvg | 96.20 ± 0.20 (n = 3) | 96.1 (measured +0.10; Table 2) |',
      '| Local | 90.17 ± 0.15 (n = 3) | not found |',
      '| FedAvg | digits | 3 of 3 | 1,000 | 20,000 | 50 | 123,456 | 12.5 s |',
      # Gains 6, 6, 6.1: mean 6.0333, s = 0.057735, half a width of 0.1434.
      'FedAvg beats \\| Local | digits | FedAvg - Local: +6.00, +6.00, +6.10 | '
      '+6.03 [+5.89, +6.18] | ±1 | **holds** |',
      '| FedAvg | digits | 1 | lr=0.1 |',
      'Not tuned: Local.',
      '- commit: abc\n- code digest: code1\n- versions: absl 2.5, jax 0.10.2\n',
      '- device: cpu\n- wall time of all cells together: 75.0 s',
      'python -m launchers.table\n',
    ):
      self.assertIn(expected, text)
    for result in made.results:
      self.assertIn(f'\n{result.cell.command()}\n', text)
    self.assertIn('--seed=9 --workdir=results/demo/small/tuning/', text)
    self.assertNotIn('Failed cells', text)
    self.assertNotIn('Fewer than 3 seeds', text)

  def test_further_metrics_relatives_and_limits(self):
    figures = [final(0.96, loss=0.2), final(0.962, loss=0.2)]
    figures += [final(0.964, loss=0.3), final(0.90, loss=0.4)]
    figures += [final(0.902, loss=0.5), final(0.903, loss=0.4)]
    text = tables.markdown(report(figures, text=MORE))
    for expected in (
      # 20, 20, 30: s = 10 / sqrt(3); 40, 50, 40 too.
      '| FedAvg | 96.20 ± 0.20 (n = 3) | 96.1 (measured +0.10; Table 2) |',
      'digits, `test/loss` |\n',
      '| FedAvg | 23.33 ± 5.77 (n = 3) |\n| Local | 43.33 ± 5.77 (n = 3) |\n',
      # Mean 6.0333 [5.89, 6.18] lies inside 6.2.
      'They are the same | digits | FedAvg = Local: +6.00, +6.00, +6.10 | '
      '+6.03 [+5.89, +6.18] | ±6.2 | **holds** |',
      # 96 / 90, 96.2 / 90.2, 96.4 / 90.3 = 1.066667, 1.066519, 1.067553.
      '| Better by: FedAvg / Local | digits | `test/accuracy` | '
      '+6.67 %, +6.65 %, +6.76 % | +6.69 % | 7 % (abstract) |',
      # 20 / 40, 20 / 50, 30 / 40.
      '| Better by: FedAvg / Local | digits | `test/loss` | '
      '-50.00 %, -60.00 %, -25.00 % | -45.00 % | 7 % (abstract) |',
      '| Behind by: FedAvg / Local | digits | `test/accuracy` | '
      '-6.67 %, -6.65 %, -6.76 % | -6.69 % | not found |',
      '| Behind by: FedAvg / Local | digits | `test/loss` | '
      '+50.00 %, +60.00 %, +25.00 % | +45.00 % | not found |',
      '| FedAvg | digits | >= 96 | 96.00, 96.20, 96.40 | ours | **kept** |',
      '| FedAvg | digits | >= 96.1 | 96.00, 96.20, 96.40 |  | **broken** |',
      '| Local | digits | <= 90.3 | 90.00, 90.20, 90.30 |  | **kept** |',
      '| Local | digits | <= 90.25 | 90.00, 90.20, 90.30 |  | **broken** |',
    ):
      self.assertIn(expected, text)
    plain = tables.markdown(report(figures))
    for absent in (
      'test/loss',
      '## Relative figures',
      '## Limits',
      'digits, `',
    ):
      self.assertNotIn(absent, plain)

  def test_figures_by_name(self):
    """Local has no generic model; its own metric stands elsewhere."""
    text = TABLE.replace("metric = 'test/accuracy'", "metric = 'PM'", 1)
    text = text.replace(
      '[presets.small]',
      "[figures]\nPM = 'test/accuracy'\nGM = 'test/loss'\n"
      "[[details]]\ntitle = 'More'\nmetrics = ['GM', 'none']\n"
      '[presets.small]',
    ).replace(
      "name = 'Local'\n",
      "name = 'Local'\nfigures = { PM = 'own', GM = '' }\n",
      1,
    )
    text += "[[limits]]\nrow = 'FedAvg'\nfigure = 'GM'\nat_least = 25\n"
    local = [final(0.1) for _ in range(3)]
    for one in local:
      one.metrics['own'] = 0.5
    made = report([final(0.96, loss=0.3)] * 3 + local, text=text)
    shown = tables.markdown(made)
    for expected in (
      '| FedAvg | 96.00 ± 0.00 (n = 3) | 96.1 (measured -0.10; Table 2) |',
      '| Local | 50.00 ± 0.00 (n = 3) | not found |',
      'over n seeds of `PM` (`test/accuracy`) in %',
      '## More: digits\n\n|  | GM | none |\n| --- | --- | --- |\n'
      '| FedAvg | 30.00 ± 0.00 (n = 3) | - |\n\n',
      '- GM: `test/loss`',
      '- PM of Local: `own`\n- GM of Local: it has none',
      '| FedAvg (GM) | digits | >= 25 | 30.00, 30.00, 30.00 |  | **kept** |',
    ):
      self.assertIn(expected, shown)
    lines = list(csv.DictReader(io.StringIO(tables.csv_text(made))))
    self.assertEqual([line['GM'] for line in lines], ['30.0'] * 3 + [''] * 3)
    self.assertEqual(lines[3]['value'], '50.0')

  def test_a_seed_without_a_figure_in_the_further_sections(self):
    figures = [final(0.97, loss=0.2)] * 2 + [final(0.97, diverged=True)]
    figures += [final(0.90, loss=0.4)] * 2 + [final(0.90)]
    text = tables.markdown(report(figures, text=MORE))
    for expected in (
      '| FedAvg | diverged 1 of 3; 20.00 ± 0.00 (n = 2) |\n'
      '| Local | failed 1 of 3; 40.00 ± 0.00 (n = 2) |\n',
      '| digits | `test/accuracy` | n/a | n/a | 7 % (abstract) |',
      '| digits | `test/loss` | n/a | n/a | 7 % (abstract) |',
      # Two seeds keep it, the third did not get there.
      '| FedAvg | digits | >= 96 | 97.00, 97.00 | ours | **broken** |',
      '| Local | digits | <= 90.3 | 90.00, 90.00, 90.00 |  | **kept** |',
    ):
      self.assertIn(expected, text)

  def test_a_reference_of_zero_has_no_ratio(self):
    figures = [final(0.9, loss=0.1)] * 3 + [final(0.9, loss=0.0)] * 3
    text = tables.markdown(report(figures, text=MORE))
    self.assertIn('| digits | `test/accuracy` | +0.00 %, +0.00 %, ', text)
    self.assertIn('| digits | `test/loss` | n/a | n/a | 7 % (abs', text)

  def test_cells_that_diverged_or_failed_stay_and_say_so(self):
    figures = [final(0.96), final(0.5, diverged=True), final(float('nan'))]
    figures += [final(0.9), final(0.91), 'exit code 1: ValueError: no']
    text = tables.markdown(report(figures))
    self.assertIn('| FedAvg | diverged 2 of 3; 96.00 ± n/a (n = 1) |', text)
    self.assertIn('| Local | failed 1 of 3; 90.50 ± 0.71 (n = 2) |', text)
    self.assertIn('| Local | digits | 2 of 3 |', text)
    self.assertIn('**undecided** (FedAvg, seed 2: diverged; ', text)
    self.assertIn(
      '- digits / Local / seed 3: `exit code 1: ValueError: no`', text
    )

  def test_one_seed_is_undecided_and_smoke_says_what_it_is(self):
    text = tables.markdown(report([final(0.9), 'why'], preset='smoke'))
    self.assertIn('Smoke scale', text)
    self.assertIn('| Local | failed | not found |', text)
    self.assertIn('**undecided** (Local, seed 1: failed)', text)
    text = tables.markdown(report([final(0.9), final(0.8)], preset='smoke'))
    self.assertIn('**undecided** (n = 1 seed; ', text)

  def test_cells_of_several_commits_are_counted(self):
    figures = [final(0.9, commit='old')] * 2 + [final(0.9)] * 4
    text = tables.markdown(report(figures))
    self.assertIn('- commit: old (2 cells); abc (4 cells)', text)

  def test_csv_has_one_line_a_cell(self):
    made = report([final(0.5)] * 4 + [final(0.5, diverged=True), 'why'])
    lines = list(csv.DictReader(io.StringIO(tables.csv_text(made))))
    self.assertLen(lines, 6)
    self.assertEqual(
      [line['status'] for line in lines], ['ok'] * 4 + ['diverged', 'failed']
    )
    self.assertEqual([line['value'] for line in lines[3:]], ['50.0', '', ''])
    self.assertEqual(lines[0]['published'], '96.1')
    self.assertAlmostEqual(
      float(lines[0]['difference']), float(lines[0]['value']) - 96.1
    )
    self.assertEqual(lines[3]['difference'], '')
    self.assertEqual(lines[3]['published'], 'not found')
    self.assertEqual(lines[0]['tuned'], 'lr=0.1')
    self.assertEqual(lines[5]['reason'], 'why')
    self.assertEqual(lines[0]['command'], made.results[0].cell.command())

  def test_plot_is_a_png_even_where_every_seed_failed(self):
    for figures in ([final(0.9)] * 6, ['why'] * 6):
      made = report(figures)
      groups = summary.summarise(made.spec, made.results)
      chart = plot.bar_chart(made.spec, groups, subtitle='small')
      self.assertStartsWith(chart, b'\x89PNG')


if __name__ == '__main__':
  absltest.main()
