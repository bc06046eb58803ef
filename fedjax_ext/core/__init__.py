"""The engine: client programs, plans, reducers, states, evaluation."""

from fedjax_ext.core import validate
from fedjax_ext.core.algorithm import Adaptation, FederatedAlgorithm, Predictor
from fedjax_ext.core.client_states import ClientStates, make_client_states
from fedjax_ext.core.cohort import Cohort, make_cohort
from fedjax_ext.core.debug import ClientError
from fedjax_ext.core.engine import (
  RoundOutput,
  combine,
  for_each_client,
  per_client,
  summarize,
)
from fedjax_ext.core.evaluation import evaluate, make_evaluator
from fedjax_ext.core.features import Features, place_features
from fedjax_ext.core.generalization import (
  Gap,
  Generalization,
  evaluate_generalization,
  gap_metrics,
  generalization_gaps,
)
from fedjax_ext.core.layout import Layout, make_layout
from fedjax_ext.core.parts import (
  Part,
  PartReport,
  Report,
  examples_of,
  summarize_report,
)
from fedjax_ext.core.plans import (
  Phase,
  Plan,
  PlanSpec,
  SparseTable,
  plan_round,
)
from fedjax_ext.core.prefetch import prefetch
from fedjax_ext.core.programs import (
  Batch,
  Client,
  ClientOutput,
  ClientProgram,
  StepInfo,
  run_one,
)
from fedjax_ext.core.reducers import (
  Collected,
  Reducer,
  by_key,
  collect,
  finish,
  premap,
  total,
  weighted_mean,
)
from fedjax_ext.core.sampling import (
  Sampler,
  fixed_sampler,
  poisson_sampler,
  sample_cohort,
  uniform_sampler,
  weighted_sampler,
)
from fedjax_ext.core.sparse_rows import (
  sparse_weighted_mean,
  with_sparse_rows,
)
from fedjax_ext.core.validate import InvalidInput

__all__ = [
  'Adaptation',
  'Batch',
  'Client',
  'ClientError',
  'ClientOutput',
  'ClientProgram',
  'ClientStates',
  'Cohort',
  'Collected',
  'Features',
  'FederatedAlgorithm',
  'Gap',
  'Generalization',
  'InvalidInput',
  'Layout',
  'Part',
  'PartReport',
  'Phase',
  'Plan',
  'PlanSpec',
  'Predictor',
  'Reducer',
  'Report',
  'RoundOutput',
  'Sampler',
  'SparseTable',
  'StepInfo',
  'by_key',
  'collect',
  'combine',
  'evaluate',
  'evaluate_generalization',
  'examples_of',
  'finish',
  'fixed_sampler',
  'for_each_client',
  'gap_metrics',
  'generalization_gaps',
  'make_client_states',
  'make_cohort',
  'make_evaluator',
  'make_layout',
  'per_client',
  'place_features',
  'plan_round',
  'poisson_sampler',
  'prefetch',
  'premap',
  'run_one',
  'sample_cohort',
  'sparse_weighted_mean',
  'summarize',
  'summarize_report',
  'total',
  'uniform_sampler',
  'validate',
  'weighted_mean',
  'weighted_sampler',
  'with_sparse_rows',
]
