"""A streamed merge equals a merge in memory bit for bit, with one weight in memory at a time."""

import ctypes
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from streamed_models import SHAPE, saved, tensors_of, trained
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from peftcore import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MergeError,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
)
from peftcore.export import ExportError, merge_streaming
from peftcore.files import damaged_files, sha256

METHODS: dict[str, PeftConfig] = {
    "lora": LoraConfig(target_modules="all-linear", use_rslora=True),
    "dora": LoraConfig(target_modules=["q_proj", "down_proj"], use_dora=True),
    "pissa": LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa", r=4),
    "adalora": AdaLoraConfig(target_modules=["q_proj", "up_proj"], total_step=4, init_r=4, target_r=2),
    "loha": LoHaConfig(target_modules=["q_proj", "up_proj"], r=2),
    "lokr": LoKrConfig(target_modules=["q_proj", "up_proj"], r=2),
    "vera": VeraConfig(target_modules=["q_proj", "o_proj"], r=8),
    "oft": OFTConfig(target_modules=["q_proj", "up_proj"], oft_block_size=4, r=0),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "norms": LNTuningConfig(target_modules=["input_layernorm"]),
    "embedding": LoraConfig(target_modules=["embed_tokens"]),
    "head": LoraConfig(target_modules=["lm_head", "q_proj"]),
    "saved modules": LoraConfig(target_modules=["q_proj"], modules_to_save=["model.norm"]),
    "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5]),
}


def anonymous_memory() -> int:
    """Bytes of this process's own memory; pages of mapped files are the system's to take back."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.filterwarnings("ignore:.*share a weight, and the adapter changes:UserWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:tied weights of the model differ after the merge:UserWarning")
def test_the_bits_of_a_merge_in_memory(method: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    adapter = trained(base, METHODS[method], tmp_path / "adapter")
    before = sha256(base / "model.safetensors")
    merge_streaming(base, adapter, tmp_path / "out")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    model.merge_and_unload().save_pretrained(tmp_path / "reference")
    expected, found = tensors_of(tmp_path / "reference"), tensors_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in expected.items())
    assert any(not torch.equal(value, tensors_of(base).get(key, torch.zeros(1))) for key, value in found.items())
    config = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("reference", "out")}
    assert config["out"] == config["reference"]
    assert (tmp_path / "out" / "tokenizer.json").exists() and (tmp_path / "out" / "generation_config.json").exists()
    assert damaged_files(tmp_path / "out") == [] and sha256(base / "model.safetensors") == before


def test_folders_that_the_model_needs_are_copied(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    adapter = trained(base, METHODS["lora"], tmp_path / "adapter")
    (base / "modules.json").write_text('[{"path": "", "idx": 0}, {"path": "1_Pooling", "idx": 1}]')
    files = ("additional_chat_templates/rag.jinja", "1_Pooling/config.json", "onnx/model.onnx")
    for name in files:
        (base / name).parent.mkdir()
        (base / name).write_text("{}")
    out = merge_streaming(base, adapter, tmp_path / "out")
    assert [(out / name).is_file() for name in files] == [True, True, False] and damaged_files(out) == []


def test_one_weight_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftcore.export import safetensors_stream

    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPE, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 10})
    base = tmp_path / "base"
    LlamaForCausalLM(config).bfloat16().save_pretrained(base)
    adapter = trained(base, LoraConfig(target_modules="all-linear"), tmp_path / "adapter")
    alive, most, peak = weakref.WeakSet(), 0, 0
    plain = safetensors_stream._bytes

    def counted(tensor: torch.Tensor) -> memoryview:
        nonlocal most, peak
        if tensor.dim() == 2 and len(tensor) != SHAPE["vocab_size"]:  # every one of these is merged
            alive.add(tensor)
        most, peak = max(most, len(alive)), max(peak, anonymous_memory())
        return plain(tensor)

    monkeypatch.setattr(safetensors_stream, "_bytes", counted)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else what other tests have freed would count as ours
    before = anonymous_memory()
    merge_streaming(base, adapter, tmp_path / "out")
    whole, largest = (base / "model.safetensors").stat().st_size, 1024 * 512 * 4
    assert most == 1
    assert peak - before < 6 * largest + 2 * (adapter / "adapter_model.safetensors").stat().st_size < whole / 2
    copies = [tensor.clone() for tensor in tensors_of(base).values()]
    assert anonymous_memory() - before > 0.9 * whole and copies  # what the measure says of a whole model


def test_nothing_is_left_of_what_is_refused(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("stays")

    def refused(error: type[Exception], match: str, config: PeftConfig, base: Path = base, **options: Any) -> None:
        adapter = trained(saved(tmp_path / "plain"), config, tmp_path / "adapter")
        with pytest.raises(error, match=match):
            merge_streaming(base, adapter, out, **options)
        assert [file.name for file in out.iterdir()] == ["old"]
        assert not list(tmp_path.glob(".out*"))

    refused(MergeError, "prompts", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    refused(MergeError, "aLoRA", LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3]))
    for layers in (None, [0]):  # with and without an adapter at the added layers
        deeper = LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (0, 2)], layers_to_transform=layers)
        refused(ExportError, "layer_replication", deeper)
    refused(ExportError, "dtype must be", METHODS["lora"], dtype="int8")
    refused(ExportError, "storage must be", METHODS["lora"], storage="int8")
    gpt2 = saved(tmp_path / "gpt2", kind="gpt2")
    refused(ValueError, "does not fit", METHODS["lora"], gpt2)
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-9])
    refused(ExportError, "damaged or truncated", METHODS["lora"])
