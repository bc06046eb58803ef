"""Small problems of mixed federated learning that need no download.

Axis letters: C clients, M examples, D features.
"""

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.data.columns import Columns, make_columns


def synthetic_smile(
  *,
  num_features: int = 10,
  mean: float = 0.4,
  shift: float = 0.5,
  num_clients: int = 100,
  examples: int = 40,
  num_test_clients: int = 100,
  test_examples: int = 20,
  seed: int = 0,
) -> Columns:
  """Clients with positives only, negatives at the server: label imbalance.

  x = shift_i + y mean + N(0, I) with y = +1 or -1 and a shift_i ~ N(0, shift^2
  I) of each client. The client named 'server' holds as many negatives as all
  clients hold positives, made with fresh shifts. The test clients are others,
  with both classes.

  Args:
    num_features: D.
    mean: of each feature of a positive without the shift.
    shift: standard deviation of a client's shift.
    num_clients: C.
    examples: of each client.
    num_test_clients: clients to test on.
    test_examples: of each of these and of each class.
    seed: seed of everything.

  Returns:
    Columns with `x` float32 [M, D] and `label` 0 or 1.
  """
  for name, value in (
    ('num_features', num_features),
    ('num_clients', num_clients),
    ('examples', examples),
    ('num_test_clients', num_test_clients),
    ('test_examples', test_examples),
  ):
    validate.at_least(name, value, 1)
  rng = np.random.default_rng(seed)

  def draw(clients: int, each: int, label: int) -> np.ndarray:
    shifts = shift * rng.standard_normal((clients, 1, num_features))
    noise = rng.standard_normal((clients, each, num_features))
    x = shifts + (mean if label else -mean) + noise
    return x.reshape(-1, num_features)

  positives = draw(num_clients, examples, 1)
  negatives = draw(num_clients, examples, 0)
  # A test client's positives and negatives share its shift.
  shifts = shift * rng.standard_normal((num_test_clients, 1, num_features))
  noise = rng.standard_normal(
    (num_test_clients, 2 * test_examples, num_features)
  )
  test_label = np.tile(np.repeat([1, 0], test_examples), num_test_clients)
  test = (shifts + noise).reshape(-1, num_features)
  test += np.where(test_label, mean, -mean)[:, None]
  names = [f'client_{i:05d}' for i in range(num_clients)]
  tested = [f'test_{i:05d}' for i in range(num_test_clients)]
  client = np.concatenate(
    [
      np.repeat(names, examples),
      np.repeat('server', len(negatives)),
      np.repeat(tested, 2 * test_examples),
    ]
  )
  label = np.concatenate(
    [np.ones(len(positives)), np.zeros(len(negatives)), test_label]
  )
  split = np.zeros(len(label), np.int32)
  split[-len(test) :] = 1
  return make_columns(
    'synthetic_smile',
    {
      'x': np.concatenate([positives, negatives, test]).astype(np.float32),
      'label': label.astype(np.int32),
      'client': client,
      'split': split,
    },
    num_classes=2,
  )


def quadratic(
  *,
  curvatures: tuple[float, ...] = (1.0, 1.0),
  optima: tuple[float, ...] = (0.0, 4.0),
  examples: tuple[int, ...] = (1, 1),
  server_curvature: float = 2.0,
  server_optimum: float = -4.0,
  server_examples: int = 1,
  noise: float = 0.0,
  num_features: int = 1,
  seed: int = 0,
) -> Columns:
  """f_i = a_i/2 |x - b_i|^2 on clients and f_c = c/2 |x - d|^2 at the server.

  What theory is exact about. Client i is `examples[i]` equal examples, so that
  its local steps can be chosen.

  Args:
    curvatures: a_i of the clients.
    optima: b_i of the clients.
    examples: of the clients.
    server_curvature: c.
    server_optimum: d.
    server_examples: examples of the server.
    noise: standard deviation of a server example's gradient.
    num_features: D; the optima are the same in every coordinate.
    seed: of the noise.

  Returns:
    Columns with `curvature` float32 [M], `x` (the optimum) float32 [M, D] and
    `label` 0; the last client is named 'server'.
  """
  validate.check(
    len(curvatures) == len(optima) == len(examples) > 0,
    f'Expected as many curvatures as optima and examples, got {curvatures}, '
    f'{optima} and {examples}.',
  )
  for name, values in (
    ('curvatures', (*curvatures, server_curvature)),
    ('examples', (*examples, server_examples)),
  ):
    for value in values:
      validate.above(name, value, 0)
  rng = np.random.default_rng(seed)
  sizes = [*examples, server_examples]
  curvature = np.repeat([*curvatures, server_curvature], sizes)
  optimum = np.repeat([*optima, server_optimum], sizes)[:, None]
  x = np.tile(optimum, num_features).astype(np.float64)
  x[-server_examples:] -= (
    noise
    / server_curvature
    * rng.standard_normal((server_examples, num_features))
  )
  names = [f'client_{i:05d}' for i in range(len(examples))]
  return make_columns(
    'quadratic',
    {
      'x': x.astype(np.float32),
      'curvature': curvature.astype(np.float32),
      'label': np.zeros(len(x), np.int32),
      'client': np.repeat([*names, 'server'], sizes),
      'split': np.zeros(len(x), np.int32),
    },
    num_classes=1,
  )
