"""`export_vllm`: a LoRA directory for vLLM and LoRAX, which HF PEFT and peftcore read too.

The directory has PEFT's format (https://huggingface.co/docs/peft/developer_guides/checkpoint), restricted to the subset
of vLLM (https://docs.vllm.ai/en/latest/features/lora.html):
- One rank for all layers, of those for which vLLM has buffers, by padding with zeros.
- α = r, with the scaling in B; no patterns, no biases, no saved modules.
- Every layer with a targeted name, layers that are not adapted with zeros: LoRAX ignores a layer name that is missing
  in some block.

Shapes: i in_features, o out_features, r rank.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from peftcore.bases import base_weight, is_adaptable
from peftcore.conversion.convert import write_lora
from peftcore.errors import ExportError
from peftcore.export.canonical import CanonicalLora, canonicalise
from peftcore.export.vllm_rules import RANKS, check_vllm
from peftcore.files.tensors import PREFIX
from peftcore.injection.module_index import ModuleIndex
from peftcore.layers.wrapper import unwrapped
from peftcore.methods.lora import LoraConfig


def export_vllm(model: nn.Module, adapter_name: str, folder: str | Path) -> int:
    """Write a model's LoRA, AdaLoRA or VeRA adapter for vLLM and LoRAX; an existing folder is replaced.

    Returns:
        The rank of the written adapter; vLLM's `--max-lora-rank` must be at least that.

    Raises:
        ExportError: the runtimes do not support the adapter; nothing has been written.
    """
    lora = canonicalise(model, adapter_name)
    if lora.embeddings:
        raise ExportError(
            f"{', '.join(sorted(lora.embeddings))}: these runtimes adapt linear layers only; leave embeddings out, or "
            "merge the adapter into the base"
        )
    rank = next((rank for rank in RANKS if rank >= lora.rank), None)
    if rank is None:
        raise ExportError(
            f"rank {lora.rank} is above vLLM's largest, {RANKS[-1]}; use "
            f"add_as_lora(model, name, new_name, rank={RANKS[-1]})"
        )
    lora = canonicalise(model, adapter_name, rank)
    tensors = _tensors(model, lora)
    config = LoraConfig(
        task_type=lora.task_type,
        base_model_name_or_path=lora.base,
        revision=lora.revision,
        inference_mode=True,
        target_modules={_name(path) for path in tensors},
        r=rank,
        lora_alpha=rank,
    )
    keyed = {}
    for path, (a, b) in tensors.items():
        keyed |= {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}
    write_lora(config, keyed, Path(folder))
    problems = check_vllm(folder, max_lora_rank=rank)
    assert not problems, problems
    return rank


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _tensors(model: nn.Module, lora: CanonicalLora) -> dict[str, tuple[Tensor, Tensor]]:
    """Return {path: (A, B)} of every linear layer with a targeted name, in the model's order."""
    names = {_name(path) for path in lora.layers}
    tensors = {}
    for path, module in ModuleIndex(model).modules.items():
        layer = unwrapped(module)
        if _name(path) not in names or not is_adaptable(layer):
            continue
        if path in lora.layers:
            tensors[path] = lora.layers[path]
        elif (base := base_weight(layer)).kind == "linear":
            tensors[path] = (torch.zeros(lora.rank, base.in_features), torch.zeros(base.out_features, lora.rank))
    return tensors
