"""Ranking by popularity: what every recommender has to beat.

Items are ranked by how often they are a label in the participating clients'
train examples. Nothing is trained and no client differs from another.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_ext.core import Batch, FederatedAlgorithm, Predictor
from fedjax_ext.losses.ranking import rank_metrics


def popularity(
  labels: np.ndarray,
  *,
  num_items: int,
  label: str = 'label',
  pad_is_candidate: bool = False,
  pessimistic_ties: bool = False,
) -> FederatedAlgorithm:
  """Builds the ranking; the server state is the counts, float [V+1].

  Args:
    labels: items int [N] of all train examples, 1..V.
    num_items: V.
    label: name of the feature to predict.
    pad_is_candidate: see `ranking.ranks`.
    pessimistic_ties: see `ranking.ranks`.
  """
  counts = np.bincount(labels, minlength=num_items + 1).astype(np.float32)

  def metrics(state: jax.Array, batch: Batch) -> dict:
    right = batch.data[label].astype(jnp.int32)
    weight = batch.mask.astype(state.dtype)
    values = rank_metrics(
      jnp.ones((len(right), 1)),
      state[:, None],
      right,
      pad_is_candidate=pad_is_candidate,
      pessimistic_ties=pessimistic_ties,
    )
    return {n: (x, weight) for n, x in values.items()}

  return FederatedAlgorithm(
    init=lambda key: jnp.asarray(counts),
    apply=lambda state, client_states, cohort: (state, client_states, {}),
    plans={},
    predictors={'global': Predictor(metrics)},
  )
