"""Defences at the server: rules that combine clients' updates.

Each is a `core.Reducer` of updates that are one pytree of deltas, for any
algorithm that averages. A builder's keyword `cohort_size`, where it has one, is
set by `--cohort_size`.
"""

from collections.abc import Callable

from fedjax_ext.core.reducers import Reducer
from fedjax_ext.defenses.coordinates import (
  median,
  robust_learning_rate,
  trimmed_mean,
)
from fedjax_ext.defenses.flame import flame
from fedjax_ext.defenses.fools_gold import fools_gold
from fedjax_ext.defenses.geometric_median import geometric_median
from fedjax_ext.defenses.krum import krum, multi_krum
from fedjax_ext.defenses.norm_clipping import norm_clipping

DEFENSES: dict[str, Callable[..., Reducer]] = {
  rule.__name__: rule
  for rule in (
    norm_clipping,
    krum,
    multi_krum,
    fools_gold,
    robust_learning_rate,
    median,
    trimmed_mean,
    geometric_median,
    flame,
  )
}

__all__ = ['DEFENSES', *DEFENSES]
