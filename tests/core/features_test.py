"""Features: placed once or streamed wave by wave, with the same results."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from fedjax_ext import core
from fedjax_ext.algorithms import fed_avg, scaffold
from fedjax_ext.core.features import Features
from fedjax_ext.data import RecordType
from fedjax_ext.data.lazy import LazyColumn, Reader, lazy_columns
from tests.problems import make_problem, x64

CLIENTS = tuple(range(12))


class PlaceFeaturesTest(parameterized.TestCase):
  def place(self, **features):
    layout = core.make_layout(num_devices=4)
    return core.place_features(features, layout).placed

  def test_numbers_are_copied_to_every_device(self):
    columns = dict(
      image=np.arange(24, dtype=np.float32).reshape(3, 4, 2),
      half=np.arange(3, dtype=np.float16),
      pixel=np.arange(3, dtype=np.uint8),
      label=np.array([0, -1, 5]),
      seen=np.array([True, False, True]),
    )
    placed = self.place(**columns)
    self.assertEqual(placed.keys(), columns.keys())
    for name, column in columns.items():
      self.assertLen(placed[name].addressable_shards, 4)
      for shard in placed[name].addressable_shards:
        np.testing.assert_array_equal(shard.data, column)

  def test_dtypes(self):
    placed = self.place(
      a=np.zeros(2, np.float64),
      b=np.zeros(2, np.int64),
      c=np.zeros(2, np.uint64),
      d=np.zeros(2, np.float16),
      e=np.zeros(2, np.uint8),
      f=np.zeros(2, bool),
    )
    self.assertEqual(
      {name: str(x.dtype) for name, x in placed.items()},
      dict(
        a='float32', b='int32', c='uint32', d='float16', e='uint8', f='bool'
      ),
    )

  def test_float64_stays_with_64_bits(self):
    with x64():
      big = 2**40 + 1
      placed = self.place(a=np.array([0.1]), b=np.array([big]))
      self.assertEqual(placed['a'].dtype, jnp.float64)
      self.assertEqual(placed['b'].tolist(), [big])

  def test_text_stays_on_the_host(self):
    placed = self.place(
      x=np.zeros(2),
      text=np.array(['to', 'be']),
      raw=np.array([b'to', b'be']),
      objects=np.array(['to', None], object),
      when=np.array(['2020-01-01', '2020-01-02'], 'datetime64[D]'),
    )
    self.assertEqual(list(placed), ['x'])
    self.assertEqual(self.place(text=np.array(['to'])), {})

  @parameterized.parameters(
    (np.int64, 2**31, 'int32'),
    (np.int64, -(2**31) - 1, 'int32'),
    (np.uint64, 2**32, 'uint32'),
  )
  def test_an_integer_that_does_not_fit(self, dtype, value, name):
    with self.assertRaisesRegex(
      core.InvalidInput,
      f"^Expected feature 'id' to fit into {name}, got values from .*{value}",
    ):
      self.place(id=np.array([1, value], dtype))

  @parameterized.parameters(
    (np.int64, 2**31 - 1), (np.int64, -(2**31)), (np.uint64, 2**32 - 1)
  )
  def test_the_extreme_integers_fit(self, dtype, value):
    placed = self.place(id=np.array([value], dtype))
    self.assertEqual(placed['id'].tolist(), [value])

  def test_empty_columns(self):
    placed = self.place(id=np.zeros((0, 3), np.int64))
    self.assertEqual(placed['id'].shape, (0, 3))


class StreamedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.problem = make_problem()
    self.columns = self.problem.federated.features

  def lazily(self):
    """The problem's columns behind a reader that notes what it reads."""
    self.read = []

    def read(rows):
      self.read.append(rows)
      return {n: x[rows] for n, x in self.columns.items()}

    types = {
      n: RecordType(x.shape[1:], x.dtype) for n, x in self.columns.items()
    }
    return lazy_columns(Reader(read, types, len(self.columns['label'])))

  def features(self, how: str, layout) -> Features:
    columns = self.lazily() if how == 'lazy' else self.columns
    budget = 0 if how == 'budget' else np.inf
    return core.place_features(columns, layout, memory_gb=budget)

  def cohort(self, algorithm, features, layout):
    return core.make_cohort(
      np.asarray(CLIENTS[: len(self.problem.federated.client_ids)]),
      round=1,
      seed=3,
      specs=algorithm.plans,
      data=self.problem.splits,
      features=features,
      layout=layout,
    )

  def run_round(self, how, *, algorithm='fed_avg', debug=False, **layout):
    layout = core.make_layout(**layout)
    common = dict(
      layout=layout, phase=core.Phase(epochs=2, batch_size=4), debug=debug
    )
    if algorithm == 'fed_avg':
      algorithm = fed_avg(
        self.problem.task,
        client_optimizer=optax.sgd(0.1),
        server_optimizer=optax.sgd(1.0),
        **common,
      )
    else:
      algorithm = scaffold(
        self.problem.task, client_learning_rate=0.1, num_clients=12, **common
      )
    cohort = self.cohort(algorithm, self.features(how, layout), layout)
    for name in algorithm.plans:
      cohort.prepare(name)
    state = algorithm.init(jax.random.key(0))
    states = None
    if algorithm.init_client is not None:
      states = core.make_client_states(
        algorithm.init_client, num_clients=12, key=jax.random.key(1)
      )
    state, _, metrics = algorithm.apply(state, states, cohort)
    return state, metrics

  @parameterized.product(
    how=['budget', 'lazy'],
    layout=[
      dict(num_devices=1, lanes=1),
      dict(num_devices=3, lanes=2),
      dict(num_devices=2, lanes=1, wave_clients=3),
    ],
    algorithm=['fed_avg', 'scaffold'],
  )
  def test_a_round_is_the_same_bit_for_bit(self, how, layout, algorithm):
    expected, metrics = self.run_round('placed', algorithm=algorithm, **layout)
    got, streamed = self.run_round(how, algorithm=algorithm, **layout)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    self.assertEqual(streamed.keys(), metrics.keys())
    np.testing.assert_array_equal(streamed['train_loss'], metrics['train_loss'])

  def test_debug_reads_the_same_rows(self):
    layout = dict(num_devices=2, lanes=1, wave_clients=3)
    expected, _ = self.run_round('placed', **layout)
    got, _ = self.run_round('lazy', debug=True, **layout)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected
    )

  def test_only_the_rows_of_the_cohort_are_read(self):
    layout = core.make_layout(num_devices=2)
    features = self.features('lazy', layout)
    self.assertIsNone(features.placed)
    self.assertEmpty(self.read)
    spec = core.PlanSpec((core.Phase(batch_size=4),))
    cohort = core.make_cohort(
      np.array([2, 4]),
      round=1,
      seed=0,
      specs={'train': spec},
      data=self.problem.splits,
      features=features,
      layout=layout,
    )
    tables = list(cohort.tables('train'))
    data = self.problem.federated
    mine = np.concatenate([data.client_rows(2), data.client_rows(4)])
    self.assertCountEqual(np.concatenate(self.read).tolist(), mine.tolist())
    self.assertLen(tables, 1)

  def test_shapes_of_tables_repeat(self):
    """Ragged cohorts lead to few shapes: rows are padded to buckets."""
    layout = core.make_layout(num_devices=2)
    features = self.features('budget', layout)
    spec = core.PlanSpec((core.Phase(batch_size=4),))
    shapes = set()
    for round in range(1, 20):
      rng = np.random.default_rng(round)
      cohort = core.make_cohort(
        rng.choice(len(self.problem.federated.client_ids), 4, replace=False),
        round=round,
        seed=0,
        specs={'train': spec},
        data=self.problem.splits,
        features=features,
        layout=layout,
      )
      for table in cohort.tables('train'):
        rows = table.arrays['label'].shape[1]
        self.assertEqual(core.layout.bucket(rows), rows)
        shapes.add(rows)
    self.assertLess(len(shapes), 6)

  @parameterized.parameters('budget', 'lazy')
  def test_evaluation_in_chunks(self, how):
    """A pass in several chunks gives the sums of one pass."""
    layout = core.make_layout(num_devices=2)
    parts = {'all': core.Part(np.arange(5), 'train')}
    state = self.problem.task.init(jax.random.key(0))
    reports = []
    for kind, size in (('placed', 1 << 26), (how, 2000)):
      features = self.features(kind, layout)
      with _chunk_bytes(size):
        report = core.evaluate(
          core.Predictor(self.problem.task.metrics),
          state,
          data=self.problem.splits,
          parts=parts,
          features=features,
          layout=layout,
          batch_size=4,
        )
      reports.append(report['all'])
    if how == 'lazy':
      self.assertGreater(len(self.read), 2)
    for name, sums in reports[0].sums.items():
      np.testing.assert_allclose(reports[1].sums[name], sums, rtol=1e-6)
      np.testing.assert_array_equal(
        reports[1].weights[name], reports[0].weights[name]
      )

  def test_an_integer_that_does_not_fit_is_found_when_read(self):
    layout = core.make_layout(num_devices=1)
    column = np.array([0, 2**40])
    features = core.place_features({'id': column}, layout, memory_gb=0)
    features.read(np.array([0]))
    with self.assertRaisesRegex(core.InvalidInput, "feature 'id' to fit"):
      features.read(np.array([0, 1]))

  def test_types_and_budget(self):
    layout = core.make_layout(num_devices=1)
    columns = {
      'x': np.zeros((256, 1024), np.float64),
      'name': np.array(['a'] * 256),
    }
    mib = 256 * 1024 * 4 / 2**30
    for budget, placed in ((mib, True), (mib * 0.99, False)):
      features = core.place_features(columns, layout, memory_gb=budget)
      self.assertEqual(features.placed is not None, placed)
      self.assertEqual(list(features.types), ['x'])
      self.assertEqual(features.types['x'].dtype, np.float32)
      self.assertEqual(features.row_bytes, 4096)
    with self.assertRaisesRegex(core.InvalidInput, 'data_memory_gb=-1'):
      core.place_features(columns, layout, memory_gb=-1)

  def test_a_lazy_column_is_streamed_whatever_the_budget(self):
    features = self.features('lazy', core.make_layout(num_devices=1))
    self.assertIsNone(features.placed)
    self.assertIsInstance(features.columns['label'], LazyColumn)


class _chunk_bytes:
  """Evaluation reads so many bytes at a time."""

  def __init__(self, size: int):
    self.size = size

  def __enter__(self):
    self.before = core.pooled.CHUNK_BYTES
    core.pooled.CHUNK_BYTES = self.size

  def __exit__(self, *unused):
    core.pooled.CHUNK_BYTES = self.before


if __name__ == '__main__':
  absltest.main()
