"""A private Slurm cluster on this machine: two nodes of one core each."""

import contextlib
import getpass
import os
import pathlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping

_NEEDED = ('slurmctld', 'slurmd', 'munged', 'sbatch', 'squeue', 'scancel')
# Jobs of the partition `high` take the nodes from those of `low`, which are
# requeued: they get SIGTERM, and SIGKILL after the grace time.
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
ReturnToService=2
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={one} CPUs=1
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={two} CPUs=1
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=3
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF
"""


def missing() -> str:
  """Says why no cluster can be started here, '' where one can."""
  lacking = [name for name in _NEEDED if _find(name) is None]
  if lacking:
    return (
      f'no {", ".join(lacking)} here (Debian: slurmctld, slurmd, '
      'slurm-client, munge)'
    )
  return '' if os.geteuid() == 0 else 'slurmd and munged need root here'


@contextlib.contextmanager
def cluster(folder: pathlib.Path) -> Iterator[Mapping[str, str]]:
  """Starts a cluster; yields the environment in which Slurm's tools find it.

  Args:
    folder: for its files; short, since a socket lies there.

  Raises:
    RuntimeError: its nodes were not ready within 30 s.
  """
  one, two, port = _free_ports(3)
  conf = folder / 'slurm.conf'
  conf.write_text(
    _CONF.format(
      host=socket.gethostname().partition('.')[0],
      user=getpass.getuser(),
      folder=folder,
      port=port,
      one=one,
      two=two,
    )
  )
  (folder / 'state').mkdir()
  (folder / 'munge.key').write_bytes(os.urandom(1024))
  (folder / 'munge.key').chmod(0o400)
  environment = {'SLURM_CONF': str(conf)}
  munged = [
    *('munged', '--force', '--foreground'),
    *(
      f'--{name}={folder}/munge{end}'
      for name, end in (
        ('key-file', '.key'),
        ('socket', '.socket'),
        ('pid-file', 'd.pid'),
        ('log-file', 'd.log'),
        ('seed-file', 'd.seed'),
      )
    ),
  ]
  commands = [
    munged,
    ['slurmctld', '-D'],
    ['slurmd', '-D', '-N', 'one'],
    ['slurmd', '-D', '-N', 'two'],
  ]
  with contextlib.ExitStack() as stack:
    for command in commands:
      process = subprocess.Popen(
        [_find(command[0]), *command[1:]],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
      )
      stack.callback(_end, process)
      if command is munged:
        _wait_for(lambda: (folder / 'munge.socket').exists())
    _wait_for(lambda: _idle_nodes(environment) == 2)
    yield environment


def _idle_nodes(environment: Mapping[str, str]) -> int:
  listed = subprocess.run(
    ['sinfo', '--noheader', '--Node', '--partition=low', '--format=%T'],
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    check=False,
  ).stdout
  return listed.split().count('idle')


def _wait_for(ready, seconds: float = 30.0) -> None:
  deadline = time.monotonic() + seconds
  while not ready():
    if time.monotonic() > deadline:
      raise RuntimeError(f'the cluster was not ready within {seconds} s')
    time.sleep(0.2)


def _end(process: subprocess.Popen) -> None:
  process.terminate()
  try:
    process.wait(10)
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()


def _find(name: str) -> str | None:
  return shutil.which(name, path=f'{os.environ.get("PATH", "")}:/usr/sbin')


def _free_ports(count: int) -> list[int]:
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
    for one in sockets:
      one.bind(('127.0.0.1', 0))
    return [one.getsockname()[1] for one in sockets]
