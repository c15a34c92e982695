"""One training step of a tiny adapted Llama in a group of processes (gloo, CPU), for tests that start them."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import LoraConfig, get_peft_model
from peftcore.kernels.low_rank import low_rank_linears
from peftcore.layers import forward_paths

PROCESSES = 2
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


def step(rank: int, way: str, folder: str) -> None:
    """One process's part of a step under "ddp" or "fsdp2"; the first writes what came out into the folder."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{way}", rank=rank, world_size=PROCESSES)
    taken = []

    def counted(x: Tensor, layers: Any) -> Any:
        taken.append(len(layers))
        return low_rank_linears(x, layers)

    forward_paths.low_rank_linears = counted  # type: ignore[assignment]
    model = adapted()
    if way == "ddp":
        wrapped: Any = DistributedDataParallel(model)
    else:
        for block in model.model.layers:
            fully_shard(block)
        wrapped = fully_shard(model)
    rows = TOKENS[rank::PROCESSES]
    loss = wrapped(input_ids=rows, labels=rows).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}
    dist.all_reduce(total := loss.detach().clone())
    if rank == 0:
        torch.save({"loss": total / PROCESSES, "gradients": whole, "taken": taken}, f"{folder}/result.pt")
    dist.barrier()
    os._exit(0)  # taking gloo and FSDP's modules apart in an exiting process can hang
