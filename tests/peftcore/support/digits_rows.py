"""How each method learns the digits: its options, learning rate, steps, and the held-out loss it must get under.

The base alone has a loss of 5.07 on transposed digits, and a model that knows nothing and says so ln 10 = 2.30. A bound
is at least 0.2 above the worst of three seeds; LoRA on the queries and values alone, with the row's steps and rate,
would miss LoRA's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from digits import WIDTH, base, batches, digits, judge, train, two_tasks

from peftcore import LoraConfig, get_peft_model
from peftcore.config import PeftConfig
from peftcore.registry import method_named

LOW_RANK = "low rank"
SHARED = "products, shared and mixed"
ORTHOGONAL = "rotations and reflections"
SPARSE = "sparse and spectral"
FEW = "scales, norms, tokens"
PROMPT = "prompts"

EVERY_LINEAR = {"target_modules": "all-linear"}
SCALED = {"target_modules": r".*\.(\w_proj|\w+_proj)", "feedforward_modules": r".*\.down_proj"}
CAUSAL = {"task_type": "CAUSAL_LM"}


def examples(count: int) -> dict[str, Any]:
    """CPT's: training digits with their classes, as a prompt."""
    types = [kind for n in range(count) for kind in (*[4 * n + 2] * 16, 4 * n + 4)]
    return {"cpt_token_ids": digits("transposed")[:count].flatten().tolist(), "cpt_tokens_type_mask": types}


@dataclass(frozen=True)
class Row:
    """One method, or a variant that is worth its own."""

    name: str
    method: str
    family: str
    lr: float
    bound: float
    """What its held-out loss must be under, in nats per digit."""
    options: Mapping[str, Any]
    steps: int = 60


# fmt: off
ROWS = [
    Row("LoRA", "LORA", LOW_RANK, 1e-2, 1.4, EVERY_LINEAR | {"r": 4, "lora_alpha": 8}),
    Row("rsLoRA", "LORA", LOW_RANK, 5e-3, 1.4, EVERY_LINEAR | {"r": 4, "lora_alpha": 8, "use_rslora": True}),
    Row("DoRA", "LORA", LOW_RANK, 1e-2, 1.4, EVERY_LINEAR | {"r": 4, "lora_alpha": 8, "use_dora": True}),
    Row("AdaLoRA", "ADALORA", LOW_RANK, 3e-2, 1.4, EVERY_LINEAR | {
        "init_r": 6, "target_r": 4, "lora_alpha": 16, "tinit": 15, "tfinal": 20, "deltaT": 5, "total_step": 60,
        "orth_reg_weight": 0.1,
    }),
    Row("DeLoRA", "DELORA", LOW_RANK, 1e-2, 1.4, EVERY_LINEAR | {"r": 4}),
    Row("DEFT", "DEFT", LOW_RANK, 1e-2, 1.5, EVERY_LINEAR | {"r": 8}),
    Row("AdaMSS", "ADAMSS", LOW_RANK, 3e-2, 1.6, EVERY_LINEAR | {"r": 32, "subspace_rank": 2}, 100),
    Row("HiRA", "HIRA", LOW_RANK, 3e-2, 1.45, EVERY_LINEAR | {"r": 8}),
    Row("GLoRA", "GLORA", LOW_RANK, 1e-2, 1.5, EVERY_LINEAR | {"r": 4}),
    Row("GraLoRA", "GRALORA", LOW_RANK, 1e-2, 1.4, EVERY_LINEAR | {"r": 8, "alpha": 16}),
    Row("MiSS", "MISS", LOW_RANK, 1e-2, 1.3, EVERY_LINEAR | {"r": 8}),
    Row("PEANuT", "PEANUT", LOW_RANK, 1e-2, 1.5, EVERY_LINEAR | {"r": 8, "depth": 1}),
    Row("Lily", "LILY", SHARED, 1e-2, 1.5, EVERY_LINEAR | {"r": 16}),
    Row("LoHa", "LOHA", SHARED, 2e-2, 1.4, EVERY_LINEAR | {"r": 4, "alpha": 8}),
    Row("LoKr", "LOKR", SHARED, 5e-2, 1.5, EVERY_LINEAR | {"r": 4, "alpha": 8}),
    Row("OSF", "OSF", LOW_RANK, 2e-2, 1.5, EVERY_LINEAR),
    Row("VeRA", "VERA", SHARED, 1e-1, 1.4, EVERY_LINEAR | {"r": 64}),
    Row("PVeRA", "PVERA", SHARED, 1e-1, 1.9, EVERY_LINEAR | {"r": 64, "d_initial": 0.4}),
    Row("RandLoRA", "RANDLORA", SHARED, 1e-2, 1.3, EVERY_LINEAR | {"r": 8, "randlora_alpha": 64}),
    Row("VB-LoRA", "VBLORA", SHARED, 5e-2, 1.4, EVERY_LINEAR | {"r": 4, "num_vectors": 32, "vector_length": 24}, 100),
    Row("Uni-LoRA", "UNILORA", SHARED, 5e-2, 1.45, EVERY_LINEAR | {"r": 4, "theta_d_length": 1024}, 100),
    Row("TinyLoRA", "TINYLORA", SHARED, 1e-1, 1.8, EVERY_LINEAR | {"r": 8, "u": 64}, 100),
    Row("Poly", "POLY", SHARED, 3e-2, 1.7, EVERY_LINEAR | {"r": 4, "n_tasks": 2, "n_skills": 2}),
    Row("X-LoRA", "XLORA", SHARED, 1e-2, 1.4, {"hidden_size": WIDTH, "layerwise_scalings": True}),
    Row("OFT", "OFT", ORTHOGONAL, 2e-2, 1.3, EVERY_LINEAR | {"oft_block_size": 8}),
    Row("BOFT", "BOFT", ORTHOGONAL, 2e-2, 1.3, EVERY_LINEAR | {"boft_block_size": 8}),
    Row("HRA", "HRA", ORTHOGONAL, 2e-2, 1.3, EVERY_LINEAR | {"r": 8}),
    Row("PSOFT", "PSOFT", ORTHOGONAL, 2e-2, 1.4, EVERY_LINEAR | {"r": 16}),
    Row("RoAd", "ROAD", ORTHOGONAL, 1e-1, 1.5, EVERY_LINEAR | {"group_size": 8}),
    Row("FourierFT", "FOURIERFT", SPARSE, 1e-1, 1.5, EVERY_LINEAR | {"n_frequency": 200, "scaling": 15}),
    Row("FRoD", "FROD", SPARSE, 1e-2, 1.5, EVERY_LINEAR | {"sparse_rate": 0.05, "progressbar": False}),
    Row("WaveFT", "WAVEFT", SPARSE, 3e-3, 1.3, EVERY_LINEAR | {"n_frequency": 400, "scaling": 10}),
    Row("C3A", "C3A", SPARSE, 2e-1, 1.6, EVERY_LINEAR | {"block_size": 24}),
    Row("SHiRA", "SHIRA", SPARSE, 3e-2, 1.3, EVERY_LINEAR | {"r": 4, "random_seed": 0}),
    Row("Super-Tuning", "SUPERTUNING", SPARSE, 3e-2, 1.4, EVERY_LINEAR | {"sparsity": 0.9}),
    Row("bottleneck", "BOTTLENECK", SHARED, 1e-2, 1.7, {"bottleneck_size": 16}),
    Row("parallel bottleneck", "BOTTLENECK", SHARED, 1e-2, 1.65, {"style": "parallel", "bottleneck_size": 16}),
    Row("IA3", "IA3", FEW, 1e-1, 1.5, SCALED, 120),
    Row("BEFT", "BEFT", FEW, 1e-1, 2.0, EVERY_LINEAR, 120),
    Row("LN tuning", "LN_TUNING", FEW, 1e-1, 1.7, {}, 120),
    Row("trainable tokens", "TRAINABLE_TOKENS", FEW, 1e-1, 1.7, {"token_indices": list(range(17))}, 120),
    Row("prompt tuning", "PROMPT_TUNING", PROMPT, 5e-1, 1.9, CAUSAL | {"num_virtual_tokens": 32}, 150),
    Row("prefix tuning", "PREFIX_TUNING", PROMPT, 1e-1, 1.3, CAUSAL | {"num_virtual_tokens": 16}, 120),
    Row("Cartridge", "CARTRIDGE", PROMPT, 1e-1, 1.3, CAUSAL | {"num_virtual_tokens": 16}, 120),
    Row("P-tuning", "P_TUNING", PROMPT, 2e-2, 2.15, CAUSAL | {
        "num_virtual_tokens": 32, "encoder_hidden_size": 64,
    }, 250),
    Row("multitask prompts", "MULTITASK_PROMPT_TUNING", PROMPT, 3e-1, 2.15, CAUSAL | {
        "num_virtual_tokens": 32, "num_tasks": 2, "num_ranks": 4,
    }, 250),
    Row("CPT", "CPT", PROMPT, 2e-1, 1.85, CAUSAL | examples(2) | {"opt_projection_epsilon": 20.0}, 150),
    Row("Shadow", "SHADOW", SHARED, 1e-2, 1.65, CAUSAL | {"r": 8, "shadow_alpha": 1.0}),
    Row("LoReFT", "LOREFT", SHARED, 3e-2, 1.5, CAUSAL | {"r": 8, "positions": "f8+l8"}, 120),
    Row("adaption prompt", "ADAPTION_PROMPT", PROMPT, 2e-1, 1.9, {"adapter_len": 16, "adapter_layers": 3}, 120),
]
# fmt: on


@dataclass(frozen=True)
class Curve:
    """What training showed, at the start and every few steps."""

    seconds: list[float]
    losses: list[float]
    """On held-out digits, in nats each."""
    accuracy: float
    """At the end."""
    trainable: int
    """Parameters that trained, at the start (count)."""


def learn(row: Row, scratch: Path, every: int | None = None) -> Curve:
    """Train the row's adapter on transposed digits and judge it every few steps (None: at the end alone).

    A method that takes `task_ids` learns transposed digits as task 1 of two, beside upright ones.
    """
    config = configuration(row, scratch)
    torch.manual_seed(0)
    net = get_peft_model(base(), config)
    arguments = method_named(row.method).adapter.forward_arguments(config)
    task = 1 if arguments and "task_ids" in arguments else None
    trainable, _ = net.get_nb_trainable_parameters()  # AdaLoRA ends with fewer
    judged, seconds = [judge(net, task=task)], [0.0]

    def look(number: int, elapsed: float) -> None:
        if number % (every or row.steps) == 0:
            judged.append(judge(net, task=task))
            seconds.append(elapsed)

    train(net, batches("transposed", row.steps) if task is None else two_tasks(row.steps), row.lr, look)
    losses, accuracies = zip(*judged, strict=True)
    return Curve(seconds, list(losses), accuracies[-1], trainable)


def configuration(row: Row, scratch: Path) -> PeftConfig:
    """The row's options, and for X-LoRA the LoRAs that it mixes."""
    own: dict[str, Any] = {"adapters": experts(scratch)} if row.method == "XLORA" else {}
    return method_named(row.method).config(**row.options, **own)


def experts(scratch: Path) -> dict[str, str]:
    """Directories of LoRAs, one trained on transposed digits and the others on digits turned in other ways."""
    found = {}
    for number, turn in enumerate(("mirrored", "flipped", "transposed")):
        torch.manual_seed(0)
        net = get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        train(net, batches(turn, 60), lr=1e-2)
        found[str(number)] = str(scratch / turn)
        net.save_pretrained(found[str(number)])
    return found
