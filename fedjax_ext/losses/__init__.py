"""Losses, and tasks that pair a model with one."""

from fedjax_ext.losses.task import Task, classification_task, masked_mean

__all__ = ['Task', 'classification_task', 'masked_mean']
