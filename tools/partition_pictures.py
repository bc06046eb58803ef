"""Draws one picture for each partitioner and feature skew, on small digits.

Usage:
  python -m tools.partition_pictures docs/partitions

writes NAME.png for every name in `PARTITIONERS` and `SKEWS`, as shown in
docs/partitions.md.
"""

import argparse
import inspect
import pathlib
import sys
from collections.abc import Mapping

import numpy as np

from fedjax_ext.data.digits import load_digits
from fedjax_ext.data.partition import (
  PARTITIONERS,
  class_counts,
  iid_partition,
)
from fedjax_ext.data.skew import SKEWS
from fedjax_ext.training.plots import plot_partition

NUM_CLIENTS = 20
SHOWN_CLASS = 7  # A digit that one can tell from itself turned.
SETTINGS: Mapping[str, Mapping[str, float | str]] = {
  'iid': {},
  'dirichlet': {'alpha': 0.3},
  'dirichlet_client': {'alpha': 0.3},
  'shards': {'shards_per_client': 2},
  'quantity': {'alpha': 1.0},
  'classes': {'classes_per_client': 3},
  'multinomial_dirichlet': {'alpha': 0.3},
  'coarse_fine_dirichlet': {'coarse_alpha': 1, 'fine_alpha': 10},
  'semantic': {'components': 8, 'covariance': 'diag'},
  'rotate': {'num_groups': 4},
  'noise': {'level': 0.8},
}


def flag(kind: str, name: str, settings: Mapping[str, float | str]) -> str:
  """The command-line flag that asks for a partition or a skew."""
  text = ','.join(f'{key}={value}' for key, value in settings.items())
  return f'--data_{kind}={name}' + (f':{text}' if text else '')


def draw(folder: pathlib.Path, name: str) -> bool:
  """Writes NAME.png; returns whether it could (not without matplotlib)."""
  columns = load_digits()
  label, image = columns.features['label'], columns.features['image']
  settings = SETTINGS[name]
  if name in PARTITIONERS:
    own = {'num_clients': NUM_CLIENTS, **settings}
    title, images = flag('partition', name, own), None
    # Superclasses of neighbouring digits: 0 and 1, 2 and 3, ...
    given = {'features': {'image': image, 'coarse': label // 2}}
    takes = inspect.signature(PARTITIONERS[name]).parameters
    more = given if 'features' in takes else {}
    owner = PARTITIONERS[name](label, seed=0, **own, **more)
    if name == 'semantic':
      images = _one_of_each(image, label, owner)
  else:
    title = flag('partition', 'iid', {'num_clients': NUM_CLIENTS})
    title += ' ' + flag('skew', name, settings)
    owner = iid_partition(label, num_clients=NUM_CLIENTS, seed=0)
    skewed = SKEWS[name](
      image, owner, num_clients=NUM_CLIENTS, seed=0, **settings
    )
    images = np.clip(_one_of_each(skewed, label, owner), 0, 1)
  counts = class_counts(
    label,
    owner,
    num_clients=NUM_CLIENTS,
    num_classes=columns.num_classes,
  )
  path = folder / f'{name}.png'
  drawn = plot_partition(path, counts, title=title, images=images)
  if drawn:
    _shrink(path)
  return drawn


def _one_of_each(
  image: np.ndarray, label: np.ndarray, owner: np.ndarray
) -> np.ndarray:
  """The first image of SHOWN_CLASS of each client that has one, [I, H, W]."""
  rows = np.flatnonzero(label == SHOWN_CLASS)
  _, first = np.unique(owner[rows], return_index=True)
  return image[rows[first]]


def _shrink(path: pathlib.Path) -> None:
  """Halves a picture's file by 16 levels of each colour, and no alpha."""
  from matplotlib import image

  pixels = np.rint(image.imread(path)[..., :3] * 15) / 15
  image.imsave(path, pixels, pil_kwargs={'optimize': True})


def main() -> int:
  """Draws all pictures into the folder that is named on the command line."""
  parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('folder', type=pathlib.Path)
  folder = parser.parse_args().folder
  folder.mkdir(parents=True, exist_ok=True)
  for name in (*PARTITIONERS, *SKEWS):
    if not draw(folder, name):
      print('matplotlib is not installed: no pictures.')
      return 1
    path = folder / f'{name}.png'
    print(f'{path}: {path.stat().st_size:,} bytes')
  return 0


if __name__ == '__main__':
  sys.exit(main())
