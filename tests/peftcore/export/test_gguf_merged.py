"""A merged GGUF computes in llama.cpp what the adapted model computes."""

from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_models import FAMILIES, LlamaCpp, adapted, furthest, log_probs, tiny, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peftcore import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    MergeError,
    OFTConfig,
    PeftConfig,
    get_peft_model,
)
from peftcore.export import ExportError, export_gguf_lora, export_gguf_merged

CLOSE = 1e-3
"""Log-probabilities; llama.cpp's GELU is a table of float16, the other families agree to 1e-5."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_gguf_says_the_same_in_llama_cpp(family: str, tmp_path: Path) -> None:
    base = write_gguf(tiny(family), tmp_path / "base.gguf")
    model = adapted(family)
    file = export_gguf_merged(base, model, tmp_path / "merged.gguf", dtype="float32")
    assert furthest(LlamaCpp(file).log_probs, partial(log_probs, model)) < CLOSE
    old, new = gguf.GGUFReader(base), gguf.GGUFReader(file)
    for key, field in old.fields.items():
        if not key.startswith("GGUF."):
            assert new.fields[key].contents() == field.contents()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_embeddings_and_head_where_they_are_two_weights(family: str, tmp_path: Path) -> None:
    model = adapted(family, LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False))
    base = write_gguf(tiny(family), tmp_path / "base.gguf")
    file = export_gguf_lora(model, "default", tmp_path / "lora.gguf")
    assert furthest(LlamaCpp(base, file).log_probs, partial(log_probs, model)) < CLOSE
    merged = export_gguf_merged(base, model, tmp_path / "merged.gguf", dtype="float32")
    assert furthest(LlamaCpp(merged).log_probs, partial(log_probs, model)) < CLOSE


@pytest.mark.filterwarnings("ignore:.*share a weight, and the adapter changes:UserWarning")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("end", ["embeddings", "head"])
def test_a_merge_into_one_end_of_tied_embeddings_makes_them_two(family: str, end: str, tmp_path: Path) -> None:
    embeddings = "wte" if family == "gpt2" else "embed_tokens"
    config = LoraConfig(r=4, target_modules=[embeddings if end == "embeddings" else "lm_head"], init_lora_weights=False)
    model = adapted(family, config, tie_word_embeddings=True)
    base = write_gguf(tiny(family, tie_word_embeddings=True), tmp_path / "base.gguf")
    file = export_gguf_merged(base, model, tmp_path / "merged.gguf", dtype="float32")
    assert furthest(LlamaCpp(file).log_probs, partial(log_probs, model)) < CLOSE
    with pytest.raises(ExportError, match="is one of two tied layers"):
        export_gguf_lora(model, "default", tmp_path / "lora.gguf")


@pytest.mark.parametrize("method", ["oft", "loha", "dora", "ia3"])
def test_any_mergeable_method_merges_into_a_gguf(method: str, tmp_path: Path) -> None:
    configs: dict[str, PeftConfig] = {
        "oft": OFTConfig(target_modules=["q_proj", "k_proj"], oft_block_size=4, r=0),
        "loha": LoHaConfig(target_modules=["q_proj", "k_proj"], r=2, init_weights=False),
        "dora": LoraConfig(target_modules=["q_proj", "k_proj"], use_dora=True),
        "ia3": IA3Config(target_modules=["q_proj", "k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    }
    model = adapted("qwen2" if method == "ia3" else "llama", configs[method])  # qwen2's q and k have biases
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    base = write_gguf(tiny(model.config.model_type), tmp_path / "base.gguf")
    file = export_gguf_merged(base, model, tmp_path / "merged.gguf", dtype="float32")
    there = LlamaCpp(file)
    assert furthest(there.log_probs, partial(log_probs, model)) < CLOSE
    with model.disable_adapter():
        assert furthest(there.log_probs, partial(log_probs, model)) > 10 * CLOSE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_directory_and_half_precision(dtype: str, tmp_path: Path) -> None:
    model = adapted("llama")
    model.save_pretrained(tmp_path / "adapter")
    tiny("llama").save_pretrained(tmp_path / "model")
    base = write_gguf(tiny("llama"), tmp_path / "base.gguf")
    file = export_gguf_merged(base, tmp_path / "adapter", tmp_path / "merged.gguf", dtype=dtype)
    away = furthest(LlamaCpp(file).log_probs, partial(log_probs, model))
    assert 1e-5 < away < (0.05 if dtype == "float16" else 0.4)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds == {"F32", "F16" if dtype == "float16" else "BF16"}
    lora = export_gguf_lora(tmp_path / "adapter", "default", tmp_path / "lora.gguf", base=tmp_path / "model")
    assert furthest(LlamaCpp(base, lora).log_probs, partial(log_probs, model)) < CLOSE


def test_what_llama_cpp_cannot_take_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    out, base = tmp_path / "out.gguf", write_gguf(tiny("llama"), tmp_path / "base.gguf")

    def refused(match: str, model: Any, merged: bool = False, error: type[Exception] = ExportError) -> None:
        with pytest.raises(error, match=match):
            if merged:
                export_gguf_merged(base, model, out)
            else:
                export_gguf_lora(model, "default", out)
        assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]

    refused("DoRA is not low-rank", adapted("llama", LoraConfig(target_modules=["q_proj"], use_dora=True)))
    norms = LNTuningConfig(target_modules=["input_layernorm"])
    refused("is a norm", adapted("llama", norms), merged=True)
    refused("is a norm", adapted("llama", norms), error=ValueError)
    refused("the base a llama", adapted("qwen2"), merged=True)
    alora = LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3])
    refused("aLoRA", adapted("llama", alora), merged=True, error=MergeError)
    saved = LoraConfig(target_modules=["q_proj"], modules_to_save=["model.norm"])
    refused("holds trained modules", adapted("llama", saved), merged=True)
    replicated = LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (0, 2)], layers_to_transform=[0])
    refused("adds layers that the base does not have", adapted("llama", replicated), merged=True)
    config = AutoConfig.for_model(
        "gpt_neox", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30
    )
    neox = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(target_modules=["dense"]))
    refused("'gpt_neox' model cannot be exported as GGUF; supported: gemma", neox)
    deeper = adapted("llama", num_hidden_layers=3)
    refused("layers.2.self_attn.q_proj has no GGUF name in a llama model", deeper, merged=True)
    wider = adapted("llama", intermediate_size=64)
    refused(r"blk.0.ffn_gate.weight is \[48, 32\] in the file, and the adapter is for \[64, 32\]", wider, merged=True)


def test_a_broken_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, base = tmp_path / "out.gguf", write_gguf(tiny("llama"), tmp_path / "base.gguf")
    out.write_bytes(b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space"):
        export_gguf_merged(base, adapted("llama"), out)
    with pytest.raises(OSError, match="No space"):
        export_gguf_lora(adapted("llama"), "default", out)
    assert out.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_the_real_base_says_the_same_in_llama_cpp(tmp_path: Path) -> None:
    """SmolLM2-135M in float32, LoRA on every linear layer: on the base, at scale 0, and merged."""
    folder = Path(__file__).parents[3] / "artifacts" / "base"
    if not (folder / "model.safetensors").exists():
        pytest.skip("the fetch stage has not run")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = write_gguf(plain, tmp_path / "base.gguf", tokens=tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    torch.manual_seed(1)
    model: Any = get_peft_model(plain, LoraConfig(target_modules="all-linear", r=8, use_rslora=True)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    prompts = [tokenizer(text).input_ids for text in ("The capital of France is", "def add(a, b):\n    return")]
    lora = export_gguf_lora(model, "default", tmp_path / "lora.gguf")
    merged = export_gguf_merged(base, model, tmp_path / "merged.gguf", dtype="float32")
    with_lora, with_merge, words = LlamaCpp(base, lora), LlamaCpp(merged), len(tokenizer)
    for prompt in prompts:
        here = log_probs(model, prompt)
        assert (with_lora.log_probs(prompt, vocabulary=words) - here).abs().max() < CLOSE
        assert (with_merge.log_probs(prompt, vocabulary=words) - here).abs().max() < CLOSE
        with model.disable_adapter():
            before = log_probs(model, prompt)
        assert (with_lora.log_probs(prompt, scale=0, vocabulary=words) - before).abs().max() < CLOSE
        assert (here - before).abs().max() > 0.5
