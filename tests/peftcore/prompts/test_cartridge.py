"""Cartridge: a prefix of keys and values whose first tokens are frozen."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from prompt_models import FAMILIES, attach, batch, both_ways, build, call

from peftcore import CartridgeConfig, ConfigError, PeftModel, get_peft_model

CAUSAL: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize("family, frozen", [("gpt2", 1), ("llama", 0), ("llama", 2), ("mistral", 3), ("t5", 1)])
def test_parity(family: str, frozen: int, tmp_path: Path) -> None:
    options = {"num_virtual_tokens": 3, "task_type": FAMILIES[family][1], "num_frozen_tokens": frozen}
    both_ways(family, peft.CartridgeConfig(**options), CartridgeConfig(**options), tmp_path)


def test_the_first_tokens_stay_while_the_others_train() -> None:
    model = get_peft_model(build("llama"), CartridgeConfig(**CAUSAL, num_frozen_tokens=2)).train()
    prefix = model.prompt_encoder["default"]
    before = prefix.weight.detach().clone()
    assert model.get_nb_trainable_parameters()[0] == 1 * 64
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for name in ("default", "default"):  # switching makes an adapter's parameters trainable again
        model.set_adapter(name)
        optimizer.zero_grad()
        model(batch(), labels=batch()).loss.backward()
        optimizer.step()
    assert torch.equal(prefix.weight[:2], before[:2]) and not (prefix.weight[2:] == before[2:]).any()


def test_frozen_tokens_act_like_the_others() -> None:
    """The prefix of all tokens together decides, whatever part of it is frozen."""
    torch.manual_seed(0)
    values, outputs = torch.randn(3, 64), []
    for frozen in (0, 1, 3):
        model = get_peft_model(build("llama"), CartridgeConfig(**CAUSAL, num_frozen_tokens=frozen)).eval()
        model.prompt_encoder["default"].load_prompt_embeddings(values)
        outputs.append(call("llama", model))
        with model.disable_adapter():
            assert (outputs[-1] - call("llama", model)).abs().max() > 1e-3
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_rows_of_a_batch_can_have_different_cartridges() -> None:
    model = attach("llama", CartridgeConfig(**CAUSAL))
    model.add_adapter("longer", CartridgeConfig(num_virtual_tokens=5, num_frozen_tokens=0, task_type="CAUSAL_LM"))
    alone = []
    for row, name in enumerate(("default", "longer")):
        model.set_adapter(name)
        alone.append(call("llama", model)[row])
    mixed = call("llama", model, adapter_names=["default", "longer"])
    torch.testing.assert_close(mixed, torch.stack(alone), rtol=1e-5, atol=1e-5)


def test_saving_keeps_frozen_and_trained_tokens(tmp_path: Path) -> None:
    model = attach("llama", CartridgeConfig(**CAUSAL, num_frozen_tokens=2))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    here, there = model.prompt_encoder["default"], loaded.prompt_encoder["default"]
    assert torch.equal(here.frozen_embedding, there.frozen_embedding)
    assert torch.equal(here.trainable_embedding, there.trainable_embedding)
    assert there.trainable_embedding.requires_grad
    assert torch.equal(call("llama", copy.deepcopy(model)), call("llama", loaded))


@pytest.mark.parametrize("frozen", [-1, 4])
def test_impossible_numbers_of_frozen_tokens(frozen: int) -> None:
    with pytest.raises(ConfigError, match=f"num_frozen_tokens must be at least 0 and at most .*=3; got {frozen}"):
        CartridgeConfig(**CAUSAL, num_frozen_tokens=frozen)
    config = CartridgeConfig()
    config.num_virtual_tokens, config.num_frozen_tokens = 3, frozen
    with pytest.raises(ConfigError, match=f"got {frozen}; try 1"):
        get_peft_model(build("llama"), config)
