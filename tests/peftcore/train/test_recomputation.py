"""Recomputed activations: the same numbers from less memory, whatever is adapted and wherever the weights lie."""

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TrainingArguments, modeling_utils

from peftcore import AdaLoraConfig, ConfigError, LoraConfig, PrefixTuningConfig, TrainingError, get_peft_model
from peftcore.train import AdapterTrainer, RightPaddingCollator, recomputation, recompute_activations, token_losses
from peftcore.train.recomputation import MODES

ROWS, TOKENS, WIDTH = 2, 12, 32
IDS = torch.arange(3, 3 + ROWS * TOKENS).view(ROWS, TOKENS)
RECOMPUTING = ("selective", "blocks")


def llama(blocks: int = 4, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config) if not options else LlamaForCausalLM.from_pretrained(**options, config=config)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)


def adapted(case: str, folder: Path) -> Any:
    """A model in float64, in float32 on a base in NF4."""
    if case == "NF4":
        llama().save_pretrained(folder)
        storage = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        base = llama(pretrained_model_name_or_path=folder, quantization_config=storage, dtype=torch.float32)
        return get_peft_model(base, lora(lora_dropout=0.2)).train()
    if case == "AdaLoRA":
        options: dict[str, Any] = {"target_modules": "all-linear", "init_lora_weights": False}
        config: Any = AdaLoraConfig(init_r=4, target_r=2, total_step=10, lora_dropout=0.2, **options)
    else:
        config = lora(use_dora=case == "DoRA", lora_dropout=0.0 if case == "DoRA" else 0.2)
    return get_peft_model(llama().double(), config).train()


def loss_of(model: Any) -> Tensor:
    return token_losses(model, {"input_ids": IDS}, IDS)[0].mean()


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients, from one random state."""
    torch.manual_seed(1)
    loss = loss_of(model)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


def saved_bytes(model: nn.Module, loss: Any) -> int:
    """Bytes of what a forward keeps for its backward, each storage once, the model's own apart."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = loss(model)  # held until they are counted, because memory that is free is used again
    total = sum(sizes.values())
    del kept
    return total


# -- transformers' models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["LoRA", "DoRA", "AdaLoRA", "NF4"])
def test_loss_and_gradients_are_the_same_to_the_bit_and_less_is_kept(case: str, tmp_path: Path) -> None:
    model = adapted(case, tmp_path)
    loss, gradients = step(model)
    kept = [saved_bytes(model, loss_of)]
    for mode in RECOMPUTING:
        recompute_activations(model, mode)
        again, recomputed = step(model)
        assert torch.equal(again, loss)
        assert recomputed.keys() == gradients.keys()
        assert all(torch.equal(recomputed[name], gradient) for name, gradient in gradients.items())
        kept.append(saved_bytes(model, loss_of))
    assert kept[0] > 1.5 * kept[1] > 3 * kept[2]
    recompute_activations(model, "none")
    assert saved_bytes(model, loss_of) == pytest.approx(kept[0], rel=0.01)


def test_a_recomputed_block_keeps_its_input_and_nothing_else() -> None:
    kept = []
    for blocks in (2, 5):
        model = get_peft_model(llama(blocks).double(), lora(lora_dropout=0.1)).train()
        recompute_activations(model, "blocks")
        kept.append(saved_bytes(model, loss_of))
    assert kept[1] - kept[0] == 3 * ROWS * TOKENS * WIDTH * 8


def test_nothing_is_recomputed_in_evaluation() -> None:
    model = get_peft_model(llama().double(), lora()).eval()
    before = saved_bytes(model, loss_of)
    recompute_activations(model, "blocks")
    assert saved_bytes(model, loss_of) == pytest.approx(before, rel=0.02)


def test_training_goes_the_same_way(tmp_path: Path) -> None:
    ends = []
    for mode in ("none", *RECOMPUTING):
        model = get_peft_model(llama(), lora(lora_dropout=0.2))
        recompute_activations(model, mode)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True,
            save_strategy="no", logging_strategy="no", report_to=[], dataloader_pin_memory=False, log_level="error",
        )  # fmt: skip
        rows = Dataset.from_dict({"input_ids": IDS.tolist() * 2, "labels": IDS.tolist() * 2})
        AdapterTrainer(model=model, args=arguments, train_dataset=rows, data_collator=RightPaddingCollator(0)).train()
        ends.append([parameter for parameter in model.parameters() if parameter.requires_grad])
    for end in ends[1:]:
        assert all(torch.equal(one, other) for one, other in zip(end, ends[0], strict=True))


def test_a_prefix_and_recomputation_exclude_each_other_both_ways() -> None:
    model = llama()
    recompute_activations(model, "selective")
    with pytest.raises(ConfigError, match="turn checkpointing off"):
        get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    recompute_activations(model, "none")
    model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).train()
    recompute_activations(model, "blocks")
    with pytest.raises(TrainingError, match="turn checkpointing off"):
        loss_of(model)


def test_pytorch_keeps_no_product_that_the_fused_operation_adds_to() -> None:
    # the reason why `selective` chooses blocks and not operations
    model = get_peft_model(llama().double(), lora()).train()
    policy = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": policy})
    with pytest.raises(RuntimeError, match="has been mutated"):
        step(model)


# -- offloading --------------------------------------------------------------------------------------------------------


class Counted(torch.autograd.graph.saved_tensors_hooks):
    """In the place of `save_on_cpu`: notes what it would move."""

    moved: list[Tensor]

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor: Tensor) -> Tensor:
        self.moved.append(tensor)
        return tensor


@pytest.mark.parametrize("own", [True, False], ids=["transformers", "plain"])
def test_offloading_moves_each_blocks_input_and_nothing_else(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputation, "_on_accelerator", lambda model: True)
    for module in (modeling_utils, recomputation):
        monkeypatch.setattr(module, "save_on_cpu", Counted)
    Counted.moved = []
    model = get_peft_model(llama().double(), lora()).train() if own else stack()
    expected = step(model) if own else plain_step(model)
    recompute_activations(model, "offload")
    loss, gradients = step(model) if own else plain_step(model)
    shapes = [tuple(tensor.shape) for tensor in Counted.moved if tensor.numel()]
    assert shapes == [(ROWS, TOKENS, WIDTH)] * 4
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected[1].items())


def test_offloading_is_refused_where_there_is_nowhere_to_move_from() -> None:
    with pytest.raises(TrainingError, match=r"from a GPU .* use blocks"):
        recompute_activations(llama(), "offload")


# -- any other model ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * nn.functional.dropout(self.down(nn.functional.gelu(self.up(x))), 0.2, self.training)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=0.5)
        return x


def stack() -> Any:
    torch.manual_seed(0)
    return get_peft_model(Stack().double(), LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))


def plain_loss(model: nn.Module) -> Tensor:
    x = torch.linspace(-1, 1, ROWS * TOKENS * WIDTH, dtype=torch.float64).view(ROWS, TOKENS, WIDTH)
    return model(x).square().mean()


def plain_step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    loss = plain_loss(model)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


def test_the_blocks_of_a_plain_module_recompute_too() -> None:
    model = stack()
    loss, gradients = plain_step(model)
    kept = [saved_bytes(model, plain_loss)]
    for mode in RECOMPUTING:
        recompute_activations(model, mode)
        again, recomputed = plain_step(model)
        assert torch.equal(again, loss)
        assert all(torch.equal(recomputed[name], gradient) for name, gradient in gradients.items())
        kept.append(saved_bytes(model, plain_loss))
    assert kept[0] > kept[1] > kept[2]
    recompute_activations(model, "none")
    assert saved_bytes(model, plain_loss) == pytest.approx(kept[0], rel=0.01)


def test_a_copy_of_a_recomputing_module_recomputes_by_itself() -> None:
    model = stack()
    expected = plain_step(model)
    recompute_activations(model, "blocks")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        loss, gradients = plain_step(copied)
        assert torch.equal(loss, expected[0])
        assert all(torch.equal(gradients[name], gradient) for name, gradient in expected[1].items())
        model = copied


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(TrainingError, match="no list of repeated blocks"):
        recompute_activations(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)), "blocks")


def test_a_forward_that_somebody_replaced_is_left_alone() -> None:
    model = stack()
    model.blocks[0].forward = lambda x, scale: x
    with pytest.raises(TrainingError, match="the forward of a Block has already been replaced"):
        recompute_activations(model, "blocks")


def test_an_unknown_mode_is_named_with_those_there_are() -> None:
    wrong: Any = "some"
    with pytest.raises(TrainingError, match=f"'some'; give one of {', '.join(MODES)}"):
        recompute_activations(llama(), wrong)
