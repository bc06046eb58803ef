"""Rounds of mixed FL on MovieLens-1M, against plain FedAvg of the same model.

  python -m benchmarks.mixed_rounds --data_dir=DIR

100 users, batch 16, at most 300 examples each, hinge loss; the server's loss is
the spreadout of the item table. Contestants take turns on the same cohorts,
planned before the clock starts, as the training loop's thread does it; medians
of their rounds are compared within one process.

  fed_avg           hinge alone, whole table on clients
  fed_avg_sparse    the same, clients hold the items that they name
  one_way           the server's gradient rides along (whole table)
  parallel          the server steps beside sparse clients
  client_side       clients evaluate the spreadout at every step, D x D form
  client_side_sparse  the same for their own rows; other rows count as constant
  client_side_pairs  V x V form (--pairs=1; one round takes a minute)
"""

import argparse
import json
import statistics
import time


def main() -> None:
  """Prints one line of JSON."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.mixed_rounds')
  parser.add_argument('--data_dir', required=True)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--pairs', type=int, default=0, help='rounds of V x V')
  given = parser.parse_args()

  from benchmarks.contestants import use_one_device_per_core

  use_one_device_per_core()
  import jax
  import optax

  from fedjax_ext import core, data
  from fedjax_ext.algorithms import ServerLoss, fed_avg, mixed_fl
  from fedjax_ext.losses import (
    RetrievalLoss,
    Spreadout,
    item_table,
    retrieval_task,
    table_regulariser,
  )
  from fedjax_ext.models import dual_encoder

  columns = data.movielens(data_dir=given.data_dir, num_users=6040)
  dataset = data.make_dataset(columns)
  layout = core.make_layout()
  features = core.place_features(dataset.features, layout)
  encoder = dual_encoder(num_classes=columns.num_classes, input_shape=(10,))
  task = retrieval_task(encoder, RetrievalLoss('hinge'))
  weight = 0.01
  common = dict(
    client_optimizer=optax.sgd(0.3),
    server_optimizer=optax.adam(0.01),
    layout=layout,
    phase=core.Phase(batch_size=16, max_examples=300),
  )
  tables = (item_table(encoder),)
  server = ServerLoss(
    lambda params, batch: table_regulariser(params['items'], spreadout=weight),
    optax.sgd(0.3),
    steps=8,
  )
  mixed = dict(common, server=server)

  def with_spreadout(form: str) -> core.FederatedAlgorithm:
    loss = RetrievalLoss(
      'hinge', spreadout=Spreadout(table=weight), table_form=form
    )
    return fed_avg(retrieval_task(encoder, loss), **common)

  contestants = {
    'fed_avg': fed_avg(task, **common),
    'fed_avg_sparse': fed_avg(task, tables=tables, **common),
    'one_way': mixed_fl(task, mode='one_way', **mixed),
    'parallel': mixed_fl(
      task, mode='parallel_training', tables=tables, **mixed
    ),
    'client_side': with_spreadout('gram'),
    'client_side_sparse': sparse_client_side(task, weight, tables, common),
  }
  if given.pairs:
    contestants['client_side_pairs'] = with_spreadout('pairs')

  sampler = core.uniform_sampler(dataset.participating, cohort_size=100)
  states = {n: a.init(jax.random.key(0)) for n, a in contestants.items()}
  seconds: dict[str, list[float]] = {name: [] for name in contestants}
  for number in range(1, given.rounds + 3):  # the first two compile
    clients = core.sample_cohort(sampler, 0, number)
    # Whoever follows a long round finds cold caches: the order rotates.
    first = number % len(contestants)
    names = [*contestants][first:] + [*contestants][:first]
    for name in names:
      algorithm = contestants[name]
      if name == 'client_side_pairs' and number > given.pairs:
        continue
      cohort = core.make_cohort(
        clients,
        round=number,
        seed=0,
        specs=algorithm.plans,
        data=dataset.splits,
        features=features,
        layout=layout,
      )
      for plan in algorithm.plans:
        cohort.prepare(plan)
      begun = time.perf_counter()
      states[name], _, _ = algorithm.apply(states[name], None, cohort)
      jax.block_until_ready(states[name])
      seconds[name].append(time.perf_counter() - begun)
  medians = {
    name: statistics.median(times[2:] or times[-1:])
    for name, times in seconds.items()
  }
  result = {name: round(x, 4) for name, x in medians.items()}
  for a, b in (
    ('one_way', 'fed_avg'),
    ('parallel', 'fed_avg_sparse'),
    ('one_way', 'client_side'),
    ('parallel', 'client_side'),
    ('parallel', 'client_side_sparse'),
  ):
    result[f'{a} / {b}'] = round(medians[a] / medians[b], 3)
  if given.pairs:
    result['parallel / client_side_pairs'] = round(
      medians['parallel'] / medians['client_side_pairs'], 5
    )
  print(json.dumps(result))


def sparse_client_side(task, weight, tables, common):
  """Clients that spread their own rows out, with all other rows constant.

  The server sends X'X of the unit rows, D x D numbers; a client takes its own
  rows' part out of it and puts the present one in at each step.
  """
  import jax
  import jax.numpy as jnp

  from fedjax_ext import core
  from fedjax_ext.algorithms import local_sgd
  from fedjax_ext.algorithms.fed_avg import ServerState, server_step
  from fedjax_ext.losses.retrieval import normalise_rows

  def gram(table: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = normalise_rows(table)
    return rows.T @ rows, jnp.square(jnp.square(rows).sum(-1)).sum()

  def begin(shared, client, key):
    del client, key
    params, (whole, quartic) = shared
    own, own_quartic = gram(params['items'])
    return params, (whole - own, quartic - own_quartic)

  def penalty(params, rest):
    own, own_quartic = gram(params['items'])
    square = jnp.square(rest[0] + own).sum() - rest[1] - own_quartic
    return weight * jnp.sqrt(jnp.maximum(square, 1e-12))

  def end(shared, client, state):
    delta = jax.tree.map(jnp.subtract, state.params, shared[0])
    return core.ClientOutput(delta, client.num_examples)

  program = local_sgd(
    task.loss,
    common['client_optimizer'],
    begin=begin,
    penalty=penalty,
    end=end,
  )
  reducer = core.sparse_weighted_mean(tables)
  run = core.for_each_client(
    core.with_sparse_rows(program, tables), reducer, layout=common['layout']
  )
  send = jax.jit(lambda params: (params, gram(params['items'])))
  optimizer = common['server_optimizer']

  def init(key):
    params = task.init(key)
    return ServerState(params, optimizer.init(params))

  @jax.jit
  def update(state, output):
    return server_step(optimizer, state, core.finish(reducer, output)[0])

  def apply(state, client_states, cohort):
    inputs = (cohort.touched('train'), ())
    output, _ = run(send(state.params), cohort, 'train', inputs=inputs)
    return update(state, output), client_states, core.summarize(output)

  plans = {'train': core.PlanSpec((common['phase'],), tables)}
  return core.FederatedAlgorithm(init, apply, plans, {})


if __name__ == '__main__':
  main()
