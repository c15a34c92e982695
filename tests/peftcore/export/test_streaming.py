"""A streamed merge writes the bits of merge_and_unload and save_pretrained, and holds one weight at a time."""

import ctypes
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
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
    get_peft_model,
)
from peftcore.export import ExportError, merge_streaming
from peftcore.files import damaged_files, sha256

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = torch.arange(1, 13).view(1, 12)


def saved(folder: Path, tied: bool = True, kind: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    if kind == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=32))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=tied))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied))
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def trained(base: Path, config: PeftConfig, directory: Path) -> Path:
    """An adapter with random parameters, saved."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


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
    "saved modules": LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]),
    "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5]),
}


@pytest.mark.parametrize("method", METHODS)
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


def test_another_type_is_rounded_to_once(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    adapter = trained(base, METHODS["lora"], tmp_path / "adapter")
    merge_streaming(base, adapter, tmp_path / "out", dtype="float32")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    model.merge_and_unload().save_pretrained(tmp_path / "reference")
    expected = tensors_of(tmp_path / "reference")
    assert all(torch.equal(value, expected[key]) for key, value in tensors_of(tmp_path / "out").items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("double_quant", [False, True])
def test_into_what_training_in_4_bits_saw(double_quant: bool, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    base = saved(tmp_path / "base")
    adapter = trained(base, METHODS["dora"], tmp_path / "adapter")
    merge_streaming(base, adapter, tmp_path / "out", storage="nf4", double_quant=double_quant)
    storage = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    quantised = AutoModelForCausalLM.from_pretrained(base, quantization_config=storage, dtype=torch.bfloat16)
    expected = PeftModel.from_pretrained(quantised.dequantize(torch.bfloat16), adapter).merge_and_unload().state_dict()
    found = tensors_of(tmp_path / "out")
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert {file.name for file in (tmp_path / "out").iterdir()}.isdisjoint({"dequantised.safetensors"})


def anonymous_memory() -> int:
    """Bytes of this process's own memory; pages of mapped files are the system's to take back."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


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
    refused(ExportError, "dtype must be", METHODS["lora"], dtype="int8")
    refused(ExportError, "storage must be", METHODS["lora"], storage="int8")
    gpt2 = saved(tmp_path / "gpt2", kind="gpt2")
    refused(ValueError, "does not fit", METHODS["lora"], gpt2)
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-9])
    refused(ExportError, "damaged or truncated", METHODS["lora"])


def test_a_merged_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", dtype=torch.float16)
    adapter = trained(base, LoraConfig(target_modules=["q_proj"], lora_alpha=1e9), tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"q_proj.weight has NaN or infinite values in torch.float16"):
        merge_streaming(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
