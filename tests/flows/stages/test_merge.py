"""merge: an ordinary model that says what the adapter says, or nothing at all."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from flows.base_model import load_dequantized
from flows.errors import StageError
from flows.paths import Paths
from flows.stages import merge
from peftcore import CheckpointError, PeftModel
from peftcore.files import damaged_files, read_manifest

FAITHFUL = {"max_kl": 0.01, "min_top1_agreement": 0.9}


def test_the_merged_model_is_ordinary_and_says_what_the_adapter_says(trained: Paths, tiny_params) -> None:
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


def test_the_report_has_both_candidates(trained: Paths, tiny_params) -> None:
    merge.run(tiny_params(merge=FAITHFUL), trained)
    report = json.loads(trained.merge_report.read_text())
    assert report["into"] == "dequantized"
    assert 0 <= report["kl"] < 0.01 and report["top1_agreement"] >= 0.9 and report["tokens"] > 0
    assert report["candidates"].keys() == {"dequantized", "original"}
    assert report["candidates"]["dequantized"]["kl"] == pytest.approx(report["kl"], abs=1e-6)
    assert report["candidates"]["original"]["kl"] > report["kl"]  # the adapter has never seen that base


def test_the_original_base_can_be_asked_for(trained: Paths, tiny_params) -> None:
    merge.run(tiny_params(merge={"into": "original", "max_kl": 10.0, "min_top1_agreement": 0.0}), trained)
    report = json.loads(trained.merge_report.read_text())
    assert report["into"] == "original"
    assert report["kl"] == pytest.approx(report["candidates"]["original"]["kl"], abs=1e-6)


def test_an_unfaithful_merge_is_refused_and_the_old_one_stays(trained: Paths, tiny_params) -> None:
    merge.run(tiny_params(merge=FAITHFUL), trained)
    before, report = (trained.merged / "SHA256SUMS").read_bytes(), trained.merge_report.read_bytes()
    limits = {"into": "original", "max_kl": 1e-9, "min_top1_agreement": 0.9}
    with pytest.raises(StageError, match=r"nothing was written.*into dequantized: KL"):
        merge.run(tiny_params(merge=limits), trained)
    assert (trained.merged / "SHA256SUMS").read_bytes() == before
    assert trained.merge_report.read_bytes() == report
    assert sorted(path.name for path in trained.artifacts.iterdir() if path.name.startswith(".")) == []


def test_an_adapter_that_is_not_whole_is_refused(trained: Paths, tiny_params) -> None:
    (trained.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        merge.run(tiny_params(), trained)
    assert not trained.merged.exists()
