"""Where published data sets are, and what their files are called."""

import pathlib
from typing import NamedTuple

from fedjax_ext.core import validate

_FEDJAX = 'https://storage.googleapis.com/gresearch/fedjax'
_TFF = 'https://storage.googleapis.com/tff-datasets-public'


class RemoteFile(NamedTuple):
  """A published file; .lzma is decompressed to the name without it.

  Attributes:
    url: where it is.
    sha256: published checksum (hex) of what is at the URL, '' if there is none.
    num_bytes: published size of it, 0 if there is none.
  """

  url: str
  sha256: str = ''
  num_bytes: int = 0

  @property
  def name(self) -> str:
    """Name of the file that arrives in data_dir."""
    return self.url.rsplit('/', 1)[1].removesuffix('.lzma')


# Files by data set. The checksum of CIFAR-100 is the one that FedJAX expects,
# https://github.com/google/fedjax/blob/main/fedjax/datasets/cifar100.py.
DATASETS = {
  'federated_emnist': tuple(
    RemoteFile(f'{_FEDJAX}/emnist/federated_emnist_{split}.sqlite')
    for split in ('train', 'test')
  ),
  'federated_emnist_digits': tuple(
    RemoteFile(f'{_FEDJAX}/emnist/federated_emnist_digitsonly_{split}.sqlite')
    for split in ('train', 'test')
  ),
  'federated_cifar100': (
    RemoteFile(
      f'{_TFF}/cifar100.sqlite.lzma',
      '23d3916c9caa33395737ee560cc7cb77bbd05fc7b73647ee7be3a7e764172939',
      153_019_920,
    ),
  ),
  'shakespeare': tuple(
    RemoteFile(f'{_FEDJAX}/shakespeare/shakespeare_{split}.sqlite')
    for split in ('train', 'test')
  ),
  'stackoverflow': (
    *(
      RemoteFile(f'{_FEDJAX}/stackoverflow/stackoverflow_{split}.sqlite')
      for split in ('train', 'held_out', 'test')
    ),
    RemoteFile(f'{_FEDJAX}/stackoverflow/stackoverflow.word_count'),
  ),
}


def dataset_paths(
  name: str, data_dir: str | pathlib.Path
) -> dict[str, pathlib.Path]:
  """The downloaded files of a data set, {file name: path}.

  Raises:
    InvalidInput: one is missing; the message has the command that gets it.
  """
  validate.one_of('data set', name, DATASETS)
  paths = {f.name: pathlib.Path(data_dir, f.name) for f in DATASETS[name]}
  for path in paths.values():
    validate.check(
      path.is_file(),
      f'Expected {path}, found none; python -m fedjax_ext.data.download '
      f'{name} --data_dir={data_dir}',
    )
  return paths
