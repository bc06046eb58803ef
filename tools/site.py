"""The documentation site's hook of MkDocs: pages and links beyond docs/.

README.md is the home page, and each experiments/NAME/README.md the page
reproduction/NAME. Relative links, written for GitHub, lead to the page where
the file is one, to a copy where it is a picture, and to GitHub otherwise. A
link to a file that does not exist is a warning, which `mkdocs build --strict`
refuses. See mkdocs.yml.
"""

from __future__ import annotations

import json
import logging
import pathlib
import posixpath
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # The tests of links do without MkDocs.
  from mkdocs.config.defaults import MkDocsConfig
  from mkdocs.structure.files import Files
  from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).resolve().parents[1]
_LOG = logging.getLogger('mkdocs.hooks.site')
_PICTURES = ('.png', '.svg', '.jpg', '.gif')
# Code, which is left alone, or the end of a link: ](target "title").
_CODE_OR_LINK = re.compile(
  r'^```.*?^```|^ {4}[^\n]*|`(?:[^`\n]|\n(?!\n))+`'
  r'|\]\((?P<target>[^)\s]+)(?P<title>\s+"[^"]*")?\)',
  re.MULTILINE | re.DOTALL,
)


def page_uri(path: str) -> str:
  """Where the site has a file of the repository; '' if it is none of its pages.

  Args:
    path: of the file, from the repository's root.
  """
  if path == 'README.md':
    return 'index.md'
  card = re.fullmatch(r'experiments/(\w+)/README\.md', path)
  if card:
    return f'reproduction/{card[1]}.md'
  if path.startswith('docs/'):
    return path.removeprefix('docs/')
  return f'pictures/{path}' if path.endswith(_PICTURES) else ''


def extra_pages() -> list[pathlib.Path]:
  """The pages that are not in docs/."""
  return [ROOT / 'README.md', *sorted(ROOT.glob('experiments/*/README.md'))]


def links(text: str) -> Iterator[re.Match]:
  """Yields the matches of links in Markdown, none of those in code."""
  for match in _CODE_OR_LINK.finditer(text):
    if match['target']:
      yield match


def mend(target: str, source: pathlib.Path, repository: str) -> str:
  """A link as the site needs it.

  Args:
    target: of a link, as it is written for GitHub.
    source: the file that has it.
    repository: the repository's address.

  Returns:
    The link to go there instead.

  Raises:
    FileNotFoundError: it leads nowhere.
  """
  path, mark, anchor = target.partition('#')
  blob = f'{repository}/blob/main/'
  if path.startswith(blob):
    if not (ROOT / path.removeprefix(blob)).exists():
      raise FileNotFoundError(path)
    return target
  if not path or re.match(r'[a-z]+:', path):
    return target
  file = (source.parent / path).resolve()
  if not file.exists() or not file.is_relative_to(ROOT):
    raise FileNotFoundError(path)
  relative = file.relative_to(ROOT).as_posix()
  page = '' if file.is_dir() else page_uri(relative)
  if page:
    here = posixpath.dirname(page_uri(source.relative_to(ROOT).as_posix()))
    return posixpath.relpath(page, here or '.') + mark + anchor
  kind = 'tree' if file.is_dir() else 'blob'
  return f'{repository}/{kind}/main/{relative}{mark}{anchor}'


def on_config(config: MkDocsConfig) -> MkDocsConfig:
  """Adds the notebooks to the navigation."""
  notebooks = []
  for path in sorted(ROOT.glob('notebooks/*.ipynb')):
    address = f'{config.repo_url}/blob/main/{path.relative_to(ROOT)}'
    notebooks.append({_title(path): address})
  if notebooks:
    config.nav.append({'Notebooks': notebooks})
  return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the pages, and the pictures of all pages, that are not in docs/."""
  from mkdocs.structure.files import File

  added = set(extra_pages())
  for page in (*added, *ROOT.glob('docs/**/*.md')):
    for link in links(page.read_text()):
      file = (page.parent / link['target']).resolve()
      outside = not file.is_relative_to(ROOT / 'docs')
      if file.suffix in _PICTURES and file.exists() and outside:
        added.add(file)
  for path in sorted(added):
    uri = page_uri(path.relative_to(ROOT).as_posix())
    files.append(File.generated(config, uri, abs_src_path=str(path)))
  return files


def on_page_markdown(
  markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
  """Mends the links of a page."""
  del files
  source = pathlib.Path(page.file.abs_src_path).resolve()

  def mended(match: re.Match) -> str:
    if not match['target']:
      return match[0]
    try:
      target = mend(match['target'], source, config.repo_url)
    except FileNotFoundError:
      where = source.relative_to(ROOT)
      _LOG.warning('%s links to %s: no such file', where, match['target'])
      return match[0]
    return f']({target}{match["title"] or ""})'

  return _CODE_OR_LINK.sub(mended, markdown)


def _title(notebook: pathlib.Path) -> str:
  """A notebook's first heading, or its name."""
  for cell in json.loads(notebook.read_text())['cells']:
    found = re.search(r'^# (.+)$', ''.join(cell['source']), re.MULTILINE)
    if cell['cell_type'] == 'markdown' and found:
      return found[1]
  return notebook.stem
