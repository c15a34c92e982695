"""Rows of one batch with prompts of different kinds and lengths: each is what it is alone, also padded and cached."""

from typing import Any

import pytest
import torch
from method_example import randomise
from prompt_models import FAMILIES, build
from torch import Tensor

from peftcore import LoraConfig, get_peft_model
from peftcore.composition import Stack
from peftcore.errors import RoutingError
from peftcore.prompts.adaption_prompt import AdaptionPromptConfig
from peftcore.prompts.cpt import CPTConfig
from peftcore.prompts.multitask_prompt_tuning import MultitaskPromptTuningConfig
from peftcore.prompts.p_tuning import PromptEncoderConfig
from peftcore.prompts.prefix_tuning import PrefixTuningConfig
from peftcore.prompts.prompt_tuning import PromptTuningConfig

TOKENS = torch.arange(3, 45).view(6, 7)
MASKS = {"whole": None, "left": [(1, slice(0, 2)), (2, slice(0, 3))], "right": [(1, slice(5, 7)), (4, slice(6, 7))]}
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def configs(family: str) -> dict[str, Any]:
    task = {"task_type": FAMILIES[family][1]}
    found: dict[str, Any] = {
        "three": PromptTuningConfig(num_virtual_tokens=3, **task),
        "five": PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, **task),
        "tasks": MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=3, num_ranks=2, **task),
        "lora": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    }
    if family not in ("bert-cls", "bert-features"):
        found["prefix"] = PrefixTuningConfig(num_virtual_tokens=2, **task)
    if family in ("gpt2", "llama", "mistral"):
        found["attention"] = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, **task)
        found["examples"] = CPTConfig(
            cpt_token_ids=[5, 6, 7, 8],
            cpt_tokens_type_mask=[1, 2, 4, 4],
            opt_projection_epsilon=20.0,
            opt_projection_format_epsilon=20.0,
        )
    return found


def prompted(family: str) -> Any:
    torch.manual_seed(0)
    model: Any = build(family)
    for number, (name, config) in enumerate(configs(family).items()):
        if number:
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, name)
        for other in model.peft_config:
            model.set_requires_grad(other, other == name)
        randomise(model, 0.5, seed=number)
    for name in model.peft_config:
        model.set_requires_grad(name, False)
    return model.double().eval()


def masked(kind: str) -> dict[str, Tensor]:
    if MASKS[kind] is None:
        return {}
    mask = torch.ones_like(TOKENS)
    for row, places in MASKS[kind] or []:
        mask[row, places] = 0
    return {"attention_mask": mask}


def row_of(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {key: value[row : row + 1] for key, value in inputs.items()}


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize(
    "names",
    [
        ["three", "five", "prefix", "lora", None, "attention"],
        ["tasks", "three", "examples", None, "tasks", Stack("lora", "prefix")],
        ["prefix", None, None, "lora", "attention", {"lora": 0.5}],
    ],
)
def test_a_row_is_what_it_is_alone(family: str, padding: str, names: list[Any]) -> None:
    model = prompted(family)
    inputs = {"input_ids": TOKENS, **masked(padding), "task_ids": torch.tensor([0, 1, 2, 0, 1, 2])}
    seen = inputs.get("attention_mask", torch.ones_like(TOKENS)).bool()
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            mixed = model(**inputs, adapter_names=names).logits[:, -7:]
            for row, name in enumerate(names):
                with model.route(name):
                    alone = model(**row_of(inputs, row)).logits[0, -7:]
                torch.testing.assert_close(mixed[row][seen[row]], alone[seen[row]], atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("padding", ["whole", "left"])
def test_generating(options: dict[str, Any], padding: str) -> None:
    model, names = prompted("llama"), ["three", "five", "prefix", "lora", None, "attention"]
    inputs = {"input_ids": TOKENS, **masked(padding)}
    mixed = model.generate(**inputs, adapter_names=names, **GREEDY, **options)
    for row, name in enumerate(names):
        with model.route(name):
            alone = model.generate(**row_of(inputs, row), **GREEDY, **options)
        assert torch.equal(mixed[row, : alone.shape[1]], alone[0]), name


@pytest.mark.parametrize(
    "names", [["three", "prefix", "lora", None, "prefix", "five"], ["three", "tasks", "lora", None, "tasks", "five"]]
)
def test_an_encoder_and_its_decoder(names: list[Any]) -> None:
    model = prompted("t5")
    inputs = {"input_ids": TOKENS, **masked("right"), "task_ids": torch.tensor([0, 1, 2, 0, 1, 2])}
    decoded = {"decoder_input_ids": TOKENS[:, :4]}
    mixed = model(**inputs, **decoded, adapter_names=names).logits
    generated = model.generate(**inputs, adapter_names=names, **GREEDY)
    for row, name in enumerate(names):
        with model.route(name):
            alone = model(**row_of({**inputs, **decoded}, row)).logits
            torch.testing.assert_close(mixed[row, -4:], alone[0, -4:], atol=1e-10, rtol=0)
            own = model.generate(**row_of(inputs, row), **GREEDY)
        assert torch.equal(generated[row, : own.shape[1]], own[0]), name


def test_a_classifier_that_reads_whole_rows() -> None:
    model = prompted("bert-cls")
    inputs = {"input_ids": TOKENS, **masked("right"), "task_ids": torch.tensor([0, 1, 2, 0, 1, 2])}
    names = ["three", "five", "lora", None, "tasks", "three"]
    mixed = model(**inputs, adapter_names=names).logits
    for row, name in enumerate(names):
        with model.route(name):
            alone = model(**row_of(inputs, row)).logits
        torch.testing.assert_close(mixed[row], alone[0], atol=1e-10, rtol=0)


def test_labels_are_those_of_the_text() -> None:
    model, names = prompted("llama"), ["three", "prefix", None, "lora", "five", "attention"]
    together = model(TOKENS, labels=TOKENS, adapter_names=names).logits[:, -7:]
    loss = model(TOKENS, labels=TOKENS, adapter_names=names).loss
    first = model(TOKENS, adapter_names=names).logits[:, -8]  # what stands before the text predicts its first token
    predicted = torch.cat([first[:, None], together[:, :-1]], 1)
    expected = torch.nn.functional.cross_entropy(predicted.flatten(0, 1), TOKENS.flatten())
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=0)  # the model's own loss is float32


def test_positions_that_a_model_counts_by_itself_are_not_put_wrong() -> None:
    inputs = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4], "task_ids": torch.tensor([0, 1, 2, 0, 1, 2])}
    with pytest.raises(RoutingError, match="computes positions itself"):
        prompted("t5")(**inputs, adapter_names=["tasks", "prefix", None, "lora", "three", None])


def test_what_a_prompt_cannot_be_part_of_is_refused() -> None:
    model = prompted("llama")
    for names, said in (
        ([{"three": 0.5}, *[None] * 5], "mixes a prompt with others"),
        ([Stack("three", "five"), *[None] * 5], "mixes a prompt with others"),
    ):
        with pytest.raises(RoutingError, match=said):
            model(TOKENS, adapter_names=names)
    with pytest.raises(RoutingError, match="has its own loss, so it cannot train in mixed batches"):
        model(TOKENS, labels=TOKENS, adapter_names=["examples", *["three"] * 5])
