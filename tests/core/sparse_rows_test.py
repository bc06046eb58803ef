"""Sparse-row client models give what the whole table gives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from fedjax_ext import core
from fedjax_ext.algorithms import fed_avg, fed_prox
from fedjax_ext.core.sparse_rows import NO_ROW, touched_rows
from fedjax_ext.data import from_segments
from fedjax_ext.losses import Task

V, D, LENGTH = 40, 3, 4
TABLE = core.SparseTable('items/embedding', ('context', 'target'), V)
SIZES = np.array([7, 0, 1, 5, 3])


def make_data() -> core.plans.ClientRows:
  """Five clients; each names a few of the rows, one of them none."""
  rng = np.random.default_rng(0)
  size = SIZES.sum()
  owner = np.repeat(np.arange(len(SIZES)), SIZES)
  near = lambda *shape: rng.integers(0, 9, shape)
  return from_segments(
    {
      'context': (owner[:, None] * 7 + near(size, LENGTH)).astype(np.int32),
      'target': (owner * 7 + near(size)).astype(np.int32),
    },
    np.cumsum(SIZES) - SIZES,
    SIZES,
    client_ids=np.arange(len(SIZES)),
  )


def make_task() -> Task:
  """A bag of embeddings predicts another embedding, through a dense layer."""

  def init(key):
    one, two = jax.random.split(key)
    return {
      'items': {'embedding': jax.random.normal(one, (V, D))},
      'dense': jax.random.normal(two, (D, D)),
    }

  def loss(params, batch):
    table = params['items']['embedding']
    context = table[batch.data['context']].mean(1) @ params['dense']
    error = jnp.sum((context - table[batch.data['target']]) ** 2, -1)
    count = jnp.maximum(batch.mask.sum(), 1)
    return jnp.where(batch.mask, error, 0).sum() / count

  return Task(init, loss, lambda params, batch: {})


def train(
  tables: tuple,
  *,
  optimizer: optax.GradientTransformation,
  lanes: int = 1,
  num_devices: int = 1,
  make=fed_avg,
  memory_gb: float = 1.0,
  **more,
):
  """Three rounds; the server's model."""
  layout = core.make_layout(num_devices=num_devices, lanes=lanes)
  algorithm = make(
    make_task(),
    client_optimizer=optimizer,
    server_optimizer=optax.adam(0.1),
    layout=layout,
    phase=core.Phase(batch_size=2, epochs=2),
    tables=tables,
    **more,
  )
  data = make_data()
  features = core.place_features(data.features, layout, memory_gb=memory_gb)
  state = algorithm.init(jax.random.key(1))
  for round in range(1, 4):
    cohort = core.make_cohort(
      np.arange(5),
      round=round,
      seed=0,
      specs=algorithm.plans,
      data={'train': data},
      features=features,
      layout=layout,
    )
    cohort.prepare('train')
    state, _, _ = algorithm.apply(state, None, cohort)
  return state.params


class SparseRowsTest(parameterized.TestCase):
  def assert_same(self, dense, sparse):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9),
      dense,
      sparse,
    )

  @parameterized.parameters(
    dict(optimizer=optax.sgd(0.05)),
    dict(optimizer=optax.sgd(0.05, momentum=0.9)),
    dict(optimizer=optax.adam(0.01)),
    dict(optimizer=optax.sgd(0.05), lanes=3),
    dict(optimizer=optax.sgd(0.05), lanes=2, num_devices=2),
    dict(optimizer=optax.sgd(0.05), memory_gb=0),
    dict(optimizer=optax.sgd(0.05), debug=True),
  )
  def test_equals_the_whole_table(self, **settings):
    with jax.enable_x64(True):
      dense = train((), **settings)
      sparse = train((TABLE,), **settings)
    self.assert_same(dense, sparse)
    self.assertGreater(np.abs(dense['dense']).sum(), 0)

  def test_clients_hold_only_their_rows(self):
    shapes = []
    task = make_task()

    def loss(params, batch):
      shapes.append(params['items']['embedding'].shape)
      return task.loss(params, batch)

    def make(task, **settings):
      return fed_avg(task._replace(loss=loss), **settings)

    train((TABLE,), optimizer=optax.sgd(0.1), make=make)
    widest = max(len(np.unique(rows)) for rows in self.named())
    self.assertEqual(
      {shape[0] for shape in shapes}, {core.layout.bucket(widest)}
    )
    self.assertLess(widest, V)

  def named(self) -> list[np.ndarray]:
    """Each client's rows."""
    data = make_data()
    clients = [data.client(c) for c in range(len(SIZES))]
    return [
      np.unique(np.concatenate([c['context'].ravel(), c['target']]))
      for c in clients
    ]

  def test_touched_rows(self):
    data = make_data()
    rows = touched_rows(
      (TABLE,), {'train': data}, data.features, np.arange(len(SIZES))
    )[TABLE.path]
    for mine, expected in zip(rows, self.named(), strict=True):
      np.testing.assert_array_equal(mine[mine != NO_ROW], expected)
      self.assertTrue((np.diff(mine.astype(np.int64)) >= 0).all())

  def test_rows_that_every_client_holds(self):
    """Whether its examples name them or not, and once."""
    table = TABLE._replace(always=(V - 1, 0))
    data = make_data()
    rows = touched_rows(
      (table,), {'train': data}, data.features, np.array([4, 1, 0])
    )[TABLE.path]
    named = self.named()
    for mine, client in zip(rows, (4, 1, 0), strict=True):
      expected = sorted({0, V - 1, *named[client].tolist()})
      self.assertEqual(mine[mine != NO_ROW].tolist(), expected)
    self.assertNotIn(0, named[4])
    # They have no gradient and change nothing.
    settings = dict(optimizer=optax.sgd(0.05))
    with jax.enable_x64(True):
      dense = train((), **settings)
      sparse = train((table,), **settings)
    self.assert_same(dense, sparse)

  def test_fed_prox_sees_the_same_rows(self):
    # The penalty on rows that a client does not touch is zero.
    settings = dict(
      optimizer=optax.sgd(0.05), make=fed_prox, proximal_weight=0.5
    )
    with jax.enable_x64(True):
      dense = train((), **settings)
      sparse = train((TABLE,), **settings)
    self.assert_same(dense, sparse)

  def test_rows_out_of_range(self):
    short = TABLE._replace(num_rows=5)
    with self.assertRaisesRegex(core.InvalidInput, 'rows 0..4 of items'):
      train((short,), optimizer=optax.sgd(0.1))

  def test_another_number_of_rows(self):
    with self.assertRaisesRegex(core.InvalidInput, 'Expected 41 rows'):
      train((TABLE._replace(num_rows=41),), optimizer=optax.sgd(0.1))

  def test_no_such_leaf(self):
    with self.assertRaisesRegex(core.InvalidInput, 'ends with embeding'):
      train((TABLE._replace(path='embeding'),), optimizer=optax.sgd(0.1))

  def test_tables_that_share_some_features(self):
    other = TABLE._replace(path='dense', features=('target',))
    with self.assertRaisesRegex(core.InvalidInput, 'share a feature'):
      train((TABLE, other), optimizer=optax.sgd(0.1))

  def test_two_tables_of_the_same_features(self):
    """Factors and biases, named by one feature."""

    def init(key):
      return make_task().init(key) | {'bias': jnp.zeros(V)}

    def loss(params, batch):
      bias = params['bias'][batch.data['target']]
      error = jnp.where(batch.mask, (bias - 1) ** 2, 0).sum()
      return make_task().loss(params, batch) + error

    def make(task, **settings):
      return fed_avg(task._replace(init=init, loss=loss), **settings)

    tables = (TABLE, TABLE._replace(path='bias'))
    settings = dict(optimizer=optax.sgd(0.05), make=make)
    with jax.enable_x64(True):
      dense, sparse = (train(t, **settings) for t in ((), tables))
    self.assert_same(dense, sparse)

  def test_unknown_feature(self):
    wrong = TABLE._replace(features=('item',))
    with self.assertRaisesRegex(
      core.InvalidInput, 'got feature of a sparse table=item'
    ):
      train((wrong,), optimizer=optax.sgd(0.1))


if __name__ == '__main__':
  absltest.main()
