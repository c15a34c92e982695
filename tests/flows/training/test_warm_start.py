"""Training that continues from a registered version's adapter."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flows.errors import StageError
from flows.params import Params
from flows.paths import Paths
from flows.stages import train
from flows.training.warm_start import SHAPE, continue_adapter, starts_warm
from peftcore import IA3Config, LoHaConfig, LoraConfig, get_peft_model

ACROSS = {"r": 4, "lora_alpha": 8.0, "target_modules": ["0", "1"]}


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


@pytest.fixture
def start(tmp_path: Path) -> Paths:
    """Paths whose start stage left an adapter of rank 4 with random weights, that of v0.3.0."""
    paths = Paths(tmp_path)
    config = LoraConfig(**ACROSS, init_lora_weights=False)
    get_peft_model(small_model(), config).save_pretrained(paths.start_adapter)
    paths.start_source.write_text(json.dumps({"version": "v0.3.0"}))
    return paths


def test_the_adapter_is_the_registered_one_and_can_be_trained(start: Paths, tmp_path: Path) -> None:
    model = continue_adapter(Params(), start, small_model(), LoraConfig(**ACROSS))
    model.save_pretrained(tmp_path / "again")
    saved, again = (load_file(at / "adapter_model.safetensors") for at in (start.start_adapter, tmp_path / "again"))
    torch.testing.assert_close(again, saved, rtol=0, atol=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(map(torch.numel, trained)) == sum(map(torch.numel, saved.values())) > 0


@pytest.mark.parametrize(
    ("option", "value", "difference"),
    [
        ("r", 8, "r 4 there and 8 here"),
        ("lora_alpha", 32.0, "lora_alpha 8.0 there and 32.0 here"),
        ("use_rslora", True, "use_rslora False there and True here"),
        ("use_dora", True, "use_dora False there and True here"),
    ],
)
def test_another_shape_or_scaling_is_refused_with_both_values(
    start: Paths, option: str, value: Any, difference: str
) -> None:
    assert option in SHAPE
    config = LoraConfig(**ACROSS | {option: value})
    with pytest.raises(StageError, match=re.escape(f"v0.3.0 has {difference};")):
        continue_adapter(Params(), start, small_model(), config)


def test_another_method_is_refused(start: Paths) -> None:
    with pytest.raises(StageError, match=r"method LORA there and IA3 here, r 4 there and None here"):
        continue_adapter(Params(), start, small_model(), IA3Config(target_modules=["0"], feedforward_modules=[]))


def test_the_scaling_of_other_methods_is_compared_too(start: Paths) -> None:
    options: dict[str, Any] = {"r": 4, "target_modules": ["0", "1"]}
    shutil.rmtree(start.start_adapter)
    get_peft_model(small_model(), LoHaConfig(**options, alpha=8)).save_pretrained(start.start_adapter)
    params = Params.model_validate({"method": {"name": "loha", "lora_dropout": None}})
    with pytest.raises(StageError, match=r"v0.3.0 has alpha 8.* there and 32.* here;"):
        continue_adapter(params, start, small_model(), LoHaConfig(**options, alpha=32))


@pytest.mark.parametrize("targets", [["0"], "1"])
def test_other_layers_are_refused(start: Paths, targets: Any) -> None:
    config = LoraConfig(**ACROSS | {"target_modules": targets})
    with pytest.raises(StageError, match=r"v0.3.0 adapts 2 layers, and method.target_modules names 1; [01] is one"):
        continue_adapter(Params(), start, small_model(), config)


def test_the_dropout_is_that_of_the_parameters(start: Paths) -> None:
    config = LoraConfig(**ACROSS | {"target_modules": "[01]", "lora_dropout": 0.5})  # the same layers in other words
    model = continue_adapter(Params(), start, small_model(), config)
    assert model.peft_config["default"].lora_dropout == 0.5
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    inputs = torch.ones(4, 6)
    assert 0.5 in rates or not torch.equal(model(inputs), model(inputs))


def test_searched_ranks_are_those_of_the_registered_adapter(start: Paths) -> None:
    params = Params.model_validate({"method": {"r": "auto"}})
    model = continue_adapter(params, start, small_model(), LoraConfig(r=16, target_modules=["0", "1"]))
    assert model.peft_config["default"].r == 4


def test_without_an_adapter_of_the_start_stage_a_run_starts_anew(start: Paths) -> None:
    assert starts_warm(start)
    shutil.rmtree(start.start_adapter)
    assert not starts_warm(start)


def first_loss(paths: Paths) -> float:
    return json.loads(paths.training_log.read_text().splitlines()[0])["loss"]


def test_it_goes_on_from_an_adapter_that_the_start_stage_left(trained: Paths, tiny_params) -> None:
    anew = first_loss(trained)
    shutil.copytree(trained.adapter, trained.start_adapter)
    trained.start_source.write_text('{"version": "v0.3.0"}')
    train.run(tiny_params(train={"learning_rate": 1e-5}), trained)
    assert first_loss(trained) < anew - 0.2, "it begins where the other ended"
    # a run that starts elsewhere resumes nothing
    assert not any(trained.checkpoints.iterdir())
    with pytest.raises(StageError, match=r"v0.3.0 has r 4 there and 8 here"):
        train.run(tiny_params(method={"r": 8}), trained)
    with pytest.raises(StageError, match=r"adalora schedules its ranks over one run and cannot continue v0.3.0"):
        train.run(tiny_params(method={"name": "adalora", "r": None}), trained)
