"""One training step of an adapted model, to be timed: the floor, ours and HF PEFT on equal bases and equal weights.

Used by `benchmarks.train_step` (one setting, a table) and `benchmarks.growth` (many settings, a picture). The floor is
the frozen base: its forward, and the backward through activations only. Each side is there with both losses: ours, with
the output head at labelled positions only, and the model's own, with the head at every position. "floor" and "ours"
have our loss, and "PEFT" the model's, as people use it.
"""

import gc
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import peftcore
from peftcore.train import token_losses

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest difference of our loss and PEFT's at equal weights (nats)."""
METHODS = ("lora", "lora-qv", "rslora", "dora", "adalora")
"""`lora-qv` adapts q_proj and v_proj alone, HF PEFT's default for Llama."""
FLOOR, OURS, PEFT, PEFT_OUR_LOSS = "floor", "ours", "PEFT", "PEFT, our loss"
FLOOR_MODEL_LOSS, OURS_MODEL_LOSS = "floor, model's loss", "ours, model's loss"
OUR_LOSS_ROWS, MODEL_LOSS_ROWS = (FLOOR, OURS, PEFT_OUR_LOSS), (FLOOR_MODEL_LOSS, OURS_MODEL_LOSS, PEFT)
"""Floor, ours and PEFT with one loss each."""
ROWS = OUR_LOSS_ROWS + MODEL_LOSS_ROWS
LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Loss = Callable[[nn.Module, dict[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """What is trained on what."""

    folder: Path
    """The base model."""
    dtype: str = "bf16"
    storage: str = "none"
    """Of the base's weights: none or nf4."""
    method: str = "lora"
    rank: int = 16
    dropout: float = 0.0
    batch: int = 4
    """Rows (count)."""
    length: int = 256
    """Tokens a row."""
    blocks: int | None = None
    """Adapted blocks of a Llama, from the input on; None: all linear layers of any model."""
    device: str = "cpu"
    regularized: bool = True
    """Whether AdaLoRA has its regulariser."""


@dataclass
class Row:
    """One line of the table."""

    name: str
    model: nn.Module
    inputs: Callable[[], dict[str, Tensor]]
    loss: Loss
    saved: int = 0
    """Bytes of activations that one forward keeps for the backward."""
    cuda_peak: int = 0
    """Most bytes that a step allocates on the GPU beyond what lay there before."""
    seconds: list[float] = field(default_factory=list)


def quiet() -> None:
    """Nothing but the benchmark's own output: no warnings and no bars of the libraries."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()


# -- models ------------------------------------------------------------------------------------------------------


def random_base(folder: Path, blocks: int) -> Path:
    """A folder with SmolLM2-135M's shape and random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def load(setting: Setting) -> Any:
    """The frozen base, in training mode."""
    dtype = DTYPES[setting.dtype]
    quantization = None
    if setting.storage == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        setting.folder,
        dtype=dtype,
        quantization_config=quantization,
        device_map={"": setting.device},
        local_files_only=True,
    )
    return model.requires_grad_(False).train()


def adapter_config(tool: ModuleType, setting: Setting) -> Any:
    """The adapter's options for `peft` or `peftcore`, which give them the same names."""
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "lora_alpha": 2 * setting.rank,
        "lora_dropout": setting.dropout,
        "target_modules": _targets(setting),
        "layers_to_transform": None if setting.blocks is None else list(range(setting.blocks)),
    }
    if setting.method == "adalora":
        if not setting.regularized:
            common["orth_reg_weight"] = 0.0
        return tool.AdaLoraConfig(init_r=setting.rank, target_r=max(1, setting.rank // 2), total_step=1000, **common)
    variant = {"use_dora": setting.method == "dora", "use_rslora": setting.method == "rslora"}
    return tool.LoraConfig(r=setting.rank, **variant, **common)


def _targets(setting: Setting) -> list[str] | str:
    if setting.method == "lora-qv":
        return ["q_proj", "v_proj"]
    return "all-linear" if setting.blocks is None else LLAMA_LINEARS


def build(setting: Setting, scratch: Path) -> list[Row]:
    """All rows; ours reads the adapter that PEFT wrote into `scratch`, so their weights are equal."""
    torch.manual_seed(1)
    theirs = peft.get_peft_model(load(setting), adapter_config(peft, setting))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name or "lora_E" in name:  # at zero, as it starts, it would hide A from the loss
            nn.init.normal_(parameter, std=0.01)
    theirs.save_pretrained(str(scratch))
    ours = peftcore.PeftModel.from_pretrained(load(setting), scratch, is_trainable=True).train()
    floor = load(setting)
    models = (floor, ours, theirs)
    return [
        _row(name, model, setting)
        for names in (OUR_LOSS_ROWS, MODEL_LOSS_ROWS)
        for name, model in zip(names, models, strict=True)
    ]


def build_alone(setting: Setting, name: str) -> Row:
    """One row without any other in memory."""
    torch.manual_seed(1)
    model = load(setting)
    if name not in (FLOOR, FLOOR_MODEL_LOSS):
        tool = peftcore if name in (OURS, OURS_MODEL_LOSS) else peft
        model = tool.get_peft_model(model, adapter_config(tool, setting)).train()
    return _row(name, model, setting)


def _row(name: str, model: Any, setting: Setting) -> Row:
    ids, _ = make_batch(model, setting)
    loss = model_loss if name in MODEL_LOSS_ROWS else our_loss
    if name in (FLOOR, FLOOR_MODEL_LOSS):
        embeddings = model.get_input_embeddings()(ids).detach()
        return Row(name, model, lambda: {"inputs_embeds": embeddings.clone().requires_grad_()}, loss)
    return Row(name, model, lambda: {"input_ids": ids}, loss)


def make_batch(model: nn.Module, setting: Setting) -> tuple[Tensor, Tensor]:
    """Random token ids and labels, both (batch, length); the first two thirds of each row are masked."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(config.vocab_size, (setting.batch, setting.length), generator=generator)
    labels = ids.clone()
    labels[:, : 2 * setting.length // 3] = -100
    return ids.to(setting.device), labels.to(setting.device)


# -- losses ------------------------------------------------------------------------------------------------------


def model_loss(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The model's own loss: the output head at every position; PEFT's AdaLoRA adds its regulariser to it."""
    return model(**inputs, labels=labels).loss


def our_loss(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The same number by our trainer's way: the head only where a label is, and our adapters' regulariser."""
    loss = token_losses(model, inputs, labels)[0].mean()
    regularizer = model.adapter_regularizer() if isinstance(model, peftcore.PeftModel) else None
    return loss if regularizer is None else loss + regularizer


# -- measuring ---------------------------------------------------------------------------------------------------


def check_equal(setting: Setting, scratch: Path) -> None:
    """Stop unless ours and PEFT have the same loss and gradient at equal weights, without dropout.

    AdaLoRA's regulariser is left out: PEFT's is the norm's mean, and ours, as in the paper, its square's.
    """
    setting = replace(setting, dropout=0.0, regularized=False)
    rows = {row.name: row for row in build(setting, scratch)}
    tolerance = TOLERANCE[setting.dtype]
    (our_value, our_norm), (their_value, their_norm) = (_loss_and_gradient(rows[n], setting) for n in (OURS, PEFT))
    if not abs(our_value - their_value) <= tolerance:
        raise SystemExit(f"error: at equal weights our loss is {our_value:.5f} and PEFT's {their_value:.5f}")
    # in bf16 the two gradients round apart by tens of per cent on a real base, in fp32 they are equal
    if setting.dtype == "fp32" and not abs(our_norm / their_norm - 1) <= tolerance:
        raise SystemExit(f"error: at equal weights our gradient's norm is {our_norm:.5f}, PEFT's {their_norm:.5f}")


def _loss_and_gradient(row: Row, setting: Setting) -> tuple[float, float]:
    """Loss in nats and the norm of its gradient; an adapter without a gradient would be fast and wrong."""
    value = row.loss(row.model, row.inputs(), make_batch(row.model, setting)[1])
    value.backward()
    trained = [parameter for parameter in row.model.parameters() if parameter.requires_grad]
    gradients = [parameter.grad.float().norm() for parameter in trained if parameter.grad is not None]
    if not trained or len(gradients) < len(trained):
        raise SystemExit(f"error: {row.name}: {len(gradients)} of {len(trained)} adapter weights got a gradient")
    return value.item(), torch.stack(gradients).norm().item()


def saved_bytes(row: Row, labels: Tensor) -> int:
    """Bytes of every storage that a forward saves, each once, the model's own parameters and buffers apart."""
    own = {t.untyped_storage().data_ptr() for t in (*row.model.parameters(), *row.model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = row.loss(row.model, row.inputs(), labels)
    total = sum(sizes.values())  # while `value` keeps the graph, and with it every storage, alive
    del value
    return total


def measure(rows: list[Row], labels: Tensor, repeats: int) -> None:
    """Time one step of each row a round, the order rotated, after two rounds of warm-up."""
    for round_number in range(-2, repeats):
        shift = round_number % len(rows)
        for row in rows[shift:] + rows[:shift]:
            seconds = step(row, labels)
            if round_number >= 0:
                row.seconds.append(seconds)


def step(row: Row, labels: Tensor) -> float:
    """Seconds of one forward and backward; on a GPU until it has finished them."""
    inputs = row.inputs()
    cuda = labels.device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.synchronize()
    start = time.perf_counter()
    row.loss(row.model, inputs, labels).backward()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if cuda:
        row.cuda_peak = max(row.cuda_peak, torch.cuda.max_memory_allocated() - before)
    row.model.zero_grad(set_to_none=True)
    return seconds


def release(device: str) -> None:
    """Give back what models that are no longer used held; their modules refer to one another in circles."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
