"""Reads and checks experiments/NAME/table.toml, the description of one table.

The format, with every key (those marked optional may be left out):

    title = 'Federated averaging and its baselines'
    paper = 'Authors, year, title, link'
    metric = 'test/accuracy/pooled'   # a key of final.json's metrics
    direction = 'higher'              # optional: or 'lower'; 'neither' of a
                                      # figure of which no side is better
    scale = 100.0                     # optional: shown = scale * measured
    also = ['test/loss/pooled']       # optional: more metrics, shown beside
    figures = { GM = 'test/accuracy/pooled' }  # optional: names of metrics,
                                      # to stand wherever a metric may
    [[details]]                       # optional: a table of its own for each
    title = 'Heads'                   # data set; '-' where a row lacks one
    metrics = ['GM', 'GM tail']
    curves = ['GM', 'PM']             # optional: drawn against rounds
    x_label = 'clients'               # optional: what x of a data set is
    [presets.smoke]                   # any of smoke, small, paper
    seeds = [1]
    datasets = ['digits']             # optional: a subset of the columns
    flags = ['--num_rounds=2']        # optional: appended to every command
    [[rows]]                          # one method
    name = 'FedAvg'
    flags = ['--algorithm=fed_avg']   # optional
    tune = { client_learning_rate = [0.03, 0.1] }                  # optional
    tune_on = 'digits'                # optional: one column, for all of them
    published = { digits = { value = 96.1, source = 'Table 2' } }  # optional
    datasets = ['digits']             # optional: every column
    figures = { GM = 'other/accuracy/pooled' }  # optional: where this row has
                                      # a figure; '' if it has none
    [[datasets]]                      # one column
    name = 'digits'
    flagfile = 'flags/digits.flags'   # relative to experiments/NAME
    flags = []                        # optional
    presets = { small = ['--num_rounds=50'] }                      # optional
    seeds = { small = [1, 2] }        # optional: instead of the preset's
    tuning = []                       # optional: flags of tuning runs only
    x = 38.0                          # optional, for all: axis of plot.png
    [tuning]                          # needed when any row has `tune`
    seed = 1000                       # no preset may report it
    metric = 'validation/accuracy/pooled'
    direction = 'higher'              # optional: the table's direction
    flags = []                        # optional: for tuning runs only
    presets = ['small']               # optional: which tune; the others run
                                      # on the flags as they stand
    [[claims]]                        # optional
    text = 'FedAvg beats local training'
    better = 'FedAvg'
    worse = 'Local'                   # optional: without it, against `level`
    level = 85.0                      # optional: shown points, 0 by default
    figure = 'GM'                     # optional: the table's metric
    against = 'GM tail'               # optional: of `worse`, by default figure
    direction = 'lower'               # optional: of figure, the table's
    datasets = ['digits']             # optional: every column
    margin = 1.0                      # optional: shown points that count as 0
    kind = 'better'                   # optional: or 'equal', within the margin;
                                      # or 'zero', see launchers/claims.py
    [[slopes]]                        # optional: of a row against 1 / x
    text = 'More clients, smaller gap'
    row = 'FedAvg'
    datasets = ['digits']             # optional: every column
    sign = 'positive'                 # what is claimed of it; or 'negative'
    [[relatives]]                     # optional: row / reference, in %
    text = 'Gain over local training'
    row = 'FedAvg'
    reference = 'Local'
    kind = 'gain'                     # row / reference - 1; or 'gap': 1 - that
    datasets = ['digits']             # optional: every column
    published = 'up to 20 %'          # optional, with its source
    source = 'abstract'
    [[limits]]                        # optional: a bound, but for smoke
    row = 'FedAvg'
    at_least = 90.0                   # or at_most; shown units, for every seed
    of = 'seeds'                      # optional: or 'mean', over seeds
    figure = 'GM'                     # optional: the table's metric
    source = 'our acceptance limit'
    datasets = ['digits']             # optional: every column
"""

import dataclasses
import pathlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from launchers import fields

PRESETS = ('smoke', 'small', 'paper')
DIRECTIONS = ('higher', 'lower', 'neither')
_OWN_FLAGS = ('seed', 'workdir')  # The launcher sets these for each cell.


@dataclasses.dataclass(frozen=True)
class Preset:
  """Seeds, columns and extra flags of one scale of the table."""

  seeds: tuple[int, ...]
  datasets: tuple[str, ...]
  flags: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Published:
  """A number as the paper prints it, with the place where it stands."""

  value: float
  source: str


@dataclasses.dataclass(frozen=True)
class Row:
  """One method: its flags, its tuning grid and its published numbers.

  `tune` holds (flag name, values as text) pairs; `published` is by data set;
  `figures` says under which metric the row has a figure, '' that it has none.
  """

  name: str
  flags: tuple[str, ...]
  tune: tuple[tuple[str, tuple[str, ...]], ...]
  published: Mapping[str, Published]
  datasets: tuple[str, ...]
  tune_on: str = ''
  figures: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def tuned_on(self, dataset: str) -> str:
    """The column whose tuning a column takes."""
    return self.tune_on or dataset


@dataclasses.dataclass(frozen=True)
class Dataset:
  """One column: its flag file, and its flags and seeds, some by preset.

  `x` is its place in the plot, or None.
  """

  name: str
  flagfile: str
  flags: tuple[str, ...]
  presets: Mapping[str, tuple[str, ...]]
  seeds: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  x: float | None = None
  tuning: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How tuned values are chosen: on validation data, with a seed of its own."""

  seed: int
  metric: str
  direction: str
  flags: tuple[str, ...]
  presets: tuple[str, ...] = PRESETS


@dataclasses.dataclass(frozen=True)
class Claim:
  """One claim of the paper: row `better` beats row `worse` on `datasets`.

  Without `worse` the row's own figure is compared with `level`. `figure` is
  that of `better`, `against` that of `worse`; '' stands for the table's metric.
  """

  text: str
  better: str
  worse: str
  datasets: tuple[str, ...]
  margin: float
  kind: str = 'better'
  level: float = 0.0
  figure: str = ''
  against: str = ''
  direction: str = ''


@dataclasses.dataclass(frozen=True)
class Relative:
  """A row's figure relative to another row's: a gain, or a gap to it."""

  text: str
  row: str
  reference: str
  kind: str
  datasets: tuple[str, ...]
  published: str
  source: str


@dataclasses.dataclass(frozen=True)
class Slope:
  """A claim about the slope of a row's figure against 1 / x."""

  text: str
  row: str
  datasets: tuple[str, ...]
  sign: str


@dataclasses.dataclass(frozen=True)
class Limit:
  """A bound that every seed of a row, or their mean, has to keep.

  In shown units.
  """

  row: str
  at_least: float | None
  at_most: float | None
  source: str
  datasets: tuple[str, ...]
  of: str = 'seeds'
  figure: str = ''


@dataclasses.dataclass(frozen=True)
class Detail:
  """Further figures of all rows that have them, in a table of their own."""

  title: str
  metrics: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TableSpec:
  """A whole table.toml, checked."""

  title: str
  paper: str
  metric: str
  direction: str
  scale: float
  presets: Mapping[str, Preset]
  rows: tuple[Row, ...]
  datasets: tuple[Dataset, ...]
  tuning: Tuning | None
  claims: tuple[Claim, ...]
  also: tuple[str, ...] = ()
  relatives: tuple[Relative, ...] = ()
  limits: tuple[Limit, ...] = ()
  slopes: tuple[Slope, ...] = ()
  x_label: str = ''
  figures: Mapping[str, str] = dataclasses.field(default_factory=dict)
  details: tuple[Detail, ...] = ()
  curves: tuple[str, ...] = ()

  def key(self, row: str, figure: str) -> str:
    """The metric of final.json that holds a row's figure, '' if none does."""
    own = next((r.figures for r in self.rows if r.name == row), {})
    return own.get(figure, self.figures.get(figure, figure))

  def tunes(self, row: Row, preset: str) -> bool:
    """Whether a preset chooses values for a row by validation."""
    return bool(row.tune) and preset in self.tuning.presets

  @property
  def further(self) -> tuple[str, ...]:
    """All figures beside the table's own metric, each once."""
    names = [*self.also, *(m for d in self.details for m in d.metrics)]
    return tuple(n for n in dict.fromkeys(names) if n != self.metric)

  @property
  def decimals(self) -> int:
    """Decimals to show: 2 for percentages, 4 for unscaled figures."""
    return 2 if self.scale >= 10 else 4


def load_table(path: pathlib.Path, *, shown: str) -> TableSpec:
  """Reads one table.toml and checks that its flag files exist.

  Args:
    path: the table.toml of a paper, in the folder experiments/NAME.
    shown: what to call it in errors.

  Returns:
    The checked description.

  Raises:
    TableError: the file cannot be read, is no TOML or has a mistake in it.
  """
  try:
    text = path.read_text('utf8')
  except (OSError, UnicodeDecodeError) as error:
    raise fields.TableError(f'{shown}: cannot be read: {error}') from error
  spec = parse_table(text, file=shown)
  for index, dataset in enumerate(spec.datasets):
    if not (path.parent / dataset.flagfile).is_file():
      raise fields.TableError(
        f'{shown}: datasets[{index}].flagfile: no file {dataset.flagfile!r}'
      )
  return spec


def parse_table(text: str, *, file: str) -> TableSpec:
  """Checks the text of a table.toml.

  Args:
    text: the TOML text.
    file: what to call it in errors.

  Returns:
    The checked description.

  Raises:
    TableError: on the first mistake, naming `file` and the key.
  """
  try:
    data = tomllib.loads(text)
  except tomllib.TOMLDecodeError as error:
    raise fields.TableError(f'{file}: is not valid TOML: {error}') from error
  known = [field.name for field in dataclasses.fields(TableSpec)]
  top = fields.Section(file, '', data, known)
  datasets = tuple(_dataset(s) for s in top.tables('datasets', Dataset))
  columns = _unique(top, 'datasets', [dataset.name for dataset in datasets])
  figures = top.get('figures', fields.dict_of(None), {})
  named = fields.Section(file, 'figures', figures, list(figures))
  figures = {name: named.get(name, fields.text) for name in figures}
  rows = tuple(_row(s, columns, figures) for s in top.tables('rows', Row))
  names = _unique(top, 'rows', [row.name for row in rows])
  direction = top.get('direction', fields.one_of(DIRECTIONS), 'higher')
  presets = {
    name: _preset(
      fields.Section.of(top, f'presets.{name}', value, Preset), columns
    )
    for name, value in top.get('presets', fields.dict_of(PRESETS)).items()
  }
  for dataset in datasets:
    for kind, of in (('flags', dataset.presets), ('seeds', dataset.seeds)):
      for name in of:
        if name not in presets:
          top.fail(
            'datasets', f'{dataset.name!r} has {kind} for no preset {name}'
          )
  spec = TableSpec(
    title=top.get('title', fields.text),
    paper=top.get('paper', fields.text),
    metric=top.get('metric', fields.text),
    direction=direction,
    scale=top.get('scale', fields.positive, 100.0),
    presets=presets,
    rows=rows,
    datasets=datasets,
    tuning=_tuning(top, direction, rows, figures),
    figures=figures,
    curves=top.get('curves', fields.list_of(fields.text), ()),
    details=tuple(
      Detail(
        s.get('title', fields.text),
        s.get('metrics', fields.list_of(fields.text)),
      )
      for s in top.tables('details', Detail, [])
    ),
    claims=tuple(
      _claim(s, names, columns) for s in top.tables('claims', Claim, [])
    ),
    also=top.get('also', fields.list_of(fields.text), ()),
    x_label=top.get('x_label', fields.text, ''),
    relatives=tuple(
      _relative(s, names, columns)
      for s in top.tables('relatives', Relative, [])
    ),
    limits=tuple(
      _limit(s, names, columns) for s in top.tables('limits', Limit, [])
    ),
    slopes=tuple(
      _slope(s, names, datasets) for s in top.tables('slopes', Slope, [])
    ),
  )
  placed = [dataset.x is not None for dataset in datasets]
  if any(placed) != all(placed):
    top.fail('datasets', 'expected x in all data sets or in none')
  for name, preset in presets.items():
    check_seeds(spec, preset.seeds, where=f'{file}: presets.{name}.seeds')
  for dataset in datasets:
    for name, seeds in dataset.seeds.items():
      check_seeds(spec, seeds, where=f'{file}: {dataset.name!r}: seeds.{name}')
  return spec


def check_seeds(spec: TableSpec, seeds: Sequence[int], *, where: str) -> None:
  """Refuses seeds that repeat, are negative or were used for tuning.

  Args:
    spec: the table.
    seeds: the seeds to report.
    where: what to call them in the error.

  Raises:
    TableError: naming the seed.
  """
  if not seeds:
    raise fields.TableError(f'{where}: expected at least one seed, got none')
  for seed in seeds:
    if seed < 0:
      raise fields.TableError(f'{where}: expected seeds >= 0, got {seed}')
    if list(seeds).count(seed) > 1:
      raise fields.TableError(f'{where}: seed {seed} stands there twice')
    if spec.tuning is not None and seed == spec.tuning.seed:
      raise fields.TableError(
        f'{where}: seed {seed} is the tuning seed, which no report may use'
      )


def slug(name: str) -> str:
  """Turns a name into a folder name: lower case, underscores between words."""
  return re.sub(r'[^a-z0-9.]+', '_', name.lower()).strip('_.')


def _columns(section: fields.Section, columns: Sequence[str]) -> Sequence[str]:
  """The key `datasets`: some of the columns, by default all."""
  return section.get(
    'datasets', fields.list_of(fields.one_of(columns)), columns
  )


def _preset(section: fields.Section, columns: Sequence[str]) -> Preset:
  subset = _columns(section, columns)
  if not subset:
    section.fail('datasets', 'expected at least one data set, got none')
  return Preset(
    seeds=section.get('seeds', fields.list_of(fields.whole)),
    datasets=tuple(name for name in columns if name in subset),
    flags=section.get('flags', _flags, ()),
  )


def _row(
  section: fields.Section,
  columns: Sequence[str],
  figures: Mapping[str, str],
) -> Row:
  grid = section.get('tune', fields.dict_of(None), {})
  tune = fields.Section(section.file, f'{section.where}.tune', grid, list(grid))
  table = section.get('published', fields.dict_of(columns), {})
  published = {}
  for name, value in table.items():
    where = f'{section.where}.published.{name}'
    entry = fields.Section.of(section, where, value, Published)
    published[name] = Published(
      value=entry.get('value', fields.number),
      source=entry.get('source', fields.text),
    )
  for name in grid:
    if not re.fullmatch(r'[A-Za-z_]\w*', name) or name in _OWN_FLAGS:
      tune.fail(name, 'expected the name of a flag, without dashes')
  own = section.get('figures', fields.dict_of(list(figures)), {})
  for name, key in own.items():
    if not isinstance(key, str):
      section.fail('figures', f'expected a metric for {name}, got {key!r}')
  if 'tune_on' in section.data and not grid:
    section.fail('tune_on', 'the row has nothing to tune')
  return Row(
    name=section.get('name', fields.text),
    flags=section.get('flags', _flags, ()),
    tune=tuple((name, tune.get(name, _candidates)) for name in grid),
    published=published,
    datasets=_columns(section, columns),
    tune_on=section.get('tune_on', fields.one_of(columns), ''),
    figures=own,
  )


def _dataset(section: fields.Section) -> Dataset:
  extra = section.get('presets', fields.dict_of(PRESETS), {})
  own = section.get('seeds', fields.dict_of(PRESETS), {})
  seeds = fields.Section(section.file, f'{section.where}.seeds', own, PRESETS)
  where = f'{section.where}.presets'
  presets = fields.Section(section.file, where, extra, PRESETS)
  return Dataset(
    name=section.get('name', fields.text),
    flagfile=section.get('flagfile', fields.text),
    flags=section.get('flags', _flags, ()),
    presets={name: presets.get(name, _flags) for name in extra},
    seeds={name: seeds.get(name, fields.list_of(fields.whole)) for name in own},
    x=section.get('x', fields.positive, None),
    tuning=section.get('tuning', _flags, ()),
  )


def _tuning(
  top: fields.Section,
  direction: str,
  rows: Sequence[Row],
  figures: Mapping[str, str],
) -> Tuning | None:
  if 'tuning' not in top.data:
    tuned = [row.name for row in rows if row.tune]
    if tuned:
      top.fail('tuning', f'missing key; row {tuned[0]!r} has `tune`')
    return None
  section = fields.Section.of(top, 'tuning', top.data['tuning'], Tuning)
  # A table without a better side has to say which one its tuning has.
  default = () if direction == 'neither' else (direction,)
  metric = section.get('metric', fields.text)
  keys = {row.figures.get(metric, figures.get(metric, metric)) for row in rows}
  for key in sorted(keys):
    # A personal model's metrics stand behind its name: 'personal:validation/'.
    if not key.rpartition(':')[2].startswith('validation/'):
      section.fail('metric', f'expected validation/..., got {key!r}')
  return Tuning(
    seed=section.get('seed', fields.whole),
    metric=metric,
    direction=section.get('direction', fields.one_of(DIRECTIONS[:2]), *default),
    flags=section.get('flags', _flags, ()),
    presets=section.get(
      'presets', fields.list_of(fields.one_of(PRESETS)), PRESETS
    ),
  )


def _claim(
  section: fields.Section, rows: Sequence[str], columns: Sequence[str]
) -> Claim:
  claim = Claim(
    text=section.get('text', fields.text),
    better=section.get('better', fields.one_of(rows)),
    worse=section.get('worse', fields.one_of(rows), ''),
    datasets=_columns(section, columns),
    margin=section.get('margin', fields.positive, 1.0),
    kind=section.get(
      'kind', fields.one_of(('better', 'equal', 'zero')), 'better'
    ),
    level=section.get('level', fields.number, 0.0),
    figure=section.get('figure', fields.text, ''),
    against=section.get('against', fields.text, ''),
    direction=section.get('direction', fields.one_of(DIRECTIONS), ''),
  )
  if claim.level and claim.worse:
    section.fail('level', 'is for claims without worse')
  if claim.against and not claim.worse:
    section.fail('against', 'is the figure of worse, which is not there')
  same = claim.against in ('', claim.figure)
  if claim.better == claim.worse and same:
    section.fail('worse', f'is the same row as better, {claim.better!r}')
  return claim


def _relative(
  section: fields.Section, rows: Sequence[str], columns: Sequence[str]
) -> Relative:
  return Relative(
    text=section.get('text', fields.text),
    row=section.get('row', fields.one_of(rows)),
    reference=section.get('reference', fields.one_of(rows)),
    kind=section.get('kind', fields.one_of(('gain', 'gap'))),
    datasets=_columns(section, columns),
    published=section.get('published', fields.text, 'not found'),
    source=section.get('source', fields.text, ''),
  )


def _limit(
  section: fields.Section, rows: Sequence[str], columns: Sequence[str]
) -> Limit:
  limit = Limit(
    row=section.get('row', fields.one_of(rows)),
    at_least=section.get('at_least', fields.number, None),
    at_most=section.get('at_most', fields.number, None),
    source=section.get('source', fields.text, ''),
    datasets=_columns(section, columns),
    of=section.get('of', fields.one_of(('seeds', 'mean')), 'seeds'),
    figure=section.get('figure', fields.text, ''),
  )
  if (limit.at_least is None) == (limit.at_most is None):
    section.fail('row', 'expected one of at_least and at_most')
  return limit


def _slope(
  section: fields.Section, rows: Sequence[str], datasets: Sequence[Dataset]
) -> Slope:
  columns = [dataset.name for dataset in datasets]
  slope = Slope(
    text=section.get('text', fields.text),
    row=section.get('row', fields.one_of(rows)),
    datasets=tuple(_columns(section, columns)),
    sign=section.get('sign', fields.one_of(('positive', 'negative'))),
  )
  if any(d.x is None for d in datasets if d.name in slope.datasets):
    section.fail('datasets', 'expected an x in each of them')
  return slope


def _unique(top: fields.Section, key: str, names: list[str]) -> tuple[str, ...]:
  """Refuses names that share a folder; returns the names."""
  slugs = [slug(name) for name in names]
  for name, folder in zip(names, slugs, strict=True):
    if not folder:
      top.fail(key, f'name {name!r} has no letter or digit')
    if slugs.count(folder) > 1:
      top.fail(key, f'two names share the folder {folder!r}')
  return tuple(names)


def _flag(value: Any) -> str:
  match = isinstance(value, str) and re.match(r'--?(\w+)', value)
  if not match:
    raise ValueError(f'expected a flag such as --name=value, got {value!r}')
  if match[1] in _OWN_FLAGS:
    raise ValueError(f'the launcher sets --{match[1]} itself, got {value!r}')
  return value


def _flags(value: Any) -> tuple[str, ...]:
  return fields.list_of(_flag)(value)


def _candidates(value: Any) -> tuple[str, ...]:
  """Returns a flag's candidate values as they stand on the command line."""
  if not isinstance(value, list) or not value:
    raise ValueError(f'expected a list of values, got {value!r}')
  texts = []
  for item in value:
    if not isinstance(item, (bool, int, float, str)):
      raise ValueError(f'expected numbers, texts or booleans, got {item!r}')
    texts.append(str(item).lower() if isinstance(item, bool) else str(item))
  if len(set(texts)) != len(texts):
    raise ValueError(f'expected values that differ, got {value!r}')
  return tuple(texts)
