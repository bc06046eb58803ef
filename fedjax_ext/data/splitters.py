"""Datasets by name of what they report on, for --eval.

Each is `f(columns, *, partition, num_clients, skew, eval_clients, seed,
**settings) -> FederatedDataset`.
"""

import types
from collections.abc import Callable, Mapping

from fedjax_ext.data.datasets import FederatedDataset
from fedjax_ext.data.long_tail import long_tail
from fedjax_ext.data.three_way import three_way

SPLITTERS: Mapping[str, Callable[..., FederatedDataset]] = (
  types.MappingProxyType({'three_way': three_way, 'long_tail': long_tail})
)
