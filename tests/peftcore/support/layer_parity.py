"""HF `peft` as the oracle at one layer, for kinds of layers that small language models do not have."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from method_example import randomise
from parity_log import agree
from torch import Tensor, nn

from peftcore import PeftConfig, PeftModel, get_peft_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft


def agrees_with_peft(
    layer: nn.Module, x: Tensor, theirs: str, ours: type[PeftConfig], options: dict[str, Any], path: Path, **how: Any
) -> None:
    """Assert that an adapted layer's directory means the same here and there, both ways, within 1e-5.

    how: merged=True merges PEFT's adapter first, for forwards that PEFT gets wrong; spread of the random parameters.
    """
    net, spread = nn.Sequential(layer).eval(), how.get("spread", 0.3)
    options = {"target_modules": ["0"], **options}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        hf = peft.get_peft_model(copy.deepcopy(net), getattr(peft, theirs)(**copy.deepcopy(options))).eval()
        randomise(hf, spread)
        hf.save_pretrained(path / "hf", save_embedding_layers=False)
        here = PeftModel.from_pretrained(copy.deepcopy(net), path / "hf")
        own: Any = get_peft_model(copy.deepcopy(net), ours(**options)).eval()
        randomise(own, spread)
        own.save_pretrained(path / "ours")
        there = peft.PeftModel.from_pretrained(copy.deepcopy(net), path / "ours").eval()
        if how.get("merged"):
            hf.merge_adapter()
            there.merge_adapter()
        agree(here(x), hf(x), ours.method, type(layer).__name__, made_by="peft")
        agree(own(x), there(x), ours.method, type(layer).__name__, made_by="peftcore")
        assert (hf(x) - net(x)).abs().max() > 1e-2
