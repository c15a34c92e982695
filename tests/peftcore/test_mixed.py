"""Several adapters of different methods at once on one model: switched, together, merged, saved, loaded, deleted."""

from typing import Any

import pytest
import torch
from method_example import examples, randomise
from torch import nn

from peftcore import PeftModel, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.registry import methods

pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")

EXAMPLES = {
    method: example
    for method, example in examples().items()
    if "linear" in methods()[method].adapter.layer_kinds and not example.whole_model
    if method != "LN_TUNING"  # replaces the weight, so nothing of the adapters before it is left
}
MERGING = [method for method, example in EXAMPLES.items() if example.merges]
REPLACES = "LN_TUNING"
"""The method that trains the weight itself: at a layer, it replaces what the adapters before it do."""
NEIGHBOURS = zip(MERGING, MERGING[1:] + MERGING[:1], strict=True)
PAIRS = [pytest.param(a, b, id=f"{a}-{b}") for a, b in NEIGHBOURS if b != REPLACES]
"""Each method is once the first and once the second; `test_pairs_on_biased_layers` merges every pair."""


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 8)).double()


def add(model: Any, method: str, name: str, targets: list[str], seed: int) -> None:
    active = model.active_adapters
    for other in model.peft_config:
        model.set_requires_grad(other, False)
    model.add_adapter(name, EXAMPLES[method].make(target_modules=targets))
    model.set_requires_grad(name)
    randomise(model, EXAMPLES[method].spread, seed=seed)
    model.set_adapter(active())
    model.eval()  # Poly and PVeRA draw at random while they train


def mixed(first: str, second: str) -> Any:
    """Both on layer 0, the second alone on layer 2."""
    model = get_peft_model(net(), EXAMPLES[first].make(target_modules=["0"]), "first")
    randomise(model, EXAMPLES[first].spread)
    add(model, second, "second", ["0", "2"], seed=5)
    return model


@pytest.mark.parametrize("first, second", PAIRS)
def test_two_methods_at_once(first: str, second: str) -> None:
    x = torch.randn(5, 12, dtype=torch.float64)
    model = mixed(first, second)
    base, alone = net()(x), {}
    for name in ("first", "second"):
        model.set_adapter(name)
        alone[name] = model(x)
        assert not torch.allclose(alone[name], base)
    model.set_adapter(["first", "second"])
    both = model(x)
    assert not any(torch.allclose(both, single) for single in alone.values())
    model.merge_adapter(["first"])  # the second goes on acting on the merged weight
    torch.testing.assert_close(model(x), both, rtol=1e-9, atol=1e-9)
    model.merge_adapter()
    torch.testing.assert_close(model(x), both, rtol=1e-9, atol=1e-9)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    model.unmerge_adapter()
    assert torch.equal(model(x), both)
    model.delete_adapter("first")
    assert torch.equal(model(x), alone["second"])
    assert torch.equal(model.unload()(x), base)


def test_every_method_on_one_layer_saved_and_loaded_together(tmp_path: Any) -> None:
    x = torch.randn(5, 12, dtype=torch.float64)
    model: Any = None
    for number, method in enumerate(MERGING):
        if model is None:
            model = get_peft_model(net(), EXAMPLES[method].make(target_modules=["0"]), method)
            randomise(model, EXAMPLES[method].spread)
        else:
            add(model, method, method, ["0"], seed=number)
    alone = {}
    for method in MERGING:
        model.set_adapter(method)
        alone[method] = model(x)
    model.set_adapter(MERGING)
    together = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), together, rtol=1e-7, atol=1e-7)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set(MERGING)

    fresh: Any = PeftModel.from_pretrained(net(), tmp_path / MERGING[0], MERGING[0])
    for method in MERGING[1:]:
        fresh.load_adapter(tmp_path / method, method)
    for method in MERGING:
        fresh.set_adapter(method)
        assert torch.equal(fresh(x), alone[method]), method
    fresh.set_adapter(MERGING)
    assert torch.equal(fresh(x), together)
    for method in MERGING:
        fresh.delete_adapter(method)
    assert torch.equal(fresh(x), net()(x)) and not adapter_set(fresh).layers


@pytest.mark.parametrize("method", [method for method in EXAMPLES if method not in MERGING])
def test_a_method_that_does_not_merge_acts_beside_one_that_does(method: str) -> None:
    x = torch.randn(5, 12, dtype=torch.float64)
    model = mixed("LORA", method)
    model.set_adapter(["first", "second"])
    both = model(x)
    model.merge_adapter(["first"])
    torch.testing.assert_close(model(x), both, rtol=1e-9, atol=1e-9)
