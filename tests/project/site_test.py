"""The documents hang together: links, navigation, names; the site builds."""

import importlib
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from absl.testing import absltest, parameterized

from tools import site

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = (*site.extra_pages(), *sorted(ROOT.glob('docs/**/*.md')))
REPOSITORY = re.search(
  r'^repo_url: (\S+)', (ROOT / 'mkdocs.yml').read_text(), re.MULTILINE
)[1]
# Packages in whose names docs/port_from_fedjax.md speaks.
PACKAGES = 'algorithms|core|data|defenses|losses|models|training'


def headings(text: str) -> set[str]:
  """The anchors that GitHub makes of a document's headings."""
  text = re.sub(r'^```.*?^```', '', text, flags=re.MULTILINE | re.DOTALL)
  found = re.findall(r'^#+ (.+)$', text, re.MULTILINE)
  bare = [re.sub(r'[^\w\- ]', '', h.lower().strip()) for h in found]
  return {h.replace(' ', '-') for h in bare}


def named_in_tables(column: int) -> Iterator[str]:
  """Code in a column (from 0) of the tables of the page on FedJAX."""
  text = (ROOT / 'docs/port_from_fedjax.md').read_text()
  for row in re.findall(r'^\|(.+)\|$', text, re.MULTILINE):
    yield from re.findall(r'`([^`]+)`', row.split('|')[column])


def find(name: str) -> Any:
  """What a dotted name stands for; AttributeError if it stands for nothing."""
  package, *rest = name.split('.')
  found, path = importlib.import_module(package), package
  for part in rest:
    path = f'{path}.{part}'
    try:
      found = getattr(found, part)
    except AttributeError:
      try:
        found = importlib.import_module(path)
      except ImportError as error:
        raise AttributeError(path) from error
  return found


def unformatted(html: str) -> list[str]:
  """Paragraphs of a page that show Markdown which was not understood.

  GitHub begins a list or a table without an empty line before it, MkDocs not.
  """
  [article] = re.findall(r'<article.*?</article>', html, re.DOTALL)
  article = re.sub(r'<(pre|code).*?</\1>', '', article, flags=re.DOTALL)
  texts = re.findall(r'<(?:p|li)>(.*?)</(?:p|li)>', article, re.DOTALL)
  strange = re.compile(r'\n\s*([-*|]|\d+\.) |\*\*|\]\(')
  return [text for text in texts if strange.search(text)]


class LinksTest(parameterized.TestCase):
  @parameterized.parameters(*(str(p.relative_to(ROOT)) for p in PAGES))
  def test_links_lead_somewhere(self, page: str):
    source = ROOT / page
    for link in site.links(source.read_text()):
      with self.subTest(link['target']):
        site.mend(link['target'], source, REPOSITORY)
        path, _, anchor = link['target'].partition('#')
        file = (source.parent / path).resolve() if path else source
        if anchor and file.suffix == '.md':
          self.assertIn(anchor, headings(file.read_text()))

  @parameterized.parameters(
    ('docs/a.md', 'b.md#c', 'b.md#c'),
    ('docs/systems/a.md', '../b.md', '../b.md'),
    ('docs/a.md', '../README.md#x', 'index.md#x'),
    ('docs/systems/a.md', '../../experiments/b/README.md', None),
    ('README.md', 'docs/b.md', 'b.md'),
    ('README.md', 'src/c.py', 'https://host/blob/main/src/c.py'),
    ('README.md', 'src', 'https://host/tree/main/src'),
    ('docs/a.md', '../src/d.png', 'pictures/src/d.png'),
    ('docs/a.md', '#c', '#c'),
    ('docs/a.md', 'https://x.org/y#z', 'https://x.org/y#z'),
  )
  def test_mended(self, page: str, target: str, expected: str | None):
    root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    for name in (
      'README.md',
      'docs/a.md',
      'docs/b.md',
      'docs/systems/a.md',
      'experiments/b/README.md',
      'src/c.py',
      'src/d.png',
    ):
      (root / name).parent.mkdir(parents=True, exist_ok=True)
      (root / name).touch()
    root = root.resolve()
    self.enterContext(absltest.mock.patch.object(site, 'ROOT', root))
    self.assertEqual(
      site.mend(target, root / page, 'https://host'),
      expected or '../reproduction/b.md',
    )
    for missing in ('no.md', 'https://host/blob/main/no.py', '../../out.md'):
      with self.assertRaises(FileNotFoundError):
        site.mend(missing, root / page, 'https://host')

  def test_code_has_no_links(self):
    text = '[a](b) `[c](d)`\n\n    [e](f)\n\n```\n[g](h)\n```\n![i](j "k")\n'
    found = [link['target'] for link in site.links(text)]
    self.assertEqual(found, ['b', 'j'])


class NavigationTest(absltest.TestCase):
  def test_every_page_is_in_it_once(self):
    text = (ROOT / 'mkdocs.yml').read_text()
    listed = re.findall(r': (\S+\.md)$', text[text.index('\nnav:') :], re.M)
    uris = [site.page_uri(p.relative_to(ROOT).as_posix()) for p in PAGES]
    self.assertCountEqual(listed, uris)


class FedjaxNamesTest(absltest.TestCase):
  def test_ours_exist(self):
    names = [n for n in named_in_tables(1) if re.match(rf'({PACKAGES})\.', n)]
    self.assertGreater(len(names), 40)
    for name in names:
      with self.subTest(name):
        find(f'fedjax_ext.{name}')

  def test_theirs_exist(self):
    if importlib.util.find_spec('fedjax') is None:
      self.skipTest('fedjax is not installed: pip install -e .[fedjax]')
    for name in named_in_tables(0):
      if re.fullmatch(r'fedjax\.[\w.]+', name):
        with self.subTest(name):
          find(name)


@pytest.mark.slow
class BuildTest(absltest.TestCase):
  def test_builds_without_a_warning(self):
    if importlib.util.find_spec('mkdocs') is None:
      self.skipTest('mkdocs is not installed: pip install -e .[test]')
    out = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    done = subprocess.run(
      [sys.executable, '-m', 'mkdocs', 'build', '--strict', '-d', str(out)],
      cwd=ROOT,
      env=os.environ | {'NO_MKDOCS_2_WARNING': '1'},
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertNotIn('WARNING', done.stderr)
    for page in PAGES:
      uri = site.page_uri(page.relative_to(ROOT).as_posix())
      name = uri.removesuffix('.md').removesuffix('index')
      with self.subTest(uri):
        html = (out / name / 'index.html').read_text()
        self.assertEmpty(unformatted(html))


if __name__ == '__main__':
  absltest.main()
