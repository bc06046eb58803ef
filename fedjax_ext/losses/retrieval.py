"""Losses of dual encoders, and which of them depend on the rest of the batch.

Ning et al. (arXiv 2108.07931): contexts and labels are embedded, and a label
should be near its context. Which other examples share the batch, one user's in
federated learning, matters to some of the losses and not to others.

Axis letters: B examples, V+1 items (row 0 is padding), D embedding size.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_ext.core import validate

LOSSES = ('batch_softmax', 'global_softmax', 'hinge', 'spreadout')
TABLE_FORMS = ('gram', 'pairs')
_EPS = 1e-12


class Spreadout(NamedTuple):
  """Factors >= 0 of the off-diagonal norms: how hard to push things apart.

  Attributes:
    context: between the contexts of the batch.
    label: between labels: those of the batch, or all items; see RetrievalLoss.
    cross: between contexts and the labels of others.
    table: between the rows of the item table.
  """

  context: float = 0.0
  label: float = 0.0
  cross: float = 0.0
  table: float = 0.0


_NO_SPREADOUT = Spreadout()


def normalise_rows(x: jax.Array) -> jax.Array:
  """Rows [..., D] / their norms; 0 with gradient 0 where |row|^2 <= 1e-12."""
  square = (x * x).sum(-1, keepdims=True)
  small = square <= _EPS
  return jnp.where(small, 0, x * lax.rsqrt(jnp.where(small, 1, square)))


def _safe_sqrt(square: jax.Array, floor: jax.Array | float = _EPS) -> jax.Array:
  """The root of a scalar; 0 with gradient 0 where it is <= floor."""
  small = square <= floor
  return jnp.where(small, 0, jnp.sqrt(jnp.where(small, 1, square)))


def off_diagonal_norm(
  matrix: jax.Array,
  columns: jax.Array | None = None,
  *,
  rows: jax.Array | None = None,
  kept: jax.Array | None = None,
) -> jax.Array:
  """sqrt(sum M^2 - sum_i M[i, columns_i]^2), with gradient 0 where it is ~0.

  Args:
    matrix: M [N, M].
    columns: int [N], the entry of each row that does not count; the diagonal by
      default.
    rows: bool [N], which rows count; all by default.
    kept: bool [M], which columns count; all by default.
  """
  num_rows, num_columns = matrix.shape
  if columns is None:
    columns = jnp.arange(num_rows)
  counted = jnp.arange(num_columns) != columns[:, None]
  if rows is not None:
    counted &= rows[:, None]
  if kept is not None:
    counted &= kept
  matrix = jnp.where(counted, matrix, 0)
  return _safe_sqrt((matrix * matrix).sum())


def gram_off_diagonal_norm(
  x: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
  """off_diagonal_norm(x @ x.T) of x [N, D] in O(N D^2), without N x N.

  It is sqrt(|x'x|^2 - sum_i |x_i|^4), and 0 with gradient 0 where the
  difference is rounding: rows that are orthogonal, or nearly.

  Args:
    x: rows [N, D].
    mask: bool [N], which rows count; all by default.
  """
  if mask is not None:
    x = jnp.where(mask[:, None], x, 0)
  gram = jnp.matmul(x.T, x, precision='highest')
  total = (gram * gram).sum()
  diagonal = (x * x).sum(-1)
  floor = jnp.maximum(_EPS, 4 * jnp.finfo(x.dtype).eps * total)
  return _safe_sqrt(total - (diagonal * diagonal).sum(), floor)


def _rows_norm(x: jax.Array, form: str) -> jax.Array:
  """off_diagonal_norm of the pairs of the rows [N, D]."""
  if form == 'gram':
    return gram_off_diagonal_norm(x)
  return off_diagonal_norm(jnp.matmul(x, x.T, precision='highest'))


@jax.custom_vjp
def cosine_table_norm(table: jax.Array) -> jax.Array:
  """gram_off_diagonal_norm(normalise_rows(table)) of table [V+1, D], faster.

  With unit rows X = R table and G = X'X the gradient is
  2 / norm * R (X G - diag(X G X') X): two products, a third of what automatic
  differentiation does. Reverse mode only.
  """
  return gram_off_diagonal_norm(normalise_rows(table))


def _cosine_table_norm_forward(
  table: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The norm, and its gradient [V+1, D]."""
  columns = lax.optimization_barrier(table.T)  # sums over D become fast
  square = (columns * columns).sum(0)
  small = square <= _EPS
  scale = jnp.where(small, 0, lax.rsqrt(jnp.where(small, 1, square)))
  units = lax.optimization_barrier(columns * scale)
  gram = jnp.matmul(units, units.T, precision='highest')
  total = (gram * gram).sum()
  floor = jnp.maximum(_EPS, 4 * jnp.finfo(table.dtype).eps * total)
  diagonal = (units * units).sum(0)
  norm = _safe_sqrt(total - (diagonal * diagonal).sum(), floor)
  product = jnp.matmul(gram, units, precision='highest')
  tangent = product - (product * units).sum(0) * units
  factor = jnp.where(norm > 0, 2 / jnp.where(norm > 0, norm, 1), 0)
  return norm, (factor * scale * tangent).T


cosine_table_norm.defvjp(
  _cosine_table_norm_forward, lambda gradient, g: (g * gradient,)
)


def table_regulariser(
  table: jax.Array,
  *,
  spreadout: float,
  l2: float = 0.0,
  normalise: bool = True,
  form: str = 'gram',
) -> jax.Array:
  """spreadout * the off-diagonal norm of the rows + l2 * sum table^2.

  Args:
    table: raw item table [V+1, D]; the padding's row counts.
    spreadout: factor of the norm.
    l2: factor of the squares, before rows are normalised.
    normalise: take the norm between normalised rows.
    form: 'gram' costs O(V D^2), 'pairs' O(V^2 D); equal up to rounding.
  """
  validate.one_of('form', form, TABLE_FORMS)
  value = jnp.zeros((), table.dtype)
  if spreadout:
    if normalise and form == 'gram':
      norm = cosine_table_norm(table)
    else:
      norm = _rows_norm(normalise_rows(table) if normalise else table, form)
    value += spreadout * norm
  if l2:
    value += l2 * (table * table).sum()
  return value


@dataclasses.dataclass(frozen=True)
class RetrievalLoss:
  """Which loss: a core, the mean over examples, plus spreadout terms.

  Label spreadout is between all items for 'global_softmax', and for 'hinge' and
  'spreadout' with global_similarity; else between the labels of the batch.
  Cross spreadout is between contexts and all items for 'global_softmax', else
  between contexts and labels of the batch.

  Attributes:
    core: 'batch_softmax', cross-entropy with the batch's labels as classes;
      'global_softmax', with all items; 'hinge', max(0, margin - s)^2 of the
      positive pair; or 'spreadout', 0.
    spreadout: factors of the norms.
    normalise: cosines rather than dot products, also in the spreadout of
      outputs.
    global_similarity: labels are rows of all items' embeddings.
    margin: of 'hinge'.
    mask_false_negatives: in 'batch_softmax', examples of the same label are no
      negatives of each other.
    pad_is_candidate: item 0 is a class of 'global_softmax', and a column of its
      cross spreadout.
    l2: factor of the item table's squares.
    normalise_table: table spreadout is between normalised rows.
    table_form: 'gram' or 'pairs', for norms between all items; see
      table_regulariser.
  """

  core: str = 'batch_softmax'
  _: dataclasses.KW_ONLY
  spreadout: Spreadout = _NO_SPREADOUT
  normalise: bool = True
  global_similarity: bool = False
  margin: float = 0.9
  mask_false_negatives: bool = False
  pad_is_candidate: bool = True
  l2: float = 0.0
  normalise_table: bool = True
  table_form: str = 'gram'

  def __post_init__(self):
    validate.one_of('core', self.core, LOSSES)
    validate.one_of('table_form', self.table_form, TABLE_FORMS)
    for name, value in self.spreadout._asdict().items():
      validate.at_least(f'spreadout.{name}', value, 0)
    validate.at_least('l2', self.l2, 0)

  @property
  def needs_all_items(self) -> bool:
    """Whether the embeddings of all items are needed."""
    return self.core == 'global_softmax' or self.global_similarity

  @property
  def needs_table(self) -> bool:
    """Whether the raw item table is needed."""
    return bool(self.spreadout.table or self.l2)

  @property
  def spreads_all_items(self) -> bool:
    """Whether label spreadout is between all items, not the batch's labels."""
    return self.needs_all_items and self.core != 'batch_softmax'


def is_batch_insensitive(settings: RetrievalLoss) -> bool:
  """Whether a batch's loss is the mean of its examples' losses, each alone."""
  spreadout = settings.spreadout
  return (
    settings.core != 'batch_softmax'
    and not spreadout.context
    and not spreadout.cross
    and (not spreadout.label or settings.spreads_all_items)
  )


def _weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
  """sum w * v / sum w over [B], a scalar; 0 if sum w = 0."""
  total = weights.sum()
  empty = total == 0
  mean = (weights * values).sum() / jnp.where(empty, 1, total)
  return jnp.where(empty, 0, mean)


def _check_inputs(
  settings: RetrievalLoss,
  contexts: jax.Array,
  label_embeddings: jax.Array | None,
  items: jax.Array | None,
  table: jax.Array | None,
) -> None:
  if settings.needs_all_items:
    validate.check(
      items is not None,
      f'Expected items, the embeddings of all items, for {settings.core} with '
      f'global_similarity={settings.global_similarity}, got none.',
    )
  else:
    validate.check(
      label_embeddings is not None,
      f'Expected label_embeddings for {settings.core}, got none.',
    )
  validate.check(
    table is not None or not settings.needs_table,
    'Expected the item table for spreadout.table or l2, got none.',
  )
  others = items if settings.needs_all_items else label_embeddings
  size, other_size = contexts.shape[-1], others.shape[-1]
  validate.check(
    size == other_size,
    'Expected contexts and labels of one embedding size, '
    f'got {size} and {other_size}.',
  )


def retrieval_loss(
  settings: RetrievalLoss,
  contexts: jax.Array,
  label_embeddings: jax.Array | None,
  labels: jax.Array,
  *,
  items: jax.Array | None = None,
  table: jax.Array | None = None,
  mask: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """The loss of a batch, a scalar.

  A masked row changes nothing, even if it is not finite: it has no loss, is no
  negative and is in no norm. An example of weight 0 only has no loss.

  Args:
    settings: which loss.
    contexts: outputs [B, D].
    label_embeddings: outputs [B, D]; not used if settings.needs_all_items.
    labels: item ids, int [B].
    items: outputs of all items [V+1, D], if settings.needs_all_items.
    table: raw item table [V+1, D], if settings.needs_table.
    mask: bool [B], which rows are real; all by default.
    weights: of the examples in the core's mean [B]; equal by default.
  """
  _check_inputs(settings, contexts, label_embeddings, items, table)
  core, spreadout = settings.core, settings.spreadout
  num_rows = len(contexts)
  if mask is None:
    mask = jnp.ones(num_rows, bool)
  if weights is None:
    weights = jnp.ones(num_rows, contexts.dtype)
  weights = jnp.where(mask, weights, 0)
  labels = jnp.where(mask, labels, 0).astype(jnp.int32)

  def prepare(x: jax.Array) -> jax.Array:
    return normalise_rows(x) if settings.normalise else x

  # Zeros in place of masked rows: junk must not reach a product, even one that
  # is discarded, since its gradient would be 0 * nan.
  contexts = prepare(jnp.where(mask[:, None], contexts, 0))
  if settings.needs_all_items:
    items = prepare(items)
    own = jnp.where(mask[:, None], items[labels], 0)
  else:
    own = prepare(jnp.where(mask[:, None], label_embeddings, 0))

  if core == 'global_softmax':
    columns, others = labels, items
    kept = jnp.ones(len(items), bool).at[0].set(settings.pad_is_candidate)
  else:
    columns, others, kept = jnp.arange(num_rows), own, mask
  scores = None
  if core.endswith('softmax') or spreadout.cross:
    scores = contexts @ others.T

  value = jnp.zeros((), contexts.dtype)
  if core.endswith('softmax'):
    positive = columns[:, None] == jnp.arange(scores.shape[1])
    # A row's own label always stays, so that every row has a candidate.
    candidates = kept | positive
    if core == 'batch_softmax' and settings.mask_false_negatives:
      candidates &= (labels[:, None] != labels) | positive
    masses = jnp.where(candidates, scores, -jnp.inf)
    own_scores = jnp.take_along_axis(scores, columns[:, None], axis=1)[:, 0]
    losses = jax.nn.logsumexp(masses, axis=1) - own_scores
    value += _weighted_mean(losses, weights)
  elif core == 'hinge':
    shortfall = jnp.maximum(0, settings.margin - (contexts * own).sum(-1))
    value += _weighted_mean(shortfall**2, weights)

  if spreadout.context:
    value += spreadout.context * off_diagonal_norm(contexts @ contexts.T)
  if spreadout.label and settings.spreads_all_items:
    value += spreadout.label * _rows_norm(items, settings.table_form)
  elif spreadout.label:
    value += spreadout.label * off_diagonal_norm(own @ own.T)
  if spreadout.cross:
    value += spreadout.cross * off_diagonal_norm(
      scores, columns, rows=mask, kept=kept
    )
  if settings.needs_table:
    value += table_regulariser(
      table,
      spreadout=spreadout.table,
      l2=settings.l2,
      normalise=settings.normalise_table,
      form=settings.table_form,
    )
  return value
