"""Where the right item ranks among all items, and what follows from it.

Axis letters: B examples, N items (row 0 is padding), D features, K best items.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Scores of a chunk: memory is B times so many floats whatever N is.
CHUNK_ITEMS = 8192


def compare(
  contexts: jax.Array,
  items: jax.Array,
  labels: jax.Array,
  *,
  pad_is_candidate: bool = False,
  chunk_items: int = CHUNK_ITEMS,
) -> tuple[jax.Array, jax.Array]:
  """Other items that score higher than the label, and like it: int32 [B] each.

  Scores are dot products. A score that is not a number counts as higher, and a
  label's that is not finite as lower than all: a broken model ranks last.

  Args:
    contexts: [B, D].
    items: [N, D].
    labels: int [B].
    pad_is_candidate: whether row 0 competes, as in the paper's code.
    chunk_items: items scored at a time.
  """
  chunks = _chunks(items, chunk_items)
  score = lambda chunk: jnp.matmul(contexts, chunk.T, precision='highest')
  # The label's score comes from the same product as all others: equal items
  # score alike to the last bit.
  right = jnp.zeros((len(contexts), 1))
  for chunk, first in chunks:
    at = labels[:, None] - first
    here = (at >= 0) & (at < len(chunk))
    at = jnp.clip(at, 0, len(chunk) - 1)
    own = jnp.take_along_axis(score(chunk), at, axis=1)
    right = jnp.where(here, own, right)
  right = jnp.where(jnp.isfinite(right), right, jnp.nan)
  higher = tied = jnp.zeros(len(contexts), jnp.int32)
  for chunk, first in chunks:
    scores = score(chunk)
    numbers = first + jnp.arange(len(chunk))
    # The label itself never competes, whatever rounding says.
    others = numbers != labels[:, None]
    others &= pad_is_candidate | (numbers > 0)
    count = lambda x, others=others: (x & others).sum(-1, dtype=jnp.int32)
    higher += count(~(scores <= right))
    tied += count(scores == right)
  return higher, tied


def ranks(
  contexts: jax.Array,
  items: jax.Array,
  labels: jax.Array,
  *,
  pessimistic_ties: bool = False,
  **settings: Any,
) -> jax.Array:
  """Number of items that score higher than the label, int32 [B].

  Args:
    contexts: [B, D].
    items: [N, D].
    labels: int [B].
    pessimistic_ties: items that score like the label count as higher.
    **settings: of `compare`.
  """
  higher, tied = compare(contexts, items, labels, **settings)
  return higher + tied if pessimistic_ties else higher


def rank_metrics(
  contexts: jax.Array,
  items: jax.Array,
  labels: jax.Array,
  *,
  pessimistic_ties: bool = False,
  **settings: Any,
) -> dict[str, jax.Array]:
  """`ranking_metrics` of labels, and 'ties', how many others score alike.

  Args:
    contexts: [B, D].
    items: [N, D].
    labels: int [B].
    pessimistic_ties: items that score like the label count as higher.
    **settings: of `compare`.

  Returns:
    {name: [B]}.
  """
  higher, tied = compare(contexts, items, labels, **settings)
  values = ranking_metrics(higher + tied if pessimistic_ties else higher)
  return values | {'ties': tied.astype(values['mrr'].dtype)}


def _chunks(items: jax.Array, size: int) -> list[tuple[jax.Array, int]]:
  return [(items[i : i + size], i) for i in range(0, len(items), size)]


def top_items(
  contexts: jax.Array,
  items: jax.Array,
  *,
  k: int,
  pad_is_candidate: bool = False,
  chunk_items: int = CHUNK_ITEMS,
) -> tuple[jax.Array, jax.Array]:
  """The K items with the highest dot products: (scores, numbers) [B, K].

  `lax.top_k` chunk by chunk; of equal scores the lower number comes first.

  Args:
    contexts: [B, D].
    items: [N, D].
    k: K, at most the number of candidates.
    pad_is_candidate: whether row 0 may be returned.
    chunk_items: items scored at a time.
  """
  best = jnp.full((len(contexts), 0), -jnp.inf)
  numbers = jnp.zeros((len(contexts), 0), jnp.int32)
  for chunk, first in _chunks(items, chunk_items):
    scores = jnp.matmul(contexts, chunk.T, precision='highest')
    if first == 0 and not pad_is_candidate:
      scores = scores.at[:, 0].set(-jnp.inf)
    here = jnp.broadcast_to(first + jnp.arange(len(chunk)), scores.shape)
    best = jnp.concatenate([best.astype(scores.dtype), scores], -1)
    numbers = jnp.concatenate([numbers, here], -1)
    best, at = lax.top_k(best, min(k, best.shape[-1]))
    numbers = jnp.take_along_axis(numbers, at, -1)
  return best, numbers


def ranking_metrics(
  rank: jax.Array, *, at: tuple[int, ...] = (1, 5, 10), ndcg_at: int = 10
) -> dict[str, jax.Array]:
  """Metrics of examples with one right item each, by its rank from 0.

  recall_at_k = [rank < k]; mrr = 1 / (rank + 1); ndcg_at_k = [rank < k] /
  log2(rank + 2); rank itself, whose mean is the mean rank.

  Args:
    rank: int [B].
    at: the k of recall.
    ndcg_at: the k of ndcg.

  Returns:
    {name: [B]}.
  """
  rank = rank.astype(jnp.result_type(float))
  result = {f'recall_at_{k}': (rank < k).astype(rank.dtype) for k in at}
  gain = 1 / jnp.log2(rank + 2)
  return result | {
    'mrr': 1 / (rank + 1),
    f'ndcg_at_{ndcg_at}': jnp.where(rank < ndcg_at, gain, 0),
    'rank': rank,
  }
