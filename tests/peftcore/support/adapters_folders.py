"""Directories as the library `adapters` 1.3 writes them for Houlsby's bottleneck adapters (`double_seq_bn`)."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

PLACES = {
    "llama": ("layers", "attention_adapters", "output_adapters"),
    "gpt2": ("h", "attention_adapters", "output_adapters"),
    "bert": ("encoder.layer", "attention.output", "output"),
}
"""{model type: its list of blocks, and the modules of a block that hold the adapters after attention and MLP}."""
OPTIONS: dict[str, Any] = {
    **{"architecture": None, "mh_adapter": True, "output_adapter": True, "reduction_factor": 16},
    **{"non_linearity": "swish", "scaling": 1.0, "dropout": 0.0, "init_weights": "bert", "leave_out": []},
    **{"original_ln_before": False, "original_ln_after": True, "ln_before": False, "ln_after": False},
    **{"residual_before_ln": True, "adapter_residual_before_ln": False, "is_parallel": False, "use_gating": False},
    **{"phm_layer": False, "inv_adapter": None, "cross_adapter": False, "stochastic_depth": 0.0},
}


def houlsby_folder(folder: Path, model: Any, prefix: str = "", size: int = 3, **options: Any) -> dict[str, Tensor]:
    """Write a directory of random adapters for a tiny model: {key: tensor}."""
    folder.mkdir()
    kind, width = model.config.model_type, model.config.hidden_size
    blocks, *places = PLACES[kind]
    torch.manual_seed(7)
    tensors = {}
    for number in range(model.config.num_hidden_layers):
        for place in places:
            start = f"{prefix}{blocks}.{number}.{place}.adapters.task."
            down, up = nn.Linear(width, size), nn.Linear(size, width)
            parts = {"adapter_down.0": down, "adapter_up": up}
            for part, layer in parts.items():
                for name, parameter in layer.named_parameters():
                    tensors[f"{start}{part}.{name}"] = parameter.detach().clone()
            if isinstance(options.get("scaling"), str):
                tensors[f"{start}scaling"] = torch.rand(1) + 1
    save_file(tensors, folder / "adapter.safetensors")
    described = {"config": {**OPTIONS, **options}, "hidden_size": width, "model_type": kind, "name": "task"}
    (folder / "adapter_config.json").write_text(json.dumps({**described, "version": "adapters.1.3.0"}))
    return tensors
