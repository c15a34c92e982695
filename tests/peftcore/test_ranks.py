import torch
from torch import nn

from peftcore import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))


def test_ranks_are_those_of_the_layers_of_the_active_adapter() -> None:
    model = get_peft_model(net(), LoraConfig(r=4, rank_pattern={"1": 2}, target_modules=["0", "1"]))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["2"]))
    assert model.adapter_ranks() == {"0": 4, "1": 2}
    assert model.adapter_ranks("other") == {"2": 3}
    model.set_adapter("other")
    assert model.adapter_ranks() == {"2": 3}


def test_adaloras_rank_is_what_its_budget_keeps() -> None:
    config = AdaLoraConfig(init_r=4, target_r=2, tinit=0, tfinal=1, total_step=4, target_modules=["0", "1"])
    model = get_peft_model(net(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert model.adapter_ranks() == {"0": 4, "1": 4}
    totals = []
    for step in range(1, 5):
        model(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()
        model.on_optimizer_step(step, optimizer)
        optimizer.zero_grad()
        totals.append(sum(model.adapter_ranks().values()))
    assert totals == [config.budget(step, 2) for step in range(1, 5)] and totals[-1] == 4


def test_a_method_without_ranks_has_none() -> None:
    model = get_peft_model(net(), IA3Config(target_modules=["0"], feedforward_modules=[]))
    assert model.adapter_ranks() == {}
