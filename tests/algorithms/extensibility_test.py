"""FedProx and SCAFFOLD are short, and use public names of core only."""

import ast
import pathlib

from absl.testing import absltest, parameterized

from fedjax_ext import algorithms, core

FOLDER = pathlib.Path(algorithms.__file__).parent


class ExtensibilityTest(parameterized.TestCase):
  @parameterized.parameters('fed_prox.py', 'scaffold.py')
  def test_short_and_on_public_names(self, name):
    source = (FOLDER / name).read_text()
    self.assertLess(len(source.splitlines()), 120)
    for node in ast.walk(ast.parse(source)):
      if isinstance(node, ast.ImportFrom) and node.module.startswith(
        'fedjax_ext.core'
      ):
        self.assertEqual(node.module, 'fedjax_ext.core')
        for alias in node.names:
          self.assertIn(alias.name, core.__all__)
      if isinstance(node, ast.Attribute) and ast.unparse(node.value) == 'core':
        self.assertIn(node.attr, core.__all__)
      if isinstance(node, ast.Attribute):
        self.assertFalse(node.attr.startswith('_') and node.attr != '_replace')


if __name__ == '__main__':
  absltest.main()
