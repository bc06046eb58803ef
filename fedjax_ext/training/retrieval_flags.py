"""Flags of experiments that retrieve items, and what is built from them.

`--model` names a function that returns a `DualEncoder`.
"""

import numpy as np
from absl import flags

from fedjax_ext import data
from fedjax_ext.core import SparseTable, validate
from fedjax_ext.losses import Task
from fedjax_ext.losses.retrieval import LOSSES, RetrievalLoss, Spreadout
from fedjax_ext.losses.retrieval_task import (
  CONTEXT,
  LABEL,
  item_table,
  retrieval_task,
)
from fedjax_ext.models.dual_encoder import DualEncoder, dual_encoder
from fedjax_ext.training import flags as shared

FLAGS = flags.FLAGS
ENCODERS = {'dual_encoder': dual_encoder}
# Flags that name functions, for `flags.flag_values`.
NAMED = {'model': ENCODERS}

flags.DEFINE_enum('loss', 'batch_softmax', LOSSES, 'The loss of retrieval.')
for _term, _what in (
  ('context', 'contexts of a batch'),
  ('label', 'labels of a batch, or of all items'),
  ('cross', 'contexts and labels of other examples'),
  ('table', 'rows of the item table'),
):
  flags.DEFINE_float(
    f'spreadout_{_term}', 0.0, f'Weight that keeps apart {_what}.'
  )
flags.DEFINE_float('table_l2', 0.0, 'Weight of the item table squared.')
flags.DEFINE_float('margin', 0.9, 'hinge: the cosine that is good enough.')
flags.DEFINE_bool(
  'normalise', True, 'Cosines, as in the paper; else dot products.'
)
flags.DEFINE_bool(
  'global_similarity',
  False,
  'hinge, spreadout, batch_softmax: from similarities to all items.',
)
flags.DEFINE_bool(
  'mask_false_negatives',
  False,
  'batch_softmax: an equal label elsewhere in the batch is no negative.',
)
flags.DEFINE_bool(
  'pad_is_candidate',
  False,
  "Padding competes in global softmax and ranks, as in the paper's code.",
)
flags.DEFINE_bool(
  'pessimistic_ties', False, 'Items that score like the label rank before it.'
)
flags.DEFINE_bool(
  'sparse_rows',
  True,
  'Clients hold only the items that they name, where that gives the same '
  'result.',
)
flags.DEFINE_enum(
  'table_form',
  'gram',
  ['gram', 'pairs'],
  'spreadout_table by the D x D Gram matrix, or by all V x V pairs.',
)


def retrieval_loss_from_flags() -> RetrievalLoss:
  """The loss that the flags describe."""
  return RetrievalLoss(
    FLAGS.loss,
    spreadout=Spreadout(
      FLAGS.spreadout_context,
      FLAGS.spreadout_label,
      FLAGS.spreadout_cross,
      FLAGS.spreadout_table,
    ),
    normalise=FLAGS.normalise,
    global_similarity=FLAGS.global_similarity,
    margin=FLAGS.margin,
    mask_false_negatives=FLAGS.mask_false_negatives,
    pad_is_candidate=FLAGS.pad_is_candidate,
    l2=FLAGS.table_l2,
    table_form=FLAGS.table_form,
  )


def encoder_from_flags(dataset: data.FederatedDataset) -> DualEncoder:
  """--model for contexts int [M, T] and labels int [M] of a dataset."""
  for name, ndim in ((CONTEXT, 2), (LABEL, 1)):
    column = dataset.features.get(name)
    validate.check(
      column is not None
      and len(column.shape) == ndim
      and np.dtype(column.dtype).kind in 'iu',
      f'Expected integers {name!r} [M{", T" * (ndim - 1)}] in the data, got '
      f'{sorted(dataset.features)}.',
    )
  return shared.build_model(
    ENCODERS,
    DualEncoder,
    input_shape=dataset.features[CONTEXT].shape[1:],
    num_classes=dataset.num_classes,
  )


def retrieval_task_from_flags(
  encoder: DualEncoder, loss: RetrievalLoss
) -> Task:
  """The task; ranks by the flags."""
  return retrieval_task(
    encoder,
    loss,
    pad_is_candidate=FLAGS.pad_is_candidate,
    pessimistic_ties=FLAGS.pessimistic_ties,
  )


def sparse_tables(
  encoder: DualEncoder, loss: RetrievalLoss
) -> tuple[SparseTable, ...]:
  """The item table [V+1, D], where clients can do with the rows they name.

  Neither the loss nor weight decay may touch the other rows.
  """
  whole = loss.needs_all_items or loss.needs_table or FLAGS.client_weight_decay
  return () if whole or not FLAGS.sparse_rows else (item_table(encoder),)
