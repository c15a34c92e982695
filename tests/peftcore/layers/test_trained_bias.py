"""`bias="all"` and `bias="lora_only"`: trained biases belong to their adapter, and the base stays the base."""

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_parity import agrees_with_peft
from method_example import examples, randomise
from quantised_layers import quantised
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from peftcore import (
    CheckpointError,
    ConfigError,
    LoraConfig,
    PeftModel,
    RoutingError,
    TargetError,
    get_peft_model,
)
from peftcore.conversion import add_as_lora
from peftcore.files import MANIFEST
from peftcore.files.tensors import WEIGHTS_NAME
from peftcore.injection.adapter_set import adapter_set
from peftcore.routing import AdapterStore
from peftcore.train.reference import reference_acting

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft


class Doubled(nn.Linear):
    """A linear layer whose forward does more than add its bias."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Reader(nn.Module):
    """Reads a layer's weight and bias and never calls the layer, as Mamba does."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.read.weight, self.read.bias)


class Offset(nn.Module):
    """A module of unknown kind with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.bias)


PLAIN = {"linear": lambda: nn.Linear(6, 6), "norm": lambda: nn.LayerNorm(6), "doubled": lambda: Doubled(6, 6)}
WHOLE = {"read": Reader, "offset": Offset}
"""Modules whose bias is one for all rows of a batch."""


def net(*kinds: str) -> Any:
    torch.manual_seed(0)
    made = [{**PLAIN, **WHOLE}[kind]() for kind in kinds]
    return nn.Sequential(nn.Linear(6, 6), *made).double().eval()


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": list(targets or ["0"]), "init_lora_weights": False, **options})


X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kinds", [[*PLAIN], [*WHOLE], [*PLAIN, *WHOLE]], ids="+".join)
@pytest.mark.parametrize("mode", ["all", "lora_only"])
def test_the_base_never_sees_them(mode: str, kinds: list[str]) -> None:
    base = net(*kinds)
    expected = base(X)
    model = get_peft_model(copy.deepcopy(base), lora(bias=mode))
    model.add_adapter("other", lora())
    alone = get_peft_model(copy.deepcopy(base), lora())
    randomise(model, 0.3)
    adapted = model(X)
    with torch.no_grad():
        for mine, theirs in zip(
            adapter_set(alone).adapters("default").values(), adapter_set(model).adapters("other").values(), strict=True
        ):
            mine.load_state_dict(theirs.state_dict())
    with model.disable_adapter():
        assert torch.equal(model(X), expected)
    with model.route(None):
        assert torch.equal(model(X), expected)
    with reference_acting(model):
        assert torch.equal(model(X), expected)
    with model.route("other"):
        torch.testing.assert_close(model(X), alone(X), rtol=1e-12, atol=1e-12)
    model.set_adapter("other")
    torch.testing.assert_close(model(X), alone(X), rtol=1e-12, atol=1e-12)
    model.set_adapter("default")
    assert torch.equal(model(X), adapted)
    model.merge_adapter()
    torch.testing.assert_close(model(X), adapted, rtol=1e-12, atol=1e-12)
    with model.disable_adapter():
        assert torch.equal(model(X), expected)
    model.unmerge_adapter()
    assert torch.equal(model(X), adapted)
    kept = copy.deepcopy(model)
    model.set_adapter([])
    model.delete_adapter("default")
    assert torch.equal(model(X), expected)
    assert torch.equal(copy.deepcopy(kept).unload()(X), expected)
    torch.testing.assert_close(kept.merge_and_unload()(X), adapted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["all", "lora_only"])
def test_rows_of_a_batch_each_have_their_own(mode: str) -> None:
    model = get_peft_model(net(*PLAIN), lora(bias=mode), "a")
    model.add_adapter("b", lora(bias=mode))
    model.add_adapter("c", lora())
    randomise(model, 0.3)
    given: list[Any] = ["a", None, "b", "c", {"a": 0.5, "b": 2.0}, "a"]
    x = torch.randn(len(given), 6, dtype=torch.float64)
    alone = []
    for row, one in zip(x, given, strict=True):
        with model.route(one):
            alone.append(model(row[None]))
    with model.route(given):
        torch.testing.assert_close(model(x), torch.cat(alone), rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(model(x), torch.cat(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_bias_that_is_one_for_all_rows_is_refused_in_a_mixed_batch(kind: str) -> None:
    model = get_peft_model(net(kind), lora(bias="all"))
    with model.route(["default", None, "default"]), pytest.raises(RoutingError, match=r"for all rows of a batch"):
        model(X)


def test_several_that_train_biases_add_their_changes() -> None:
    base = net(*PLAIN, *WHOLE)
    model = get_peft_model(copy.deepcopy(base), lora(bias="all"), "a")
    model.add_adapter("b", lora("1", bias="lora_only"))
    randomise(model, 0.3)
    model.set_adapter(["a", "b"])
    both = model(X)
    biases = [adapter_set(model).biases(name)["1"].bias for name in ("a", "b")]
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(X), both, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged[1].bias, biases[0] + biases[1] - base[1].bias)


def test_the_same_gradients_as_a_base_that_trains() -> None:
    """What PEFT trains: the base's own parameters."""
    base = net(*PLAIN, *WHOLE)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["0"], bias="all"))
    base(X).square().sum().backward()
    model(X).square().sum().backward()
    trained = {name: own.bias for name, own in adapter_set(model).biases("default").items()}
    assert set(trained) == {"0", "1", "2", "3", "4.read", "5.bias"}
    for path, bias in trained.items():
        torch.testing.assert_close(bias.grad, base.get_parameter(f"{path.removesuffix('.bias')}.bias").grad)
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "base_layer" in name]


WITH_BIASES = [
    (method, mode)
    for method, example in examples().items()
    if "bias" in {field.name for field in dataclasses.fields(example.make())} and not example.whole_model
    for mode in ("all", "_only")
]


@pytest.mark.parametrize("method, mode", WITH_BIASES)
def test_every_method_that_trains_biases(method: str, mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8)).double(), torch.randn(3, 12).double()
    expected = base(x)
    named = {"MISS": "MiSS", "FOURIERFT": "fourier", "ADALORA": "lora"}.get(method, method.lower())
    wanted = f"{named}_only" if mode == "_only" else mode
    model = get_peft_model(copy.deepcopy(base), examples()[method].make(target_modules=["0"], bias=wanted))
    with torch.no_grad():
        for own in adapter_set(model).biases("default").values():
            own.bias.add_(torch.arange(8))
    adapted = model.eval()(x)
    assert not torch.allclose(adapted, expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), adapted)
    if examples()[method].merges:
        torch.testing.assert_close(model.merge_and_unload()(x), adapted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("storage", ["nf4", "int8", "Q4_1"])
def test_merging_a_bias_alone_leaves_the_codes_of_a_quantised_layer(storage: str) -> None:
    torch.manual_seed(0)
    layer: Any = quantised(storage)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64), layer), LoraConfig(target_modules=["0"], bias="all"))
    randomise(model, 0.3)
    weight, before = layer.weight, layer.bias.clone()
    trained = adapter_set(model).biases("default")["1"].bias
    model.merge_adapter()
    assert (
        layer.weight is weight and torch.equal(layer.bias, trained.to(layer.bias)) and not torch.equal(before, trained)
    )
    model.unmerge_adapter()
    assert torch.equal(layer.bias, before)


# -- disk ----------------------------------------------------------------------------------------------------------


def bert(kind: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return kind(BertConfig(vocab_size=30, **sizes)).eval()


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize("mode", ["all", "lora_only"])
@pytest.mark.parametrize("kind, task", [(BertForMaskedLM, None), (BertForSequenceClassification, "SEQ_CLS")])
def test_peft_reads_and_writes_the_same_keys(kind: Any, task: str | None, mode: str, tmp_path: Path) -> None:
    """Tied biases (a masked LM's head) stand twice, a head that trains in full has its own."""
    tokens, options = (
        torch.tensor([[1, 2, 3, 4]]),
        {"r": 2, "target_modules": ["query"], "bias": mode, "task_type": task},
    )
    theirs = peft.get_peft_model(bert(kind), peft.LoraConfig(**options)).eval()
    ours = get_peft_model(bert(kind), LoraConfig(**options)).eval()
    for model in (theirs, ours):
        randomise(model, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    keys = [set(load_file(tmp_path / name / WEIGHTS_NAME)) for name in ("theirs", "ours")]
    assert keys[1] == {key for key in keys[0] if ".original_module." not in key and ".modules_to_save." not in key}
    here = PeftModel.from_pretrained(bert(kind), tmp_path / "theirs")
    there = peft.PeftModel.from_pretrained(bert(kind), tmp_path / "ours").eval()
    torch.testing.assert_close(here(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(there(tokens).logits, ours(tokens).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(here(tokens).logits, bert(kind)(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("mode", ["all", "lora_only"])
def test_a_layer_computes_what_it_does_in_peft(mode: str, options: dict[str, Any], tmp_path: Path) -> None:
    for number, layer in enumerate((nn.Linear(6, 8), nn.Conv1d(6, 8, 1))):
        x = torch.randn(3, 6) if number == 0 else torch.randn(2, 6, 5)
        given = {"r": 2, "bias": mode, **options}
        agrees_with_peft(layer, x, "LoraConfig", LoraConfig, given, tmp_path / str(number))


@pytest.mark.parametrize("damage", ["(1,)", "(5,)", "missing"])
@pytest.mark.parametrize("key", ["0.base_layer.bias", "1.bias", "3.bias"])
def test_a_bias_that_does_not_fit_changes_nothing(key: str, damage: str, tmp_path: Path) -> None:
    base = net("norm", "linear", "offset")
    get_peft_model(copy.deepcopy(base), lora(bias="all")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    bias = tensors.pop(f"base_model.model.{key}")
    if damage != "missing":
        tensors[f"base_model.model.{key}"] = bias.repeat(2)[: 1 if damage == "(1,)" else 5]
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    (tmp_path / MANIFEST).unlink()
    model, said = copy.deepcopy(base), "missing" if damage == "missing" else "another base"
    before, modules = copy.deepcopy(base.state_dict()), dict(model.named_modules())
    with pytest.raises(CheckpointError, match=said):
        PeftModel.from_pretrained(model, tmp_path)
    assert dict(model.named_modules()) == modules and type(model) is nn.Sequential
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    adapted = get_peft_model(copy.deepcopy(base), lora(bias="all"))
    before = copy.deepcopy(adapted.state_dict())
    with pytest.raises(CheckpointError, match=said):
        adapted.load_adapter_weights(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


def test_biases_of_a_layer_that_another_adapter_adapts_keep_their_key(tmp_path: Path) -> None:
    model = get_peft_model(net("linear"), lora("1"), "other")
    model.add_adapter("default", lora("0", bias="all"))
    randomise(model, 0.3)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert "base_model.model.1.bias" in load_file(tmp_path / WEIGHTS_NAME)
    model.set_adapter("default")
    assert torch.equal(PeftModel.from_pretrained(net("linear"), tmp_path)(X), model(X))


def test_a_store_serves_them_beside_others(tmp_path: Path) -> None:
    made = {"biased": lora(bias="all"), "plain": lora()}
    for name, config in made.items():
        model = get_peft_model(net("norm"), config)
        randomise(model, 0.3)
        model.save_pretrained(tmp_path / name)
    model = net("norm")
    base, store = model(X), AdapterStore(model)
    store.register_directory(tmp_path)
    alone = {name: PeftModel.from_pretrained(net("norm"), tmp_path / name)(X) for name in made}
    with store.route(["biased", None, "plain"]):
        rows = model(X)
    expected = torch.stack([alone["biased"][0], base[1], alone["plain"][2]])
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-12)


def test_a_conversion_keeps_them() -> None:
    model = get_peft_model(net("norm"), lora(bias="all"))
    randomise(model, 0.3)
    adapted = model(X)
    add_as_lora(model, "default", "plain")
    model.set_adapter("plain")
    torch.testing.assert_close(model(X), adapted, rtol=1e-6, atol=1e-6)


# -- modules that are trained in full ----------------------------------------------------------------------------------


def test_modules_trained_whole_exclude_trained_biases_of_another_adapter() -> None:
    model = get_peft_model(net("linear"), lora("0", modules_to_save=["1"]))
    with pytest.raises(ConfigError, match=r"bias='all': 1 is trained in full \(modules_to_save\) by another adapter"):
        model.add_adapter("b", lora("0", bias="all"))
    model.add_adapter("b", lora("0", bias="all", modules_to_save=["1"]))
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6))), lora("0", bias="all"))
    with pytest.raises(TargetError, match=r"\['1'\] already have an adapter"):
        model.add_adapter("b", lora("0", modules_to_save=["1"]))
