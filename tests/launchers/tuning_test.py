"""Tests of launchers.tuning: what is chosen, and by which figures."""

from absl.testing import absltest, parameterized

from launchers import grid, results, spec, tuning

TABLE = """
title = 'T'
paper = 'P'
metric = 'test/accuracy'
[presets.small]
seeds = [1, 2]
[[rows]]
name = 'A'
tune = { lr = [0.1, 1.0, 10.0] }
[[datasets]]
name = 'd'
flagfile = 'd.flags'
[tuning]
seed = 9
metric = 'validation/accuracy'
"""


def candidates(*figures):
  """One candidate for each figure: a number, 'diverged' or 'failed'."""
  return [
    tuning.Candidate(
      (('lr', str(index)),),
      results.Measure(figure, reason='why')
      if isinstance(figure, str)
      else results.Measure('ok', figure),
    )
    for index, figure in enumerate(figures)
  ]


def run_result(cell, metrics, *, diverged=False):
  final = results.Final(
    metrics=metrics,
    diverged=diverged,
    round=1,
    clients=1,
    examples=1,
    examples_processed=1,
    wall_seconds=1.0,
    device='',
    versions={},
    commit='',
  )
  return results.Result(cell, final, 'code')


class TuningTest(parameterized.TestCase):
  @parameterized.parameters(
    ((0.1, 0.3, 0.2), 'higher', '1'),
    ((0.1, 0.3, 0.2), 'lower', '0'),
    ((0.3, 0.3, 0.2), 'higher', '0'),
    (('diverged', 0.3, 0.2), 'higher', '1'),
    (('diverged', 0.3, 0.2), 'lower', '2'),
  )
  def test_choice(self, figures, direction, expected):
    chosen, reason = tuning.choose(
      candidates(*figures), size=3, direction=direction
    )
    self.assertEqual(chosen, (('lr', expected),))
    self.assertEqual(reason, '')

  @parameterized.parameters(
    ((0.1, 'failed', 0.2), 3, 'tuning failed: why'),
    (('diverged', 'diverged'), 2, 'every candidate diverged'),
    ((0.1, 0.2), 3, '2 of 3 tuning runs have ended'),
  )
  def test_no_choice(self, figures, size, expected):
    chosen, reason = tuning.choose(
      candidates(*figures), size=size, direction='higher'
    )
    self.assertIsNone(chosen)
    self.assertIn(expected, reason)

  def test_test_figures_never_influence_the_choice(self):
    table = spec.parse_table(TABLE, file='table.toml')
    plan = grid.make_plan(
      table,
      name='demo',
      preset='small',
      seeds=None,
      folder='experiments/demo',
      results_dir='results',
    )
    cells = grid.tuning_cells(table, plan)
    validation = (0.1, 0.3, 0.2)
    records = []
    for test in ((0.9, 0.1, 0.5), (0.1, 0.5, 0.9), (None, None, None)):
      ended = [
        run_result(c, {'validation/accuracy': v, 'test/accuracy': t})
        for c, v, t in zip(cells, validation, test, strict=True)
      ]
      choices = tuning.choose_all(table, ended)
      self.assertEqual(
        tuning.chosen_values(choices), {('d', 'A'): (('lr', '1.0'),)}
      )
      records.append(tuning.to_json(table, choices))
    self.assertEqual(records[0], records[1])
    self.assertEqual(records[0], records[2])
    self.assertNotIn('test/', str(records[0]))
    self.assertEqual(
      [
        c['validation/accuracy'] for c in records[0]['choices'][0]['candidates']
      ],
      list(validation),
    )


if __name__ == '__main__':
  absltest.main()
