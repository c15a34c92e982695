"""After `set_start_subtraction("base")`, PiSSA and its relatives change the base weight, as in HF PEFT."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftcore
from peftcore import CheckpointError, LoraConfig, PeftModel, get_peft_model, initialize_from_data, set_start_subtraction

pytestmark = pytest.mark.filterwarnings("ignore:.init_lora_weights. is:UserWarning")  # EVA or CorDA by defaults

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
STARTS = ["pissa", "olora", "corda"]


@pytest.fixture(autouse=True)
def _base() -> Iterator[None]:
    set_start_subtraction("base")
    yield
    set_start_subtraction("adapter")


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))


def config(start: Any, **options: Any) -> LoraConfig:
    return LoraConfig(r=3, target_modules=["0", "1"], init_lora_weights=start, **options)


def started(start: str, **options: Any) -> Any:
    model = get_peft_model(net(), config(start, **options))
    if start == "corda":
        initialize_from_data(model, [{"input": X}], progress=False)
    return model


def trained(model: Any) -> Any:
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def close(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.allclose(x, y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("start", STARTS)
def test_the_start_is_subtracted_once_and_in_the_precision_of_the_base(start: str) -> None:
    layer = net()[0].double()  # at two paths
    base, x = nn.Sequential(layer, layer), X.double()
    before = base(x)
    model = get_peft_model(base, config(start))
    if start == "corda":
        initialize_from_data(model, [{"input": x}], progress=False)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("start", STARTS)
def test_the_base_weight_becomes_the_residual(start: str) -> None:
    base, model = net(), started(start)
    for layer, original in ((model[0], base[0]), (model[1], base[1])):
        assert not close(layer.base_layer.weight, original.weight)
        assert close(layer.base_layer.weight + layer.get_delta_weight("default"), original.weight)
        assert layer.adapters["default"].start is None
    assert close(model(X), base(X))
    expected = trained(model)(X)
    model.merge_adapter()
    assert close(model(X), expected)
    model.unmerge_adapter()
    assert close(model(X), expected)
    residual = [layer.base_layer.weight for layer in model]
    assert all(torch.equal(layer.weight, w) for layer, w in zip(model.unload(), residual, strict=True))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_base_and_adapter_are_those_of_hf_peft(start: Any) -> None:
    ours = started(start)
    theirs: Any = peft.get_peft_model(net(), peft.LoraConfig(r=3, target_modules=["0", "1"], init_lora_weights=start))
    for layer, other in zip(ours, theirs.base_model.model, strict=True):
        torch.testing.assert_close(layer.base_layer.weight, other.base_layer.weight)
        torch.testing.assert_close(layer.get_delta_weight("default"), other.get_delta_weight("default"))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_of_rank_r_is_saved_and_both_libraries_read_it(start: str, tmp_path: Path) -> None:
    model = trained(started(start))
    model.save_pretrained(tmp_path)
    assert not close(model(X), net()(X))
    for library in (PeftModel, peft.PeftModel):
        read: Any = library.from_pretrained(net(), str(tmp_path))
        assert close(read(X), model(X)) and read.peft_config["default"].r == 3
    set_start_subtraction("adapter")
    read = PeftModel.from_pretrained(net(), tmp_path)
    assert close(read(X), model(X)) and torch.equal(read[0].base_layer.weight, net()[0].weight)


def test_hf_pefts_script_for_pissa(tmp_path: Path) -> None:
    """The start and the base without it are saved, then trained together, then saved for the whole base."""
    model = started("pissa")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    resumed = PeftModel.from_pretrained(model.unload(), tmp_path / "start", is_trainable=True)
    assert close(resumed(X), net()(X)) and resumed.peft_config["default"].r == 3
    expected = trained(resumed)(X)
    resumed.save_pretrained(tmp_path / "whole", path_initial_model_for_weight_conversion=tmp_path / "start")
    read = PeftModel.from_pretrained(net(), tmp_path / "whole")
    assert close(read(X), expected) and read.peft_config["default"].r == 6


@pytest.mark.parametrize("options", [{"rank_pattern": {"0": 2}}, {"alpha_pattern": {"0": 5}}])
def test_the_conversion_is_exact_with_rslora_and_patterns(options: Any, tmp_path: Path) -> None:
    model = started("pissa", use_rslora=True, **options)
    model.save_pretrained(tmp_path / "start")
    expected = trained(model)(X)
    model.save_pretrained(tmp_path / "whole", path_initial_model_for_weight_conversion=tmp_path / "start")
    for library in (PeftModel, peft.PeftModel):
        read: Any = library.from_pretrained(net(), str(tmp_path / "whole"))
        assert close(read(X), expected)


def test_a_start_from_data_cannot_be_computed_again(tmp_path: Path) -> None:
    model = trained(started("corda"))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="fits only the base from which the start was subtracted"):
        read = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert not close(read(X), net()(X))


def test_another_adapter_on_a_changed_base_warns(tmp_path: Path) -> None:
    get_peft_model(net(), config(False)).save_pretrained(tmp_path / "plain")
    started("pissa").save_pretrained(tmp_path / "pissa")
    for first, second in (("plain", "pissa"), ("pissa", "plain")):
        model = PeftModel.from_pretrained(net(), tmp_path / first)
        with pytest.warns(UserWarning, match="the initialisation of '(default|b)' changed the base weights"):
            model.load_adapter(tmp_path / second, "b")


def test_a_start_stays_in_the_adapter_where_the_weight_is_not_the_bases_own() -> None:
    model = get_peft_model(net(), config(False), "merged")
    model.merge_adapter()
    model.add_adapter("pissa", config("pissa"))
    model.unmerge_adapter()
    assert model[0].adapters["pissa"].start is not None
    model.set_adapter("pissa")
    assert close(model(X), net()(X)) and torch.equal(model.unload()(X), net()(X))


def test_a_tied_weight_is_not_changed_for_the_other_layer() -> None:
    model = net()
    model.append(nn.Linear(8, 8))
    model[2].weight = model[0].weight
    original = copy.deepcopy(model[0].weight)
    adapted: Any = get_peft_model(model, LoraConfig(r=3, target_modules=["0"], init_lora_weights="pissa"))
    assert torch.equal(adapted[2].weight, original) and not close(adapted[0].base_layer.weight, original)


def test_tensors_with_a_start_do_not_fit_an_adapter_whose_start_is_in_the_base(tmp_path: Path) -> None:
    set_start_subtraction("adapter")
    started("pissa").save_pretrained(tmp_path)
    set_start_subtraction("base")
    model = started("pissa")
    with pytest.raises(CheckpointError):
        model.load_adapter_weights(tmp_path)


def test_another_word_is_refused_and_changes_nothing() -> None:
    with pytest.raises(peftcore.ConfigError, match='takes "adapter" or "base"; got '):
        set_start_subtraction("weight")  # type: ignore[arg-type]
    assert peftcore.get_start_subtraction() == "base"


def test_the_alias_chooses_the_base_and_imports_no_torch() -> None:
    code = (
        "import sys, peftcore; before = peftcore.get_start_subtraction(); import peftcore.as_peft;"
        "print(before, peftcore.get_start_subtraction(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["adapter", "base", "False"]
