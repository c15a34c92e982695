"""The choice of dropout masks holds for the whole process, and only its own function or the alias changes it."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import peftcore
from peftcore import LoraConfig, PeftModel, get_dropout_masks, get_peft_model, set_dropout_masks


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    yield
    set_dropout_masks("fast")


class Branches(nn.Module):
    """Two layers that read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(64, 8, bias=False)
        self.v = nn.Linear(64, 8, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.q(x), self.v(x)


def adapted() -> Any:
    config = LoraConfig(r=2, lora_dropout=0.5, target_modules=["q", "v"], init_lora_weights=False)
    model = get_peft_model(Branches(), config)
    for layer in (model.q, model.v):
        layer.base_layer.weight.data.zero_()
    return model.train()


def expected(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The outputs with the masks that `torch.nn.functional.dropout` draws, layer by layer."""
    adapters = [layer.adapters["default"] for layer in (model.q, model.v)]
    torch.manual_seed(0)
    return [F.dropout(x, 0.5) @ a.lora_A_weight.T @ a.lora_B_weight.T * a.scaling for a in adapters]


def outputs(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return list(model(x))


def same(ys: list[torch.Tensor], others: list[torch.Tensor]) -> list[bool]:
    return [torch.allclose(y, other, atol=1e-5) for y, other in zip(ys, others, strict=True)]


def test_each_choice_draws_its_own_masks() -> None:
    model, x = adapted(), torch.randn(30, 64)
    assert get_dropout_masks() == "fast"
    fast = outputs(model, x)
    assert same(fast, expected(model, x)) == [False, False]
    set_dropout_masks("pytorch")
    assert same(outputs(model, x), expected(model, x)) == [True, True]
    set_dropout_masks("fast")
    assert same(outputs(model, x), fast) == [True, True]


@pytest.mark.parametrize("masks, shares", [("fast", True), ("pytorch", False)])
def test_layers_of_one_input_share_only_fast_masks(masks: Any, shares: bool) -> None:
    set_dropout_masks(masks)
    model = adapted()
    model.v.adapters["default"].load_state_dict(model.q.adapters["default"].state_dict())
    q, v = model(torch.ones(30, 64))
    assert torch.equal(q, v) == shares


def test_gradients_are_those_of_pytorchs_dropout() -> None:
    set_dropout_masks("pytorch")
    model, x = adapted(), torch.randn(30, 64, requires_grad=True)
    parameters = [x, *(p for p in model.parameters() if p.requires_grad)]
    gradients = [
        torch.autograd.grad(sum(y.square().sum() for y in ys), parameters)  # type: ignore[arg-type]
        for ys in (outputs(model, x), expected(model, x))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_neither_a_thread_nor_a_loaded_adapter_changes_the_choice(tmp_path: Path) -> None:
    set_dropout_masks("pytorch")
    adapted().save_pretrained(tmp_path)
    seen = []

    def load() -> None:
        PeftModel.from_pretrained(Branches(), tmp_path)
        seen.append(get_dropout_masks())

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert seen == ["pytorch"] and get_dropout_masks() == "pytorch"


@pytest.mark.parametrize("masks", ["Pytorch", "", None, True, ["fast"]])
def test_another_word_is_refused_and_changes_nothing(masks: Any) -> None:
    set_dropout_masks("pytorch")
    with pytest.raises(peftcore.ConfigError, match='takes "fast" or "pytorch"; got '):
        set_dropout_masks(masks)
    assert get_dropout_masks() == "pytorch"


def test_the_alias_chooses_pytorchs_masks_and_imports_no_torch() -> None:
    code = (
        "import sys, peftcore; before = peftcore.get_dropout_masks(); import peftcore.as_peft;"
        "print(before, peftcore.get_dropout_masks(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["fast", "pytorch", "False"]
