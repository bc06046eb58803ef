"""Next-item retrieval with a dual encoder, as a task.

Axis letters: B examples, T items of a context, V items (0 is padding), D
features.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_ext.core import Batch, SparseTable
from fedjax_ext.losses.ranking import rank_metrics
from fedjax_ext.losses.retrieval import (
  RetrievalLoss,
  normalise_rows,
  retrieval_loss,
)
from fedjax_ext.losses.task import Task
from fedjax_ext.models.dual_encoder import PAD, TABLE, DualEncoder

PyTree = Any
CONTEXT, LABEL = 'context', 'label'


def retrieval_task(
  encoder: DualEncoder,
  loss: RetrievalLoss,
  *,
  pad_is_candidate: bool = False,
  pessimistic_ties: bool = False,
) -> Task:
  """Predicts the label, int [B], from the context, int [B, T].

  Metrics rank the label among all V items, whatever the loss: see
  `ranking.rank_metrics`. Items of the context are not filtered out.

  Args:
    encoder: the model.
    loss: which loss; see `retrieval_loss`.
    pad_is_candidate: rank among all rows, padding included, as the paper's
      code does.
    pessimistic_ties: items that score like the label count as higher.
  """
  score = normalise_rows if loss.normalise else lambda x: x

  def all_items(params: PyTree) -> jax.Array:
    return encoder.items(params, jnp.arange(encoder.num_items + 1))

  def embed(params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
    context = batch.data[CONTEXT].astype(jnp.int32)
    return encoder.contexts(params, context), batch.data[LABEL].astype(
      jnp.int32
    )

  def value(params: PyTree, batch: Batch) -> jax.Array:
    contexts, labels = embed(params, batch)
    return retrieval_loss(
      loss,
      contexts,
      encoder.items(params, labels),
      labels,
      items=all_items(params) if loss.needs_all_items else None,
      table=params[TABLE],
      mask=batch.mask,
    )

  def metrics(params: PyTree, batch: Batch) -> dict:
    contexts, labels = embed(params, batch)
    values = rank_metrics(
      score(contexts),
      score(all_items(params)),
      labels,
      pad_is_candidate=pad_is_candidate,
      pessimistic_ties=pessimistic_ties,
    )
    weight = batch.mask.astype(values['mrr'].dtype)
    return {name: (x, weight) for name, x in values.items()}

  return Task(encoder.init, value, metrics)


def item_table(encoder: DualEncoder) -> SparseTable:
  """The item table [V+1, D], for clients that hold only their own items."""
  rows = encoder.num_items + 1
  return SparseTable(TABLE, (CONTEXT, LABEL), rows, always=(PAD,))
