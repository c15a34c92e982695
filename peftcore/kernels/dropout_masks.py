"""The process-wide choice between fast dropout masks and PyTorch's own.

    fast      masks from NumPy's random bytes on a CPU; layers that read the same input share one mask
    pytorch   the masks of `torch.nn.functional.dropout`, one for each layer in the order of the calls, as in HF PEFT

This module imports no torch, so that `import peftcore.as_peft` may be the first line of a script.
"""

from typing import Literal, get_args

from peftcore.errors import ConfigError

DropoutMasks = Literal["fast", "pytorch"]

_current: DropoutMasks = "fast"


def set_dropout_masks(masks: DropoutMasks) -> None:
    """Choose where the dropout masks of low-rank adapters come from, for all models and threads of this process.

    Both choices drop each element with the probability that the configuration states, and both follow
    `torch.manual_seed`. Only "pytorch" drops the elements that HF PEFT drops, so that a seeded training run has HF
    PEFT's losses. On a CPU "pytorch" takes about 20 times as long to draw a mask, and a mask for every layer instead of
    one for all layers with the same input.

    Make the choice before training starts: gradient checkpointing draws a mask again in the backward pass, and must
    find the same choice there. Other processes of the same training run make their own choice.

    Args:
        masks: "fast", the default, or "pytorch". `import peftcore.as_peft` chooses "pytorch".

    Raises:
        ConfigError: `masks` is neither of the two.
    """
    if masks not in get_args(DropoutMasks):
        raise ConfigError(f'set_dropout_masks takes "fast" or "pytorch"; got {masks!r:.200}')
    global _current
    _current = masks


def get_dropout_masks() -> DropoutMasks:
    """Return the choice that is in effect in this process: "fast" or "pytorch"."""
    return _current
