"""The tensors of a streamed merge equal those of a merge in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from streamed_models import saved, tensors_of, trained
from tiny_models import tiny
from transformers import (
    AutoModelForCausalLM,
)

from peftcore import (
    LoraConfig,
    MergeError,
    PeftModel,
    get_peft_model,
)
from peftcore.export import merge_streaming
from peftcore.files import sha256


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_in_shards_and_untied_and_with_trained_biases(kind: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", tied=False, kind=kind)
    targets = ["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "lm_head"]
    config = LoraConfig(target_modules=targets, bias="all" if kind == "qwen2" else "none")
    adapter = trained(base, config, tmp_path / "adapter")
    before = sha256(base / "model.safetensors")
    merge_streaming(base, adapter, tmp_path / "out", max_shard_bytes=8000)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    expected = model.merge_and_unload().state_dict()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files] and len(files) > 3
    assert all(file.stat().st_size < 8000 + 4096 or len(load_file(file)) == 1 for file in files)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], value) for key, value in expected.items())
    assert sha256(base / "model.safetensors") == before


@pytest.mark.parametrize("model_type", ["bart", "t5"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["shared"]},
        {"target_modules": ["shared"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens"]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*share a weight, and the adapter changes:UserWarning")
@pytest.mark.filterwarnings("ignore:tied weights of the model differ after the merge:UserWarning")
def test_all_of_several_tied_weights_are_written_if_one_differs(
    model_type: str, options: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = tiny(model_type, "cpu").eval()
    model.save_pretrained(tmp_path / "base")
    model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options))
    model.save_pretrained(tmp_path / "adapter")
    merge_streaming(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = model.merge_and_unload()
    loaded = dict(type(model).from_pretrained(tmp_path / "out").named_parameters(remove_duplicate=False))
    for path, weight in merged.named_parameters(remove_duplicate=False):
        assert torch.equal(loaded[path], weight), path


def test_another_type_is_rounded_to_once(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    adapter = trained(base, LoraConfig(target_modules="all-linear", use_rslora=True), tmp_path / "adapter")
    merge_streaming(base, adapter, tmp_path / "out", dtype="float32")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    model.merge_and_unload().save_pretrained(tmp_path / "reference")
    expected = tensors_of(tmp_path / "reference")
    assert all(torch.equal(value, expected[key]) for key, value in tensors_of(tmp_path / "out").items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_a_merged_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", dtype=torch.float16)
    adapter = trained(base, LoraConfig(target_modules=["q_proj"], lora_alpha=1e9), tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"q_proj.weight has NaN or infinite values in torch.float16"):
        merge_streaming(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
