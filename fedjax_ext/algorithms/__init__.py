"""Federated algorithms, one file a paper."""

from fedjax_ext.algorithms.centralised import centralised
from fedjax_ext.algorithms.fed_avg import fed_avg
from fedjax_ext.algorithms.fed_prox import fed_prox
from fedjax_ext.algorithms.fine_tuning import with_fine_tuning
from fedjax_ext.algorithms.local_sgd import (
  LocalState,
  add_scaled,
  delta_of,
  local_sgd,
  return_delta,
)
from fedjax_ext.algorithms.local_training import local_training
from fedjax_ext.algorithms.mixed_fl import MODES, ServerLoss, mixed_fl
from fedjax_ext.algorithms.popularity import popularity
from fedjax_ext.algorithms.scaffold import scaffold
from fedjax_ext.algorithms.server_step import server_step

__all__ = [
  'MODES',
  'LocalState',
  'ServerLoss',
  'add_scaled',
  'centralised',
  'delta_of',
  'fed_avg',
  'fed_prox',
  'local_sgd',
  'local_training',
  'mixed_fl',
  'popularity',
  'return_delta',
  'scaffold',
  'server_step',
  'with_fine_tuning',
]
