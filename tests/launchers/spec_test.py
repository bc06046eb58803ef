"""Tests of launchers.spec: what a table.toml may say, and what errors say."""

import pathlib
import tempfile

from absl.testing import absltest, parameterized

from launchers import fields, spec

TABLE = """
title = 'Baselines'
paper = 'Someone, 2017'
metric = 'test/accuracy/pooled'

[presets.smoke]
seeds = [1]
datasets = ['digits']
flags = ['--num_rounds=2']

[presets.small]
seeds = [1, 2, 3]

[[rows]]
name = 'FedAvg'
flags = ['--algorithm=fed_avg']
tune = { lr = [0.03, 1e-5], nesterov = [true, false] }
published = { digits = { value = 96.1, source = 'Table 2' } }

[[rows]]
name = 'Local'

[[datasets]]
name = 'digits'
flagfile = 'flags/digits.flags'
presets = { small = ['--num_rounds=50'] }

[[datasets]]
name = 'letters'
flagfile = 'flags/letters.flags'

[tuning]
seed = 1000
metric = 'validation/accuracy/pooled'

[[claims]]
text = 'FedAvg beats local training'
better = 'FedAvg'
worse = 'Local'
"""

MORE = (
  TABLE.replace(
    '[presets.smoke]', "also = ['test/loss/pooled', 'test/w']\n[presets.smoke]"
  )
  + """kind = 'equal'
margin = 2

[[relatives]]
text = 'Gain over local training'
row = 'FedAvg'
reference = 'Local'
kind = 'gain'
datasets = ['letters']
published = 'up to 20 %'
source = 'abstract'

[[relatives]]
text = 'Gap'
row = 'Local'
reference = 'FedAvg'
kind = 'gap'

[[limits]]
row = 'Local'
at_least = 90
source = 'our limit'
datasets = ['digits']

[[limits]]
row = 'FedAvg'
at_most = -0.5
"""
)


class SpecTest(parameterized.TestCase):
  def test_every_key_is_read_and_defaults_are_filled_in(self):
    table = spec.parse_table(TABLE, file='table.toml')
    self.assertEqual(table.scale, 100.0)
    self.assertEqual(table.direction, 'higher')
    self.assertEqual(
      table.presets['smoke'],
      spec.Preset((1,), ('digits',), ('--num_rounds=2',)),
    )
    self.assertEqual(table.presets['small'].datasets, ('digits', 'letters'))
    row = table.rows[0]
    self.assertEqual(row.published['digits'], spec.Published(96.1, 'Table 2'))
    self.assertEqual(
      row.tune, (('lr', ('0.03', '1e-05')), ('nesterov', ('true', 'false')))
    )
    self.assertEqual(
      table.tuning,
      spec.Tuning(1000, 'validation/accuracy/pooled', 'higher', ()),
    )
    claim = table.claims[0]
    self.assertEqual(claim.datasets, ('digits', 'letters'))
    self.assertEqual(claim.margin, 1.0)

  def test_further_metrics_relatives_limits_and_kinds(self):
    table = spec.parse_table(MORE, file='table.toml')
    self.assertEqual(table.also, ('test/loss/pooled', 'test/w'))
    claim = table.claims[0]
    self.assertEqual((claim.kind, claim.margin), ('equal', 2.0))
    columns = ('digits', 'letters')
    self.assertEqual(
      table.relatives,
      (
        spec.Relative(
          'Gain over local training',
          'FedAvg',
          'Local',
          'gain',
          ('letters',),
          'up to 20 %',
          'abstract',
        ),
        spec.Relative(
          'Gap', 'Local', 'FedAvg', 'gap', columns, 'not found', ''
        ),
      ),
    )
    self.assertEqual(
      table.limits,
      (
        spec.Limit('Local', 90.0, None, 'our limit', ('digits',)),
        spec.Limit('FedAvg', None, -0.5, '', columns),
      ),
    )
    plain = spec.parse_table(TABLE, file='table.toml')
    self.assertEqual((plain.also, plain.relatives, plain.limits), ((),) * 3)
    self.assertEqual(plain.claims[0].kind, 'better')

  @parameterized.parameters(
    ("also = ['test/loss/pooled', ", "also = ['', ", 'also: expected a text'),
    ("also = ['test/loss/pooled', 'test/w']", 'also = 1', 'also: expected a l'),
    ("kind = 'equal'", "kind = 'same'", 'claims[0].kind: expected one of'),
    ("kind = 'gain'", "kind = 'ratio'", 'relatives[0].kind: expected one of'),
    ("kind = 'gain'\n", '', 'relatives[0].kind: missing key'),
    (
      "reference = 'FedAvg'",
      "reference = 'Fed'",
      'relatives[1].ref',
    ),
    (
      "text = 'Gap'\nrow = 'Local'",
      "text = 'Gap'",
      'relatives[1].row: ',
    ),
    (
      "datasets = ['letters']",
      "datasets = ['l']",
      'relatives[0].data',
    ),
    (
      "published = 'up to 20 %'",
      'published = 20',
      'relatives[0].pub',
    ),
    ("text = 'Gap'", "texts = 'Gap'", 'relatives[1].texts: unknown key'),
    ('at_least = 90\n', '', 'limits[0].row: expected one of at_least and at_m'),
    (
      'at_most = -0.5',
      'at_most = -0.5\nat_least = 1',
      'limits[1].row: expected',
    ),
    (
      'at_least = 90',
      'at_least = true',
      'limits[0].at_least: expected a',
    ),
    ('at_most = -0.5', 'at_most = inf', 'limits[1].at_most: expected a finite'),
    ('at_most = -0.5', 'below = 2', 'limits[1].below: unknown key'),
    ("row = 'Local'\nat_", "row = 'Lokal'\nat_", 'limits[0].row: expected one'),
  )
  def test_a_mistake_in_the_further_sections(self, old, new, message):
    self.assertIn(old, MORE)
    with self.assertRaises(fields.TableError) as caught:
      spec.parse_table(MORE.replace(old, new, 1), file='a/table.toml')
    self.assertStartsWith(str(caught.exception), 'a/table.toml: ' + message)

  @parameterized.parameters(
    ("name = 'Local'", "name = 'Local'\nflag = []", 'rows[1].flag: unknown'),
    ('seeds = [1]\n', 'seeds = [1]\nseed = 2\n', 'presets.smoke.seed: unknown'),
    ("title = 'Baselines'", "titel = 'B'", 'titel: unknown key'),
    ("title = 'Baselines'", '', 'title: missing key'),
    ('[presets.small]', '[presets.tiny]', "unknown key 'tiny'"),
    ('small = [', 'paper = [', "'digits' has flags for no preset paper"),
    ('small = [', 'smal = [', "datasets[0].presets: unknown key 'smal'"),
    (
      "source = 'Table 2'",
      "page = 'Table 2'",
      'published.digits.page: unknown',
    ),
    (", source = 'Table 2'", '', 'rows[0].published.digits.source: missing'),
    ('published = { digits', 'published = { digit', "unknown key 'digit'"),
    ("worse = 'Local'", "worse = 'Lokal'", "got 'Lokal'"),
    ("worse = 'Local'", "worse = 'FedAvg'", 'is the same row as better'),
    ("name = 'Local'", "name = 'fedavg'", "share the folder 'fedavg'"),
    ("'validation/acc", "'test/acc", 'tuning.metric: expected validation/'),
    ('seed = 1000', 'seed = 2', 'seed 2 is the tuning seed'),
    ('seeds = [1, 2, 3]', 'seeds = [1, 2, 2]', 'seed 2 stands there twice'),
    ('seeds = [1, 2, 3]', 'seeds = [1, true]', 'expected a whole number'),
    ('seeds = [1, 2, 3]', 'seeds = []', 'expected at least one seed'),
    ("datasets = ['digits']", 'datasets = []', 'at least one data set'),
    ('value = 96.1', 'value = nan', 'expected a finite number'),
    ("'--num_rounds=2'", "'num_rounds=2'", 'expected a flag such as'),
    ("'--num_rounds=2'", "'--seed=2'", 'the launcher sets --seed itself'),
    ('lr = [0.03, 1e-5]', 'lr = []', 'rows[0].tune.lr: expected a list'),
    ('lr = [', 'seed = [', 'rows[0].tune.seed: expected the name of a flag'),
    ("title = 'Baselines'", 'title = ', 'is not valid TOML'),
    (
      "worse = 'Local'",
      "worse = 'Local'\nlevel = 2",
      'claims[0].level: is for claims without worse',
    ),
    (
      "worse = 'Local'",
      "against = 'x'",
      'claims[0].against: is the figure of worse',
    ),
    ("name = 'Local'", "name = 'Local'\nfigures = { a = 'b' }", "key 'a'"),
    ('seed = 1000', "seed = 1000\npresets = ['tiny']", 'tuning.presets: exp'),
    ('seed = 1000', 'seed = 1000\nfigures = 1', 'tuning.figures: unknown'),
  )
  def test_a_mistake_is_one_line_with_file_and_key(self, old, new, message):
    self.assertIn(old, TABLE)
    with self.assertRaises(fields.TableError) as caught:
      spec.parse_table(TABLE.replace(old, new, 1), file='a/table.toml')
    self.assertStartsWith(str(caught.exception), 'a/table.toml: ')
    self.assertIn(message, str(caught.exception))
    self.assertNotIn('\n', str(caught.exception))

  def test_tuned_rows_need_a_tuning_section(self):
    start = TABLE.index('[tuning]')
    text = TABLE[:start] + TABLE[TABLE.index('[[claims]]') :]
    with self.assertRaisesRegex(fields.TableError, "row 'FedAvg' has `tune`"):
      spec.parse_table(text, file='table.toml')

  def test_flag_files_must_exist(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    path = folder / 'table.toml'
    path.write_text(TABLE)
    with self.assertRaisesRegex(fields.TableError, r'no file .*digits\.flags'):
      spec.load_table(path, shown='table.toml')

  @parameterized.parameters(
    ('FedAvg', 'fedavg'), ('p = 0.5, IID', 'p_0.5_iid'), ('..', ''), ('é', '')
  )
  def test_slug(self, name, expected):
    self.assertEqual(spec.slug(name), expected)


if __name__ == '__main__':
  absltest.main()
