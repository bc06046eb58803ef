"""Attacks: what malicious clients do, and how far they get.

An attack is a function of a `Scenario`, and of keywords of its own, that
returns a client program for `algorithms.averaging.Attack`.
"""

from collections.abc import Callable

from fedjax_ext.attacks.backdoors import (
  backdoor,
  constrain_and_scale,
  label_flip,
  neurotoxin,
  projected,
)
from fedjax_ext.attacks.bapfl import bapfl
from fedjax_ext.attacks.hidden_trigger import hidden_trigger
from fedjax_ext.attacks.scenario import (
  Scenario,
  poison,
  stamp,
  with_attack_success,
)
from fedjax_ext.attacks.triggers import TRIGGERS, Trigger
from fedjax_ext.core import ClientProgram

ATTACKS: dict[str, Callable[..., ClientProgram]] = {
  make.__name__: make
  for make in (
    backdoor,
    constrain_and_scale,
    neurotoxin,
    projected,
    label_flip,
    bapfl,
    hidden_trigger,
  )
}

__all__ = [
  'ATTACKS',
  'TRIGGERS',
  'Scenario',
  'Trigger',
  'poison',
  'stamp',
  'with_attack_success',
]
