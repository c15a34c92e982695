"""The calibrated base that is saved: from any kind of rows, or an error and the earlier folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import T5Config

from flows.base.model import load_for_inference
from flows.errors import StageError
from flows.params import Params
from flows.paths import Paths
from flows.stages import calibrate
from flows.training import calibration
from flows.training.calibration import save_calibrated_base
from peftcore import ConfigError
from peftcore.bases import base_weight
from peftcore.files import read_manifest

CALIBRATION = {"storage": "int8", "compute_dtype": "float32", "calibration": {"method": "rounding", "rows": 16}}
CHAT = {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, -100, 7, 8, 9, 10]}
PAIR = {f"{side}_{name}": ids for side in ("chosen", "rejected") for name, ids in CHAT.items()}
LABELLED = {"input_ids": CHAT["input_ids"], "label": 1}


@pytest.fixture
def params(tiny_params: Callable[..., Params]) -> Params:
    return tiny_params(quantization=CALIBRATION)


def weight_of(model: Any) -> torch.Tensor:
    return base_weight(model.model.layers[0].mlp.down_proj).read()


@pytest.mark.parametrize(
    ("kind", "objective", "row"),
    [("preference", "dpo", PAIR), ("classification", "classification", LABELLED)],
)
def test_pairs_give_their_chosen_answers_and_labelled_texts_their_tokens(
    prepared: Paths, tiny_params: Callable[..., Params], tmp_path: Path, kind: str, objective: str, row: dict[str, Any]
) -> None:
    """The same token ids as those of chats, so the same base."""
    weights = []
    for name, rows, sections in (
        ("chat", CHAT, {}),
        (kind, row, {"data": {"kind": kind}, "train": {"objective": objective}}),
    ):
        Dataset.from_list([rows] * 16).to_parquet(prepared.split("train"))
        run, folder = tiny_params(quantization=CALIBRATION, **sections), tmp_path / name
        folder.mkdir()
        record = save_calibrated_base(run, prepared, folder)
        assert (record["rows"], record["tokens"]) == (16, 96)
        weights.append(weight_of(load_for_inference_of(folder)))
    assert torch.equal(*weights)


def load_for_inference_of(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_a_base_that_is_no_decoder_of_transformers_is_refused(
    prepared: Paths, tiny_params: Callable[..., Params], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classifiers of such bases can be trained, so params.yaml alone does not show it."""
    T5Config().save_pretrained(prepared.base)
    monkeypatch.setattr(calibration, "check_base", lambda _: None)
    Dataset.from_list([LABELLED] * 16).to_parquet(prepared.split("train"))
    run = tiny_params(quantization=CALIBRATION, data={"kind": "classification"}, train={"objective": "classification"})
    with pytest.raises(StageError, match=r"calibration\.method is rounding, .* base\.source is a t5; give method none"):
        save_calibrated_base(run, prepared, tmp_path)


def test_too_few_rows_leave_the_earlier_folder(
    prepared: Paths, params: Params, tiny_params: Callable[..., Params]
) -> None:
    calibrate.run(params, prepared)
    before = read_manifest(prepared.calibrated)
    few = tiny_params(quantization=CALIBRATION | {"calibration": {"method": "rounding", "rows": 1}})
    with pytest.raises(StageError, match=r"1 rows have \d+ tokens, and the second moment of a layer's 64 inputs needs"):
        calibrate.run(few, prepared)
    assert read_manifest(prepared.calibrated) == before and not list(prepared.artifacts.glob(".calibrated.*"))


def test_inputs_that_are_not_finite_leave_no_folder(
    prepared: Paths, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(*arguments: Any) -> Any:
        model: Any = load_for_inference(*arguments)
        model.model.layers[0].input_layernorm.weight.data.fill_(torch.nan)
        return model

    monkeypatch.setattr(calibration, "load_for_inference", overflowing)
    with pytest.raises(ConfigError, match="has values in batch 1 that are NaN"):
        calibrate.run(params, prepared)
    assert not prepared.calibrated.exists() and not list(prepared.artifacts.glob(".calibrated.*"))
