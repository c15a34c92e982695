"""Sections `method` and `quantization`: LoRA's defaults, ranks, and options that do not go together."""

from pathlib import Path

import pytest
from params_texts import read, refusal

from flows.params import Method, Quantization


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("method: {lora_dropout: 1.0}", "method.lora_dropout"),
        ("method: {lora_alpha: 0}", "method.lora_alpha"),
        ("method: {r: 0}", "method.r"),
        ("method: {r: true}", "method.r"),
        ("method: {r: 8.0}", "method.r"),
        ("method: {r: automatic}", "method.r"),
        ("method: {target_modules: []}", "method.target_modules"),
        ("method: {target_modules: ['']}", "method.target_modules"),
        ("method: {target_modules: all-liner}", "method.target_modules"),
        ("method: {target_modules: '.*(_proj'}", "method.target_modules"),
        ("method: {target_modules: 3}", "method.target_modules"),
        ("method: {schedule: {warmup_share: 0.5, final_share: 0.5}}", "method.schedule.final_share"),
        ("method: {auto: {steps: 0}}", "method.auto.steps"),
        ("quantization: {storage: nf8}", "quantization.storage"),
        ("quantization: {calibration: {rows: 0}}", "quantization.calibration.rows"),
        ("quantization: {calibration: {damping: 0}}", "quantization.calibration.damping"),
    ],
)
def test_an_impossible_value_is_refused_by_its_key(tmp_path: Path, text: str, key: str) -> None:
    assert refusal(tmp_path, text).startswith(f"params.yaml:1: {key}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{name: ia3, use_rslora: true}", "method.use_rslora: true does not fit; ia3 has no such option; give false"),
        ("{name: ia3, init: qera}", "method.init: 'qera' does not fit; ia3 has no such start; give default"),
        (
            "{init: qera, options: {init_lora_weights: loftq}}",
            "method.options.init_lora_weights: 'loftq' does not fit; method.init is qera, which is the same",
        ),
        ("{name: loha, r: 8, options: {r: 4}}", "method.options.r: 4 does not fit; method.r is 8, which is the same"),
        (
            "{name: vera, r: auto}",
            "method.r: 'auto' does not fit; ranks are searched for lora only; give vera a number",
        ),
        ("{name: ia3, r: auto}", "method.r: 'auto' does not fit; ranks are searched for lora only; give ia3 null"),
        ("{name: [lora], r: 8}", "method.name"),
    ],
)
def test_what_does_not_go_together_is_refused(text: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, f"method: {text}")


def test_only_lora_has_defaults_of_the_pipeline() -> None:
    lora, other = Method(), Method(name="loha")
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 32, 0.0)
    assert (other.r, other.lora_alpha, other.lora_dropout) == (None, None, None)
    assert Method(r=4).lora_alpha == 32, "one option that is given leaves the others"
    assert Method(r=None).r is None, "null is the default of the method's own configuration"


def test_the_same_value_may_be_given_twice() -> None:
    assert Method(name="loha", r=8, options={"r": 8}).r == 8
    assert Method(name="loha", options={"r": 4}).options == {"r": 4}


def test_lora_may_search_its_ranks(tmp_path: Path) -> None:
    assert read(tmp_path, "method: {r: auto, auto: {r: 4, tolerance: 0.01}}").method.auto.tolerance == 0.01


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{calibration: {method: roundings}}", "method: 'roundings' does not fit; did you mean rounding?"),
        ("{calibration: {method: off}}", "method: 'off' does not fit; give one of none, rounding"),
        ("{calibration: {row: 3}}", "row: unknown key; did you mean rows?"),
        (
            "{storage: none, calibration: {method: rounding}}",
            "storage is none: its weights are not rounded; give none, or",
        ),
        ("{storage: gguf, calibration: {method: rounding}}", "its file has no weights from before the quantisation"),
        ("{storage: hqq4, calibration: {method: rounding}}", "it cannot be saved after the calibration; give none, or"),
    ],
)
def test_a_calibration_that_cannot_be_says_what_can(text: str, message: str, tmp_path: Path) -> None:
    refused = refusal(tmp_path, f"quantization: {text}")
    assert refused.startswith("params.yaml:1: quantization.calibration.") and message in refused


def test_a_record_without_calibration_has_none(tmp_path: Path) -> None:
    earlier = Quantization.model_validate({"storage": "nf4", "double_quant": True, "compute_dtype": "bfloat16"})
    assert not earlier.is_calibrated and earlier == Quantization(compute_dtype="bfloat16")
    rounded = read(tmp_path, "quantization: {calibration: {method: rounding, rows: 8}}").quantization
    assert rounded.is_calibrated and rounded.uncalibrated == Quantization()
