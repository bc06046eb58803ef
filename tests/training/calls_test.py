"""Functions named by flags: what is found, what is typed, what is refused."""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Literal, Optional

from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.training import calls


def build(
  x=None,
  *,
  width: int = 8,
  rate: float = 0.5,
  norm: str = 'group',
  deep: bool = False,
  hidden: tuple[int, ...] = (200,),
  limit: int | None = None,
  seed: int,
):
  """What a flag may name."""
  del x
  return width, rate, norm, deep, hidden, limit, seed


REGISTRY = {'build': build}


class CallsTest(parameterized.TestCase):
  def arguments(self, text, **settings):
    return calls.arguments('model', text, build, **settings)

  def test_a_registered_name_or_any_importable_one(self):
    self.assertIs(calls.resolve('model', 'build', REGISTRY), build)
    self.assertIs(calls.resolve('model', 'build:width=3', REGISTRY), build)
    here = f'{__name__}.build:width=3'
    self.assertIs(calls.resolve('model', here, {}), build)

  @parameterized.parameters(
    ('nope', r"Expected model to be one of \['build'\], or MODULE"),
    ('no_such_module.build', 'no_such_module.build to be importable'),
    ('fedjax_ext.training.calls.nope', 'function nope in module fedjax_ext'),
    ('fedjax_ext.training.calls._BOOLS', 'function _BOOLS'),
  )
  def test_nothing_of_that_name(self, text, message):
    with self.assertRaisesRegex(InvalidInput, message):
      calls.resolve('model', text, REGISTRY)

  def test_types(self):
    got = self.arguments(
      'build:width=16,rate=1e-3,norm=batch,deep=true,hidden=200/100,limit=4'
    )
    self.assertEqual(
      got,
      dict(
        width=16,
        rate=1e-3,
        norm='batch',
        deep=True,
        hidden=(200, 100),
        limit=4,
      ),
    )
    self.assertIsInstance(got['rate'], float)
    self.assertEqual(self.arguments('build'), {})
    self.assertEqual(self.arguments('build:hidden='), {'hidden': ()})
    self.assertEqual(self.arguments('build:deep=0'), {'deep': False})

  @parameterized.parameters(
    ('build:depth=2', "each KEY once of .*'width'.*got 'depth=2'"),
    ('build:width', "got 'width'"),
    ('build:width=1,width=2', "got 'width=2'"),
    ('build:x=1', "got 'x=1'"),
    ('build:width=1.5', 'width of model to be int, got width=1.5'),
    ('build:rate=fast', 'rate of model to be float, got rate=fast'),
    ('build:deep=yes', 'deep of model to be bool, got deep=yes'),
    ('build:hidden=2/a', 'hidden of model to be int, got hidden=a'),
  )
  def test_refused(self, text, message):
    with self.assertRaisesRegex(InvalidInput, message):
      self.arguments(text)

  def test_reserved_arguments_are_not_the_flags_to_set(self):
    with self.assertRaisesRegex(InvalidInput, "got 'seed=1'"):
      self.arguments('build:seed=1', reserved=('seed',))
    self.assertEqual(self.arguments('build:seed=1'), {'seed': 1})

  def test_description(self):
    described = calls.describe_all(REGISTRY, reserved=('limit',))
    self.assertEqual(
      described,
      '  build: width=8, rate=0.5, norm=group, deep=False, hidden=200, seed',
    )

  def test_other_annotations(self):
    """Unions, literals and sequences; the default's type without any."""

    def other(
      *,
      a: Optional[int] = None,  # noqa: UP045
      b: Sequence[int] = (),
      c: Literal['x', 'y'] = 'x',
      d=3,
      e: dict | None = None,
    ):
      del a, b, c, d, e

    parse = lambda text: calls.arguments('model', f'other:{text}', other)
    self.assertEqual(
      parse('a=5,b=1/2,c=y,d=7'), dict(a=5, b=(1, 2), c='y', d=7)
    )
    self.assertEqual(parse('a=None'), {'a': None})
    with self.assertRaisesRegex(InvalidInput, 'c of model to be one of'):
      parse('c=z')
    with self.assertRaisesRegex(InvalidInput, 'e of model to be annotated'):
      parse('e=1')

  def test_source_digest(self):
    """Of a user's function, not of one that the project knows by name."""
    self.assertEqual(
      calls.source_digest('model', 'build:width=1', REGISTRY), ''
    )
    here = calls.source_digest('model', f'{__name__}.build', REGISTRY)
    self.assertEqual(
      here, hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()
    )

  def test_missing(self):
    self.assertEqual(calls.missing(build, {'width': 1}), ['seed'])
    self.assertEqual(calls.missing(build, {'seed': 1}), [])
    self.assertTrue(calls.takes(build, 'seed'))
    self.assertFalse(calls.takes(build, 'x'))


if __name__ == '__main__':
  absltest.main()
