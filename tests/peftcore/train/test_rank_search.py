"""find_ranks: a budget kept, a model left as it was, and ranks where they are needed."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from peftcore import ConfigError, LoraConfig, TargetError, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.train.rank_search import find_ranks

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def batches(count: int, seed: int = 1) -> list[dict[str, Tensor]]:
    made = torch.randint(1, 9, (count, 4, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids, "labels": ids} for ids in made]


def search(model: Any, config: LoraConfig = CONFIG, **options: Any) -> Any:
    given: dict[str, Any] = {"learning_rate": 0.02, "progress": False, **options}
    return find_ranks(model, config, batches(8), batches(2, seed=2), **given)


def trained(model: Any, config: LoraConfig) -> int:
    return get_peft_model(model, config).get_nb_trainable_parameters()[0]


def test_has_as_many_parameters_as_one_rank_for_all() -> None:
    found = search(llama())
    fixed = trained(llama(), CONFIG)
    assert fixed * 0.98 < found.parameters <= fixed
    assert trained(llama(), found.config_for(CONFIG)) == found.parameters
    assert len(set(found.ranks.values())) > 2 and all(1 <= rank <= 8 for rank in found.ranks.values())
    assert found.loss_after < found.loss_before and found.seconds > 0 and found.ladder == []
    assert search(llama(), budget=fixed // 2).parameters <= fixed // 2


def test_the_same_seed_finds_the_same_and_draws_no_number_of_the_callers() -> None:
    torch.manual_seed(5)
    first = search(llama())
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert search(llama()).scores == first.scores
    assert search(llama(), seed=1).scores != first.scores
    torch.manual_seed(5)
    llama()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(fails: bool) -> None:
    model = llama().train()
    model.lm_head.weight.requires_grad_(False)
    before, frozen = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    modules = [type(module) for module in model.modules()]
    if fails:
        with pytest.raises(ConfigError, match="labels"):
            find_ranks(model, CONFIG, [{"input_ids": torch.ones(1, 3, dtype=torch.long)}], batches(1), progress=False)
    else:
        search(model)
    assert model.training and [p.requires_grad for p in model.parameters()] == frozen
    assert [type(module) for module in model.modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("rslora", [False, True])
def test_each_layer_keeps_the_scaling_of_its_one_rank(rslora: bool) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=rslora)
    found = search(llama(), config)
    model = get_peft_model(llama(), found.config_for(config))
    layers: Any = adapter_set(model).of_method("default")
    for path, adapter in layers.items():
        assert adapter.r == found.ranks[path]
        assert adapter.scaling == pytest.approx(8 / (2 if rslora else 4))


def test_ranks_go_where_the_task_needs_them() -> None:
    """The first layer must change by a matrix of rank 6, the second one by rank 1."""
    torch.manual_seed(0)
    first, second = nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False)
    wanted = copy.deepcopy([first, second])
    with torch.no_grad():
        wanted[0].weight += torch.randn(24, 6) @ torch.randn(6, 24) / 12
        wanted[1].weight += torch.randn(24, 1) @ torch.randn(1, 24) / 12

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x: Tensor, goal: Tensor) -> Any:
            pair = torch.cat([self.first(x), self.second(x)], -1)
            return type("Output", (), {"loss": (pair - goal).square().mean()})

    def data(count: int) -> list[dict[str, Tensor]]:
        made = [torch.randn(64, 24) for _ in range(count)]
        return [{"x": x, "goal": torch.cat([w(x) for w in wanted], -1).detach()} for x in made]

    config = LoraConfig(r=4, lora_alpha=4, target_modules=["first", "second"])
    found = find_ranks(Two(), config, data(150), data(4), learning_rate=0.02, least=0, progress=False)
    assert found.ranks["first"] >= 6 > 2 >= found.ranks["second"]
    shares = {path: sorted(scores, reverse=True) for path, scores in found.scores.items()}
    assert shares["second"][0] > 20 * shares["second"][1] and shares["first"][5] > 5 * shares["first"][6]
    within = find_ranks(Two(), config, data(150), data(4), learning_rate=0.02, least=0, tolerance=0.3, progress=False)
    assert within.ranks["first"] >= 5 and within.parameters < 2 * 8 * 48
    assert within.ladder[-1].loss > 1.3 * within.loss_after >= within.ladder[-2].loss


def test_a_tolerance_takes_the_smallest_budget_that_keeps_it() -> None:
    strict, loose = (search(llama(), tolerance=tolerance) for tolerance in (1e-4, 10.0))
    assert loose.parameters < strict.parameters
    least = trained(llama(), CONFIG) // 4
    assert least <= loose.parameters < least * 2**0.5, "the whole ladder was gone down"
    budgets = [rung.parameters for rung in loose.ladder]
    assert budgets == sorted(budgets, reverse=True) and budgets[-1] == loose.parameters
    assert all(rung.loss <= loose.loss_after * 11 for rung in loose.ladder)


def test_layers_of_rank_0_are_no_targets() -> None:
    found = search(llama(), least=0, budget=3 * (32 + 48))
    dropped = [path for path, rank in found.ranks.items() if not rank]
    config: Any = found.config_for(CONFIG)
    assert dropped and not set(dropped) & set(config.target_modules)
    assert trained(llama(), config) == found.parameters


def test_a_base_in_four_bits_and_a_new_head(tmp_path: Any) -> None:
    llama().save_pretrained(tmp_path)
    storage = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=storage, device_map="cpu")
    assert search(packed).loss_after < search(packed).loss_before
    torch.manual_seed(0)
    classifier = LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=3))
    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    rows = [{"input_ids": b["input_ids"], "labels": b["input_ids"][:, 0] % 3} for b in batches(6)]
    found = find_ranks(classifier, config, rows, rows, learning_rate=0.02, progress=False)
    assert "score" not in found.ranks and math.isfinite(found.loss_after)
    assert found.config_for(config).task_type == "SEQ_CLS"


def test_what_leaves_no_choice_of_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match="without adapters"):
        search(get_peft_model(llama(), CONFIG))
    with pytest.raises(ConfigError, match="computes rank_pattern"):
        search(llama(), LoraConfig(target_modules="all-linear", rank_pattern={"q_proj": 2}))
    with pytest.raises(ConfigError, match="budget or a tolerance"):
        search(llama(), budget=100, tolerance=0.1)
    with pytest.raises(ConfigError, match="tolerance must be above 0"):
        search(llama(), tolerance=0.0)
    with pytest.raises(ConfigError, match="multiple must be an integer, at least 1; got 0; try 1"):
        search(llama(), multiple=0)
    with pytest.raises(ConfigError, match="least must be an integer, at least 0; got -3; try 1"):
        search(llama(), least=-3)
    with pytest.raises(ConfigError, match="got 0 and 2"):
        find_ranks(llama(), CONFIG, [], batches(2), progress=False)
    with pytest.raises(ConfigError, match=r"linear layers only; exclude model\.embed_tokens"):
        search(llama(), LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(TargetError):
        search(llama(), LoraConfig(target_modules=["nothing"]))
