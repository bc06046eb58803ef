"""Draws which mode of mixed FL is better when, on quadratics and on MNIST.

  python -m launchers.table --paper=mixed_fl --table=orderings --preset=small
  python -m tools.mixed_fl_orderings

The quadratics are run here, exactly; MNIST curves come from the table's runs.
Writes orderings.png and orderings.json to --results; every panel's title says
what theory predicts and whether it holds there.
"""

import argparse
import json
import pathlib

import jax
import numpy as np
import optax

from fedjax_ext import core, data
from fedjax_ext.algorithms import ServerLoss, mixed_fl
from fedjax_ext.losses import quadratic_task
from fedjax_ext.training.writers import write_atomically
from launchers import claims

MODES = {
  'PT': ('parallel_training', None),
  '1W': ('one_way', None),
  '1W, one batch': ('one_way', 1),
  '2W': ('two_way', None),
}
ROWS = {
  'PT': 'parallel_training',
  '1W': '1_way_gradient_transfer',
  '1W, one batch': '1_way_one_central_batch',
  '2W': '2_way_gradient_transfer',
}
# Problem A of the specification with K local steps; f_c noisy, sharp, alike.
QUADRATICS = {
  'plain': dict(problem={}, steps=5, rate=0.1),
  '(a)': dict(
    problem=dict(noise=4.0, server_examples=256, num_features=64),
    steps=8,
    rate=0.03,
  ),
  '(b)': dict(problem=dict(server_curvature=20.0), steps=10, rate=0.05),
  '(c)': dict(problem=dict(server_optimum=2.0), steps=5, rate=0.1),
}
DATASETS = {
  'plain': 'plain',
  '(a)': 'a_central_batch_of_4',
  '(b)': 'b_f_c_times_10_k_10',
  '(c)': 'c_server_data_like_clients',
}
PREDICTIONS = {
  'plain': 'PT is biased (divided optima), 1W and 2W are not',
  '(a)': 'one noisy central batch, used K times: 1W noisier than PT',
  '(b)': 'f_c times 10, K = 10: 1W unstable, PT stable',
  '(c)': 'one distribution: PT has no bias either, all end alike',
}
# (kind, better, worse) on MNIST, as in experiments/mixed_fl/orderings.toml.
MNIST_CLAIMS = {
  'plain': [('better', '1W', 'PT'), ('better', '2W', 'PT')],
  '(a)': [('better', 'PT', '1W, one batch')],
  '(b)': [('better', 'PT', '1W')],
  '(c)': [('equal', 'PT', '1W'), ('equal', 'PT', '2W')],
}
ROUNDS = 80


def quadratic_curves(
  *, problem: dict, steps: int, rate: float
) -> dict[str, list[float]]:
  """Root mean square distance to the optimum after each round, by mode."""
  columns = data.quadratic(**problem)
  dataset = data.make_dataset(columns, test_fraction=0.0)
  chosen = data.SERVER_DATA['client'](dataset)
  dataset, server = data.split_off_server(dataset, chosen)
  layout = core.make_layout(num_devices=1)
  features = core.place_features(dataset.features, layout)
  task = quadratic_task(columns.features['x'].shape[1])
  best = optimum(columns.features, columns.client == 'server')
  curves = {}
  for name, (mode, server_steps) in MODES.items():
    algorithm = mixed_fl(
      task,
      mode=mode,
      server=ServerLoss(
        task.loss,
        optax.sgd(rate),
        server_steps or steps,
        client=server,
        batch_size=1,
      ),
      client_optimizer=optax.sgd(rate),
      server_optimizer=optax.sgd(1.0),
      layout=layout,
      phase=core.Phase(epochs=steps, batch_size=1),
    )
    state = algorithm.init(jax.random.key(0))
    curves[name] = []
    for round in range(1, ROUNDS + 1):
      cohort = core.make_cohort(
        dataset.participating,
        round=round,
        seed=1,
        specs=algorithm.plans,
        data=dataset.splits,
        features=features,
        layout=layout,
      )
      state, _, _ = algorithm.apply(state, None, cohort)
      error = np.asarray(state.params['w'], np.float64) - best
      distance = float(np.sqrt(np.mean(np.square(error))))
      curves[name].append(distance if np.isfinite(distance) else 1e30)
  return curves


def optimum(features: dict[str, np.ndarray], at_server: np.ndarray):
  """The minimum [D] of f_f + f_c, with the server's examples as drawn."""
  weight = features['curvature'].astype(np.float64)
  weight /= np.where(at_server, at_server.sum(), (~at_server).sum())
  x = features['x'].astype(np.float64)
  return (weight[:, None] * x).sum(0) / weight.sum()


def mnist_runs(folder: pathlib.Path) -> dict[str, list[dict[int, float]]]:
  """{mode: [{round: test accuracy in %} for each seed]} of a table's runs."""
  found = {}
  for name, row in ROWS.items():
    runs = []
    for path in sorted((folder / row).glob('seed_*/metrics.jsonl')):
      rows = [json.loads(line) for line in path.read_text().splitlines()]
      key = 'test/accuracy/pooled'
      runs.append(
        {r['round']: 100 * r[key] for r in rows if r.get(key) is not None}
      )
    if runs:
      found[name] = runs
  return found


def judge_mnist(case: str, runs: dict[str, list[dict[int, float]]]) -> str:
  """'holds', 'fails' or 'undecided', as the table judges its claims."""
  last = {name: [run[max(run)] for run in each] for name, each in runs.items()}
  outcomes = []
  for kind, better, worse in MNIST_CLAIMS[case]:
    gains = [a - b for a, b in zip(last[better], last[worse], strict=True)]
    interval = claims.t_interval(gains)
    outcomes.append(claims.outcome(interval, margin=1.0, kind=kind))
  for outcome in ('fails', 'undecided'):
    if outcome in outcomes:
      return outcome
  return 'holds'


def holds(case: str, last: dict[str, float]) -> bool:
  """Whether a prediction holds for the last distances to the optimum."""
  small = 1e-3
  if case == 'plain':
    return last['PT'] > max(last['1W'], last['2W']) + small
  if case == '(a)':
    return last['1W, one batch'] > last['PT'] + small
  if case == '(b)':
    return last['1W'] > last['PT'] + small
  return max(last.values()) - min(last.values()) <= small


def main() -> None:
  """Runs, draws, writes."""
  parser = argparse.ArgumentParser(prog='python -m tools.mixed_fl_orderings')
  parser.add_argument(
    '--results', default='results/mixed_fl/orderings/small', help='the table'
  )
  given = parser.parse_args()
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  folder = pathlib.Path(given.results)
  folder.mkdir(parents=True, exist_ok=True)
  figure, axes = pyplot.subplots(2, 4, figsize=(18, 8), layout='constrained')
  said = {}
  for column, case in enumerate(QUADRATICS):
    curves = quadratic_curves(**QUADRATICS[case])
    last = {n: float(np.mean(y[-20:])) for n, y in curves.items()}
    verdict = holds(case, last)
    said[f'quadratics {case}'] = {'last': last, 'holds': bool(verdict)}
    axis = axes[0, column]
    for name, values in curves.items():
      axis.semilogy(
        range(1, ROUNDS + 1), np.clip(values, 1e-8, 1e6), label=name
      )
    axis.set_title(
      f'quadratics {case}\n{PREDICTIONS[case]}: '
      f'{"holds" if verdict else "does not hold"}',
      fontsize=9,
    )
    axis.set_ylabel('distance to the optimum')
    axis = axes[1, column]
    runs = mnist_runs(folder / 'runs' / DATASETS[case])
    for name, each in runs.items():
      rounds = sorted(each[0])
      means = [float(np.mean([run[r] for run in each])) for r in rounds]
      axis.plot(rounds, means, label=name)
    title = f'MNIST by writer {case}'
    if len(runs) == len(ROWS) and MNIST_CLAIMS[case]:
      outcome = judge_mnist(case, runs)
      said[f'MNIST {case}'] = {
        'last': {n: [r[max(r)] for r in each] for n, each in runs.items()},
        'outcome': outcome,
      }
      title += f'\n{PREDICTIONS[case]}: {outcome}'
    axis.set_title(title, fontsize=9)
    axis.set_ylabel('accuracy on unseen writers, %')
    axis.set_xlabel('round')
  axes[0, 0].legend()
  figure.savefig(folder / 'orderings.png', dpi=110)
  write_atomically(folder / 'orderings.json', json.dumps(said, indent=2) + '\n')
  print(json.dumps(said, indent=2))


if __name__ == '__main__':
  main()
