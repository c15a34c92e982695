"""A LoRA directory as vLLM and LoRAX take it, and HF PEFT and we too.

One rank for all layers, of those that vLLM has buffers for, by rows and columns of zeros; α = r, the true scale in B;
no patterns, no biases, no saved modules. LoRAX leaves out a kind of layer that some block lacks, so every layer of an
adapted name is there, the others with zeros.

Shapes: i in_features, o out_features, r rank.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from peftcore._util.tensors import PREFIX
from peftcore.bases import base_weight, is_adaptable
from peftcore.conversion.convert import write_lora
from peftcore.errors import ExportError
from peftcore.export.canonical import CanonicalLora, canonicalise
from peftcore.export.vllm_rules import RANKS, check_vllm
from peftcore.injection.module_index import ModuleIndex
from peftcore.layers.wrapper import unwrapped
from peftcore.methods.lora import LoraConfig


def export_vllm(model: nn.Module, adapter_name: str, folder: str | Path) -> int:
    """Write one LoRA adapter for vLLM and LoRAX; gives its rank, which `--max-lora-rank` must reach.

    What was at `folder` is replaced. Raises ExportError for an adapter that they cannot take; nothing is then written.
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
            f"rank {lora.rank} is above vLLM's largest, {RANKS[-1]}; use convert_to_lora(rank={RANKS[-1]})"
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
    """{path: (A, B)} of every layer that has an adapted one's name, in the model's order."""
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
