"""Attacks: what malicious clients do, and how far they get.

An attack is a function of a `Scenario`, and of keywords of its own, that
returns a client program for `algorithms.averaging.Attack`; or a `LearnedAttack`
if its trigger is learned too.
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
from fedjax_ext.attacks.pfedba import pfedba
from fedjax_ext.attacks.scenario import (
  LearnedAttack,
  Scenario,
  poison,
  stamp,
  with_attack_success,
)
from fedjax_ext.attacks.triggers import TRIGGERS, Trigger
from fedjax_ext.core import ClientProgram

ATTACKS: dict[str, Callable[..., ClientProgram | LearnedAttack]] = {
  make.__name__: make
  for make in (
    backdoor,
    constrain_and_scale,
    neurotoxin,
    projected,
    label_flip,
    bapfl,
    hidden_trigger,
    pfedba,
  )
}

__all__ = [
  'ATTACKS',
  'TRIGGERS',
  'LearnedAttack',
  'Scenario',
  'Trigger',
  'poison',
  'stamp',
  'with_attack_success',
]
