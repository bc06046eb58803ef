"""Retrieval losses: known values, batch (in)sensitivity, masks, safe roots."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.losses import retrieval
from fedjax_ext.losses.retrieval import RetrievalLoss, Spreadout
from tests.problems import is_finite, relative_error, x64

R1 = [[1, 2, 3], [4, 5, 6], [1, 1, 1], [1, 1, 1]]
R3 = R1 + [[1, 1, 2]], R1 + [[-1, -2, -3]]
R4 = (
  [[1, 2, 3], [4, 5, 6], [-1, -2, -3], [1, 1, 1]],
  [[1, 2, 3], [4, 5, 6], [-2, 4, 6], [1, 1, 1]],
)
R5 = (
  [[1, 0, 0], [2, 0, 0], [0, 1, 0], [0, 2, 0], [0, 0, 1]],
  [[1, 0, 0], [2, 1, 0], [0, 1, 0], [0, 2, 0], [0, 2, 1]],
)
R6 = [[1, 0], [0, 1], [1, 1]], [[0, 1], [1, 0], [1, 0]]
R8_TABLE = [[0, 0], [1, 0], [0, 1], [1, 1]]
R8_CONTEXTS = [[1, 0], [0, 1]]
LAMBDAS = Spreadout(0.1, 0.2, 0.3)


# Most programs here run once: what counts is how fast they compile.
fast_jit = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_cpu_use_fusion_emitters': False,
    'xla_cpu_parallel_codegen_split_count': 1,
  },
)
compiled_loss = fast_jit(retrieval.retrieval_loss, static_argnums=0)


def loss_of(settings, contexts, embeddings, labels=None, **inputs):
  """retrieval_loss of lists; distinct labels by default."""
  if not isinstance(contexts, jax.Array):
    contexts = np.asarray(contexts, float)
  if embeddings is not None:
    embeddings = np.asarray(embeddings, float)
  if labels is None:
    labels = np.arange(len(contexts))
  for name in inputs.keys() & {'items', 'table', 'weights'}:
    inputs[name] = np.asarray(inputs[name], float)
  return compiled_loss(
    settings, contexts, embeddings, np.asarray(labels), **inputs
  )


class Float64Test(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(x64())

  def assert_digits(self, value, *expected):
    """Equal to values of seven digits, to a unit of the last."""
    np.testing.assert_allclose(value, np.squeeze(expected), atol=1e-7, rtol=0)


class KnownValuesTest(Float64Test):
  """Values of the spec's table, by its names R1 to R14.

  Those of float32 programs are held to float32's digits.
  """

  @parameterized.parameters(
    ('batch_softmax', {}, (R1, R1), None, 1.3616819),
    ('batch_softmax', {'normalise': False}, (R1, R1), None, 10.500068),
    ('batch_softmax', {}, R3, [1, 1, 1, 1, 3], 2.2404878),
    ('batch_softmax', {}, R3, None, 1.7907719),
    ('batch_softmax', {}, R4, None, 1.3070719),
    ('batch_softmax', {'spreadout': LAMBDAS}, R4, None, 3.1863585),
    ('hinge', {}, R6, None, 0.5524026),
    ('hinge', {'spreadout': LAMBDAS}, R6, None, 1.5766667),
  )
  def test_cores(self, core, settings, embeddings, weights, expected):
    """R1 to R4 and R6."""
    inputs = {} if weights is None else {'weights': weights}
    value = loss_of(RetrievalLoss(core, **settings), *embeddings, **inputs)
    np.testing.assert_allclose(value, expected, rtol=1.2e-7)

  @parameterized.parameters(
    (Spreadout(0.4, 0.3, 0.7), 8.6628845),
    (Spreadout(context=1), 4),
    (Spreadout(label=1), 8.6023253),
    (Spreadout(cross=1), 6.4031242),
  )
  def test_dot_product_spreadout(self, spreadout, expected):
    """R5: examples of weight 0 have no loss but are in the norms."""
    for core in ('spreadout', 'batch_softmax', 'hinge'):
      settings = RetrievalLoss(core, spreadout=spreadout, normalise=False)
      value = loss_of(settings, *R5, weights=np.zeros(5))
      np.testing.assert_allclose(value, expected, rtol=1.2e-7)

  def test_singletons(self):
    """R7: the hinge of a batch is the mean of its examples', softmax is not."""
    hinge, softmax = (
      [loss_of(RetrievalLoss(core), [u], [v]) for u, v in zip(*R6, strict=True)]
      for core in ('hinge', 'batch_softmax')
    )
    self.assert_digits(hinge, [0.81, 0.81, 0.0372078])
    self.assert_digits(np.mean(hinge), 0.5524026)
    self.assert_digits(softmax, np.zeros(3))
    self.assert_digits(loss_of(RetrievalLoss(), *R6), 1.5040173)

  @parameterized.parameters(
    ({}, 1.0554552),
    ({'context': 1}, 1.0554552),
    ({'label': 1}, 1.0554552 + 1.4142136),
    ({'cross': 1}, 1.0554552 + 1.2247449),
    ({'table': 1}, 1.0554552 + 1.4142136),
  )
  def test_global_softmax(self, spreadout, expected):
    """R8: with the labels' and the table's norm over all items."""
    settings = RetrievalLoss('global_softmax', spreadout=Spreadout(**spreadout))
    value = loss_of(
      settings, R8_CONTEXTS, None, [1, 3], items=R8_TABLE, table=R8_TABLE
    )
    np.testing.assert_allclose(value, expected, rtol=1.2e-7)

  @parameterized.product(
    case=((True, 0.1414214), (False, 0.2)), form=retrieval.TABLE_FORMS
  )
  def test_item_table(self, case, form):
    """R9, and through the loss."""
    normalise, expected = case
    table = np.array(R8_TABLE, float)
    value, squares = fast_jit(
      lambda table: [
        retrieval.table_regulariser(
          table, spreadout=0.1, l2=l2, normalise=normalise, form=form
        )
        for l2 in (0.0, 0.5)
      ]
    )(table)
    self.assert_digits(value, expected)
    self.assert_digits(squares, expected + 2)
    settings = RetrievalLoss(
      'spreadout',
      spreadout=Spreadout(table=0.1),
      l2=0.5,
      normalise_table=normalise,
      table_form=form,
    )
    through = loss_of(settings, R8_CONTEXTS, R8_CONTEXTS, table=R8_TABLE)
    self.assert_digits(through, squares)

  def test_hinge_slope(self):
    """R12: the derivative with respect to the score."""
    settings = RetrievalLoss('hinge', normalise=False)
    loss = lambda s: retrieval.retrieval_loss(
      settings, s[None, None], jnp.ones((1, 1)), jnp.zeros(1, int)
    )
    slope = fast_jit(jax.vmap(jax.grad(loss)))
    self.assert_digits(slope(np.array([0.4, 0.9, 0.95, 1])), [-1, 0, 0, 0])

  @parameterized.parameters(
    (8, 2.0794415, 0.6664680),
    (16, 2.7725887, 1.1085723),
    (32, 3.4657359, 1.6477724),
  )
  def test_softmax_of_cosines(self, size, equal, lowest):
    """R13 and R14: all scores equal; the positive 1 and the negatives -1."""
    alike = np.ones((size, 3))
    self.assert_digits(loss_of(RetrievalLoss(), alike, -alike), equal)
    scores = 2 * np.eye(size) - 1
    settings = RetrievalLoss(normalise=False)
    self.assert_digits(loss_of(settings, scores, np.eye(size)), lowest)


class Batches:
  """Random inputs in the default float type: 6 examples, items 0 to 9."""

  def __init__(self, seed, size=6):
    rng = np.random.default_rng(seed)
    self.contexts = jnp.asarray(rng.standard_normal((size, 4)), float)
    self.items = jnp.asarray(rng.standard_normal((10, 4)), float)
    self.table = jnp.asarray(rng.standard_normal((10, 3)), float)
    self.labels = rng.permutation(np.arange(1, 10))[:size]
    self.weights = rng.uniform(0.5, 2, size)

  def loss(self, settings, rows=slice(None), **inputs):
    """The loss of the given rows."""
    labels = jnp.asarray(self.labels[rows])
    return compiled_loss(
      settings,
      self.contexts[rows],
      self.items[labels],
      labels,
      items=self.items,
      table=self.table,
      **inputs,
    )


CORES = tuple(
  RetrievalLoss(core, global_similarity=everything)
  for core in retrieval.LOSSES
  for everything in (False, True)
)
SPREADOUTS = (
  {},
  {'context': 0.1},
  {'label': 0.1},
  {'cross': 0.1},
  {'table': 0.1},
  {'label': 0.1, 'table': 0.1},
  {'cross': 0.1, 'table': 0.1},
)
OPTIONS = (
  {},
  {'normalise': False},
  {'l2': 0.1, 'normalise_table': False, 'table_form': 'pairs'},
  {'pad_is_candidate': False, 'mask_false_negatives': True, 'margin': 0.5},
)
# Each core with each spreadout; options so that each meets each of both.
KINDS = tuple(
  (i, j, (i + j) % len(OPTIONS))
  for i in range(len(CORES))
  for j in range(len(SPREADOUTS))
)
SETTINGS = tuple(
  dataclasses.replace(
    CORES[i], spreadout=Spreadout(**SPREADOUTS[j]), **OPTIONS[k]
  )
  for i, j, k in KINDS
)
# All spreadouts at once: each core, and each of batch and global similarity,
# with either way of normalising and of what is no negative.
EVERYTHING = tuple(
  dataclasses.replace(
    core,
    spreadout=Spreadout(0.1, 0.2, 0.3, 0.4),
    l2=0.1,
    normalise=kind == 0,
    table_form=retrieval.TABLE_FORMS[kind],
    mask_false_negatives=kind == 1,
  )
  for core, kind in zip(CORES, (0, 1, 1, 0) * 2, strict=True)
)


class BatchSensitivityTest(Float64Test):
  @parameterized.parameters(*SETTINGS)
  def test_mean_of_singletons(self, settings):
    """It is the batch's loss exactly for the losses said to be insensitive."""
    batches = Batches(0, 3)

    def loss(contexts, labels):
      return retrieval.retrieval_loss(
        settings,
        contexts,
        batches.items[labels],
        labels,
        items=batches.items,
        table=batches.table,
      )

    one = lambda context, label: loss(context[None], label[None])
    whole, alone = fast_jit(lambda *x: (loss(*x), jax.vmap(one)(*x)))(
      batches.contexts, batches.labels
    )
    difference = abs(float(whole - alone.mean()))
    if retrieval.is_batch_insensitive(settings):
      self.assertLess(difference, 1e-12)
    else:
      self.assertGreater(difference, 1e-3)

  def test_settings(self):
    """Every two kinds of a core, a spreadout and an option meet above."""
    kinds = len(CORES), len(SPREADOUTS), len(OPTIONS)
    for one, two in ((0, 1), (0, 2), (1, 2)):
      pairs = {(kind[one], kind[two]) for kind in KINDS}
      self.assertLen(pairs, kinds[one] * kinds[two])

  @parameterized.parameters(
    (RetrievalLoss(), False),
    (RetrievalLoss('hinge'), True),
    (RetrievalLoss('hinge', spreadout=Spreadout(table=1e-3)), True),
    (RetrievalLoss('hinge', spreadout=Spreadout(label=1e-3)), False),
    (
      RetrievalLoss(
        'hinge', spreadout=Spreadout(label=1e-3), global_similarity=True
      ),
      True,
    ),
    (RetrievalLoss('hinge', spreadout=Spreadout(cross=1e-3)), False),
    (RetrievalLoss('hinge', spreadout=Spreadout(*[1e-3] * 4)), False),
    (RetrievalLoss('global_softmax'), True),
    (RetrievalLoss('global_softmax', spreadout=Spreadout(cross=1)), False),
    (RetrievalLoss(global_similarity=True), False),
  )
  def test_table(self, settings, expected):
    """The table of section 4.1 of the spec."""
    self.assertEqual(retrieval.is_batch_insensitive(settings), expected)


class BatchTest(Float64Test):
  @parameterized.parameters(*EVERYTHING)
  def test_permutation(self, settings):
    """The order of a batch does not matter, weights moving along."""
    batches = Batches(3)
    order = np.random.default_rng(3).permutation(6)
    weights = batches.weights
    before = batches.loss(settings, weights=weights)
    after = batches.loss(settings, order, weights=weights[order])
    np.testing.assert_allclose(after, before, rtol=1e-13)

  @parameterized.parameters(
    {'core': 'batch_softmax'},
    {'core': 'batch_softmax', 'spreadout': LAMBDAS},
    {'core': 'batch_softmax', 'normalise': False},
    {'core': 'batch_softmax', 'mask_false_negatives': True},
    {'core': 'hinge'},
    {'core': 'hinge', 'spreadout': Spreadout(context=0.1, cross=0.3)},
  )
  def test_all_items(self, **settings):
    """Labels as rows of all items give the same as labels of the batch."""
    batches = Batches(4)
    batches.labels[:2] = 5
    mask = jnp.arange(6) < 5
    settings = RetrievalLoss(**settings)
    everything = dataclasses.replace(settings, global_similarity=True)
    np.testing.assert_allclose(
      batches.loss(everything, mask=mask),
      batches.loss(settings, mask=mask),
      rtol=1e-14,
    )

  def test_all_items_need_no_label_embeddings(self):
    """Nor are they looked at."""
    for core in CORES:
      if core.needs_all_items:
        b = Batches(4)
        value = loss_of(core, b.contexts, None, b.labels, items=b.items)
        np.testing.assert_allclose(value, b.loss(core), rtol=1e-14)

  @parameterized.parameters('hinge', 'batch_softmax')
  def test_untouched_rows(self, core):
    """A row of the table that is no context and no label has gradient 0."""

    def loss(table):
      contexts = table[jnp.array([[1, 2], [3, 4], [2, 2]])].mean(1)
      labels = jnp.array([3, 1, 6])
      return retrieval.retrieval_loss(
        RetrievalLoss(core), contexts, table[labels], labels
      )

    grad = np.asarray(fast_jit(jax.grad(loss))(Batches(0).items))
    touched = np.array([1, 2, 3, 4, 6])
    self.assertTrue(np.abs(grad[touched]).max(-1).all())
    np.testing.assert_array_equal(np.delete(grad, touched, axis=0), 0)

  def test_weights(self):
    """The core is sum w l / sum w, and 0 with gradient 0 if sum w is 0."""
    batches = Batches(5)
    for core in ('hinge', 'global_softmax'):
      settings = RetrievalLoss(core)
      alone = [float(batches.loss(settings, slice(i, i + 1))) for i in range(6)]
      value = batches.loss(settings, weights=batches.weights)
      expected = np.average(alone, weights=batches.weights)
      np.testing.assert_allclose(value, expected, rtol=1e-13)
      nothing = batches.loss(settings, weights=np.zeros(6))
      self.assertEqual(float(nothing), 0)

  def test_false_negatives(self):
    """Examples of one label do not repel each other if so asked."""
    batches = Batches(6)
    batches.labels[1] = batches.labels[4] = batches.labels[0]
    scores = np.asarray(batches.contexts @ batches.items[batches.labels].T)
    same = batches.labels[:, None] == batches.labels
    for masked in (False, True):
      settings = RetrievalLoss(normalise=False, mask_false_negatives=masked)
      counted = ~same | np.eye(6, dtype=bool) if masked else np.ones((6, 6))
      masses = (np.exp(scores) * counted).sum(-1)
      expected = (np.log(masses) - scores.diagonal()).mean()
      np.testing.assert_allclose(batches.loss(settings), expected, rtol=1e-13)

  @parameterized.parameters(True, False)
  def test_pad_is_candidate(self, kept):
    """Item 0 is, or is not, a class and a column of the cross norm."""
    batches = Batches(7)
    settings = RetrievalLoss(
      'global_softmax', normalise=False, pad_is_candidate=kept
    )
    first = 0 if kept else 1
    scores = np.asarray(batches.contexts @ batches.items.T)
    own = scores[np.arange(6), batches.labels]
    core = (np.log(np.exp(scores[:, first:]).sum(-1)) - own).mean()
    np.testing.assert_allclose(batches.loss(settings), core, rtol=1e-13)
    cross = np.sqrt((scores[:, first:] ** 2).sum() - (own**2).sum())
    settings = dataclasses.replace(settings, spreadout=Spreadout(cross=0.5))
    np.testing.assert_allclose(
      batches.loss(settings), core + 0.5 * cross, rtol=1e-13
    )


def pairs_norm(x, normalise, least=0.0):
  """The off-diagonal norm of x @ x.T; rows have a norm of at least so much."""
  if normalise:
    x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), least)
  matrix = x @ x.T
  np.fill_diagonal(matrix, 0)
  return np.linalg.norm(matrix)


class MaskTest(Float64Test):
  @parameterized.parameters(*EVERYTHING)
  def test_masked_rows_change_nothing(self, settings):
    """The value and gradients are those of the real rows alone."""
    batches = Batches(8)
    if settings.mask_false_negatives:
      batches.labels[3] = batches.labels[2]
    real = np.array([0, 2, 3, 5])
    mask = np.isin(np.arange(6), real)
    arrays = (batches.contexts, batches.items[batches.labels])
    shared = (batches.items, batches.table)

    def loss(arrays, labels, mask, weights):
      contexts, embeddings, items, table = arrays
      return retrieval.retrieval_loss(
        settings,
        contexts,
        embeddings,
        labels,
        items=items,
        table=table,
        mask=mask,
        weights=weights,
      )

    grad_of = jax.value_and_grad(loss)
    expected, expected_grads = fast_jit(grad_of)(
      (*(x[real] for x in arrays), *shared),
      batches.labels[real],
      None,
      batches.weights[real],
    )
    junk = np.array([np.nan, np.inf, 1e30, np.nan])[:, None, None]
    masks = mask & (np.arange(4) < 3)[:, None]  # in the last nothing is real
    values, grads = fast_jit(jax.vmap(grad_of))(
      (
        *(np.where(masks[..., None], x, junk) for x in arrays),
        *(np.stack([x] * 4) for x in shared),
      ),
      np.where(masks, batches.labels, 1000),
      masks,
      np.where(masks, batches.weights, np.nan),
    )
    np.testing.assert_allclose(values[:3], [expected] * 3, rtol=1e-13)
    self.check_nothing_is_real(
      settings, batches, values[3], [grad[3] for grad in grads]
    )
    for i in range(3):
      mine = [np.asarray(grad[i]) for grad in grads]
      for grad in mine[:2]:
        np.testing.assert_array_equal(grad[~mask], 0)
      mine[:2] = mine[0][real], mine[1][real]
      for grad, other in zip(mine, expected_grads, strict=True):
        np.testing.assert_allclose(grad, other, rtol=1e-11, atol=1e-14)

  def check_nothing_is_real(self, settings, batches, value, grads):
    """Only terms free of the batch are left, by numpy; gradients are finite."""
    table, items = (np.asarray(x) for x in (batches.table, batches.items))
    expected = 0.4 * pairs_norm(table, True) + 0.1 * (table**2).sum()
    if settings.spreads_all_items:
      expected += 0.2 * pairs_norm(items, settings.normalise)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for grad in grads[:2]:
      np.testing.assert_array_equal(grad, 0)
    self.assertTrue(is_finite(grads))

  @parameterized.parameters(*CORES)
  def test_a_real_nan_is_seen(self, settings):
    """Only masked rows are forgiven."""
    batches = Batches(0)
    batches.contexts = batches.contexts.at[2].set(jnp.nan)
    spreadout = Spreadout(context=0.1)
    settings = dataclasses.replace(settings, spreadout=spreadout)
    self.assertTrue(np.isnan(batches.loss(settings)))


class SafeNumericsTest(parameterized.TestCase):
  """In float32."""

  @parameterized.parameters(*EVERYTHING)
  def test_finite(self, settings):
    """Values and gradients are finite where norms vanish."""
    hole = np.array([[1.0], [0.0], [1.0]]) * np.ones(4)
    one = np.ones((3, 1)) * [1.0, 2.0, 0.5, 1.0]
    zeros = np.zeros((3, 4))
    x = np.array([zeros, np.ones((3, 4)), np.eye(4)[:3], hole, one, zeros])
    alone = np.array([True, False, False])  # of the last two one row is real
    mask = np.stack([~alone | alone] * 4 + [alone] * 2)

    def loss(x, items, table, mask):
      labels = jnp.arange(1, len(x) + 1)
      return retrieval.retrieval_loss(
        settings, x, items[labels], labels, items=items, table=table, mask=mask
      )

    grad_of = jax.vmap(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    whole = [slice(None), slice(None)]
    single = [slice(-2, None), slice(1)]
    # Batches of one row, too, for each core.
    some = EVERYTHING.index(settings) in (0, 3, 5, 6)
    for cases, size in [whole, single] if some else [whole]:
      rows = x[cases, size].astype(np.float32)
      items = np.pad(rows, ((0, 0), (1, 0), (0, 0)))
      values = fast_jit(grad_of)(rows, items, items, mask[cases, size])
      self.assertTrue(is_finite(values))

  def test_normalise_rows(self):
    """Rows of 0 norm, or nearly, are 0 with gradient 0."""
    x = jnp.array([[0.0, 0.0], [3.0, 4.0], [1e-7, 0.0], [1e-5, 0.0]])
    normalise = fast_jit(retrieval.normalise_rows)
    rows = normalise(x)
    expected = [[0, 0], [0.6, 0.8], [0, 0], [1, 0]]
    np.testing.assert_allclose(rows, expected, rtol=1e-6)
    grad = fast_jit(
      jax.grad(lambda x: retrieval.normalise_rows(x)[:, 1].sum())
    )(x)
    np.testing.assert_array_equal(grad[jnp.array([0, 2])], 0)
    np.testing.assert_allclose(grad[1], [-0.096, 0.072], rtol=1e-5)
    nan = retrieval.normalise_rows(jnp.array([[jnp.nan, 1.0]]))
    self.assertTrue(jnp.isnan(nan).all())

  def test_off_diagonal_norm(self):
    """Entries are chosen by column, row and mask."""
    matrix = jnp.arange(12.0).reshape(3, 4)
    norm = retrieval.off_diagonal_norm
    everything = float((matrix**2).sum())
    self.assertAlmostEqual(
      float(norm(matrix)) ** 2, everything - 125, delta=1e-3
    )
    columns, rows = jnp.array([3, 0, 1]), jnp.array([True, False, True])
    self.assertAlmostEqual(
      float(norm(matrix, columns)) ** 2, everything - 9 - 16 - 81, delta=1e-3
    )
    kept = jnp.array([True, True, False, True])
    value = float(norm(matrix, columns, rows=rows, kept=kept)) ** 2
    self.assertAlmostEqual(value, 0 + 1 + 64 + 121, delta=1e-3)

  def test_orthogonal_rows(self):
    """Their norm is rounding: 0 with gradient 0 in the Gram form."""
    rng = np.random.default_rng(0)
    for size in (2, 5, 16):
      x = np.linalg.qr(rng.standard_normal((size, size)))[0]
      x *= rng.uniform(0.5, 1, (size, 1))
      x = jnp.asarray(x, jnp.float32)
      gram = fast_jit(jax.value_and_grad(retrieval.gram_off_diagonal_norm))(x)
      np.testing.assert_array_equal(gram[0], 0)
      np.testing.assert_array_equal(gram[1], 0)
      pairs = lambda x: retrieval.off_diagonal_norm(x @ x.T)
      value, grad = fast_jit(jax.value_and_grad(pairs))(x)
      self.assertLess(value, 1e-5)
      self.assertLess(jnp.linalg.norm(grad), 2.01)  # at most 2 |x|

  @parameterized.parameters(
    ('normal', True, 700),
    ('normal', False, 700),
    ('uniform', True, 700),
    ('uniform', False, 700),
    ('off_centre', True, 3953),
    ('off_centre', False, 700),
  )
  def test_gram_is_pairs(self, kind, normalise, size):
    """Also of a whole vocabulary, to 1e-6 in float32, and both to float64."""
    rng = np.random.default_rng(1)
    table = {
      'normal': rng.standard_normal((size, 16)),
      'uniform': rng.uniform(-0.05, 0.05, (size, 16)),
      'off_centre': rng.standard_normal((size, 16)) + 2,
    }[kind].astype(np.float32)
    table[0] = 0
    regulariser = functools.partial(
      retrieval.table_regulariser, spreadout=1.0, normalise=normalise
    )
    (gram, gram_grad), (pairs, pairs_grad) = fast_jit(
      lambda table: [
        jax.value_and_grad(functools.partial(regulariser, form=form))(table)
        for form in ('gram', 'pairs')
      ]
    )(table)
    # 1e-9 leaves the row of zeros as it is.
    expected = pairs_norm(table.astype(np.float64), normalise, 1e-9)
    np.testing.assert_allclose(gram, pairs, rtol=1e-6)
    np.testing.assert_allclose(gram, expected, rtol=1e-6)
    self.assertLess(relative_error(gram_grad, pairs_grad), 1e-5)

  def test_gram_mask(self):
    """Masked rows are left out, even if not finite."""
    x = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    mask = jnp.array([True, False, True, True, False, True, True])
    junk = jnp.where(mask[:, None], x, jnp.nan)
    norm = retrieval.gram_off_diagonal_norm
    grad_of = fast_jit(jax.value_and_grad(norm))
    value, grad = grad_of(junk, mask)
    expected, expected_grad = grad_of(x[np.asarray(mask)])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grad[mask], expected_grad, rtol=1e-4)
    np.testing.assert_array_equal(grad[~mask], 0)
    pairs = retrieval.off_diagonal_norm(x @ x.T, rows=mask, kept=mask)
    np.testing.assert_allclose(value, pairs, rtol=1e-6)

  def test_compiled_and_batched(self):
    """Under jit and vmap, as clients run it; against float64 without."""
    sizes = (1, 6, 6, 6)
    for settings, size in zip(EVERYTHING[::2], sizes, strict=True):
      mask = np.arange(size) < 4
      with x64():
        batches = [Batches(seed, size) for seed in range(3)]
        expected = [float(b.loss(settings, mask=mask)) for b in batches]

      def loss(contexts, items, table, labels, settings=settings, mask=mask):
        return retrieval.retrieval_loss(
          settings,
          contexts,
          items[labels],
          labels,
          items=items,
          table=table,
          mask=mask,
        )

      names = ('contexts', 'items', 'table')
      arrays = [
        np.stack([getattr(b, name) for b in batches]).astype(np.float32)
        for name in names
      ]
      labels = np.stack([b.labels for b in batches])
      got = fast_jit(jax.vmap(loss))(*arrays, labels)
      self.assertEqual(got.dtype, jnp.float32)
      np.testing.assert_allclose(got, expected, rtol=1e-5)


class ErrorsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'core': 'softmax'}, 'core'),
    ({'table_form': 'grams'}, 'table_form'),
    ({'l2': -1.0}, 'l2'),
    ({'spreadout': Spreadout(context=-1.0)}, 'spreadout.context'),
    ({'spreadout': Spreadout(label=-1e-9)}, 'spreadout.label'),
    ({'spreadout': Spreadout(cross=float('nan'))}, 'spreadout.cross'),
    ({'spreadout': Spreadout(table=-1.0)}, 'spreadout.table'),
  )
  def test_settings(self, settings, name):
    """The message names the setting."""
    with self.assertRaisesRegex(InvalidInput, f'Expected {name} '):
      RetrievalLoss(**settings)

  @parameterized.parameters(
    (RetrievalLoss('global_softmax'), {'items': None}, 'embeddings of all'),
    (
      RetrievalLoss('hinge', global_similarity=True),
      {'items': None},
      'embeddings of all',
    ),
    (RetrievalLoss(), {'embeddings': None}, 'label_embeddings'),
    (RetrievalLoss(l2=1.0), {'table': None}, 'item table'),
    (
      RetrievalLoss(spreadout=Spreadout(table=1.0)),
      {'table': None},
      'item table',
    ),
    (RetrievalLoss(), {'embeddings': np.zeros((2, 3))}, 'size, got 2 and 3'),
    (
      RetrievalLoss('global_softmax'),
      {'items': np.zeros((4, 5))},
      'size, got 2 and 5',
    ),
  )
  def test_inputs(self, settings, changes, message):
    """What the settings need must be there, and of one size."""
    inputs = {
      'embeddings': np.zeros((2, 2)),
      'items': np.zeros((4, 2)),
      'table': np.zeros((4, 2)),
    }
    inputs = {k: v for k, v in (inputs | changes).items() if v is not None}
    embeddings = inputs.pop('embeddings', None)
    with self.assertRaisesRegex(InvalidInput, message):
      loss_of(settings, np.zeros((2, 2)), embeddings, **inputs)

  def test_form(self):
    """An unknown form of the table's norm."""
    with self.assertRaisesRegex(InvalidInput, 'form'):
      retrieval.table_regulariser(jnp.zeros((2, 2)), spreadout=1, form='x')


if __name__ == '__main__':
  absltest.main()
