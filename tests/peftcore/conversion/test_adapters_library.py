"""Directories of the library `adapters`: Houlsby's adapters are read exactly, all others are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_folders import PLACES, houlsby_folder
from prompt_models import build, call
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftcore import CheckpointError, ConfigError, PeftModel, convert_adapters_directory

LAST_LAYERS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "bert-features": ("attention.output.dense", "output.dense"),
}


def with_adapters(family: str, tensors: dict[str, Tensor]) -> Any:
    """Return the base model with the adapters in hooks on its layers."""
    model = build(family)
    blocks, *places = PLACES[family.partition("-")[0]]
    stack = next(module for path, module in model.named_modules() if path.endswith(blocks))
    for number, block in enumerate(stack):
        for place, path in zip(places, LAST_LAYERS[family], strict=True):
            start = f"{blocks}.{number}.{place}.adapters.task."
            own = {key.rpartition(start)[2]: tensor for key, tensor in tensors.items() if start in key}

            def adapt(_layer: nn.Module, _args: Any, y: Tensor, own: dict[str, Tensor] = own) -> Tensor:
                inner = torch.relu(y @ own["adapter_down.0.weight"].T + own["adapter_down.0.bias"])
                change = inner @ own["adapter_up.weight"].T + own["adapter_up.bias"]
                return y + own.get("scaling", 1.0) * change

            block.get_submodule(path).register_forward_hook(adapt)
    return model


@pytest.mark.parametrize("family, prefix", [("llama", ""), ("gpt2", "transformer."), ("bert-features", "bert.")])
@pytest.mark.parametrize("scaling", [1.0, "learned"])
def test_houlsbys_adapters_compute_the_same(family: str, prefix: str, scaling: Any, tmp_path: Path) -> None:
    tensors = houlsby_folder(tmp_path / "a", build(family), prefix, non_linearity="relu", scaling=scaling)
    convert_adapters_directory(tmp_path / "a", tmp_path / "b", build(family))
    expected = call(family, with_adapters(family, tensors))
    assert (expected - call(family, build(family))).abs().max() > 1e-2
    torch.testing.assert_close(call(family, PeftModel.from_pretrained(build(family), tmp_path / "b")), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"original_ln_before": True}, "original_ln_before must be false .*got true. Of .* only double_seq_bn"),
        ({"is_parallel": True}, "is_parallel must be false"),
        ({"phm_layer": True}, "phm_layer must be false"),
        ({"inv_adapter": "nice"}, 'inv_adapter must be null .*got "nice"'),
        ({"architecture": "lora"}, 'architecture must be null .*got "lora"'),
        ({"non_linearity": "rellu"}, "unknown non_linearity 'rellu'"),
    ],
)
def test_other_adapters_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    houlsby_folder(tmp_path / "a", build("llama"), **options)
    with pytest.raises(ConfigError, match=message):
        convert_adapters_directory(tmp_path / "a", tmp_path / "b", build("llama"))
    assert not (tmp_path / "b").exists()


def test_directories_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder, out, model = tmp_path / "a", tmp_path / "b", build("llama")
    with pytest.raises(CheckpointError, match="give a directory that `save_adapter` of adapters wrote"):
        convert_adapters_directory(tmp_path / "none", out, model)
    houlsby_folder(folder, model)
    with pytest.raises(ConfigError, match="has an encoder and a decoder"):
        convert_adapters_directory(folder, out, build("t5"))
    tensors = load_file(folder / "adapter.safetensors")
    key = next(key for key in tensors if key.endswith("down.0.weight"))
    save_file(tensors | {key: torch.zeros(5, 32)}, folder / "adapter.safetensors")
    with pytest.raises(ConfigError, match=r"the bottlenecks have the sizes \[3, 5\]"):
        convert_adapters_directory(folder, out, model)
    save_file(
        tensors | {"layers.7.output_adapters.adapters.task.scaling": torch.ones(1)}, folder / "adapter.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"layers\.7\..* belongs to no block of this LlamaForCausalLM"):
        convert_adapters_directory(folder, out, model)
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(CheckpointError, match="save the adapter with use_safetensors=True"):
        convert_adapters_directory(folder, out, model)
    (folder / "adapter_config.json").write_text(json.dumps({"config": "pfeiffer", "name": "task"}))
    with pytest.raises(ConfigError, match="does not describe an adapter of the library adapters"):
        convert_adapters_directory(folder, out, model)
    assert not out.exists()
