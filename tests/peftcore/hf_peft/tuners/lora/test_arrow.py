"""A model with Arrow's router: HF PEFT's outputs and files, errors that leave the model as it was."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore import ConfigError, LoraConfig, PeftModel, create_arrow_model
from peftcore.errors import CheckpointError
from peftcore.hf_peft.tuners.lora.arrow import _resolve_adapter_source

X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def net() -> Any:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("loras")
    for number in range(4):
        base = net()
        torch.manual_seed(number + 1)
        config = peft.LoraConfig(
            r=3, lora_alpha=number + 2, target_modules=["first", "second"], init_lora_weights=False
        )
        with warnings.catch_warnings(action="ignore"):
            peft.get_peft_model(base, config).save_pretrained(str(folder / str(number)))
    return [str(folder / str(number)) for number in range(4)]


def both(loras: list[str], general: list[str] | None = None, **options: Any) -> list[Any]:
    return [
        library.create_arrow_model(net(), loras, library.ArrowConfig(**options), general)
        for library in (peft, peftcore)
    ]


@pytest.mark.filterwarnings("ignore")  # the oracle's
@pytest.mark.parametrize(
    "options",
    [
        {"rng_seed": 3},
        {"top_k": 1},
        {"top_k": 2, "router_temperature": 0.3},
        {"top_k": 2, "use_gks": True},
        {"top_k": 2, "use_gks": True, "rng_seed": 5},
    ],
    ids=str,
)
def test_outputs_and_random_numbers_are_those_of_peft(options: dict[str, Any], loras: list[str]) -> None:
    outputs = []
    for model in both(loras[:2] if "use_gks" in options else loras, loras[2:], **options):
        torch.manual_seed(4)
        with torch.no_grad():
            outputs.append((model(X), model(2 * X), torch.rand(1)))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the oracle's
def test_a_lora_that_is_loaded_later_joins_as_in_peft(loras: list[str]) -> None:
    outputs = []
    for model in both(loras[:2], loras[3:], use_gks=True, rng_seed=3, top_k=2):
        with torch.no_grad():
            model(X)
            model.load_adapter(loras[2], "later")
            outputs.append(model(X))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the oracle's
def test_the_files_are_those_of_peft_and_load_again(loras: list[str], tmp_path: Path) -> None:
    theirs, ours = both(loras[:2], loras[2:], use_gks=True, top_k=2, rng_seed=3)
    with torch.no_grad():
        expected = ours(X)
    for name, model in {"theirs": theirs, "ours": ours}.items():
        model.save_pretrained(str(tmp_path / name))
    saved = {name: tmp_path / name / "arrow_router" for name in ("theirs", "ours")}
    configs = {name: json.loads((path / "adapter_config.json").read_text()) for name, path in saved.items()}
    assert configs["ours"]["arrow_config"] == configs["theirs"]["arrow_config"]
    assert configs["ours"]["arrow_config"]["task_adapter_names"] == ["task_0", "task_1"]
    assert sorted(configs["ours"]["target_modules"]) == sorted(configs["theirs"]["target_modules"])
    tensors = {name: peftcore.load_peft_weights(str(path)) for name, path in saved.items()}
    assert {k: t.shape for k, t in tensors["ours"].items()} == {k: t.shape for k, t in tensors["theirs"].items()}
    for folder in ("theirs", "ours"):  # HF PEFT cannot load a router: it leaves the experts' names out
        model = PeftModel.from_pretrained(net(), saved[folder], adapter_name="arrow_router")
        for name in ("task_0", "task_1", "gks_0", "gks_1"):
            model.load_adapter(tmp_path / folder / name, adapter_name=name)
        assert model.active_adapters == ["arrow_router"]
        assert model.peft_config["arrow_router"].arrow_config.gks_adapter_names == ["gks_0", "gks_1"]
        with torch.no_grad():
            torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)


def test_the_given_options_get_the_names(loras: list[str]) -> None:
    options = peftcore.ArrowConfig(top_k=1)
    model = create_arrow_model(net(), loras[:2], options, autocast_adapter_dtype=False)
    assert (options.task_adapter_names, options.gks_adapter_names) == (["task_0", "task_1"], [])
    options.top_k = 2
    assert model.peft_config["arrow_router"].arrow_config.top_k == 1
    assert model.active_adapters == ["arrow_router"] and list(model.peft_config) == ["task_0", "task_1", "arrow_router"]


def test_arguments_without_effect_are_named(loras: list[str]) -> None:
    with pytest.warns(UserWarning, match="general_adapter_paths has no effect without use_gks=True"):
        create_arrow_model(net(), loras[:1], peftcore.ArrowConfig(top_k=1), loras[1:])
    with pytest.warns(UserWarning, match="dtype has no effect; autocast_adapter_dtype=False"):
        create_arrow_model(net(), loras[:1], peftcore.ArrowConfig(top_k=1), dtype=torch.float16)


def saved(folder: Path, model: nn.Module, **options: Any) -> str:
    peftcore.get_peft_model(model, LoraConfig(**options)).save_pretrained(folder)
    return str(folder)


def test_loras_that_do_not_fit_together_are_refused_and_the_model_stays(loras: list[str], tmp_path: Path) -> None:
    base = net().requires_grad_(True)
    base.second.bias.requires_grad = False
    base.second.eval()
    before = copy.deepcopy(base)
    both = ["first", "second"]
    other = {
        "rank mismatch at first": saved(tmp_path / "r", net(), r=2, target_modules=both),
        "target_modules mismatch": saved(tmp_path / "t", net(), r=3, target_modules=["first"]),
        "'task_1' at first is a variant": saved(tmp_path / "d", net(), r=3, target_modules=both, use_dora=True),
        "holds no adapter_config.json": str(tmp_path),
    }
    options = peftcore.ArrowConfig(top_k=1)
    for message, path in other.items():
        with pytest.raises(ConfigError, match=message):
            create_arrow_model(base, [loras[0], path], options)
    peftcore.get_peft_model(net(), peftcore.IA3Config(target_modules=both, feedforward_modules=[])).save_pretrained(
        tmp_path / "ia3"
    )
    with pytest.raises(ConfigError, match="'task_0' is no LoRA, but IA3"):
        create_arrow_model(base, [str(tmp_path / "ia3")], options)
    with pytest.raises(CheckpointError):
        create_arrow_model(base, [loras[0], "no_such/repository/folder"], options, local_files_only=True)
    assert type(base) is Net and str(base) == str(before) and options == peftcore.ArrowConfig(top_k=1)
    for part, was in zip(base.modules(), before.modules(), strict=True):
        assert part.training == was.training
    for parameter, was in zip(base.parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, was) and parameter.requires_grad == was.requires_grad


def test_what_is_missing_is_named(loras: list[str]) -> None:
    with pytest.raises(ConfigError, match="task_specific_adapter_paths is empty"):
        create_arrow_model(net(), [], peftcore.ArrowConfig())
    with pytest.raises(ConfigError, match="use_gks=True needs LoRAs to subtract"):
        create_arrow_model(net(), loras, peftcore.ArrowConfig(use_gks=True))
    model = create_arrow_model(net(), loras[:1], peftcore.ArrowConfig(top_k=1))
    with pytest.raises(ConfigError, match="the model has adapters already"):
        create_arrow_model(model, loras[:1], peftcore.ArrowConfig(top_k=1))


def test_layers_that_are_not_linear_are_a_type_error(tmp_path: Path) -> None:
    path = saved(tmp_path, nn.Sequential(nn.Conv2d(3, 4, 1)), r=2, target_modules=["0"])
    with pytest.raises(TypeError, match="Arrow routes LoRAs of linear layers; 'task_0' adapts 0, which is Conv2d"):
        create_arrow_model(nn.Sequential(nn.Conv2d(3, 4, 1)), [path], peftcore.ArrowConfig())


def test_a_router_has_the_layers_of_its_loras_only(tmp_path: Path) -> None:
    def blocks() -> Any:
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4)), "b": nn.Sequential(nn.Linear(4, 4))})

    path = saved(tmp_path, blocks(), r=2, target_modules=["a.0"])
    model = create_arrow_model(blocks(), [path], peftcore.ArrowConfig())
    assert model.peft_config["arrow_router"].target_modules == {"a.0"}


def test_a_source_is_a_folder_a_repository_or_a_folder_of_one(loras: list[str]) -> None:
    assert _resolve_adapter_source(loras[0]) == (loras[0], None)
    assert _resolve_adapter_source("user/repository") == ("user/repository", None)
    assert _resolve_adapter_source("user/repository/a/b/") == ("user/repository", "a/b")
