"""merge: a model without adapters that says what the adapter says, or nothing at all."""

import json
from collections.abc import Callable
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from flows.base.model import load_dequantized
from flows.errors import StageError
from flows.evaluation.fidelity import Fidelity
from flows.params import Merge, Params
from flows.paths import Paths
from flows.stages import merge
from peftcore import CheckpointError, PeftModel
from peftcore.files import damaged_files, read_manifest

FAITHFUL = {"max_kl": 0.01, "min_top1_agreement": 0.9}
ANYTHING = {"max_kl": 10.0, "min_top1_agreement": 0.0}
TinyParams = Callable[..., Params]


def report_of(paths: Paths) -> dict:
    return json.loads(paths.merge_report.read_text())


def test_the_merged_model_is_ordinary_and_says_what_the_adapter_says(trained: Paths, tiny_params: TinyParams) -> None:
    params = tiny_params(quantization={"compute_dtype": "float32"}, merge={"max_kl": 1e-6, "min_top1_agreement": 1.0})
    merge.run(params, trained)
    merged = AutoModelForCausalLM.from_pretrained(trained.merged).eval()
    assert type(merged).__name__ == "LlamaForCausalLM" and merged.dtype == torch.float32
    adapted = PeftModel.from_pretrained(load_dequantized(trained.base, params.quantization), trained.adapter)
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    config = json.loads((trained.merged / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["LlamaForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(trained.merged)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(trained.base).chat_template
    generation, before = (GenerationConfig.from_pretrained(folder) for folder in (trained.merged, trained.base))
    assert generation.eos_token_id == before.eos_token_id and generation.use_cache is not False
    assert "model.safetensors" in read_manifest(trained.merged) and not damaged_files(trained.merged)


def test_by_default_the_nearest_of_the_16_bit_ones_is_written(trained: Paths, tiny_params: TinyParams) -> None:
    merge.run(tiny_params(merge=FAITHFUL), trained)
    report = report_of(trained)
    candidates = report["candidates"]
    assert candidates.keys() == {"dequantized", "original", "requantized"}
    assert report["into"] == "dequantized"  # the adapter has never seen the other one
    assert candidates["original"]["kl"] > candidates["dequantized"]["kl"]
    assert report["kl"] == pytest.approx(candidates["dequantized"]["kl"], abs=1e-6)
    assert 0 <= report["kl"] < 0.01 and report["top1_agreement"] >= 0.9 and report["tokens"] > 0
    assert report["loss"] == pytest.approx(report["reference_loss"], abs=0.01)


def test_a_cpu_that_is_slow_in_16_bits_compares_in_float32_and_writes_16_bits(
    trained: Paths, tiny_params: TinyParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge.run(tiny_params(merge=FAITHFUL), trained)
    expected = AutoModelForCausalLM.from_pretrained(trained.merged).state_dict()
    monkeypatch.setattr("peftcore.bases.compute_dtype._is_slow", lambda dtype: True)
    merge.run(tiny_params(merge=FAITHFUL, quantization={"compute_dtype": "auto"}), trained)
    merged = AutoModelForCausalLM.from_pretrained(trained.merged).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert abs(report_of(trained)["kl"]) < 1e-3


def test_the_original_base_can_be_asked_for(trained: Paths, tiny_params: TinyParams) -> None:
    merge.run(tiny_params(merge={"into": "original", **ANYTHING}), trained)
    report = report_of(trained)
    assert report["into"] == "original"
    assert report["kl"] == pytest.approx(report["candidates"]["original"]["kl"], abs=1e-6)


@pytest.mark.parametrize(("storage", "layer"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_requantized_is_a_quantised_folder_that_transformers_loads(
    trained: Paths, tiny_params: TinyParams, storage: str, layer: str
) -> None:
    params = tiny_params(quantization={"storage": storage}, merge={"into": "requantized", **ANYTHING})
    merge.run(params, trained)
    report = report_of(trained)
    assert report["into"] == "requantized"
    assert report["kl"] == pytest.approx(report["candidates"]["requantized"]["kl"], rel=1e-3)
    loaded = AutoModelForCausalLM.from_pretrained(trained.merged)
    linear = loaded.model.layers[0].self_attn.q_proj
    assert type(linear) is getattr(bnb.nn, layer) and not hasattr(loaded, "peft_config")
    assert "quantization_config" in json.loads((trained.merged / "config.json").read_text())
    assert not damaged_files(trained.merged)


def test_a_base_that_is_not_quantised_is_one_base(trained: Paths, tiny_params: TinyParams) -> None:
    params = tiny_params(quantization={"storage": "none"}, merge={"into": "dequantized", **FAITHFUL})
    merge.run(params, trained)
    report = report_of(trained)
    assert report["into"] == "original" and report["candidates"].keys() == {"original"}


# -- what is chosen --------------------------------------------------------------------------------------------------

AT = Fidelity(kl=0.01, top1_agreement=0.99, loss=2.0, reference_loss=2.0, tokens=100)


@pytest.mark.parametrize(
    ("into", "found", "chosen"),
    [
        ("best", {"dequantized": 0.02, "original": 0.01, "requantized": 0.001}, "original"),
        ("best", {"dequantized": 0.01, "original": 0.02, "requantized": 0.03}, "dequantized"),
        ("best", {"dequantized": float("nan"), "original": 0.02, "requantized": 0.03}, "original"),
        ("dequantized", {"dequantized": 0.02, "original": 0.01, "requantized": 0.03}, "dequantized"),
        ("requantized", {"dequantized": 0.02, "original": 0.01, "requantized": 0.03}, "requantized"),
        ("best", {"original": 0.01}, "original"),
    ],
)
def test_the_nearest_of_those_that_were_asked_for(into: str, found: dict[str, float], chosen: str) -> None:
    candidates = {name: replace(AT, kl=kl) for name, kl in found.items()}
    assert merge._chosen(Merge.model_validate({"into": into}), candidates) == chosen


def test_the_nearest_one_must_keep_both_limits() -> None:
    candidates = {"dequantized": replace(AT, kl=0.01, top1_agreement=0.5), "original": replace(AT, kl=0.02)}
    assert merge._chosen(Merge(), candidates) == "original"
    with pytest.raises(StageError, match=r"nothing was written.*into original: KL 0\.0200.*Set merge\.into"):
        merge._chosen(Merge(into="dequantized"), candidates)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_an_unfaithful_merge_is_refused_and_the_old_one_stays(trained: Paths, tiny_params: TinyParams) -> None:
    merge.run(tiny_params(merge=FAITHFUL), trained)
    before, report = (trained.merged / "SHA256SUMS").read_bytes(), trained.merge_report.read_bytes()
    for into in ("best", "original", "requantized"):
        with pytest.raises(StageError, match=r"nothing was written.*into dequantized: KL"):
            merge.run(tiny_params(merge={"into": into, "max_kl": 1e-12}), trained)
        assert (trained.merged / "SHA256SUMS").read_bytes() == before
        assert trained.merge_report.read_bytes() == report
    assert sorted(path.name for path in trained.artifacts.iterdir() if path.name.startswith(".")) == []


def test_what_cannot_be_read_back_as_it_was_is_refused(
    trained: Paths, tiny_params: TinyParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "load_original", lambda folder, *given: spoilt(load_original(folder, *given), folder))
    with pytest.raises(StageError, match="read back from disk, the model merged into dequantized differs"):
        merge.run(tiny_params(merge={"into": "dequantized", **FAITHFUL}), trained)
    assert not trained.merged.exists() and not trained.merge_report.exists()


load_original = merge.load_original


def spoilt(model, folder):
    """The model as it is on disk, unless it is the base: with other weights."""
    if folder.name != "base":
        torch.manual_seed(0)
        with torch.no_grad():
            model.lm_head.weight.normal_()
    return model


@pytest.mark.faults("flipped bit, truncated file, NaN")
def test_an_adapter_that_is_not_whole_is_refused(trained: Paths, tiny_params: TinyParams) -> None:
    (trained.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        merge.run(tiny_params(), trained)
    assert not trained.merged.exists()
