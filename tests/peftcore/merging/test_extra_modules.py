"""Extra trained modules are copied, or refused if two adapters have them."""

from pathlib import Path
from typing import Any

import torch
from merged_adapters import SUM, same_everywhere

from peftcore import ConfigError, LoraConfig, MergeError
from peftcore.injection.adapter_set import adapter_set


def test_modules_that_more_than_one_trains_whole(linears: Any, refused: Any) -> None:
    options = {"target_modules": ["0"], "modules_to_save": ["1"]}
    model = linears(a=options, b=options, c={"target_modules": ["0"]})
    for call in (
        lambda: model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "m", "svd"),
        lambda: model.add_merged("m", {"a": 1.0, "b": 1.0}, SUM),
    ):
        refused(model, MergeError, r"1 is trained in full .* by more than one of \['a', 'b'\]", call)


def test_the_same_rows_of_an_embedding(llama: Any, with_adapters: Any, refused: Any) -> None:
    options: Any = {"r": 2, "target_modules": ["q_proj"]}
    model = with_adapters(
        llama(),
        a=LoraConfig(trainable_token_indices=[1], **options),
        b=LoraConfig(trainable_token_indices=[2], **options),
    )
    message = "model.embed_tokens is trained in full .*trainable_token_indices"
    refused(model, MergeError, message, lambda: model.add_merged("m", {"a": 1.0, "b": 1.0}, SUM))


def test_rows_and_a_change_of_one_embedding(llama: Any, with_adapters: Any, refused: Any) -> None:
    rows = LoraConfig(r=2, trainable_token_indices=[1], target_modules=["q_proj"])
    model = with_adapters(llama(), a=rows, b=LoraConfig(r=2, target_modules=["embed_tokens"]))
    call = lambda: model.add_merged("m", {"a": 1.0, "b": 1.0}, SUM)  # noqa: E731
    refused(model, ConfigError, "model.embed_tokens is a target itself", call)


def test_biases_of_the_base(linears: Any, refused: Any) -> None:
    model = linears(a={"bias": "lora_only"}, b={})
    message = r"'a' trains the base's own biases \(bias='lora_only'\)"
    refused(model, MergeError, message, lambda: model.add_merged("m", {"a": 1.0, "b": 1.0}, SUM))
    assert list(adapter_set(model).configs) == ["a", "b"]


def test_a_module_that_one_of_them_trains_whole_goes_along(llama: Any, with_adapters: Any, tmp_path: Path) -> None:
    """PEFT makes a copy of the base's module, or none, so that what was trained is gone."""
    plain, saving = {"r": 2, "target_modules": ["q_proj"]}, {"modules_to_save": ["lm_head"]}
    for first in ({"a": saving, "b": {}}, {"a": {}, "b": saving}):
        model = with_adapters(llama(), **{name: LoraConfig(**{**plain, **own}) for name, own in first.items()})
        owner = "a" if first["a"] else "b"
        with torch.no_grad():
            model.lm_head.copies[owner].weight += 1
        model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "m", "cat")
        copies = model.lm_head.copies
        assert torch.equal(copies["m"].weight, copies[owner].weight) and copies["m"].weight is not copies[owner].weight
        same_everywhere(model, llama(), tmp_path / owner)


def test_trained_rows_of_one_of_them_go_along(llama: Any, with_adapters: Any, tmp_path: Path) -> None:
    for tied in (False, True):
        a = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 7])
        model = with_adapters(llama(tie_word_embeddings=tied), a=a, b=LoraConfig(r=2, target_modules=["q_proj"]))
        model.add_merged("m", {"a": 0.7, "b": 0.4}, SUM)
        ours = adapter_set(model).adapters("m")["model.embed_tokens"]
        theirs = adapter_set(model).adapters("a")["model.embed_tokens"]
        assert torch.equal(ours.trainable_tokens_delta, theirs.trainable_tokens_delta)
        assert same_everywhere(model, llama(tie_word_embeddings=tied), tmp_path / str(tied))
