import copy
from typing import Any

import peft
import peftcore.tuners.lora.eva as ours_of_eva
import pytest
import torch
from peft.tuners.lora import eva as theirs_of_eva
from torch import nn

import peftcore
from peftcore import (
    ConfigError,
    IA3Config,
    LoraConfig,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def eva() -> nn.Module:
    return get_peft_model(Model(), LoraConfig(r=2, target_modules=["layer"], init_lora_weights="eva", eva_config={}))


def test_eva_starts_from_batches() -> None:
    torch.manual_seed(0)
    model, before = eva(), None
    before = model.layer.lora_A["default"].weight.clone()  # type: ignore[union-attr]
    initialize_lora_eva_weights(model, [{"x": torch.randn(64, 6)}], show_progress_bar=False)
    assert not torch.equal(model.layer.lora_A["default"].weight, before)  # type: ignore[union-attr]


def test_eva_starts_an_adapter_without_values_as_hf_pefts_guide_does() -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["layer"], init_lora_weights="eva", eva_config={})
    base = Model()
    model, expected = get_peft_model(copy.deepcopy(base), config, low_cpu_mem_usage=True), get_peft_model(base, config)
    for one in (model, expected):
        initialize_lora_eva_weights(one, batches(), show_progress_bar=False)
    assert torch.equal(model.layer.lora_A["default"].weight, expected.layer.lora_A["default"].weight)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)


def test_what_is_not_supported_is_refused() -> None:
    with pytest.raises(ConfigError, match="prepare_layer_inputs_fn must be None"):
        initialize_lora_eva_weights(eva(), prepare_layer_inputs_fn=lambda *_: None)
    with pytest.raises(ConfigError, match="give batches"):
        initialize_lora_eva_weights(eva())
    with pytest.raises(ConfigError, match="the model has no adapter; give peft_config"):
        get_eva_state_dict(Model(), batches())
    with pytest.raises(ConfigError, match="got no batch"):
        get_eva_state_dict(eva(), [])
    with pytest.raises(ConfigError, match="EVA starts a LoRA; got IA3Config"):
        get_eva_state_dict(Model(), batches(), IA3Config(target_modules=["layer"]))  # type: ignore[arg-type]


def batches() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [{"x": torch.randn(64, 6) @ torch.diag(torch.arange(6.0, 0, -1))}] * 3


def test_a_saved_start_gives_what_the_batches_give() -> None:
    torch.manual_seed(1)
    model, other, plain = eva(), eva(), Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    starts = get_eva_state_dict(model, batches(), show_progress_bar=False)
    assert list(starts) == ["base_model.model.layer"] and starts["base_model.model.layer"].shape == (2, 6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
    initialize_lora_eva_weights(other, eva_state_dict=starts)
    for name in ("lora_A", "lora_B"):
        ours, theirs = (getattr(one.layer, name)["default"].weight for one in (model, other))
        torch.testing.assert_close(ours, theirs)
    torch.set_rng_state(state)
    config = LoraConfig(r=2, target_modules=["layer"], lora_alpha=3)
    of_plain = get_eva_state_dict(plain, batches(), config, show_progress_bar=False)
    torch.testing.assert_close(of_plain, {"layer": starts["base_model.model.layer"]})
    assert type(plain.layer) is nn.Linear and plain.layer.weight.requires_grad and not plain.layer._forward_hooks


@pytest.mark.filterwarnings("ignore")  # the oracle's
def test_the_directions_are_those_of_peft() -> None:
    config = {"r": 2, "target_modules": ["layer"], "init_lora_weights": "eva"}
    model = Model()
    theirs = peft.get_eva_state_dict(
        copy.deepcopy(model),
        batches(),
        peft.LoraConfig(**config, eva_config=peft.EvaConfig(rho=1.0)),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    ours = get_eva_state_dict(model, batches(), LoraConfig(**config, eva_config={}), show_progress_bar=False)
    torch.testing.assert_close((ours["layer"] @ theirs["layer"].float().T).abs(), torch.eye(2), atol=0.05, rtol=0)


def test_functions_of_inputs_are_those_of_peft() -> None:
    batch = {
        "input_ids": torch.arange(8).view(2, 4),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, -100, 2, 3], [1, -7, -100, 4]]),
    }
    hidden = torch.randn(2, 4, 3)
    for keys in (("input_ids",), ("input_ids", "attention_mask"), tuple(batch)):
        given = {key: batch[key] for key in keys}
        for options in ({}, {"use_label_mask": False}, {"label_mask_value": -7}):
            results = []
            for library, module in ((peftcore, ours_of_eva), (peft, theirs_of_eva)):
                config = library.LoraConfig(init_lora_weights="eva", eva_config=library.EvaConfig(**options))
                positions = module.prepare_model_inputs_fn_language_modeling(given, config)
                rows = [
                    module.prepare_layer_inputs_fn_language_modeling(one, positions, "q") for one in (hidden, (hidden,))
                ]
                results.append((positions, *rows))
            assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    for module in (ours_of_eva, theirs_of_eva):
        assert module.forward_fn_dict(lambda x, y: (y, x), {"x": 1, "y": 2}) == (2, 1)
        with pytest.raises(TypeError, match="must be a dictionary"):
            module.prepare_model_inputs_fn_language_modeling([1], LoraConfig())
        with pytest.raises(TypeError, match=r"layer q|input of q"):
            module.prepare_layer_inputs_fn_language_modeling("x", torch.zeros(1, 2), "q")


def test_the_functions_that_are_the_default_can_be_given() -> None:
    starts = [
        get_eva_state_dict(eva(), batches(), show_progress_bar=False, **options)
        for options in (
            {},
            {
                "forward_fn": ours_of_eva.forward_fn_dict,
                "prepare_model_inputs_fn": ours_of_eva.prepare_model_inputs_fn_language_modeling,
                "prepare_layer_inputs_fn": ours_of_eva.prepare_layer_inputs_fn_language_modeling,
            },
        )
    ]
    assert torch.equal(starts[0]["base_model.model.layer"], starts[1]["base_model.model.layer"])


def test_a_start_with_other_ranks_changes_the_ranks() -> None:
    torch.manual_seed(0)
    pair: Any = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    model: Any = get_peft_model(
        pair, LoraConfig(r=2, target_modules=["0", "1", "2"], init_lora_weights="eva", eva_config={})
    )
    kept = model[2].lora_A["default"].weight.clone()
    starts = {"base_model.model.0": torch.randn(3, 6), "base_model.model.1": torch.zeros(0, 5)}
    with pytest.warns(UserWarning, match="eva_state_dict has no 2; these layers get the usual start"):
        initialize_lora_eva_weights(model, eva_state_dict=starts)
    assert torch.equal(model[0].lora_A["default"].weight, starts["base_model.model.0"])
    assert type(model[1]) is nn.Linear and model[2].r["default"] == 2
    assert model[2].lora_A["default"].weight.shape == kept.shape and not model[2].lora_B["default"].weight.any()
    with pytest.raises(ConfigError, match="does not adapt 1; it adapts 0, 2"):
        initialize_lora_eva_weights(model, eva_state_dict=starts)
    with pytest.raises(ConfigError, match=r"A of 2 must have the shape \(rank, 4\); got \(2, 5\)"):
        initialize_lora_eva_weights(model, eva_state_dict={"2": torch.ones(2, 5)})
    other = get_peft_model(Model(), LoraConfig(target_modules=["layer"]))
    with pytest.raises(ConfigError, match="'default' is no LoRA with init_lora_weights='eva'"):
        initialize_lora_eva_weights(other, eva_state_dict={})


def test_labels_are_shifted_as_in_peft() -> None:
    labels = torch.tensor([[5, -100, 7], [1, 2, -100]])
    ours, theirs = (library.shift_tokens_right(labels.clone(), 0, 3) for library in (peftcore, peft))
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="pad_token_id is None"):
        peftcore.shift_tokens_right(labels, None, 3)  # type: ignore[arg-type]
