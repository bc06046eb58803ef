"""pyproject.toml, requirements.txt and requirements.lock agree."""

import pathlib
import re
import tomllib

from absl.testing import absltest

ROOT = pathlib.Path(__file__).parents[2]


def names(lines):
  return {
    re.split(r'[><=~!\[; ]', line)[0].lower().replace('_', '-')
    for line in lines
    if line.strip() and not line.startswith(('#', ' '))
  }


class PackagingTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    self.requirements = (ROOT / 'requirements.txt').read_text().splitlines()

  def test_requirements_repeat_pyproject(self):
    project = self.project['project']
    extras = project['optional-dependencies']
    declared = [
      *project['dependencies'],
      *extras['experiments'],
      *extras['tfds'],
      *extras['test'],
    ]
    listed = [x for x in self.requirements if x and not x.startswith('#')]
    self.assertEqual(sorted(declared), sorted(listed))

  def test_lower_bounds_only(self):
    for line in self.requirements:
      self.assertNotRegex(line, r'==|<(?!=)|~=')

  def test_lock_pins_every_requirement(self):
    lock = (ROOT / 'requirements.lock').read_text().splitlines()
    self.assertEmpty(names(self.requirements) - names(lock))
    for line in lock:
      self.assertRegex(line, r'^\S+==\S+( ;.*)?$')

  def test_the_wheel_ships_the_package_only(self):
    find = self.project['tool']['setuptools']['packages']['find']
    self.assertEqual(find, {'include': ['fedjax_ext*']})


if __name__ == '__main__':
  absltest.main()
