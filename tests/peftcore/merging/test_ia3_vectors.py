"""The weighted sum of IA3 adapters is the IA3 that HF `peft` makes, and one adapter alone merges with its weight."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from peftcore import IA3Config, LoraConfig, MergeError, PeftModel, get_peft_model
from peftcore.injection.adapter_set import adapter_set

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft

TARGETS = ["k_proj", "v_proj", "down_proj"]


def vectors(model: Any, name: str) -> dict[str, Any]:
    return {
        path: adapter.get_parameter("ia3_l").detach() for path, adapter in adapter_set(model).adapters(name).items()
    }


@pytest.mark.parametrize("weights", [[0.5, 1.5], [-0.5, -0.8]])
def test_the_sum_of_two_is_that_of_peft(weights: list[float], llama: Any, tmp_path: Path) -> None:
    config = peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], init_ia3_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = peft.get_peft_model(llama(), config, "first")
        theirs.add_adapter("second", config)
        theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(llama(), tmp_path / "first", "first")
    ours.load_adapter(tmp_path / "second", "second")
    theirs.add_weighted_adapter(["first", "second"], weights, "sum")
    ours.add_weighted_adapter(["first", "second"], weights, "sum")
    assert isinstance(ours.peft_config["sum"], IA3Config)
    theirs.set_adapter("sum")
    ours.set_adapter("sum")
    x = torch.arange(6)[None]
    torch.testing.assert_close(ours.eval()(x).logits, theirs.eval()(x).logits)
    ours.save_pretrained(tmp_path / "ours", selected_adapters=["sum"])
    again = PeftModel.from_pretrained(llama(), tmp_path / "ours" / "sum").eval()
    torch.testing.assert_close(again(x).logits, ours(x).logits)


def test_a_layer_that_an_adapter_leaves_out_counts_as_one(llama: Any, with_adapters: Any) -> None:
    few, many = (
        IA3Config(target_modules=names, feedforward_modules=[]) for names in (["k_proj"], ["k_proj", "v_proj"])
    )
    model = with_adapters(llama(), a=few, b=many)
    report = model.add_weighted_adapter(["a", "b"], [0.25, 0.75], "sum", "linear")
    a, b, merged = (vectors(model, name) for name in ("a", "b", "sum"))
    assert merged.keys() == b.keys() and not any(report.errors.values())
    for path, vector in merged.items():
        torch.testing.assert_close(vector, 0.25 * a.get(path, torch.ones_like(vector)) + 0.75 * b[path])


def test_input_and_output_of_one_layer_are_refused(llama: Any, with_adapters: Any, refused: Any) -> None:
    configs = (IA3Config(target_modules=["down_proj"], feedforward_modules=names) for names in ([], ["down_proj"]))
    model = with_adapters(llama(), **dict(zip("ab", configs, strict=True)))
    refused(model, MergeError, "svd_rank", lambda: model.add_weighted_adapter(["a", "b"], [1, 1], "sum"))
    model.add_weighted_adapter(["a", "b"], [1, 1], "sum", svd_rank=2)
    assert isinstance(model.peft_config["sum"], LoraConfig)


def test_a_module_that_one_of_them_saved_is_copied(llama: Any) -> None:
    options: dict[str, Any] = {"target_modules": ["k_proj"], "feedforward_modules": []}
    model = get_peft_model(copy.deepcopy(llama()), IA3Config(**options, modules_to_save=["model.norm"]), "a")
    model.add_adapter("b", IA3Config(**options))
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum")
    assert model.peft_config["sum"].modules_to_save == ["model.norm"]
