"""Federated data: columns, clients, partitioners, splits, sources."""

from fedjax_ext.data.columns import (
  Columns,
  fingerprint,
  load_columns,
  make_columns,
)
from fedjax_ext.data.datasets import (
  PARTITIONS,
  FederatedDataset,
  make_dataset,
)
from fedjax_ext.data.digits import load_digits
from fedjax_ext.data.federated_data import (
  FederatedData,
  from_assignment,
  from_client_column,
)
from fedjax_ext.data.partition import (
  apportion,
  dirichlet_partition,
  iid_partition,
)
from fedjax_ext.data.splits import (
  choose_clients,
  client_mask,
  stratified_mask,
)
from fedjax_ext.data.synthetic import synthetic_femnist

__all__ = [
  'PARTITIONS',
  'Columns',
  'FederatedData',
  'FederatedDataset',
  'apportion',
  'choose_clients',
  'client_mask',
  'dirichlet_partition',
  'fingerprint',
  'from_assignment',
  'from_client_column',
  'iid_partition',
  'load_columns',
  'load_digits',
  'make_columns',
  'make_dataset',
  'stratified_mask',
  'synthetic_femnist',
]
