"""The calibrate stage on a tiny base, and every stage after it on the calibrated base."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from flows.base.calibrated import RECORD, calibrated_base_of, calibrated_identity, calibration_record, trained_base
from flows.base.identity import base_identity
from flows.base.model import load_dequantized, load_for_training
from flows.data.rows import read_rows
from flows.errors import BaseModelError, StageError
from flows.params import Params
from flows.paths import Paths
from flows.stages import calibrate, evaluate, merge, train
from peftcore import PeftModel
from peftcore.bases import base_weight
from peftcore.files import damaged_files, read_manifest, write_manifest

CALIBRATION = {"storage": "int8", "compute_dtype": "float32", "calibration": {"method": "rounding", "rows": 32}}
"""The tiny base has 32 inputs, and 4 bits are rounded in blocks of 64."""


@pytest.fixture
def params(tiny_params: Callable[..., Params]) -> Params:
    return tiny_params(quantization=CALIBRATION)


@pytest.fixture
def calibrated(prepared: Paths, params: Params) -> Paths:
    calibrate.run(params, prepared)
    return prepared


def weight_of(model: Any) -> torch.Tensor:
    return base_weight(model.model.layers[0].mlp.down_proj).read().float()


def test_without_calibration_the_output_is_a_record_alone(prepared: Paths, tiny_params: Callable[..., Params]) -> None:
    calibrate.run(tiny_params(), prepared)
    assert [path.name for path in prepared.calibrated.iterdir()] == [RECORD]
    assert calibration_record(prepared.calibrated) is None and calibrated_identity(prepared.calibrated) is None
    assert trained_base(prepared, tiny_params().quantization) == prepared.base


def test_the_folder_is_a_quantised_model_with_nearer_outputs(calibrated: Paths, params: Params) -> None:
    assert not damaged_files(calibrated.calibrated) and "tokenizer.json" in read_manifest(calibrated.calibrated)
    assert trained_base(calibrated, params.quantization) == calibrated.calibrated
    record = json.loads((calibrated.calibrated / RECORD).read_text())
    assert record["base_model"] == base_identity(calibrated.base) and record["rows"] == 32
    uncalibrated = params.quantization.uncalibrated
    rounded, plain = (
        load_for_training(folder, quantization, 100)
        for folder, quantization in ((calibrated.calibrated, params.quantization), (calibrated.base, uncalibrated))
    )
    original: Any = load_dequantized(calibrated.base, uncalibrated.model_copy(update={"storage": "none"}))
    ours, theirs, weight = weight_of(rounded), weight_of(plain), weight_of(original)
    assert isinstance(rounded.model.layers[0].mlp.down_proj, bnb.nn.Linear8bitLt) and not torch.equal(ours, theirs)
    inputs: list[torch.Tensor] = []
    layer = original.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda _, x, y: inputs.append(x[0].flatten(0, 1).detach()))
    for row in read_rows(calibrated.split("validation"), ["input_ids"]):
        original(torch.tensor([row["input_ids"]]))
    x = torch.cat(inputs)
    assert (x @ (ours - weight).T).norm() < 0.9 * (x @ (theirs - weight).T).norm(), "on rows that it has not seen"
    dequantised = weight_of(load_dequantized(calibrated.calibrated, params.quantization))
    torch.testing.assert_close(dequantised, ours, rtol=2e-3, atol=1e-6)  # transformers rounds scales to half precision


def test_the_same_rows_give_the_same_folder(calibrated: Paths, params: Params) -> None:
    before = read_manifest(calibrated.calibrated)
    calibrate.run(params, calibrated)
    assert read_manifest(calibrated.calibrated) == before


@pytest.mark.slow
def test_train_evaluate_and_merge_use_it_and_refuse_another(calibrated: Paths, params: Params) -> None:
    train.run(params, calibrated)
    identity = calibrated_identity(calibrated.calibrated)
    assert calibrated_base_of(calibrated.adapter) == identity
    evaluate.run(params, calibrated)
    metrics = json.loads(calibrated.evaluation_metrics.read_text())
    assert metrics["calibrated_base"] == identity and metrics["base_model"] == base_identity(calibrated.base)
    merge.run(params, calibrated)
    report = json.loads(calibrated.merge_report.read_text())
    assert set(report["candidates"]) == {"dequantized", "original", "requantized"}
    assert report["candidates"]["dequantized"]["kl"] < 1e-4, "the weights that training saw"

    def loss(folder: Path) -> float:
        model: Any = PeftModel.from_pretrained(load_dequantized(folder, params.quantization), calibrated.adapter).eval()
        row = read_rows(calibrated.split("test"), ["input_ids", "labels"])[0]
        return float(model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss)

    first = loss(calibrated.calibrated)
    other = params.model_copy(
        update={
            "quantization": params.quantization.model_validate(
                CALIBRATION | {"calibration": {"method": "rounding", "rows": 8}}
            )
        }
    )
    kept = calibrated.root / "kept"
    shutil.move(calibrated.calibrated, kept)
    with pytest.raises(BaseModelError, match=r"holds no calibrated base, .*run `peftcore stage calibrate`"):
        evaluate.run(params, calibrated)
    calibrate.run(other, calibrated)
    assert loss(calibrated.calibrated) != first
    for stage in (evaluate, merge):
        with pytest.raises(BaseModelError, match=r"was trained on the calibrated base .* give the folder artifacts/c"):
            stage.run(params, calibrated)


@pytest.mark.slow
def test_four_bits_on_a_wider_base(prepared: Paths, tiny_params: Callable[..., Params]) -> None:
    """A base whose layers have whole blocks of 64 inputs, in NF4 with double quantisation, as by default."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(prepared.base)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer)
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(prepared.base)
    write_manifest(prepared.base)
    run = tiny_params(quantization={"calibration": {"method": "rounding"}}, method={"r": 4, "init": "qera"})
    calibrate.run(run, prepared)
    layer: Any = load_for_training(prepared.calibrated, run.quantization, 100).model.layers[0].mlp.down_proj
    assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
    train.run(run, prepared)
    merge.run(run, prepared)
    assert json.loads(prepared.merge_report.read_text())["into"] in ("dequantized", "original")


def test_a_continued_run_keeps_the_calibrated_base_of_its_version(
    calibrated: Paths, params: Params, tiny_params: Callable[..., Params]
) -> None:
    first = read_manifest(calibrated.calibrated)
    calibrated.start.mkdir()
    calibrated.start_source.write_text('{"version": "v0.3.0"}\n')
    with pytest.raises(StageError, match=r"v0\.3\.0 was trained without calibration, .*give method none"):
        calibrate.run(params, calibrated)
    shutil.copytree(calibrated.calibrated, calibrated.start_calibrated)
    with pytest.raises(StageError, match=r"v0\.3\.0 was trained on a calibrated base, .*give method rounding"):
        calibrate.run(tiny_params(), calibrated)
    more = tiny_params(quantization=CALIBRATION | {"calibration": {"method": "rounding", "rows": 8}})
    calibrate.run(more, calibrated)
    assert read_manifest(calibrated.calibrated) == first
    half = tiny_params(quantization=CALIBRATION | {"compute_dtype": "bfloat16"})
    with pytest.raises(BaseModelError, match="was calibrated with compute_dtype float32, and the parameters have"):
        calibrate.run(half, calibrated)
    (calibrated.base / "config.json").write_text(
        (calibrated.base / "config.json").read_text().replace("1e-06", "1e-05")
    )
    write_manifest(calibrated.base)
    with pytest.raises(BaseModelError, match="start/calibrated was calibrated from another base"):
        calibrate.run(params, calibrated)
    assert read_manifest(calibrated.calibrated) == first
