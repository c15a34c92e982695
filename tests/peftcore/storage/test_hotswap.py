"""A loaded LoRA is exchanged for a saved one, with the outputs of HF PEFT and without compiling again."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import hotswap as of_peft
from torch import Tensor, nn
from torch._dynamo.exc import RecompileError

from peftcore import (
    AdapterNameError,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peftcore.errors import HotswapError
from peftcore.hf_peft.utils import get_peft_model_state_dict
from peftcore.storage.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)

X = torch.linspace(-1, 1, 40).reshape(4, 10)
ALL = ["first", "conv", "last"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 16)
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 4, 1, groups=2)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        image = self.first(x).relu().view(-1, 1, 4, 4)
        return self.last(self.grouped(self.conv(image)).mean(1).flatten(1))


@pytest.fixture(scope="module")
def base() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def saved(base: nn.Module, directory: Path, seed: int = 1, **options: Any) -> tuple[Path, Tensor]:
    """Save an adapter by HF PEFT, and return its directory and its output."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(init_lora_weights=False, **{"target_modules": ALL, **options})
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    model.save_pretrained(str(directory))
    return directory, output(model)


def output(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(X)


def loaded(base: nn.Module, directory: Path) -> Any:
    return PeftModel.from_pretrained(copy.deepcopy(base), directory)


OTHERS = {
    "larger rank and another alpha": {"r": 9, "lora_alpha": 5},
    "smaller rank": {"r": 2, "lora_alpha": 6},
    "patterns": {"r": 3, "rank_pattern": {"first": 6}, "alpha_pattern": {"conv": 11}},
    "fewer layers": {"r": 2, "target_modules": ["conv"]},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.parametrize("target_rank", [None, 12])
def test_the_output_becomes_that_of_the_saved_adapter(
    base: Net, tmp_path: Path, options: dict[str, Any], target_rank: int | None
) -> None:
    first, before = saved(base, tmp_path / "first", r=4, lora_alpha=8)
    other, after = saved(base, tmp_path / "other", seed=2, **options)
    model = loaded(base, first)
    if target_rank is not None:
        prepare_model_for_compiled_hotswap(model, target_rank=target_rank)
    for directory, expected in ((first, before), (other, after), (first, before)):
        hotswap_adapter(model, directory, "default")
        torch.testing.assert_close(output(model), expected)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS.keys())
def test_an_exchanged_adapter_can_be_saved(base: Net, tmp_path: Path, options: dict[str, Any]) -> None:
    first, _ = saved(base, tmp_path / "first", r=4, lora_alpha=8)
    other, after = saved(base, tmp_path / "other", seed=2, **options)
    model = loaded(base, first)
    prepare_model_for_compiled_hotswap(model, target_rank=12)
    hotswap_adapter(model, other, "default")
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(output(loaded(base, tmp_path / "again")), after)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "again")).eval()
    torch.testing.assert_close(output(again), after)


def test_a_compiled_model_is_not_compiled_again(base: Net, tmp_path: Path) -> None:
    first, before = saved(base, tmp_path / "first", r=7, lora_alpha=7)
    other, after = saved(base, tmp_path / "other", seed=2, r=12, lora_alpha=30, target_modules=["first", "conv"])
    model = loaded(base, first)
    prepare_model_for_compiled_hotswap(model, target_rank=12, config=model.peft_config)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(output(compiled), before)
        for directory, expected in ((other, after), (first, before), (other, after)):
            hotswap_adapter(compiled, directory, adapter_name="default")
            torch.testing.assert_close(output(compiled), expected)


@pytest.mark.parametrize("options", [{"r": 12}, {"r": 4, "lora_alpha": 9}], ids=["rank", "scaling"])
def test_without_preparation_it_is_compiled_again(base: Net, tmp_path: Path, options: dict[str, Any]) -> None:
    first, _ = saved(base, tmp_path / "first", r=4, lora_alpha=8)
    other, _ = saved(base, tmp_path / "other", seed=2, **options)
    compiled: Any = torch.compile(loaded(base, first), backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        output(compiled)
        hotswap_adapter(compiled, other, "default")
        with pytest.raises(RecompileError):
            output(compiled)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
def test_grouped_convolutions(base: Net, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["grouped"]}
    first, before = saved(base, tmp_path / "first", r=4, **options)
    other, after = saved(base, tmp_path / "other", seed=2, r=6, **options)
    model = loaded(base, first)
    prepare_model_for_compiled_hotswap(model, target_rank=10)
    torch.testing.assert_close(output(model), before)
    hotswap_adapter(model, other, "default")
    torch.testing.assert_close(output(model), after)
    with pytest.raises(HotswapError, match="target_rank=15 is not a multiple of the 2 groups of grouped; try 16"):
        prepare_model_for_compiled_hotswap(model, target_rank=15)


def test_dora_and_saved_modules_are_exchanged(base: Net, tmp_path: Path) -> None:
    options: dict[str, Any] = {"use_dora": True, "target_modules": ["first", "conv"], "modules_to_save": ["last"]}
    first, _ = saved(base, tmp_path / "first", r=4, **options)
    other, after = saved(base, tmp_path / "other", seed=2, r=3, **options)
    model = loaded(base, first)
    hotswap_adapter(model, other, "default")
    torch.testing.assert_close(output(model), after)


def test_a_dora_layer_that_is_left_out_computes_what_the_base_does(base: Net, tmp_path: Path) -> None:
    first, _ = saved(base, tmp_path / "first", use_dora=True, target_modules=["first", "last"])
    other, after = saved(base, tmp_path / "other", seed=2, use_dora=True, target_modules=["first"])
    model = loaded(base, first)
    hotswap_adapter(model, other, "default")
    torch.testing.assert_close(output(model), after)


def test_training_goes_on_after_an_exchange(base: Net, tmp_path: Path) -> None:
    first, _ = saved(base, tmp_path / "first", r=4)
    other, after = saved(base, tmp_path / "other", seed=2, r=3, lora_alpha=1)
    model = PeftModel.from_pretrained(copy.deepcopy(base), first, is_trainable=True)
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    hotswap_adapter(model, other, "default")
    loss = model(X).square().sum()
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(loss, after.square().sum())
    assert model(X).square().sum() < loss


def test_an_embedding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4))
    tokens, outputs = torch.tensor([[1, 4, 7, 2]]), []
    for number, rank in enumerate((2, 5)):
        torch.manual_seed(number)
        config = peft.LoraConfig(r=rank, target_modules=["0", "1"], init_lora_weights=False)
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()
        model.save_pretrained(str(tmp_path / str(number)))
        outputs.append(model(tokens).detach())
    model = PeftModel.from_pretrained(base, tmp_path / "0")
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    for number in (0, 1, 0):
        hotswap_adapter(model, tmp_path / str(number), "default")
        torch.testing.assert_close(model(tokens), outputs[number])


def test_a_state_dict_with_the_adapters_name_in_its_keys(base: Net, tmp_path: Path) -> None:
    """diffusers gives keys with the adapter's name, of a model whose class is unchanged."""
    first, _ = saved(base, tmp_path / "first", r=4)
    other, after = saved(base, tmp_path / "other", seed=2, r=3, lora_alpha=1)
    model, donor = loaded(base, first), loaded(base, other)
    tensors = get_peft_model_state_dict(donor)
    named = {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}
    hotswap_adapter_from_state_dict(model, named, "default", donor.peft_config["default"])
    torch.testing.assert_close(output(model), after)
    with pytest.raises(HotswapError, match="parameter_prefix must be 'lora_'"):
        hotswap_adapter_from_state_dict(model, named, "default", donor.peft_config["default"], "ia3_")


REFUSED = {
    "use_rslora": {"use_rslora": True},
    "lora_dropout": {"lora_dropout": 0.1},
    "use_dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "modules_to_save": {"target_modules": ["first", "conv"], "modules_to_save": ["last"]},
}


@pytest.mark.parametrize(("name", "options"), REFUSED.items(), ids=REFUSED.keys())
def test_an_option_that_differs_is_named(base: Net, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    first, before = saved(base, tmp_path / "first", r=4)
    other, _ = saved(base, tmp_path / "other", seed=2, r=4, **options)
    model = loaded(base, first)
    with pytest.raises(HotswapError, match=f"^the loaded adapter has {name}="):
        hotswap_adapter(model, other, "default")
    torch.testing.assert_close(output(model), before)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(first))
    with pytest.raises((ValueError, RuntimeError, KeyError)):
        of_peft.hotswap_adapter(theirs, str(other), "default")


def test_what_cannot_be_exchanged(base: Net, tmp_path: Path) -> None:
    few, before = saved(base, tmp_path / "few", target_modules=["first"])
    more, _ = saved(base, tmp_path / "more")
    ia3 = get_peft_model(copy.deepcopy(base), IA3Config(target_modules=["first"], feedforward_modules=[]))
    ia3.save_pretrained(tmp_path / "ia3")
    model = loaded(base, few)
    with pytest.raises(HotswapError, match=r"no place: base_model\.model\.conv\.lora_A\.weight"):
        hotswap_adapter(model, more, "default")
    with pytest.raises(HotswapError, match="got LORA and IA3"):
        hotswap_adapter(model, tmp_path / "ia3", "default")
    with pytest.raises(AdapterNameError, match="Adapter other does not exist; loaded: default"):
        hotswap_adapter(model, few, "other")
    with pytest.raises(TypeError, match="has no option 'subfolders'; did you mean 'subfolder'"):
        hotswap_adapter(model, few, "default", subfolders="x")
    with pytest.raises(HotswapError, match="does not fit the layer"):
        tensors = {key: torch.zeros(8, 8) for key in get_peft_model_state_dict(model)}
        hotswap_adapter_from_state_dict(model, tensors, "default", model.peft_config["default"])
    with pytest.raises(HotswapError, match="the state dict lacks tensors"):
        hotswap_adapter_from_state_dict(model, {}, "default", model.peft_config["default"])
    torch.testing.assert_close(output(model), before)
    model.merge_adapter()
    with pytest.raises(HotswapError, match="merged into the base"):
        hotswap_adapter(model, few, "default")


def test_a_start_that_is_subtracted_from_the_base_is_refused(base: Net, tmp_path: Path) -> None:
    first, _ = saved(base, tmp_path / "first", r=2, target_modules=["first"])
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["first"], init_lora_weights="pissa"))
    with pytest.raises(HotswapError, match="init_lora_weights='pissa' changes the base"):
        hotswap_adapter(model, first, "default")


# -- preparation -----------------------------------------------------------------------------------------------------


def test_preparation_changes_no_output_and_keeps_what_trains(base: Net) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=ALL, rank_pattern={"last": 2}, init_lora_weights=False, use_rslora=True)
    model = get_peft_model(copy.deepcopy(base), config)
    before, parameters = output(model), dict(model.named_parameters())
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=config)
    torch.testing.assert_close(output(model), before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {
        name: p.requires_grad for name, p in parameters.items()
    }
    assert all(layer.lora_A["default"].weight.shape[0] == 8 for layer in (model.first, model.conv, model.last))
    assert isinstance(model.first.scaling["default"], Tensor)
    assert (config.r, config.rank_pattern) == (8, {"last": 8})
    assert (model.peft_config["default"].r, model.peft_config["default"].rank_pattern) == (8, {"last": 8})


def test_a_tensor_scaling_acts_as_a_number_does(base: Net, tmp_path: Path) -> None:
    from peftcore.hf_peft.helpers import rescale_adapter_scale

    first, before = saved(base, tmp_path / "first", r=4, lora_alpha=8)
    plain, prepared = loaded(base, first), loaded(base, first)
    prepare_model_for_compiled_hotswap(prepared)
    with rescale_adapter_scale(plain, 0.3), rescale_adapter_scale(prepared, 0.3):
        torch.testing.assert_close(output(prepared), output(plain))
    torch.testing.assert_close(output(prepared), before)
    for model in (plain, prepared):
        model.first.set_scale("default", 3)
        model.conv.scale_layer(0.5)
        model.last.scaling["default"] = 0.25
    torch.testing.assert_close(output(prepared), output(plain))
    for model in (plain, prepared):
        model.conv.unscale_layer()
    torch.testing.assert_close(output(prepared), output(plain))
    torch.testing.assert_close(output(copy.deepcopy(prepared)), output(plain))
    assert prepared.half().first.scaling["default"].dtype == torch.float32, "16 bits would round the scaling"
    torch.testing.assert_close(output(prepared.float().merge_and_unload()), output(plain.half().float()))


def test_wrong_arguments_of_the_preparation(base: Net) -> None:
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["first"]))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(HotswapError, match="first has rank 4, which is larger than target_rank=3"):
        prepare_model_for_compiled_hotswap(model, target_rank=3)
    with pytest.raises(HotswapError, match="must be a positive integer or None; got 0"):
        prepare_model_for_compiled_hotswap(model, target_rank=0)
    with pytest.raises(HotswapError, match="check_compiled must be"):
        prepare_model_for_compiled_hotswap(model, check_compiled="no")  # type: ignore[arg-type]
    with pytest.raises(AdapterNameError, match="has no adapters"):
        prepare_model_for_compiled_hotswap(copy.deepcopy(base), target_rank=3)
    ia3 = get_peft_model(copy.deepcopy(base), IA3Config(target_modules=["first"], feedforward_modules=[]))
    with pytest.raises(HotswapError, match="the model has no LoRA"):
        prepare_model_for_compiled_hotswap(ia3, target_rank=3)
    with pytest.warns(UserWarning, match="config has no effect without target_rank"):
        prepare_model_for_compiled_hotswap(model, config=model.peft_config)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_a_compiled_model_is_refused(base: Net) -> None:
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["first"]))
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(HotswapError, match=r"before torch\.compile"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.warns(UserWarning, match=r"before torch\.compile"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
    prepare_model_for_compiled_hotswap(compiled, target_rank=16, check_compiled="ignore")
    assert model.first.lora_A["default"].weight.shape[0] == 16
    model.compile(backend="eager")
    with pytest.raises(HotswapError, match=r"before torch\.compile"):
        prepare_model_for_compiled_hotswap(model)


def test_of_several_configurations_only_those_of_loras_get_the_rank(base: Net) -> None:
    torch.manual_seed(0)
    lora, loha = LoraConfig(r=3, target_modules=["first"]), LoHaConfig(r=2, target_modules=["last"])
    model = get_peft_model(copy.deepcopy(base), lora, "a")
    model.add_adapter("ia3", IA3Config(target_modules=["first"], feedforward_modules=[]))
    model.add_adapter("loha", loha)
    before = copy.deepcopy(model.state_dict())
    for wrong in (IA3Config(target_modules=["first"]), "loha"):
        with pytest.raises(HotswapError, match=r"config must be a LoraConfig, or a mapping"):
            prepare_model_for_compiled_hotswap(model, target_rank=8, config=wrong)  # type: ignore[arg-type]
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    assert model.peft_config["a"].r == 8 and (model.peft_config["loha"].r, loha.r) == (2, 2)
    assert not hasattr(model.peft_config["ia3"], "r")


def test_the_configurations_of_a_model_that_keeps_its_class(base: Net) -> None:
    model: Any = inject_adapter_in_model(LoraConfig(r=3, target_modules=["first"]), copy.deepcopy(base))
    further = LoraConfig(r=4, target_modules=["last"], rank_pattern={"last": 2})
    inject_adapter_in_model(further, model, "b")
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    assert model.peft_config["b"].rank_pattern == {"last": 8}
