"""One training step of a tiny adapted Llama in a group of processes, for tests that start them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from process_groups import PROCESSES
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import LoraConfig, get_peft_model
from peftcore.kernels.low_rank import low_rank_linears
from peftcore.layers import forward_paths

TOKENS = torch.arange(2, 30).view(4, 7)


def adapted() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config).double(), lora)


def step_of_one_process() -> tuple[float, dict[str, Tensor]]:
    model = adapted()
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def steps(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what this process came to under "ddp" and under "fsdp2"."""
    return {"ddp": _step(DistributedDataParallel), "fsdp2": _step(_sharded)}


def _sharded(model: Any) -> Any:
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def _step(wrap: Callable[[Any], Any]) -> dict[str, Any]:
    taken = []

    def counted(x: Tensor, layers: Any) -> Any:
        taken.append(len(layers))
        return low_rank_linears(x, layers)

    model = adapted()
    wrapped = wrap(model)
    rows = TOKENS[dist.get_rank() :: PROCESSES]
    with patch.object(forward_paths, "low_rank_linears", counted):
        loss = wrapped(input_ids=rows, labels=rows).loss
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}
    dist.all_reduce(total := loss.detach().clone())
    return {"loss": total.item() / PROCESSES, "gradients": whole, "taken": taken}
