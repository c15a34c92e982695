"""What the contract and parity tests need to know of a method: its test file says it, in one `EXAMPLE`."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftcore.config import PeftConfig

FOLDER = Path(__file__).parents[1] / "methods"


@dataclass(frozen=True)
class Example:
    """A method as the contract tests use it. Every adapter parameter is moved at random before most questions."""

    config: type[PeftConfig]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options that fit layers of 12 inputs (Linear, Conv1D, Conv1d), 6 (Conv2d), 4 (Conv3d), 64 (4 and 8 bit), 20
    rows (Embedding), and 8 outputs (32 for 4 and 8 bit)."""
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """{name in the contract's LAYERS: options that differ there}."""
    second: Mapping[str, Any] = field(default_factory=dict)
    """Options that differ for a second adapter that is active beside the first."""
    starts_at_base: bool = True
    """Whether an adapted layer computes what its base does before training."""
    merges: bool = True
    """False for methods whose effect depends on the input; merging must then be refused."""
    mixes_rows: bool = False
    """True for methods by which a row's output depends on the other rows that the adapter computes."""
    needs_bias: bool = False
    """True for methods that merge into the bias, and refuse to merge into a layer that has none."""
    whole_model: bool = False
    """True for methods that need a whole transformer: the contract's single layers pass them by."""
    sized: bool = True
    """False where no saved tensor depends on the layer's size, so that a directory fits any base."""
    spread: float = 0.3
    """Deviation of what is added to each parameter at random."""
    theirs: str = ""
    """HF peft's configuration class, for parity; "" where it has no such method."""
    parity: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """{test id: options that both configurations take; targets are given by the test for each family}."""
    families: tuple[str, ...] = ("gpt2", "llama", "bert")
    """Model families of the parity test (those of test_parity.py)."""
    targets: Mapping[str, Any] = field(default_factory=dict)
    """{family: target_modules} where the test's own do not fit."""
    only_ours: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """{(case, family): why HF peft cannot compute its own adapter}; ours must still be read there."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the adapted model's call in the parity test, for two rows of tokens."""

    def merges_on(self, layer: str) -> bool:
        """Whether an adapter of one of the contract's layers can be merged."""
        return self.merges and not (self.needs_bias and layer == "Linear without bias")

    def make(self, layer: str = "", **options: Any) -> PeftConfig:
        """The method's configuration for one of the contract's layers."""
        return self.config(**{**self.options, **self.layers.get(layer, {}), **options})


@cache
def examples() -> dict[str, Example]:
    """{method: its example}, read from `methods/test_*.py`."""
    found = {}
    for path in sorted(FOLDER.glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(f"example_of_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        example = getattr(module, "EXAMPLE", None)
        if example is not None:
            found[example.config.method] = example
    return found


@torch.no_grad()
def randomise(model: nn.Module, spread: float, seed: int = 2) -> None:
    """Move every trainable parameter away from its start, so that a wrong key, sign or scale cannot hide."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * spread)
