"""A checkpoint that is quantised already: loaded as its package's users load it, then trained, saved and merged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_layers import STORAGES
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig, LlamaConfig, LlamaForCausalLM

from peftcore import LoraConfig, MergeError, PeftModel, dequantize_base, get_layer_status, get_peft_model

TOKENS = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(0))


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=128))


def torchao(folder: Path, config: Callable[[Any], Any]) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    llama().save_pretrained(folder / "plain")
    options = {"dtype": torch.float32, "quantization_config": TorchAoConfig(config(quantization))}
    AutoModelForCausalLM.from_pretrained(folder / "plain", **options).save_pretrained(folder / "quantised")
    return AutoModelForCausalLM.from_pretrained(folder / "quantised")


def hqq(folder: Path) -> Any:
    library: Any = pytest.importorskip("hqq.models.hf.base").AutoHQQHFModel
    options = {"compute_dtype": torch.float32, "device": "cpu"}
    config = pytest.importorskip("hqq.core.quantize").BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
    model = llama()
    library.quantize_model(model, quant_config=config, **options)
    library.save_quantized(model, str(folder))
    return library.from_quantized(str(folder), **options)


def gptqmodel(folder: Path, kind: str, written: dict[str, Any], config: Any) -> Any:
    """Write a checkpoint in the form of GPTQ or AWQ, rounded to the nearest codes, and load it with transformers."""
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    model = llama()
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path != "lm_head":
            model.set_submodule(path, STORAGES[kind](layer))
    model.config.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    saved["quantization_config"] = {"quant_method": kind, "bits": 4, "group_size": 32, **written}
    (folder / "config.json").write_text(json.dumps(saved))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )


def gptq(folder: Path) -> Any:
    written = {"sym": False, "desc_act": False, "checkpoint_format": "gptq_v2"}
    return gptqmodel(folder, "gptq", written, GPTQConfig(bits=4, backend="gptq_torch"))


def awq(folder: Path) -> Any:
    written = {"zero_point": True, "version": "gemm"}
    return gptqmodel(folder, "awq", written, AwqConfig(backend="torch_awq"))


LOADERS: dict[str, Callable[[Path], Any]] = {
    "torchao": lambda folder: torchao(folder, lambda q: q.Int8WeightOnlyConfig(set_inductor_config=False)),
    "torchao int4": lambda folder: torchao(folder, lambda q: q.IntxWeightOnlyConfig(torch.int4, q.PerGroup(32))),
    "hqq": hqq,
    "gptq": gptq,
    "awq": awq,
}


@pytest.mark.filterwarnings("ignore")  # of the packages
@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "torchao" else pytest.mark.slow) for k in LOADERS])
@torch.compiler.set_stance("force_eager")  # gptqmodel would compile its dequantisation, which takes a minute
def test_an_adapter_on_it_trains_is_saved_and_merged(kind: str, tmp_path: Path) -> None:
    base = LOADERS[kind](tmp_path)
    plain = base(TOKENS).logits.detach()
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"]))
    layers = get_layer_status(model)
    assert {layer.quantization_backend for layer in layers} == {kind.split()[0]} and len(layers) == 4
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(4):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    model.eval()
    adapted = logits(model)
    assert (adapted - plain).abs().max() > 0.01
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain)
    close = {"rtol": 1e-2, "atol": 1e-2} if kind == "awq" else {"rtol": 1e-4, "atol": 1e-4}
    rows = logits(model, adapter_names=["default", "__base__"])
    torch.testing.assert_close(rows, torch.stack([adapted[0], plain[1]]), **close)
    model.save_pretrained(tmp_path / "adapter")
    loaded: Any = PeftModel.from_pretrained(model.unload(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), adapted, **close)
    if kind in ("gptq", "awq"):
        with pytest.raises(MergeError, match="dequantize_base"):
            loaded.merge_and_unload()
        torch.testing.assert_close(logits(loaded), adapted, **close)
    else:
        loaded.merge_adapter()
        assert 0 < (logits(loaded) - adapted).abs().max() < 0.5
        loaded.unmerge_adapter()
        torch.testing.assert_close(logits(loaded), adapted, **close)
    merged = dequantize_base(loaded, torch.float32).merge_and_unload()
    torch.testing.assert_close(logits(merged), adapted, **close)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), adapted, **close)


@torch.no_grad()
def logits(model: Any, **options: Any) -> Tensor:
    return model(TOKENS, **options).logits
