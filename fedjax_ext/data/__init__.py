"""Federated data: columns, clients, partitioners, splits, sources."""

from fedjax_ext.data.columns import (
  Columns,
  StoredClients,
  fingerprint,
  load_columns,
  make_columns,
  store_clients,
)
from fedjax_ext.data.controls import (
  first_examples,
  pool_clients,
  shuffle_across_clients,
)
from fedjax_ext.data.convert import write_columns
from fedjax_ext.data.datasets import (
  FederatedDataset,
  fingerprint_splits,
  make_dataset,
)
from fedjax_ext.data.digits import load_digits
from fedjax_ext.data.embeddings import (
  EMBEDDINGS,
  Embedding,
  embed,
  principal_components,
)
from fedjax_ext.data.federated_data import (
  FederatedData,
  SegmentRows,
  from_assignment,
  from_client_column,
  from_segments,
)
from fedjax_ext.data.fedjax_data import from_fedjax
from fedjax_ext.data.lazy import (
  LazyColumn,
  Reader,
  RecordType,
  client_reader,
  lazy_columns,
  map_records,
)
from fedjax_ext.data.long_tail import long_tail
from fedjax_ext.data.mixed import quadratic, synthetic_smile
from fedjax_ext.data.partition import (
  PARTITIONERS,
  Partitioner,
  apportion,
  class_counts,
  classes_partition,
  coarse_fine_dirichlet_partition,
  count_classes,
  dirichlet_client_partition,
  dirichlet_partition,
  iid_partition,
  multinomial_dirichlet_partition,
  quantity_partition,
  shards_partition,
)
from fedjax_ext.data.preprocess import PREPROCESS, Preprocess, chain
from fedjax_ext.data.records import (
  load_array_record,
  load_tfds,
  write_array_record,
)
from fedjax_ext.data.retrieval import (
  movielens,
  synthetic_retrieval,
  timeline_examples,
)
from fedjax_ext.data.semantic import (
  Gaussians,
  kl_divergences,
  match_clusters,
  semantic_partition,
)
from fedjax_ext.data.server import (
  SERVER_DATA,
  add_server_data,
  server_features,
  split_off_server,
)
from fedjax_ext.data.skew import (
  SKEWS,
  Skew,
  noise_skew,
  rotate_skew,
  skew_groups,
)
from fedjax_ext.data.sources import SOURCES, Source, load_npz
from fedjax_ext.data.splits import (
  choose_clients,
  client_mask,
  stratified_mask,
)
from fedjax_ext.data.splitters import SPLITTERS
from fedjax_ext.data.sqlite import load_sqlite, read_clients, write_sqlite
from fedjax_ext.data.synthetic import synthetic_femnist, synthetic_styles
from fedjax_ext.data.text import read_jsonl, text_columns
from fedjax_ext.data.three_way import check_disjoint, three_way

__all__ = [
  'EMBEDDINGS',
  'PARTITIONERS',
  'PREPROCESS',
  'SERVER_DATA',
  'SKEWS',
  'SOURCES',
  'SPLITTERS',
  'Columns',
  'Embedding',
  'FederatedData',
  'FederatedDataset',
  'Gaussians',
  'LazyColumn',
  'Partitioner',
  'Preprocess',
  'Reader',
  'RecordType',
  'SegmentRows',
  'Skew',
  'Source',
  'StoredClients',
  'add_server_data',
  'apportion',
  'chain',
  'check_disjoint',
  'choose_clients',
  'class_counts',
  'classes_partition',
  'client_mask',
  'client_reader',
  'coarse_fine_dirichlet_partition',
  'count_classes',
  'dirichlet_client_partition',
  'dirichlet_partition',
  'embed',
  'fingerprint',
  'fingerprint_splits',
  'first_examples',
  'from_assignment',
  'from_client_column',
  'from_fedjax',
  'from_segments',
  'iid_partition',
  'kl_divergences',
  'lazy_columns',
  'load_array_record',
  'load_columns',
  'load_digits',
  'load_npz',
  'load_sqlite',
  'load_tfds',
  'long_tail',
  'make_columns',
  'make_dataset',
  'map_records',
  'match_clusters',
  'movielens',
  'multinomial_dirichlet_partition',
  'noise_skew',
  'pool_clients',
  'principal_components',
  'quadratic',
  'quantity_partition',
  'read_clients',
  'read_jsonl',
  'rotate_skew',
  'semantic_partition',
  'server_features',
  'shards_partition',
  'shuffle_across_clients',
  'skew_groups',
  'split_off_server',
  'store_clients',
  'stratified_mask',
  'synthetic_femnist',
  'synthetic_retrieval',
  'synthetic_smile',
  'synthetic_styles',
  'text_columns',
  'three_way',
  'timeline_examples',
  'write_array_record',
  'write_columns',
  'write_sqlite',
]
