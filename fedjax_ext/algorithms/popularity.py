"""Ranking by popularity: what every recommender has to beat.

Items are ranked by how often they are a label in the participating clients'
train examples. Nothing is trained and no client differs from another.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_ext.core import Batch, FederatedAlgorithm, Predictor
from fedjax_ext.losses.ranking import ranking_metrics, ranks


def popularity(
  labels: np.ndarray, *, num_items: int, label: str = 'label'
) -> FederatedAlgorithm:
  """Builds the ranking; the server state is the counts, float [V+1].

  Items that are equally popular count as higher than the label.

  Args:
    labels: items int [N] of all train examples, 1..V.
    num_items: V.
    label: name of the feature to predict.
  """
  counts = np.bincount(labels, minlength=num_items + 1).astype(np.float32)

  def metrics(state: jax.Array, batch: Batch) -> dict:
    right = batch.data[label].astype(jnp.int32)
    weight = batch.mask.astype(state.dtype)
    rank = ranks(
      jnp.ones((len(right), 1)), state[:, None], right, pessimistic_ties=True
    )
    return {n: (x, weight) for n, x in ranking_metrics(rank).items()}

  return FederatedAlgorithm(
    init=lambda key: jnp.asarray(counts),
    apply=lambda state, client_states, cohort: (state, client_states, {}),
    plans={},
    predictors={'global': Predictor(metrics)},
  )
