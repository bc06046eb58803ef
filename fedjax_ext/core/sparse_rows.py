"""Clients that train only the rows of a large table which they touch.

A recommender's or a language model's embedding table has V rows, of which one
client's examples name a few. `with_sparse_rows` gives a client program just
those: it gathers them, renumbers the features that name them, trains them and
returns their change; `sparse_weighted_mean` adds it to the rows of the whole
table. Time and memory of a client then follow R, not V.

The result is that of the dense program as long as a row whose gradient is zero
throughout is left alone: any optax optimizer without weight decay, and no
penalty on the whole table.

Axis letters: K clients of the cohort, V rows of a table, R rows that a client
touches (padded), D features of a row.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_ext.core import reducers, validate
from fedjax_ext.core.layout import bucket
from fedjax_ext.core.memory_maps import read_rows
from fedjax_ext.core.plans import ClientRows, SparseTable, ramp, rows_of
from fedjax_ext.core.programs import Batch, Client, ClientProgram
from fedjax_ext.core.reducers import Reducer

PyTree = Any
# Where a client has fewer than R rows: sorts behind all, and is out of range.
NO_ROW = np.iinfo(np.int32).max


def touched_rows(
  tables: tuple[SparseTable, ...],
  splits: Mapping[str, ClientRows],
  columns: Mapping[str, Any],
  clients: np.ndarray,
) -> dict[str, np.ndarray]:
  """Which rows each client's examples name, on the host.

  Args:
    tables: the tables.
    splits: the splits that clients train on, by name.
    columns: {name: [M, ...]} on the host or on disk.
    clients: client numbers int64 [K].

  Returns:
    {path: int32 [K, R]}, ascending, NO_ROW behind; R is bucketed.

  Raises:
    InvalidInput: a feature is missing or names a row that a table lacks.
  """
  result = {}
  examples = [rows_of(data, clients) for data in splits.values()]
  for table in tables:
    always = np.array(table.always, np.int64)
    parts = [(np.arange(len(clients))[:, None] << 32 | always).reshape(-1)]
    for rows, owner in examples:
      for feature in table.features:
        validate.one_of('feature of a sparse table', feature, list(columns))
        values = read_rows(columns[feature], rows).reshape(len(rows), -1)
        low, high = values.min(initial=0), values.max(initial=0)
        validate.check(
          low >= 0 and high < table.num_rows,
          f'Expected {feature!r} to name rows 0..{table.num_rows - 1} of '
          f'{table.path}, got {low}..{high}.',
        )
        values = values.astype(np.int64)
        parts.append((owner[:, None] << 32 | values).reshape(-1))
    pairs = np.unique(np.concatenate(parts))
    owner, named = pairs >> 32, pairs & (2**32 - 1)
    counts = np.bincount(owner, minlength=len(clients))
    most = bucket(int(counts.max(initial=1)))
    rows = np.full((len(clients), most), NO_ROW, np.int32)
    rows[owner, ramp(counts)] = named
    result[table.path] = rows
  return result


def with_sparse_rows(
  program: ClientProgram, tables: tuple[SparseTable, ...]
) -> ClientProgram:
  """The same program on the rows that a client touches.

  Its `client.inputs` is (rows of `touched_rows` {path: int32 [R]}, the inputs
  of the program it wraps). Its update is {'update': the wrapped one with leaves
  [R, ...] for tables, 'rows': {path: int32 [R]}}.

  Args:
    program: written for the whole table. Whatever leaf of `shared` ends with a
      table's path is handed to it as [R, ...].
    tables: the tables.
  """

  # A feature carries one numbering: its tables must be touched alike.
  for a in tables:
    for b in tables:
      validate.check(
        set(a.features) == set(b.features)
        or not set(a.features) & set(b.features),
        f'Expected tables that share a feature to have the same features, got '
        f'{a.features} of {a.path} and {b.features} of {b.path}.',
      )

  def small(shared: PyTree, rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The tables' leaves, by their whole path, with the client's rows only."""
    kept, found = {}, set()
    leaves = jax.tree_util.tree_leaves_with_path(shared)
    for path, leaf in leaves:
      table = _table_at(path, tables)
      if table is None:
        continue
      validate.check(
        leaf.shape[0] == table.num_rows,
        f'Expected {table.num_rows} rows at {table.path}, got '
        f'{list(leaf.shape)}.',
      )
      found.add(table.path)
      # Padding reads zeros: they take no part in anything.
      kept[jax.tree_util.keystr(path)] = leaf.at[rows[table.path]].get(
        mode='fill', fill_value=0
      )
    for table in tables:
      validate.check(
        table.path in found,
        f'Expected a leaf of the model whose path ends with {table.path}, got '
        f'{[jax.tree_util.keystr(path) for path, _ in leaves]}.',
      )
    return kept

  def put(shared: PyTree, kept: dict[str, jax.Array]) -> PyTree:
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: kept.get(jax.tree_util.keystr(path), leaf), shared
    )

  def split(client: Client) -> tuple[dict[str, jax.Array], Client]:
    rows, inputs = client.inputs
    return rows, client._replace(inputs=inputs)

  def init(shared, client, key):
    rows, client = split(client)
    kept = small(shared, rows)
    return rows, kept, program.init(put(shared, kept), client, key)

  def step(shared, state, batch):
    rows, kept, inner = state
    data = dict(batch.data)
    for table in tables:
      for name in table.features:
        local = jnp.searchsorted(rows[table.path], batch.data[name])
        data[name] = local.astype(batch.data[name].dtype)
    batch = Batch(data, batch.mask, batch.info)
    return rows, kept, program.step(put(shared, kept), inner, batch)

  def final(shared, client, state):
    rows, kept, inner = state
    _, client = split(client)
    output = program.final(put(shared, kept), client, inner)
    return output._replace(update={'update': output.update, 'rows': rows})

  return ClientProgram(init, step, final)


def sparse_weighted_mean(tables: tuple[SparseTable, ...]) -> Reducer:
  """`weighted_mean` of updates by `with_sparse_rows`: whole tables [V, ...].

  sum(weight * update) / sum(weight), where a client that did not touch a row
  counts with a zero for it. Each device keeps one accumulator.
  """
  mean = reducers.weighted_mean()

  def init(template, num_slots):
    def whole(path, leaf):
      table = _table_at(path, tables)
      if table is None:
        return leaf
      shape = (table.num_rows, *leaf.shape[1:])
      return jax.ShapeDtypeStruct(shape, leaf.dtype)

    update = jax.tree_util.tree_map_with_path(whole, template['update'])
    return mean.init(update, num_slots)

  def add(acc, update, weight, slot):
    del slot
    summed, weights = acc

    def fold(path, leaf, change):
      change = jnp.where(weight == 0, 0, weight * change).astype(leaf.dtype)
      table = _table_at(path, tables)
      if table is None:
        return leaf + change
      # NO_ROW is out of range: its zeros are dropped.
      return leaf.at[update['rows'][table.path]].add(change, mode='drop')

    summed = jax.tree_util.tree_map_with_path(fold, summed, update['update'])
    return summed, weights + weight

  return mean._replace(init=init, add=add)


def _table_at(
  path: tuple[Any, ...], tables: tuple[SparseTable, ...]
) -> SparseTable | None:
  """The table that the leaf at a path belongs to, if any."""
  name = jax.tree_util.keystr(path, simple=True, separator='/')
  ends = (t for t in tables if f'/{name}'.endswith(f'/{t.path}'))
  return next(ends, None)
