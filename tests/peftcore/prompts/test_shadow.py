"""Shadow: a small trained decoder beside the frozen one corrects the input of its blocks."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import randomise
from prompt_models import batch, both_ways, build, call
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from transformers import DynamicCache

from peftcore import ConfigError, LoraConfig, PeftModel, ShadowConfig, get_peft_model, get_peft_model_state_dict
from peftcore.errors import MergeError, RoutingError, TargetError, TrainingError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft

CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 3, "shadow_dropout": 0.0}
LABELLED = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, -100, -100]])


def shadowed(family: str = "llama", spread: float = 0.2, **options: Any) -> Any:
    torch.manual_seed(3)
    model = get_peft_model(build(family), ShadowConfig(**{**CAUSAL, "shadow_alpha": 1.0, **options})).eval()
    randomise(model, spread)
    return model


def learner_of(model: Any) -> Any:
    return model.prompt_encoder["default"]


# -- parity ----------------------------------------------------------------------------------------------------------

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {"shadow_hidden_size": 16, "shadow_num_hidden_layers": 2, "update_hidden_size": 5}),
    ("gpt2", {"share_embeddings": False, "shadow_num_attention_heads": 2}),
    ("llama-cls", {"task_type": "SEQ_CLS", "target_modules": r".*layers\.1"}),
]


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize("family, options", CASES, ids=[family for family, _ in CASES])
def test_parity(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    options = {**CAUSAL, **options}
    both_ways(family, peft.ShadowConfig(**options), ShadowConfig(**options), tmp_path, spread=0.2)


@pytest.mark.filterwarnings("ignore")  # the oracle's own
@pytest.mark.parametrize("family", ["llama", "llama-cls"])
def test_losses_and_gradients_are_pefts(family: str) -> None:
    options = {**CAUSAL, "task_type": "SEQ_CLS" if family == "llama-cls" else "CAUSAL_LM", "auxiliary_loss_weight": 0.3}
    ours = get_peft_model(build(family), ShadowConfig(**options))
    theirs = peft.get_peft_model(build(family), peft.ShadowConfig(**options))
    randomise(ours, 0.2)
    peft.set_peft_model_state_dict(theirs, {k: t.clone() for k, t in get_peft_model_state_dict(ours).items()})
    inputs: dict[str, Any] = {"input_ids": batch(), "attention_mask": (LABELLED > 0).long()}
    inputs["labels"] = torch.tensor([2, 0]) if family == "llama-cls" else LABELLED
    results = []
    for model in (ours, theirs):
        out = model.train()(**inputs)
        out.loss.backward()
        norms = sorted(p.grad.norm().item() for p in model.parameters() if p.grad is not None)
        results.append((out.loss, out.shadow_loss, torch.tensor(norms)))
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)


# -- mathematics -----------------------------------------------------------------------------------------------------


def test_the_papers_equations_block_by_block() -> None:
    model = shadowed(shadow_alpha=0.7)
    learner, seen = learner_of(model), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    first = []
    model.model.layers[0].register_forward_pre_hook(lambda _m, args: first.append(args[0]), prepend=True)
    with torch.no_grad():
        model(batch())
        embedded = model.get_input_embeddings()(batch())
        state = learner.shadow_backbone(inputs_embeds=embedded, attention_mask=None).last_hidden_state
        hidden = first[0]
        torch.testing.assert_close(hidden, embedded)
        for block, (entered, left) in zip(learner.blocks, seen, strict=True):
            difference = hidden - state
            corrected = hidden + 0.7 * difference @ block.shadow_down.weight.T @ block.shadow_up.weight.T
            torch.testing.assert_close(entered, corrected, rtol=1e-5, atol=1e-5)
            transform, gate = (
                F.linear(F.gelu(F.linear(left, net[0].weight, net[0].bias)), net[2].weight, net[2].bias)
                for net in (block.shadow_update_transform, block.shadow_update_gate)
            )
            state = (1 - gate.sigmoid()) * state + gate.sigmoid() * transform
            hidden = left


def test_a_new_adapter_starts_at_its_base() -> None:
    expected = call("llama", build("llama"))
    model = get_peft_model(build("llama"), ShadowConfig(**CAUSAL)).eval()
    assert torch.equal(call("llama", model), expected)
    model = get_peft_model(build("llama"), ShadowConfig(**CAUSAL, init_weights=False)).eval()
    assert not torch.allclose(call("llama", model), expected)


def test_the_loss_of_the_shadow_is_that_of_its_first_state() -> None:
    model = shadowed(auxiliary_loss_weight=0.0)
    plain = model(batch(), labels=LABELLED)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(batch())
        logits = model.lm_head(learner_of(model).shadow_backbone(inputs_embeds=embedded).last_hidden_state)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), LABELLED[:, 1:].flatten())
    torch.testing.assert_close(plain.shadow_loss, expected, rtol=1e-5, atol=1e-5)
    model.peft_config["default"].auxiliary_loss_weight = 0.25
    weighted = model(batch(), labels=LABELLED)
    torch.testing.assert_close(weighted.loss, plain.loss + 0.25 * expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(batch(), labels=LABELLED, return_dict=False)[0], weighted.loss)
    assert not hasattr(model(batch()), "shadow_loss")


def test_dropout_acts_while_training_only() -> None:
    model = shadowed(shadow_dropout=0.5)
    assert torch.equal(call("llama", model), call("llama", model))
    model.train()
    assert not torch.equal(call("llama", model), call("llama", model))


# -- generating ------------------------------------------------------------------------------------------------------

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
LEFT = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])


@pytest.mark.parametrize("family, options", CASES[:3:2], ids=[family for family, _ in CASES[:3:2]])
def test_generate_with_any_cache_is_greedy_by_whole_forwards(family: str, options: dict[str, Any]) -> None:
    model = shadowed(family, **options)
    inputs = {"input_ids": batch(), "attention_mask": LEFT}
    expected = model.generate(**inputs, **GREEDY, use_cache=False)
    for cache in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        assert torch.equal(model.generate(**inputs, **GREEDY, **cache), expected), cache
    beams = model.generate(**inputs, **GREEDY, num_beams=3, use_cache=False)
    assert torch.equal(model.generate(**inputs, **GREEDY, num_beams=3), beams)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**inputs, **GREEDY), expected)


@pytest.mark.filterwarnings("ignore")  # the oracle's own
def test_pefts_text_is_ours(tmp_path: Path) -> None:
    """Without a cache: with transformers 5.24 HF PEFT's shadow decoder does not find its part of the cache."""
    model = shadowed()
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    expected = theirs.generate(input_ids=batch(), **GREEDY, use_cache=False)
    assert torch.equal(model.generate(input_ids=batch(), **GREEDY), expected)


def test_a_callers_cache_holds_both_decoders_and_another_one_is_refused() -> None:
    model, text = shadowed(), batch()
    whole = call("llama", model)
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        with torch.no_grad():
            first = model(text[:, :4], cache=cache)
            second = model(text[:, 4:], cache=first.cache)
        torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        plain = model(text[:, :4]).cache
    with pytest.raises(ConfigError, match="filled without the shadow decoder"):
        model(text[:, 4:], cache=plain)


def test_a_padded_row_is_what_it_is_alone() -> None:
    model = shadowed()
    ids = torch.cat([torch.zeros(1, 2, dtype=torch.long), batch(1)[:, :4]], 1)
    mask = (torch.arange(6) >= 2).long()[None]
    padded = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 2:]
    torch.testing.assert_close(padded, model(batch(1)[:, :4]).logits, rtol=1e-5, atol=1e-5)


# -- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, blocks",
    [
        ({}, [0, 1]),
        ({"target_modules": ["layers.1"]}, [1]),
        ({"target_modules": r"model\.layers\.0"}, [0]),
        ({"exclude_modules": ["layers.0"]}, [1]),
        ({"layers_to_transform": 1}, [1]),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, [0]),
    ],
)
def test_the_blocks_that_are_adapted(options: dict[str, Any], blocks: list[int]) -> None:
    config = ShadowConfig(**CAUSAL, **options)
    model = get_peft_model(build("llama"), config)
    assert learner_of(model).paths == [f"model.layers.{number}" for number in blocks]
    assert model.peft_config["default"].target_modules == set(learner_of(model).paths)
    assert config.target_modules == ShadowConfig(**options).target_modules, "the user's configuration is never changed"


def test_only_the_shadow_trains_with_and_without_checkpointing() -> None:
    gradients = []
    for checkpoints in (False, True):
        model = shadowed().train()
        if checkpoints:
            model.activation_checkpointing_enable()
        model(batch(), labels=LABELLED).loss.backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert trained and all("prompt_encoder" in name for name in trained)
        gradients.append(trained)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-6)


def test_a_wrapper_that_recomputes_hooks_is_refused() -> None:
    model = shadowed().train()
    layers = model.model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    with pytest.raises(TrainingError, match="a wrapper around the blocks runs their hooks again"):
        model(batch(), labels=LABELLED, use_cache=False).loss.backward()


def test_lora_acts_beside_it_and_a_second_one_is_switched_to() -> None:
    model = shadowed()
    alone = call("llama", model)
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.add_adapter("other", ShadowConfig(**CAUSAL, init_weights=False, shadow_alpha=1.0))
    assert torch.equal(call("llama", model), alone)
    model.set_adapter(["default", "lora"])
    both = call("llama", model)
    assert not torch.allclose(both, alone)
    model.set_adapter("other")
    other = call("llama", model)
    assert not torch.allclose(other, alone)
    model.delete_adapter("default")
    assert torch.equal(call("llama", model), other)


def test_unloading_copying_and_what_is_refused() -> None:
    expected = call("llama", build("llama"))
    model = shadowed()
    adapted = call("llama", model)
    with model.disable_adapter():
        assert torch.equal(call("llama", model), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(call("llama", twin), adapted)
    with pytest.raises(MergeError):
        model.merge_adapter()
    with pytest.raises(RoutingError, match="Shadow cannot differ between rows"):
        model(batch(), adapter_names=["default", "__base__"])
    plain = model.unload()
    assert torch.equal(call("llama", plain), expected)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in plain.model.layers)


def test_a_base_in_16_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(build("llama").bfloat16(), ShadowConfig(**CAUSAL, init_weights=False)).eval()
    out = model(batch(), labels=LABELLED)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama").bfloat16(), tmp_path)
    assert torch.equal(call("llama", loaded), call("llama", model))


def test_a_decoder_without_a_head_can_have_two() -> None:
    model = build("llama").model
    model = get_peft_model(model, ShadowConfig(r=2, shadow_dropout=0.0, init_weights=False)).eval()
    one = model(batch()).last_hidden_state
    model.add_adapter("other", ShadowConfig(r=2, shadow_dropout=0.0, init_weights=False))
    model.set_adapter("other")
    assert not torch.allclose(model(batch()).last_hidden_state, one)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"r": 0}, "r must be a positive integer; got 0"),
        ({"shadow_dropout": 1.0}, "below 1; got 1.0"),
        ({"auxiliary_loss_weight": -0.1}, "auxiliary_loss_weight must be at least 0; got -0.1"),
        ({"shadow_model": "org/name"}, "shadow_model must be 'mirror', got 'org/name'"),
        ({"task_type": "TOKEN_CLS"}, "task_type must be 'CAUSAL_LM' or 'SEQ_CLS'; got 'TOKEN_CLS'"),
    ],
)
def test_impossible_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ShadowConfig(**options)


def test_models_that_cannot_have_one() -> None:
    for model in (nn.Sequential(nn.Linear(2, 2)), build("t5")):
        with pytest.raises(ConfigError, match="SHADOW adapts decoders of transformers, such as LlamaForCausalLM"):
            get_peft_model(model, ShadowConfig())
    with pytest.raises(ConfigError, match="found no decoder of transformers inside of BertModel"):
        get_peft_model(build("bert-features"), ShadowConfig())
    with pytest.raises(TargetError, match=r"name none of model\.layers\.0 to model\.layers\.1"):
        get_peft_model(build("llama"), ShadowConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="needs a head named score or classifier; LlamaForCausalLM has none"):
        get_peft_model(build("llama"), ShadowConfig(task_type="SEQ_CLS"))
    with pytest.warns(UserWarning, match="auxiliary_loss_weight has no effect without task_type"):
        get_peft_model(build("llama"), ShadowConfig(auxiliary_loss_weight=0.5))
