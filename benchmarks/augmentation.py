"""Cost of augmenting uint8 images in the step, against ready-made floats.

  python -m benchmarks.augmentation --model=group_norm_cnn

Two data sets of random 32x32x3 images on one client: uint8 with crop, flip and
per-image standardisation inside the compiled step, and float32 standardised
before. Rounds alternate (A B A B) in one process; the ratio is the median over
pairs. Bytes are those of the image column on the device.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np
import optax

from fedjax_ext import core, data
from fedjax_ext.algorithms import fed_avg
from fedjax_ext.losses import classification_task
from fedjax_ext.models import make_model


def make_round(
  image: np.ndarray,
  preprocess: data.Preprocess | None,
  given: argparse.Namespace,
):
  """A function that runs one round and returns its seconds; bytes placed."""
  layout = core.make_layout(num_devices=1)
  label = np.random.default_rng(1).integers(0, 10, len(image)).astype(np.int32)
  owner = np.zeros(len(image), np.int64)
  federated = data.from_assignment(
    {'image': image, 'label': label}, owner, client_ids=np.array(['0'])
  )
  model = make_model(given.model, input_shape=(32, 32, 3), num_classes=10)
  algorithm = fed_avg(
    classification_task(model, preprocess=preprocess),
    client_optimizer=optax.sgd(0.05),
    server_optimizer=optax.sgd(1.0),
    layout=layout,
    phase=core.Phase(steps=given.steps, batch_size=given.batch_size),
  )
  features = core.place_features(federated.features, layout)
  state = algorithm.init(jax.random.key(0))

  def run(round: int) -> float:
    cohort = core.make_cohort(
      np.array([0]),
      round=round,
      seed=0,
      specs=algorithm.plans,
      data={'train': federated},
      features=features,
      layout=layout,
    )
    cohort.prepare('train')
    begun = time.perf_counter()
    jax.block_until_ready(algorithm.apply(state, None, cohort)[0])
    return time.perf_counter() - begun

  return run, features.placed['image'].nbytes


def main() -> None:
  """Prints one line of JSON."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.augmentation')
  parser.add_argument('--model', default='group_norm_cnn')
  parser.add_argument('--steps', type=int, default=40, help='in a round')
  parser.add_argument('--batch_size', type=int, default=20)
  parser.add_argument('--pairs', type=int, default=9, help='of timed rounds')
  given = parser.parse_args()
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (2000, 32, 32, 3), dtype=np.uint8)
  in_step = data.chain(
    data.PREPROCESS['random_crop'](),
    data.PREPROCESS['random_flip'](),
    data.PREPROCESS['standardise'](),
  )
  standardise = data.PREPROCESS['standardise']()
  floats = np.asarray(standardise(None, pixels.astype(np.float32)))
  augmented, few = make_round(pixels, in_step, given)
  ready, many = make_round(floats, None, given)
  augmented(0), ready(0)  # compiles
  pairs = [(augmented(i), ready(i)) for i in range(1, given.pairs + 1)]
  a, b = (statistics.median(times) for times in zip(*pairs, strict=True))
  print(
    json.dumps(
      {
        'model': given.model,
        'augmented_ms_per_step': round(1e3 * a / given.steps, 3),
        'ready_ms_per_step': round(1e3 * b / given.steps, 3),
        'ratio': round(statistics.median(x / y for x, y in pairs), 3),
        'image_bytes_ratio': few / many,
        'jax': jax.__version__,
        'device': jax.devices()[0].device_kind,
      }
    )
  )


if __name__ == '__main__':
  main()
