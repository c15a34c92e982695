"""The process-wide choice where an initialisation such as PiSSA subtracts its start s·B₀A₀.

    adapter   in the adapter: it computes s(BA − B₀A₀), and the base weight W stays
    base      in the base: W − s·B₀A₀ takes the place of W for good, as in HF PEFT

This module imports no torch, so that `import peftcore.as_peft` may be the first line of a script.
"""

from typing import Literal, get_args

from peftcore.errors import ConfigError

StartSubtraction = Literal["adapter", "base"]

_current: StartSubtraction = "adapter"


def set_start_subtraction(place: StartSubtraction) -> None:
    """Choose where PiSSA, OLoRA, CorDA and LoRA-GA subtract their start, for adapters made from now on.

    The choice holds for all models and threads of this process. The outputs of the adapter are the same, up to the
    rounding of the base weight. The two choices differ in everything else that sees the base:

    - "adapter": other adapters, `disable_adapter`, `unload` and a DPO reference see the original base. Several such
      adapters share one base. A saved adapter is a plain LoRA of rank 2r that fits the original base.
    - "base": all of these see the base without the start, as in HF PEFT, and `unload` returns that model. Training
      costs the time and memory of rank r. A saved adapter has rank r, and loading it computes the start again from the
      base; `save_pretrained(..., path_initial_model_for_weight_conversion=...)` saves a plain LoRA of rank 2r.

    With "base", the start stays in the adapter on a layer whose weight is quantised, merged with other adapters,
    parametrised, or replaced by LoftQ.

    Args:
        place: "adapter", the default, or "base". `import peftcore.as_peft` chooses "base".

    Raises:
        ConfigError: `place` is neither of the two.
    """
    if place not in get_args(StartSubtraction):
        raise ConfigError(f'set_start_subtraction takes "adapter" or "base"; got {place!r:.200}')
    global _current
    _current = place


def get_start_subtraction() -> StartSubtraction:
    """Return the choice that is in effect in this process: "adapter" or "base"."""
    return _current
