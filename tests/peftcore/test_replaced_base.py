"""Starts that look at the base's weight, or replace it: the base comes back exactly, and nothing of it stays behind."""

import copy
from typing import Any

import pytest
import torch
from method_example import randomise
from torch import Tensor, nn

from peftcore import ConfigError, LoraConfig, MergeError, PeftModel, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.start_from_data import initialize_from_data

pytestmark = pytest.mark.filterwarnings("ignore:.init_lora_weights. is:UserWarning")  # EVA or CorDA by defaults

WEIGHTS_ALONE = ["gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", "loftq"]
FROM_DATA = ["eva", "corda", "lora_ga"]
STARTS = WEIGHTS_ALONE + FROM_DATA
X = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))


class Net(nn.Sequential):
    """Layers that give a loss, which LoRA-GA wants."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if labels is None else (y - labels).square().mean()


def net() -> Any:
    torch.manual_seed(0)
    return Net(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))


def lora(start: Any = False, **options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["0", "2"], "init_lora_weights": start, **options})


def begin(model: Any, start: str, name: str) -> None:
    """Add an adapter and have it start."""
    model.add_adapter(name, lora(start))
    if start in FROM_DATA:
        initialize_from_data(model, [{"x": X, "labels": X.flip(0)}], name)


@pytest.mark.parametrize("start", STARTS)
def test_merging_for_good_keeps_no_old_weight(start: str) -> None:
    model = get_peft_model(net(), lora(), "other")
    begin(model, start, "a")
    randomise(model, 0.1)
    model.set_adapter("a")
    expected, attributes = model(X), [set(vars(layer)) for layer in net()]
    merged = model.merge_and_unload()
    assert [set(vars(layer)) for layer in merged] == attributes
    torch.testing.assert_close(merged(X), expected, rtol=1e-4, atol=1e-4)
    before = merged(X)
    again = get_peft_model(merged, lora(), "b")
    again.delete_adapter("b")
    assert torch.equal(again(X), before) and torch.equal(again.unload()(X), before)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("end", ["unload", "delete"])
def test_the_base_comes_back(end: str, start: str) -> None:
    base = net()
    model = get_peft_model(copy.deepcopy(base), lora(), "other")
    randomise(model, 0.1)
    expected = model(X)
    begin(model, start, "a")
    if end == "unload":
        assert torch.equal(model.unload()(X), base(X))
        return
    model.delete_adapter("a")
    assert torch.equal(model(X), expected), "the other adapter has the base that it had before"
    with model.disable_adapter():
        assert torch.equal(model(X), base(X))


@pytest.mark.parametrize("start", [start for start in STARTS if start != "loftq"])
def test_a_start_while_another_adapter_is_merged(start: str) -> None:
    base = net()
    model = get_peft_model(copy.deepcopy(base), lora(), "other")
    randomise(model, 0.3)
    model.merge_adapter()
    begin(model, start, "a")
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(X), base(X))
    assert torch.equal(model.unload()(X), base(X))


def test_a_weight_is_not_replaced_under_a_merged_adapter(tmp_path: Any) -> None:
    base = net()
    get_peft_model(copy.deepcopy(base), lora("loftq")).save_pretrained(tmp_path)
    model = get_peft_model(copy.deepcopy(base), lora(), "other")
    randomise(model, 0.3)
    model.merge_adapter()
    merged = model(X)
    for add in (lambda: begin(model, "loftq", "a"), lambda: model.load_adapter(tmp_path, "a")):
        with pytest.raises(
            MergeError, match=r"replaces the weight of 0 \(LoftQ or KaSA\), and \['other'\] are merged into it"
        ):
            add()
    assert torch.equal(model(X), merged) and list(model.peft_config) == ["other"]
    model.unmerge_adapter()
    begin(model, "loftq", "a")
    model.merge_adapter("other")
    before = model(X)
    with pytest.raises(
        MergeError, match=r"\['a'\] replaced the weight of 0 \(LoftQ\), and \['other'\] are merged into it"
    ):
        model.delete_adapter("a")
    assert torch.equal(model(X), before)
    assert torch.equal(model.unload()(X), base(X))


def test_two_that_bring_one_weight() -> None:
    """Each begins from the true weight, as it would alone, so the second changes nothing of the first."""
    base = net()
    model = get_peft_model(copy.deepcopy(base), lora("loftq"), "a")
    with pytest.raises(ConfigError, match=r"\['a'\] replaced the weight of 0 \(LoftQ or KaSA\), and this adapter"):
        model.add_adapter("b", lora("loftq", loftq_config={"loftq_bits": 8}))
    expected = model(X)
    model.add_adapter("b", lora("loftq"))
    assert torch.equal(model(X), expected)
    model.set_adapter("b")
    assert torch.equal(model(X), expected)
    model.delete_adapter("a")
    assert torch.equal(model(X), expected)
    model.delete_adapter("b")
    assert torch.equal(model(X), base(X))


def test_what_a_merge_keeps_of_a_replaced_base() -> None:
    """The function is kept, whichever adapter is merged."""
    model = get_peft_model(net(), lora("loftq"), "a")
    model.add_adapter("other", lora())
    randomise(model, 0.1)
    model.set_adapter("other")
    expected = model(X)
    torch.testing.assert_close(model.merge_and_unload(adapter_names=["other"])(X), expected, rtol=1e-5, atol=1e-5)


def test_a_copy_knows_its_own_base() -> None:
    base = net()
    model: PeftModel = get_peft_model(copy.deepcopy(base), lora("loftq"), "a")
    twin: Any = copy.deepcopy(model)
    assert torch.equal(twin.unload()(X), base(X)) and adapter_set(model).layers["0"].has_replaced_base  # type: ignore[arg-type]
