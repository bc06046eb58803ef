"""Losses and tasks: what is learned."""

from fedjax_ext.losses.quadratic import quadratic_task
from fedjax_ext.losses.ranking import ranking_metrics, ranks, top_items
from fedjax_ext.losses.retrieval import (
  LOSSES,
  RetrievalLoss,
  Spreadout,
  is_batch_insensitive,
  retrieval_loss,
  table_regulariser,
)
from fedjax_ext.losses.retrieval_task import item_table, retrieval_task
from fedjax_ext.losses.task import (
  Task,
  classification_task,
  masked_mean,
  next_token_task,
)

__all__ = [
  'LOSSES',
  'RetrievalLoss',
  'Spreadout',
  'Task',
  'classification_task',
  'is_batch_insensitive',
  'item_table',
  'masked_mean',
  'next_token_task',
  'quadratic_task',
  'ranking_metrics',
  'ranks',
  'retrieval_loss',
  'retrieval_task',
  'table_regulariser',
  'top_items',
]
