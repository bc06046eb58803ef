"""Losses and tasks: what is learned."""

from fedjax_ext.losses.task import (
  Task,
  classification_task,
  masked_mean,
  next_token_task,
)

__all__ = ['Task', 'classification_task', 'masked_mean', 'next_token_task']
