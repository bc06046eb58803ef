"""Writes any data source once, as memory-mapped columns.

  python -m fedjax_ext.training.convert_data --out=FOLDER \
    --data_source=federated_emnist --data_dir=DIR

`--data_source=npz:file=NAME --data_dir=PARENT` then reads the folder.
"""

from absl import flags

from fedjax_ext.core import validate
from fedjax_ext.data import write_columns
from fedjax_ext.training import app, data_flags
from fedjax_ext.training import flags as shared

FLAGS = flags.FLAGS
flags.DEFINE_string('out', None, 'Folder to write, which must not exist.')
flags.adopt_module_key_flags(shared)


def main() -> None:
  """Reads --data_source and writes --out."""
  validate.check(FLAGS.out, 'Expected --out=FOLDER, got none.')
  columns = data_flags.columns_from_flags()
  folder = write_columns(columns, FLAGS.out)
  rows = len(next(iter(columns.features.values())))
  print(f'{rows} rows of {sorted(columns.features)} in {folder}')


if __name__ == '__main__':
  app.run(main)
