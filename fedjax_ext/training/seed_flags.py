"""Flags of seeds: one for each role, or one for all.

Importing this module defines them.
"""

from absl import flags

from fedjax_ext.core import validate
from fedjax_ext.training.loop import Seeds

FLAGS = flags.FLAGS

flags.DEFINE_integer('seed', 0, 'Seed of every role that has none of its own.')
for _role, _what in (
  ('data', 'partition and splits'),
  ('init', 'first model and client states'),
  ('sampling', 'cohorts'),
  ('training', 'shuffles and local steps'),
):
  flags.DEFINE_integer(f'{_role}_seed', None, f'Seed of {_what}.')


def role_seed(role: str) -> int:
  """The seed (a scalar) of a role: --ROLE_seed, or else --seed."""
  name = 'seed' if FLAGS[f'{role}_seed'].value is None else f'{role}_seed'
  validate.between(name, FLAGS[name].value, 0, 2**31 - 1)
  return FLAGS[name].value


def seeds_from_flags() -> Seeds:
  """One seed (a scalar) for each role but the data's."""
  return Seeds(role_seed('init'), role_seed('sampling'), role_seed('training'))
