"""Time and memory of a semantic partition.

  python -m benchmarks.semantic_partition [--data_dir=DIR]

With --data_dir the CIFAR-10 images of `experiments.participation_gap`, else
random ones of that shape.
"""

import argparse
import json
import logging
import resource
import time

import numpy as np

from experiments.participation_gap.sources import cifar10_parts
from fedjax_ext.data import semantic_partition


def main() -> None:
  """Prints one line of JSON."""
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.semantic_partition'
  )
  parser.add_argument('--data_dir', default='')
  parser.add_argument('--images', type=int, default=15_000)
  parser.add_argument('--clients', type=int, default=300)
  parser.add_argument('--components', type=int, default=32)
  given = parser.parse_args()
  logging.basicConfig(level=logging.INFO, format='%(message)s')
  if given.data_dir:
    features = cifar10_parts(data_dir=given.data_dir).features
    image = features['image'][: given.images]
    label = features['label'][: given.images]
  else:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (given.images, 32, 32, 3), np.uint8)
    label = rng.integers(0, 10, given.images)
  begun = time.perf_counter()
  owner = semantic_partition(
    label,
    num_clients=given.clients,
    components=given.components,
    features={'image': image},
    seed=0,
  )
  seconds = time.perf_counter() - begun
  sizes = np.bincount(owner, minlength=given.clients)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  said = {
    'images': len(image),
    'in one client each': int(sizes.sum()),
    'clients': given.clients,
    'empty clients': int((sizes == 0).sum()),
    'smallest': int(sizes.min()),
    'largest': int(sizes.max()),
    'seconds': round(seconds, 1),
    'peak resident MiB': round(peak),
  }
  print(json.dumps(said))


if __name__ == '__main__':
  main()
