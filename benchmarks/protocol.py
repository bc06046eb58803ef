"""How a contestant talks to `rounds`: a round's number in, a line of JSON out.

A contestant is a process of its own. It reads a round's number on each line of
its standard input, trains that round and answers with what `Answer` says.
"""

import dataclasses
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

_BEGUN = time.perf_counter()


@dataclasses.dataclass
class Answer:
  """A round; scalars.

  Attributes:
    seconds: from the number's arrival to the round's end.
    batches: what was trained on.
    examples: likewise, each counted once.
    compiles: programs compiled during the round.
    compile_seconds: what that took.
    since_start: seconds from the process's first line of Python.
    peak_mib: most memory held so far (VmHWM).
    about: versions, device and variant, by name.
  """

  seconds: float
  batches: int
  examples: int
  compiles: int = 0
  compile_seconds: float = 0.0
  since_start: float = 0.0
  peak_mib: float = 0.0
  about: dict[str, Any] = dataclasses.field(default_factory=dict)


class Server:
  """The contestant's end."""

  def __init__(self):
    """Takes standard output over; libraries' lines go to standard error."""
    self._answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)

  def rounds(self) -> Iterator[int]:
    """Yields the numbers (scalars) as they come."""
    yield from map(int, sys.stdin)

  def answer(self, answer: Answer) -> None:
    """Sends a round's answer, start and memory filled in."""
    answer.since_start = time.perf_counter() - _BEGUN
    answer.peak_mib = peak_memory_mib()
    line = json.dumps(dataclasses.asdict(answer))
    print(line, file=self._answers, flush=True)

  def serve(self, run: Callable[[int], Answer]) -> None:
    """Answers every number with run(number)."""
    for number in self.rounds():
      self.answer(run(number))


def peak_memory_mib() -> float:
  """The most memory that this process has held so far (VmHWM), a scalar."""
  status = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(r'VmHWM:\s+(\d+) kB', status)[1]) / 1024
