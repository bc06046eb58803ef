"""Downloads from a server on this machine: resumed, verified, done once."""

import contextlib
import errno
import hashlib
import http.server
import io
import logging
import lzma
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
from unittest import mock

from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import download, published

CONTENT = bytes(range(256)) * 12000  # 3 MB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
  """Serves CONTENT at every path, as its attributes say.

  Attributes:
    content: what is served.
    etag: of it.
    ranges: whether Range is honoured.
    cut: bytes of the file after which the connection breaks, at each request.
    statuses: HTTP statuses to answer with first.
    delay: seconds before an answer.
    requests: Range header (or None) of every request.
  """

  def __init__(self):
    super().__init__(('127.0.0.1', 0), Handler)
    self.content, self.etag, self.ranges = CONTENT, '"one"', True
    self.cut, self.statuses, self.requests = [], [], []
    self.url = f'http://127.0.0.1:{self.server_port}/file'


class Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    server = self.server
    wanted = self.headers['Range']
    server.requests.append(wanted)
    if server.statuses:
      self.send_response(server.statuses.pop(0))
      self.send_header('Content-Length', '0')
      self.end_headers()
      return
    start, size = 0, len(server.content)
    if wanted and server.ranges and self.headers['If-Range'] == server.etag:
      start = int(wanted.removeprefix('bytes=').removesuffix('-'))
    if start and start >= size:
      self.send_response(416)
      self.send_header('Content-Range', f'bytes */{size}')
      self.send_header('Content-Length', '0')
      self.end_headers()
      return
    self.send_response(206 if start else 200)
    if start:
      self.send_header('Content-Range', f'bytes {start}-{size - 1}/{size}')
    if server.etag:
      self.send_header('ETag', server.etag)
    self.send_header('Content-Length', str(size - start))
    self.end_headers()
    end = server.cut.pop(0) if server.cut else size
    with contextlib.suppress(ConnectionError):
      self.wfile.write(server.content[start:end])

  def log_message(self, *args):
    pass


def fetch(url, path):
  """In a process of its own."""
  download.download(url, path)


class DownloadTestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = self.root / 'data' / 'file'
    self.partial = self.root / 'data' / 'file.partial'
    self.server = Server()
    thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
    thread.start()
    self.addCleanup(thread.join)
    self.addCleanup(self.server.server_close)
    self.addCleanup(self.server.shutdown)
    self.enterContext(mock.patch.object(download, '_PAUSE', 0.001))
    logging.getLogger(download.__name__).setLevel(logging.ERROR)

  def download(self, **kwargs):
    return download.download(self.server.url, self.path, **kwargs)

  def begin(self, cut):
    """Leaves a download broken off after so many bytes."""
    self.server.cut = [cut]
    with (
      mock.patch.object(download, '_ATTEMPTS', 1),
      self.assertRaisesRegex(InvalidInput, f'got {cut} bytes'),
    ):
      self.download()
    self.assertEqual(self.partial.stat().st_size, cut)
    self.server.requests.clear()

  def assert_complete(self, content=CONTENT):
    """The file is in place, with its checksum, and nothing else but a lock."""
    self.assertTrue(self.path.read_bytes() == content)
    kept = (self.root / 'data' / 'file.sha256').read_text()
    self.assertEqual(kept, f'{hashlib.sha256(content).hexdigest()}  file\n')
    names = sorted(p.name for p in self.path.parent.iterdir())
    self.assertEqual(names, ['file', 'file.lock', 'file.sha256'])


class DownloadTest(DownloadTestCase):
  def test_whole(self):
    """Once: a second call asks the server for nothing."""
    kwargs = {'sha256': DIGEST.upper(), 'num_bytes': len(CONTENT)}
    self.assertEqual(self.download(**kwargs), self.path)
    self.assert_complete()
    self.assertEqual(self.download(), self.path)
    self.assertEqual(self.server.requests, [None])

  def test_dropped_connections(self):
    """Each time it goes on where it was."""
    self.server.cut = [1_000_000, 1_000_000, 2_000_000]
    self.download()
    self.assert_complete()
    self.assertEqual(
      self.server.requests,
      [None, 'bytes=1000000-', 'bytes=1000000-', 'bytes=2000000-'],
    )

  def test_gives_up(self):
    """After some attempts that get no further; what arrived is kept."""
    self.server.cut = [500] * 100
    with self.assertRaisesRegex(InvalidInput, 'ended after 500 of 3072000'):
      self.download()
    self.assertLen(self.server.requests, 1 + download._ATTEMPTS - 1)
    self.assertEqual(self.partial.stat().st_size, 500)

  def test_later_call_resumes(self):
    self.begin(1_000_000)
    self.download()
    self.assert_complete()
    self.assertEqual(self.server.requests, ['bytes=1000000-'])

  def test_partial_is_complete(self):
    """Broken off between the last byte and the renaming."""
    self.begin(1_000_000)
    self.partial.write_bytes(CONTENT)
    self.download()
    self.assert_complete()

  def test_file_has_changed(self):
    """Parts of two versions are never put together."""
    self.begin(1_000_000)
    self.server.content, self.server.etag = CONTENT[::-1], '"two"'
    self.download()
    self.assert_complete(CONTENT[::-1])

  def test_file_has_shrunk(self):
    self.begin(1_000_000)
    self.server.content = CONTENT[:999]
    self.download()
    self.assert_complete(CONTENT[:999])

  @parameterized.parameters((False, '"one"'), (True, ''), (True, 'W/"one"'))
  def test_cannot_be_resumed(self, ranges, etag):
    """A server without Range, or one that does not say what it serves."""
    self.server.ranges, self.server.etag = ranges, etag
    self.server.cut = [1_000_000]
    self.download()
    self.assert_complete()
    self.assertLen(self.server.requests, 2)

  @parameterized.parameters(
    ({'sha256': '0' * 64}, f'SHA-256 0{{64}} of http.*, got {DIGEST}'),
    ({'num_bytes': 5}, 'Expected 5 bytes at http.*, got 3072000'),
  )
  def test_something_else(self, expected, message):
    """Nothing wrong is left in place, nor continued."""
    with self.assertRaisesRegex(InvalidInput, message):
      self.download(**expected)
    names = [p.name for p in self.path.parent.iterdir()]
    self.assertEqual(names, ['file.lock'])

  def test_changed_on_disk(self):
    """A later call verifies the file by the checksum that was kept."""
    self.download()
    self.path.write_bytes(b'changed')
    with self.assertRaisesRegex(
      InvalidInput, r'remove the file \(and file\.sh'
    ):
      self.download()
    self.assertEqual(self.path.read_bytes(), b'changed')

  def test_file_from_elsewhere(self):
    """One that was copied here is taken, and verified if there is a sum."""
    self.path.parent.mkdir()
    self.path.write_bytes(CONTENT)
    self.download()
    self.download(sha256=DIGEST)
    with self.assertRaisesRegex(InvalidInput, 'SHA-256 000'):
      self.download(sha256='0' * 64)
    self.assertEmpty(self.server.requests)

  @parameterized.parameters(404, 403)
  def test_no_file(self, status):
    """Said at once."""
    self.server.statuses = [status]
    with self.assertRaisesRegex(
      InvalidInput, f'at http.*/file, got HTTP {status}'
    ):
      self.download()
    self.assertLen(self.server.requests, 1)
    self.assertFalse(self.path.exists())

  @parameterized.parameters(500, 503, 429, 408)
  def test_server_is_busy(self, status):
    self.server.statuses = [status, status]
    self.download()
    self.assert_complete()
    self.assertLen(self.server.requests, 3)

  def test_no_server(self):
    self.server.shutdown()
    self.server.server_close()
    with self.assertRaisesRegex(InvalidInput, 'download http.*refused'):
      self.download()

  @parameterized.parameters('', 'file', 'nothing://x')
  def test_no_url(self, url):
    with self.assertRaises(InvalidInput):
      download.download(url, self.path)

  def test_disk_is_full(self):
    """Known before, or found while writing; what arrived can be continued."""
    usage = mock.Mock(free=1000)
    with (
      mock.patch.object(download.shutil, 'disk_usage', return_value=usage),
      self.assertRaisesRegex(
        InvalidInput, '3072000 bytes free in .*, got 1000'
      ),
    ):
      self.download()
    error = OSError(errno.ENOSPC, 'full')
    with (
      mock.patch.object(download, '_copy', side_effect=error),
      self.assertRaisesRegex(InvalidInput, 'write .*: the disk is full'),
    ):
      self.download()
    self.download()
    self.assert_complete()

  def test_threads_download_once(self):
    threads = [threading.Thread(target=self.download) for _ in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    self.assert_complete()
    self.assertLen(self.server.requests, 1)

  def test_processes_download_once(self):
    context = multiprocessing.get_context('spawn')
    processes = [
      context.Process(target=fetch, args=(self.server.url, self.path))
      for _ in range(2)
    ]
    for process in processes:
      process.start()
    for process in processes:
      process.join()
    self.assertEqual([p.exitcode for p in processes], [0, 0])
    self.assert_complete()
    self.assertLen(self.server.requests, 1)

  def test_log_lines(self):
    """Without a terminal progress goes to the log."""
    with (
      mock.patch.object(
        download.time, 'monotonic', side_effect=range(0, 999, 6)
      ),
      self.assertLogs(download.__name__, 'INFO') as logs,
    ):
      self.download()
    self.assertRegex(logs.output[0], r'file: \d of 3 MB')


class DatasetTest(DownloadTestCase):
  def setUp(self):
    super().setUp()
    self.archive = lzma.compress(CONTENT, lzma.FORMAT_ALONE)
    base = self.server.url.removesuffix('/file')
    files = (
      published.RemoteFile(
        f'{base}/file.lzma', hashlib.sha256(self.archive).hexdigest()
      ),
    )
    self.server.content = self.archive
    self.enterContext(mock.patch.dict(published.DATASETS, {'mine': files}))

  def test_compressed(self):
    """Decompressed once; a second call verifies the file."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
      download.main(['mine', f'--data_dir={self.path.parent}'])
    self.assertEqual(printed.getvalue(), f'{DIGEST}  {self.path}\n')
    self.assertTrue(self.path.read_bytes() == CONTENT)
    self.assertFalse(self.path.with_name('file.lzma').exists())
    download.download_dataset('mine', self.path.parent)
    self.assertLen(self.server.requests, 1)

  def test_broken_archive(self):
    """Half of an archive leaves no half file."""
    for content in (self.archive[: len(self.archive) // 2], b'hello'):
      archive = self.root / 'file.lzma'
      archive.write_bytes(content)
      with self.assertRaisesRegex(InvalidInput, r'LZMA file at .*file\.lzma'):
        download.decompress(archive, self.root / 'file')
      self.assertFalse((self.root / 'file').exists())
      self.assertFalse((self.root / 'file.partial').exists())

  def test_error_is_one_line(self):
    self.server.statuses = [404]
    with self.assertRaisesRegex(
      SystemExit, r'^Expected a file at [^\n]*404[^\n]*$'
    ):
      download.main(['mine', f'--data_dir={self.root}'])

  def test_published(self):
    """Names, URLs and, where known, checksums of the published files."""
    for name, files in published.DATASETS.items():
      for file in files if name != 'mine' else ():
        self.assertStartsWith(file.url, 'https://storage.googleapis.com/')
        self.assertRegex(file.sha256, '^([0-9a-f]{64})?$')
    names = [f.name for f in published.DATASETS['stackoverflow']]
    self.assertIn('stackoverflow_held_out.sqlite', names)
    with self.assertRaisesRegex(
      InvalidInput,
      r'federated_emnist_train\.sqlite, found none; python -m '
      r'fedjax_ext\.data\.download federated_emnist --data_dir=here$',
    ):
      published.dataset_paths('federated_emnist', 'here')

  def test_command(self):
    """The module runs, and says which data sets there are."""
    run = subprocess.run(
      [sys.executable, '-m', 'fedjax_ext.data.download', '--help'],
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
      capture_output=True,
      text=True,
    )
    self.assertEqual((run.returncode, run.stderr), (0, ''))
    self.assertIn('federated_cifar100', run.stdout)


if __name__ == '__main__':
  absltest.main()
