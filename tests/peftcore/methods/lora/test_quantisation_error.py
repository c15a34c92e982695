"""The start that corrects the quantisation error, beside the papers' formula and other matrices of the same rank."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_layers import quantised
from torch import Tensor, nn

from peftcore import (
    CheckpointError,
    ConfigError,
    LoraConfig,
    PeftModel,
    TargetError,
    get_peft_model,
    initialize_from_data,
)
from peftcore.errors import SizeMismatchError
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.lora import quantisation_error
from peftcore.methods.lora.quantisation_error import error_directions

STARTS = ["qera", "cloq"]
R = 4


def example() -> tuple[Tensor, Tensor]:
    """An error (12, 20) and the second moment of correlated inputs in float64."""
    torch.manual_seed(0)
    x = torch.randn(100, 20, dtype=torch.float64) @ torch.randn(20, 20, dtype=torch.float64)
    return torch.randn(12, 20, dtype=torch.float64), x.T @ x / 100


def output_error(left: Tensor, moment: Tensor) -> Tensor:
    return ((left @ moment) * left).sum()


def test_the_projection_is_the_truncated_svd_in_the_metric_of_the_inputs() -> None:
    error, moment = example()
    u, values = error_directions(error, moment, R, 1e-12)
    correction = u @ u.T @ error
    spectrum, vectors = torch.linalg.eigh(moment)
    root = vectors * spectrum.sqrt() @ vectors.T
    left, s, right = torch.linalg.svd(error @ root)
    papers = left[:, :R] * s[:R] @ right[:R] @ torch.linalg.inv(root)
    torch.testing.assert_close(correction, papers)
    torch.testing.assert_close(values, s[:R])
    torch.testing.assert_close(output_error(error - correction, moment), s[R:].square().sum())


def test_no_matrix_of_the_rank_leaves_a_smaller_error() -> None:
    error, moment = example()
    u, _ = error_directions(error, moment, R, 1e-12)
    least = output_error(error - u @ u.T @ error, moment)
    a, b = u.T @ error, u
    for scale in (1e-3, 1e-2, 0.1, 1):
        for _ in range(20):
            other = (b + scale * torch.randn_like(b)) @ (a + scale * torch.randn_like(a))
            assert output_error(error - other, moment) > least
    # alternating least squares from a random start is another way to the minimum
    b = torch.randn(12, R, dtype=torch.float64)
    for _ in range(300):
        a = torch.linalg.lstsq(b, error).solution
        b = torch.linalg.solve(a @ moment @ a.T, a @ moment @ error.T).T
    torch.testing.assert_close(output_error(error - b @ a, moment), least, rtol=1e-5, atol=0)


class Net(nn.Sequential):
    """Two layers of which the first is quantised."""

    def __init__(self, kind: str = "nf4"):
        torch.manual_seed(0)
        super().__init__(quantised(kind), nn.Linear(32, 3))


def original(kind: str = "nf4") -> dict[str, Tensor]:
    """Weights near those of the quantised layer."""
    weight = Net(kind)[0].weight
    dense = get_peft_model(Net(kind), LoraConfig(target_modules=["0"], r=1))[0].base.read().float()
    assert weight is not None
    return {"0.weight": dense + 0.02 * torch.randn(32, 64, generator=torch.Generator().manual_seed(1))}


def rows(count: int = 40) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(64, 64, generator=generator)
    return [{"input": torch.randn(count, 64, generator=generator) @ mixing} for _ in range(3)]


def started(start: str, kind: str = "nf4", **options: Any) -> Any:
    config = LoraConfig(r=R, lora_alpha=8, target_modules=["0"], init_lora_weights=start, **options)
    return get_peft_model(Net(kind), config)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["nf4", "nf4+double", "fp4", "int8"])
def test_the_output_is_as_near_to_the_original_as_the_rank_allows(start: str, kind: str) -> None:
    model, weights = started(start, kind), original(kind)
    initialize_from_data(model, rows(), model_path=weights, progress=False)
    adapter = adapter_set(model).adapters("default")["0"]
    x = torch.cat([row["input"] for row in rows()])
    error = weights["0.weight"] - adapter.base.read().float()
    left = (x @ (error - adapter.delta_weight()).T).square().sum()
    best = torch.linalg.svdvals(x @ error.T)[R:].square().sum()
    torch.testing.assert_close(left, best, rtol=2e-2, atol=0)
    plain = torch.linalg.svd(error, full_matrices=False)
    loftq = (x @ (error - plain.U[:, :R] * plain.S[:R] @ plain.Vh[:R]).T).square().sum()
    assert left < loftq
    if start == "cloq":
        torch.testing.assert_close(adapter.lora_B_weight.T @ adapter.lora_B_weight, torch.eye(R), rtol=0, atol=1e-5)
    else:
        hidden = x @ adapter.lora_A_weight.T
        second = hidden.T @ hidden / len(x)
        torch.testing.assert_close(second / second.trace() * R, torch.eye(R), rtol=0, atol=1e-2)


@pytest.mark.parametrize("start", STARTS)
def test_layers_in_groups_start_as_in_one_pass(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def started_net(batches: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(quantised("nf4"), nn.Linear(32, 64), quantised("nf4"))
        config = LoraConfig(r=R, target_modules=["0", "2"], init_lora_weights=start)
        model = get_peft_model(net, config)
        weights = {
            f"{path}.weight": adapter.base.read().float() + 0.02 * torch.eye(32, 64)
            for path, adapter in adapter_set(model).adapters("default").items()
        }
        initialize_from_data(model, batches, model_path=weights, progress=False)
        return {name: value.detach() for name, value in model.named_parameters() if "lora" in name}

    one_pass = started_net(rows())
    monkeypatch.setattr(quantisation_error, "MOMENT_BYTES", 4 * 64**2)
    two_passes = started_net(iter(rows()))  # an iterator is kept for the second pass
    assert any(value.any() for name, value in one_pass.items() if "lora_B" in name)
    torch.testing.assert_close(two_passes, one_pass)


@pytest.mark.parametrize("start", STARTS)
def test_a_layer_that_is_not_quantised_starts_as_plain_lora(start: str) -> None:
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=start)
    model, weights = get_peft_model(Net(), config), original()
    drawn = adapter_set(model).adapters("default")["1"].lora_A_weight.detach().clone()
    initialize_from_data(model, rows(), model_path=weights, progress=False)
    quantised_layer, head = (adapter_set(model).adapters("default")[path] for path in ("0", "1"))
    assert quantised_layer.lora_B_weight.any()
    assert torch.equal(head.lora_A_weight, drawn) and not head.lora_B_weight.any()


@pytest.mark.parametrize("start", STARTS)
def test_components_beyond_the_layers_smaller_side_start_as_plain_lora(start: str) -> None:
    model, weights = get_peft_model(Net(), LoraConfig(target_modules=["0"], r=35, init_lora_weights=start)), original()
    drawn = adapter_set(model).adapters("default")["0"].lora_A_weight.detach().clone()
    initialize_from_data(model, rows(), model_path=weights, progress=False)
    adapter = adapter_set(model).adapters("default")["0"]
    assert torch.equal(adapter.lora_A_weight[32:], drawn[32:]) and not adapter.lora_B_weight[:, 32:].any()
    error = weights["0.weight"] - adapter.base.read().float()
    torch.testing.assert_close(adapter.delta_weight(), error, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("start", STARTS)
def test_the_saved_adapter_is_plain_lora(start: str, tmp_path: Path) -> None:
    model = started(start, use_dora=True)
    initialize_from_data(model, rows(), model_path=original(), progress=False)
    adapter = adapter_set(model).adapters("default")["0"]
    x = rows()[0]["input"]
    corrected = adapter.base.read().float() + adapter.scaling * adapter.lora_B_weight @ adapter.lora_A_weight
    torch.testing.assert_close(adapter.merged_weight(adapter.base.read()), corrected)  # DoRA's lengths are set anew
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    assert loaded.peft_config["default"].init_lora_weights is True
    assert model.peft_config["default"].init_lora_weights == start
    torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize("start", STARTS)
def test_a_direction_without_error_still_trains(start: str) -> None:
    model = started(start)
    weights = {"0.weight": adapter_set(model).adapters("default")["0"].base.read().clone()}
    weights["0.weight"][3] += 0.1  # an error of rank 1
    initialize_from_data(model, rows(), model_path=weights, progress=False)
    adapter = adapter_set(model).adapters("default")["0"]
    alive = (adapter.lora_A_weight.norm(dim=1) > 0) | (adapter.lora_B_weight.norm(dim=0) > 0)
    assert alive.all()
    expected = weights["0.weight"] - adapter.base.read()
    torch.testing.assert_close(adapter.delta_weight(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("start", STARTS)
def test_what_does_not_fit_leaves_the_adapter_as_it_was(start: str, tmp_path: Path) -> None:
    model, weights = started(start), original()
    before = copy.deepcopy(model.state_dict())
    wrong: list[tuple[Any, Any, Any, str]] = [
        (ConfigError, rows(1)[:2], weights, r"give 0 2 inputs, and its rank 4 needs at least as many; give more rows"),
        (ConfigError, [{"input": torch.full((9, 64), torch.nan)}], weights, "the input of 0 has values in batch 1"),
        (ConfigError, [], weights, "got no batch"),
        (CheckpointError, rows(), {}, r"no 0\.weight in the original weights"),
        (CheckpointError, rows(), None, "does not know its directory; give the original model's as model_path"),
        (CheckpointError, rows(), tmp_path, "no safetensors in"),
        (SizeMismatchError, rows(), {"0.weight": torch.zeros(64, 32)}, r"is \(64, 32\), and .* is \(32, 64\)"),
    ]
    for error, batches, source, message in wrong:
        with pytest.raises(error, match=message):
            initialize_from_data(model, batches, model_path=source, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if "lora" in key)
    plain = get_peft_model(Net(), LoraConfig(target_modules=["1"], r=2, init_lora_weights=start))
    with pytest.raises(ConfigError, match=r"the base is not quantised at 1; load the base in 4 or 8 bits"):
        initialize_from_data(plain, rows(), model_path=weights, progress=False)
    with pytest.raises((ConfigError, TargetError), match="linear layers only"):
        conv = get_peft_model(
            nn.Sequential(nn.Conv1d(2, 2, 1)), LoraConfig(target_modules=["0"], init_lora_weights=start)
        )
        initialize_from_data(conv, rows(), model_path=weights, progress=False)
