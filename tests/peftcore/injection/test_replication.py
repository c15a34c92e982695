"""`layer_replication`: a deeper model whose replicated blocks share weights, and its undoing."""

import copy
from typing import Any

import peft
import pytest
import torch
from lora_nets import TOKENS, llama
from method_example import randomise
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM

from peftcore import ConfigError, LoraConfig, PeftModel, TargetError, get_peft_model
from peftcore.injection.replication import replicate

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls


def test_layer_replication_parity_and_undoing(tmp_path: Any) -> None:
    options: dict[str, Any] = {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "down_proj"],
        "layer_replication": [[0, 2], [1, 2]],
    }
    hf = peft.get_peft_model(llama(), peft.LoraConfig(**copy.deepcopy(options))).eval()
    randomise(hf, 0.3)
    hf.save_pretrained(tmp_path / "hf")
    expected = hf(TOKENS, use_cache=False).logits
    plain = llama()
    base = plain(TOKENS).logits
    here = PeftModel.from_pretrained(plain, tmp_path / "hf")
    assert len(here.model.layers) == 3 and here.config.num_hidden_layers == 3
    torch.testing.assert_close(here(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    assert here.model.layers[1].mlp.gate_proj.weight is here.model.layers[2].mlp.gate_proj.weight
    generated = here.generate(TOKENS, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, here.generate(TOKENS, max_new_tokens=4, do_sample=False, use_cache=False))
    plain = here.unload()
    assert len(plain.model.layers) == 2 and torch.equal(plain(TOKENS).logits, base)


def test_layer_replication_undone_by_delete_and_by_failure() -> None:
    model = llama()
    with pytest.raises(TargetError):
        get_peft_model(model, LoraConfig(target_modules=["nothing"], layer_replication=[(0, 2), (0, 2)]))
    assert len(model.model.layers) == 2
    with pytest.raises(ConfigError, match="not a range"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 3)]))
    base = model(TOKENS).logits
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (0, 2)]))
    model.delete_adapter("default")
    assert torch.equal(model(TOKENS).logits, base)


def test_a_merged_deeper_model_shares_no_weights_and_can_be_saved(tmp_path: Any) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)]))
    randomise(model, 0.3)
    expected = model.eval()(TOKENS).logits
    plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path)
    torch.testing.assert_close(type(plain).from_pretrained(tmp_path)(TOKENS).logits, expected)
    first, second = (set(map(id, block.parameters())) for block in plain.model.layers[1:])
    assert first.isdisjoint(second) and len(first) == len(second) == 9


def test_replicated_blocks_share_tensors_and_have_their_own_modules_and_cache_index() -> None:
    model = llama()
    first, second = model.model.layers
    before = replicate(model, [(0, 2), (0, 1)])
    blocks = model.model.layers
    assert [block.self_attn.layer_idx for block in blocks] == [0, 1, 2]
    assert blocks[2] is not blocks[0] and blocks[2].self_attn.q_proj is not blocks[0].self_attn.q_proj
    for twin, block in ((blocks[0], first), (blocks[1], second), (blocks[2], first)):
        pairs = zip(twin.parameters(), block.parameters(), strict=True)
        assert all(copied is original for copied, original in pairs)
    before.undo()
    assert list(model.model.layers) == [first, second] and model.config.num_hidden_layers == 2


def test_a_deeper_model_computes_its_blocks_in_the_order_of_the_ranges() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))
    x, (one, two, three) = torch.randn(2, 4), net[0]
    replicate(net, [(0, 2), (1, 3), (0, 1)])
    y = x
    for block in net[0]:
        y = block(y)
    assert torch.equal(y, one(three(two(two(one(x))))))


@pytest.mark.parametrize("ranges", [[(0, 3)], [(1, 1)], [(-1, 1)], [(0, 2), (2, 0)]])
def test_a_range_outside_of_the_blocks_changes_nothing(ranges: list[tuple[int, int]]) -> None:
    model = llama()
    blocks = model.model.layers
    with pytest.raises(ConfigError, match="is not a range of the model's 2 blocks"):
        replicate(model, ranges)
    assert model.model.layers is blocks and model.config.num_hidden_layers == 2


def test_lists_inside_of_blocks_are_no_second_stack_and_two_stacks_are_refused() -> None:
    def stack() -> nn.ModuleList:
        return nn.ModuleList(nn.ModuleDict({"inner": nn.ModuleList([nn.Linear(2, 2)])}) for _ in range(2))

    net = nn.ModuleDict({"blocks": stack()})
    replicate(net, [(0, 2), (0, 2)])
    assert len(net["blocks"]) == 4  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="one stack of blocks; ModuleDict has 2"):
        replicate(nn.ModuleDict({"encoder": stack(), "decoder": stack()}), [(0, 1)])
    with pytest.raises(TargetError, match="one stack of blocks; Linear has 0"):
        replicate(nn.Linear(2, 2), [(0, 1)])


def gemma3(**options: Any) -> Any:
    """Two blocks: the first one sees a window of two tokens, the second one all of them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 2}
    types = {"layer_types": ["sliding_attention", "full_attention"], "eos_token_id": [1, 2]}
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**sizes, **heads, **types, **options})).eval()


def qwen2(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": None}
    return Qwen2ForCausalLM(Qwen2Config(**{**sizes, **heads, **options})).eval()


@pytest.mark.parametrize("make", [gemma3, qwen2])
def test_lists_of_the_configuration_with_an_entry_for_each_block_follow_the_blocks(make: Any) -> None:
    numbers = [0, 1, 0, 1]
    plain = make()
    types, base = list(plain.config.layer_types), plain(TOKENS).logits
    deep_types = [types[n] for n in numbers]
    deep = make(num_hidden_layers=4, layer_types=deep_types)
    ends = {key: tensor for key, tensor in plain.state_dict().items() if ".layers." not in key}
    deep.load_state_dict(ends, strict=False)
    for block, number in zip(deep.model.layers, numbers, strict=True):
        block.load_state_dict(plain.model.layers[number].state_dict())
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 2), (0, 2)]))
    torch.testing.assert_close(model(TOKENS).logits, deep(TOKENS).logits)
    assert list(model.config.layer_types) == deep_types and model.config.eos_token_id == deep.config.eos_token_id
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(TOKENS, **options), deep.generate(TOKENS, **options))
    plain = model.unload()
    assert plain.config.layer_types == types and torch.equal(plain(TOKENS).logits, base)
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 2), (0, 2)]))
    merged = model.merge_and_unload()
    assert list(merged.config.layer_types) == deep_types
    torch.testing.assert_close(merged(TOKENS).logits, deep(TOKENS).logits)
