"""Calibrated rounding of whole models: nearer to the original's outputs, on the storage's grid, or nothing changes."""

import copy
from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import gguf
import pytest
import torch
from gguf.quants import dequantize, quantize
from quantised_layers import gguf_linear, quantised, random_rows
from torch import Tensor, nn

from peftcore import (
    CheckpointError,
    ConfigError,
    LoraConfig,
    PeftWarning,
    calibrate_rounding,
    get_peft_model,
)
from peftcore.bases import base_weight
from peftcore.bases.gguf_blocks import FORMATS
from peftcore.injection import rounding
from peftcore.kernels.calibrated_rounding import calibrated_codes

STORAGES = ["nf4", "nf4+double", "fp4", "int8", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def model_and_original(storage: str) -> tuple[Any, dict[str, Tensor]]:
    """Two quantised layers that are called and one that is not, and their weights before the quantisation."""
    torch.manual_seed(0)
    kind, _, double = storage.partition("+")
    net, weights = nn.ModuleDict(), {}
    for name in ("0", "1", "idle"):
        weights[f"{name}.weight"] = torch.randn(64, 64) / 8
        if kind in FORMATS:
            blocks = quantize(weights[f"{name}.weight"].numpy(), gguf.GGMLQuantizationType[kind])
            net[name] = gguf_linear(kind, torch.from_numpy(blocks))
            continue
        layer: Any = (
            bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
            if kind == "int8"
            else bnb.nn.Linear4bit(
                64, 64, bias=False, quant_type=kind, compress_statistics=bool(double), compute_dtype=torch.float32
            )
        )
        layer.load_state_dict({"weight": weights[f"{name}.weight"]})
        net[name] = layer.to("cpu")
    return net, weights


def forward(model: Any, batch: Mapping[str, Any]) -> Tensor:
    return model["1"](model["0"](batch["x"]).relu())


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(64, 64, generator=generator)
    return [{"x": torch.randn(60, 64, generator=generator) @ mixing} for _ in range(count)]


@pytest.mark.parametrize("storage", STORAGES)
def test_outputs_come_nearer_and_the_format_stays(storage: str) -> None:
    model, weights = model_and_original(storage)
    held_out = batches(5)[4]["x"]
    bases = {name: base_weight(model[name]) for name in model}
    grids: dict[str, Any] = {name: base.grid() for name, base in bases.items()}
    before = {name: base.read().float().clone() for name, base in bases.items()}
    sizes = {name: model[name].weight.shape for name in model}
    with pytest.warns(PeftWarning, match="no calibration row reaches idle, which stay"):
        calibrate_rounding(model, batches(), weights, forward=forward, progress=False)
    x = held_out
    for name in ("0", "1"):
        after, weight = bases[name].read().float(), weights[f"{name}.weight"]
        assert (x @ (after - weight).T).norm() < 0.9 * (x @ (before[name] - weight).T).norm()
        assert torch.equal(grids[name].values(grids[name].nearest(after)), after), "every value lies on the grid"
        now: Any = bases[name].grid()
        assert torch.equal(now.scale, grids[name].scale) and model[name].weight.shape == sizes[name]
        x = (x @ weight.T).relu()
    assert torch.equal(bases["idle"].read().float(), before["idle"])
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights=False))
    again = copy.deepcopy(adapted)
    torch.testing.assert_close(forward(again, {"x": held_out}), forward(adapted, {"x": held_out}))


@pytest.mark.parametrize("kind", FORMATS)
def test_gguf_blocks_hold_the_compensated_weight(kind: str) -> None:
    """The reference reads the written blocks as the values that the compensation chose, K-quants' as well."""
    torch.manual_seed(0)
    block, inputs = FORMATS[kind], 256
    layer: Any = gguf_linear(kind, random_rows(kind, 32, inputs))
    grid, nearest = block.grid(layer.weight), layer.dequantized()
    weight = nearest + (torch.rand(32, inputs) - 0.5) * grid.scale  # half a step away at most
    x = torch.randn(800, inputs) @ torch.randn(inputs, inputs)
    codes = calibrated_codes(weight, x.T @ x / 800, grid)
    calibrate_rounding(
        nn.ModuleDict({"0": layer}),
        [{"x": x}],
        {"0.weight": weight},
        forward=lambda model, batch: model["0"](batch["x"]),
        progress=False,
    )
    kept: Any = gguf.GGMLQuantizationType[kind]
    after = torch.from_numpy(dequantize(block.rows(layer.weight).contiguous().numpy(), kept))
    assert torch.equal(after, grid.values(codes))
    rounded = grid.values(grid.nearest(weight))
    assert (x @ (after - weight).T).norm() < 0.9 * (x @ (rounded - weight).T).norm()


def test_the_state_dict_keeps_the_storages_format() -> None:
    model, weights = model_and_original("nf4+double")
    calibrate_rounding(model, batches(), weights, forward=forward_of_all, progress=False)
    other, _ = model_and_original("nf4+double")
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    fresh, _ = model_and_original("nf4+double")
    assert saved.keys() == fresh.state_dict().keys()
    for name in model:
        part = {key.removeprefix(f"{name}."): value for key, value in saved.items() if key.startswith(f"{name}.")}
        data = part.pop("weight")
        stats = {f"weight.{key.removeprefix('weight.')}": value for key, value in part.items()}
        other[name].weight = bnb.nn.Params4bit.from_prequantized(
            data, {key.removeprefix("weight."): value for key, value in stats.items()}, device="cpu", module=other[name]
        )
        assert torch.equal(base_weight(other[name]).read(), base_weight(model[name]).read())


def forward_of_all(model: Any, batch: Mapping[str, Any]) -> Tensor:
    return model["idle"](forward(model, batch))


def test_what_does_not_fit_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, weights = model_and_original("nf4")
    stored = {name: model[name].weight for name in model}
    nan = [*batches(1), {"x": torch.full((2, 64), torch.nan)}]
    wrong: list[tuple[Any, Any, dict[str, Any], str]] = [
        (ConfigError, batches(), {"damping": 0}, "damping must be above 0; got 0; try 0.01"),
        (ConfigError, [], {}, "rounding got no batch"),
        (ConfigError, nan, {}, "the input of 0 has values in batch 2 that are NaN"),
        (CheckpointError, batches(), {"model_path": {}}, r"no 0\.weight in the original weights"),
    ]
    for error, rows, options, message in wrong:
        with pytest.raises(error, match=message):
            calibrate_rounding(model, rows, **{"model_path": weights, "forward": forward, "progress": False, **options})

    class Interrupted:
        calls = 0

        def __call__(self, *arguments: Any) -> Any:
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return codes(*arguments)

    codes = rounding.calibrated_codes
    monkeypatch.setattr(rounding, "calibrated_codes", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        calibrate_rounding(model, batches(), weights, forward=forward_of_all, progress=False)
    assert all(model[name].weight is stored[name] for name in model)


def test_models_that_cannot_be_rounded_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs layers in 4 or 8 bits, and this model has none"):
        calibrate_rounding(nn.Sequential(nn.Linear(2, 2)), batches(), {}, progress=False)
    model = get_peft_model(nn.Sequential(quantised("nf4")), LoraConfig(target_modules=["0"]))
    with pytest.raises(ConfigError, match="comes before get_peft_model"):
        calibrate_rounding(model, batches(), {}, progress=False)
    unaligned: Any = bnb.nn.Linear4bit(96, 64, quant_type="nf4").to("cpu")
    with pytest.raises(ConfigError, match="the grid of 0, a Linear4bit with 96 inputs"):
        calibrate_rounding(nn.Sequential(unaligned), batches(), {}, progress=False)
