"""No option of a configuration is ignored: each changes the adapter, its training or its files, or is refused.

Every field of every method is set to another value than its default, one at a time. The adapter must then differ: in
its parameters, its outputs in either mode, what trains, a step of its schedule, what is saved, or the warnings.
"""

import dataclasses
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import examples
from routed_models import llama
from torch import Tensor, nn

from peftcore import ConfigError, LoraConfig, PeftConfig, get_peft_model, initialize_from_data
from peftcore.errors import PeftError
from peftcore.injection.adapter_set import adapter_set
from peftcore.registry import methods

DESCRIBES = {"auto_mapping", "base_model_name_or_path", "extra", "peft_type", "peft_version", "revision", "task_type"}
"""Fields that describe the base model, the method or the file; `test_descriptions_are_saved` checks them."""
ELSEWHERE = {"runtime_config", "progressbar"}
"""Fields that other tests check: test_config.py of LoRA, test_frod.py."""
EXAMPLES = {method: example for method, example in examples().items() if not example.whole_model}
OF_CONVOLUTIONS = {"use_effective_conv2d"}
"""Options that only concern convolutions."""

VALUES: dict[str, list[Any]] = {
    "target_modules": [["layers.0.target"]],
    "exclude_modules": [["layers.0.target"]],
    "modules_to_save": [["up"]],
    "layers_to_transform": [[1]],
    "layers_pattern": ["blocks"],
    "bias": ["all"],
    "layer_replication": [[[0, 2], [0, 2]]],
    "target_parameters": [["raw"]],
    "trainable_token_indices": [{"embedding": [1]}],
    "token_indices": [[2, 3]],
    "rank_pattern": [{"layers.0.target": 2}, {"layers.0.target": [True] * 3 + [False]}],
    "alpha_pattern": [{"layers.0.target": 5}],
    "lambda_pattern": [{"layers.0.target": 5.0}],
    "block_size_pattern": [{"layers.0.target": 2}],
    "n_frequency_pattern": [{"layers.0.target": 7}],
    "fan_in_fan_out": [True],
    "num_tasks": [3],
}
"""{field: other values}; of other fields, values are derived from the default."""
WORDS: dict[str, list[Any]] = {
    "init_lora_weights": [False, "gaussian"],
    "init_weights": [False, True, "lycoris", "gaussian"],
    "config_A_B": ["vector", "constant", "none"],
    "config_C": ["vector", "none"],
    "config_D_E": ["vector", "none"],
    "variant": ["road_2", "road_4"],
    "poly_type": ["other"],
    "decomposition_method": ["qr"],
    "alpha": [5],
    "mask_type": ["other"],
    "mask_fn": [lambda layer, r, **_: torch.ones_like(layer.weight).cumsum(1).remainder(3).eq(0).float()],
    "random_seed": [5],
    "ab_svd_init": ["pissa_init"],
    "act_fn": ["gelu"],
    "psoft_svd": ["lowrank"],
    "cayley_neumann_eps": [0.5],
    "generator_seed": [5],
    "wavelet_family": ["haar", "sym3"],
    "eva_config": [{"rho": 3.0}],
    "corda_config": [{"corda_method": "kpm"}],
    "lora_ga_config": [{"scale": "unit"}],
    "loftq_config": [{"loftq_bits": 8}],
    "alora_invocation_tokens": [[1]],
    "kasa_config": [{"beta": 0.5}],
    "velora_config": [{"num_groups": 3}],
    "monteclora_config": [{"num_samples": 2, "buffer_size": 2}],
    "arrow_config": [{"top_k": 1}],
    "use_bdlora": [{"target_modules_bd_a": ["target"], "nblocks": 2}],
    "feedforward_modules": [["target"]],
    "effective_rank": [3, 0.25],
    "style": ["parallel"],
    "non_linearity": ["gelu"],
    "target_svd_config": [{"target.weight": 3}],
}
TOGETHER: dict[tuple[str, str], dict[str, Any]] = {
    ("BOTTLENECK", "reduction_factor"): {"bottleneck_size": None},
    ("DEFT", "init_scale"): {"init_weights": False},
    ("LOKR", "rank_dropout_scale"): {"rank_dropout": 0.5},
    ("MISS", "mini_r"): {"init_weights": "mini", "r": 4},
    ("OFT", "eps"): {"coft": True},
    ("TINYLORA", "init_v_bound"): {"init_weights": "uniform"},
    ("WAVEFT", "proportional_parameters"): {"target_modules": ["target", "narrow"]},
}
"""{(method, field): options without which the field has no meaning}"""


class Block(nn.Module):
    """The target, and layers after it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.is_conv = kind == "conv"
        makers = {"norm": lambda: nn.LayerNorm(12), "conv": lambda: nn.Conv2d(12, 8, (3, 1), padding=(1, 0))}
        self.target: nn.Module = makers.get(kind, lambda: nn.Linear(12, 8))()
        self.up = nn.Linear(12 if kind == "norm" else 8, 12)
        self.narrow = nn.Linear(12, 12)
        self.raw = nn.Parameter(torch.randn(12, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.target(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2) if self.is_conv else self.target(x)
        return x + self.narrow(self.up(y)) @ self.raw


class Blocks(nn.Module):
    """Two blocks, with an embedding before them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 12)
        self.layers = nn.ModuleList([Block(kind), Block(kind)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return x


IDS = torch.arange(6).view(2, 3)


def facts(method: str, options: dict[str, Any], kind: str) -> list[Any]:
    """Return everything that an option of a configuration can change."""
    torch.manual_seed(0)
    model: Any = Blocks(kind).double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = EXAMPLES[method].make(**{"target_modules": ["target"], **options})
        torch.manual_seed(1)
        model = get_peft_model(model, config)
        if getattr(config, "arrow_config", None):  # a router, which needs LoRAs to route to
            for expert in ("one", "two"):
                model.add_adapter(expert, LoraConfig(r=2, target_modules=["target"], init_lora_weights=False))
        if config.needs_data:
            initialize_from_data(model, [{"ids": IDS}], forward=lambda m, b: m(**b).square().sum(), progress=False)
    found: list[Any] = [sorted(str(warning.message) for warning in caught)]
    found += [(n, p.shape, p.requires_grad) for n, p in model.named_parameters()]
    found += [p.detach().clone() for p in model.parameters()] + list(model.buffers())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    for mode in (True, False):
        model.train(mode)
        torch.manual_seed(2)
        found.append(model(IDS).detach())
    saved = model.get_adapter_state_dict()
    found += [(key, tensor.shape) for key, tensor in saved.items()]
    found.append(adapter_set(model).forward_arguments)
    if (regularizer := model.adapter_regularizer()) is not None:
        found.append(regularizer.detach())
    for step in range(1, 6):
        if (loss := model(IDS).square().sum()).requires_grad:
            loss.backward()
        model.on_optimizer_step(step)
    found += [model.adapter_ranks(), model(IDS).detach(), *model.adapter_state().values()]
    return found


def differ(one: list[Any], other: list[Any]) -> bool:
    if len(one) != len(other):
        return True
    for first, second in zip(one, other, strict=True):
        if isinstance(first, Tensor) and isinstance(second, Tensor):
            if first.shape != second.shape or not torch.equal(first, second):
                return True
        elif first != second:
            return True
    return False


def other_values(config: PeftConfig, field: dataclasses.Field[Any]) -> list[Any]:
    """Return values of a field that are not the present one."""
    present = getattr(config, field.name)
    if field.name in VALUES:
        return VALUES[field.name]
    if isinstance(present, bool):
        return [not present, *WORDS.get(field.name, [])]
    if field.name in WORDS:
        return WORDS[field.name]
    if isinstance(present, int):
        return [present + 1, present * 2, max(1, present // 2), 2]
    if isinstance(present, float):
        return [0.5, present * 2, present + 1]
    return []


def fields() -> list[Any]:
    return [
        pytest.param(method, field.name, id=f"{method}-{field.name}")
        for method, example in EXAMPLES.items()
        for field in dataclasses.fields(example.config)
        if field.name not in DESCRIBES | ELSEWHERE
    ]


@cache
def usual(method: str, together: str, kind: str) -> list[Any]:
    return facts(method, json.loads(together), kind)


@pytest.mark.parametrize("method, name", fields())
@pytest.mark.filterwarnings("ignore:aLoRA acts nowhere")  # the net's tokens are not named input_ids
def test_an_option_is_not_ignored(method: str, name: str) -> None:
    together, kind = TOGETHER.get((method, name), {}), "conv" if name in OF_CONVOLUTIONS else "linear"
    config = EXAMPLES[method].make(**together)
    field = next(field for field in dataclasses.fields(config) if field.name == name)
    values = other_values(config, field)
    assert values, f"this test needs values of {name}: {field.type}"
    outcomes = []
    for value in values:
        if value == getattr(config, name):
            continue
        try:
            default = usual(method, json.dumps(together), kind)
            outcomes.append(differ(facts(method, {**together, name: value}, kind), default))
        except PeftError as error:
            outcomes.append(bool(str(error)))
    assert any(outcomes), list(zip(values, outcomes, strict=False))


@pytest.mark.parametrize("value", [{"top_k": 1}, {"top_k": 2}])
def test_a_router_is_built_and_not_refused(value: dict[str, Any]) -> None:
    """An error would pass the test above, too."""
    assert differ(facts("LORA", {"arrow_config": value}, "linear"), usual("LORA", "{}", "linear"))


@pytest.mark.parametrize("method", EXAMPLES)
def test_descriptions_are_saved(method: str, tmp_path: Path) -> None:
    described: dict[str, Any] = {
        "auto_mapping": {"base_model_class": "B"},
        "base_model_name_or_path": "o/n",
        "peft_version": "9",
        "revision": "v2",
        "task_type": "CAUSAL_LM",
        "extra": {"their_key": ""},
    }
    assert described.keys() == DESCRIBES - {"peft_type"}
    config = EXAMPLES[method].make(**described)
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {**described, **described["extra"]}.items() <= {**values, "extra": described["extra"]}.items()
    assert values["peft_type"] == method and PeftConfig.from_pretrained(tmp_path) == config
    with pytest.raises(ConfigError, match="task_type must be one of"):
        EXAMPLES[method].make(task_type="NO_SUCH_TASK")


# -- prompts ----------------------------------------------------------------------------------------------------------

PROMPTS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "SHADOW": {"task_type": "CAUSAL_LM", "shadow_alpha": 2.0},
    "LOREFT": {"r": 3},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 6},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2},
    "CPT": {"cpt_token_ids": [4, 5, 6], "cpt_tokens_type_mask": [1, 2, 3], "opt_projection_epsilon": 0.01},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
}
PROMPT_VALUES: dict[str, list[Any]] = {
    "num_virtual_tokens": [4],
    "token_dim": [7],
    "num_transformer_submodules": [2],
    "num_attention_heads": [3],
    "num_layers": [1],
    "modules_to_save": [["lm_head"]],
    "prompt_tuning_init": ["SAMPLE_VOCAB", "RANDOM"],
    "prompt_tuning_init_text": ["a text"],
    "prompt_tuning_init_state_dict_path": ["none.safetensors"],
    "tokenizer_kwargs": [{"use_fast": True}],
    "encoder_hidden_size": [9],
    "encoder_reparameterization_type": ["LSTM"],
    "init_weights": ["zero"],
    "num_frozen_tokens": [2],
    "exclude_modules": [["layers.0"]],
    "layers_to_transform": [0],
    "layers_pattern": ["layers"],
    "positions": ["f1"],
    "act_fn": ["relu"],
    "shadow_model": ["another"],
    "shadow_num_hidden_layers": [2],
    "shadow_hidden_size": [8],
    "shadow_num_attention_heads": [2],
    "shadow_intermediate_size": [6],
    "update_hidden_size": [3],
    "cpt_token_ids": [[7, 8, 9]],
    "cpt_mask": [[1]],
    "cpt_tokens_type_mask": [[4, 4, 4]],
    "opt_weighted_loss_type": ["decay"],
    "target_modules": ["self_attn", "no_such_module"],
    "adapter_len": [3],
    "num_tasks": [3],
    "adapter_layers": [2],
}
PROMPT_TOGETHER: dict[tuple[str, str], dict[str, Any]] = {
    ("CPT", "opt_weighted_loss_type"): {"opt_loss_decay_factor": 0.5},
}
NAMES_A_TOKENIZER = "tokenizer_name_or_path"
"""Read with prompt_tuning_init="TEXT" (prompts/test_vocabulary.py); without, only a description."""


def facts_of_prompt(method: str, options: dict[str, Any]) -> list[Any]:
    """Return everything that an option of a prompt can change, on a tiny language model."""
    model = llama()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(1)
        model = get_peft_model(model, methods()[method].config(**{**PROMPTS[method], **options}))
    found: list[Any] = [sorted(str(warning.message) for warning in caught)]
    found += [(n, p.shape, p.requires_grad) for n, p in model.named_parameters()]
    found += [p.detach().clone() for p in model.parameters() if p.requires_grad] + list(model.buffers())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    ids = torch.arange(3, 11).view(2, 4)
    further = {"task_ids": torch.tensor([0, 1])} if method == "MULTITASK_PROMPT_TUNING" else {}
    for mode in (True, False):
        model.train(mode)
        torch.manual_seed(2)
        outputs = model(input_ids=ids, labels=ids, **further)
        found += [outputs.logits.detach(), outputs.loss.detach()]
    found += [(key, tensor.shape) for key, tensor in model.get_adapter_state_dict().items()]
    return found


@cache
def usual_prompt(method: str, together: str) -> list[Any]:
    return facts_of_prompt(method, json.loads(together))


@pytest.mark.parametrize(
    "method, name",
    [
        pytest.param(method, field.name, id=f"{method}-{field.name}")
        for method in PROMPTS
        for field in dataclasses.fields(methods()[method].config)
        if field.name not in DESCRIBES | {NAMES_A_TOKENIZER}
    ],
)
def test_an_option_of_a_prompt_is_not_ignored(method: str, name: str) -> None:
    together = PROMPT_TOGETHER.get((method, name), {})
    config = methods()[method].config(**{**PROMPTS[method], **together})
    field = next(field for field in dataclasses.fields(config) if field.name == name)
    values = PROMPT_VALUES.get(name) or other_values(config, field)
    assert values, f"this test needs values of {name}: {field.type}"
    outcomes = []
    for value in values:
        if value == getattr(config, name):
            continue
        try:
            changed = facts_of_prompt(method, {**together, name: value})
            outcomes.append(differ(changed, usual_prompt(method, json.dumps(together))))
        except PeftError as error:
            outcomes.append(bool(str(error)))
    assert any(outcomes), list(zip(values, outcomes, strict=False))


def test_every_method_is_asked_about_its_options() -> None:
    whole = {method for method, example in examples().items() if example.whole_model}
    assert whole == {"XLORA"}, "methods/xlora tests each of its options"
    assert EXAMPLES.keys() | PROMPTS.keys() | whole == methods().keys()
