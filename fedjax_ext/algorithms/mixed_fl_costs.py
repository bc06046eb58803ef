"""What a mode of mixed federated learning costs its clients.

Formulas, not timings: floats that travel, and multiply-adds of forward passes
(a gradient costs about twice as many more, of either kind of term).

Axis letters: B examples in a batch, T items of a context, V+1 rows of the item
table, D features.
"""

import itertools
from typing import NamedTuple

from fedjax_ext.core import validate

MODES = (
  'fed_only',
  'central_only',
  'parallel_training',
  'one_way',
  'two_way',
  'client_side',
)


class Communication(NamedTuple):
  """Floats of one client in one round, and the server's gradients a round."""

  down: float
  up: float
  server_gradients: int


def communication(
  mode: str,
  *,
  model_floats: float,
  augmentation_floats: float = 0.0,
  sparse_floats: float | None = None,
  server_steps: int = 1,
  raw_gradients: bool = False,
) -> Communication:
  """Floats that travel between the server and one client of the cohort.

  Args:
    mode: one of `MODES`.
    model_floats: |x|, parameters of the whole model.
    augmentation_floats: parameters that f_c touches, |supp g_c|.
    sparse_floats: parameters that the client's own examples touch, where it
      holds only these; None where it holds all.
    server_steps: K_c.
    raw_gradients: two_way: clients also send their mean gradient, which plain
      SGD's delta does not need.

  Raises:
    InvalidInput: an unknown mode, or a sparse client in a mode where clients
      need the whole table.
  """
  validate.one_of('mode', mode, MODES)
  if mode == 'central_only':
    return Communication(0.0, 0.0, server_steps)
  validate.check(
    sparse_floats is None or mode in ('fed_only', 'parallel_training'),
    f'Expected sparse_floats=None for mode={mode}, whose clients need the '
    'whole table.',
  )
  own = model_floats if sparse_floats is None else sparse_floats
  if mode in ('one_way', 'two_way'):
    up = own * (2 if mode == 'two_way' and raw_gradients else 1)
    gradients = 1 if mode == 'one_way' else server_steps
    return Communication(own + augmentation_floats, up, gradients)
  gradients = server_steps if mode == 'parallel_training' else 0
  return Communication(own, own, gradients)


def spreadout_multiply_adds(rows: int, features: int, *, form: str) -> float:
  """A forward pass of the spreadout of a table [V+1, D].

  Args:
    rows: V + 1.
    features: D.
    form: 'pairs' forms all (V+1)^2 D products, 'gram' D^2 (V+1) of them.
  """
  validate.one_of('form', form, ('pairs', 'gram'))
  if form == 'pairs':
    return float(rows) ** 2 * features
  return float(rows) * features**2


def dual_encoder_multiply_adds(
  *, batch_size: int, context: int, features: int, hidden: tuple[int, ...]
) -> float:
  """A forward pass of contexts and of positive pairs, without other items.

  B (T D + sum of the dense layers + D').

  Args:
    batch_size: B.
    context: T.
    features: D.
    hidden: widths of the context tower's dense layers.
  """
  widths = (features, *hidden)
  dense = sum(a * b for a, b in itertools.pairwise(widths))
  return float(batch_size * (context * features + dense + widths[-1]))
