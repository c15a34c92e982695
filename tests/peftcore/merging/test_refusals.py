"""What is refused says what was given and what fits, and leaves the model as it was."""

from typing import Any

import pytest
import torch

from peftcore import AdapterNameError, ConfigError, LoraConfig, MergeError, PeftError
from peftcore.injection.adapter_set import adapter_set
from peftcore.merging import Recipe

SUM = Recipe.task_arithmetic()


def unchanged(model: Any, snapshot: Any, kind: type[PeftError], message: str, call: Any) -> None:
    before = snapshot(model)
    with pytest.raises(kind, match=message):
        call()
    after = snapshot(model)
    assert before[:-1] == after[:-1] and all(map(torch.equal, before[-1], after[-1]))


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"adapter_name": "b"}, AdapterNameError, "already an adapter named 'b'"),
        ({"adapter_name": "x.y"}, AdapterNameError, r"must not be empty or contain '\.'"),
        ({"adapters": ["a", "z"]}, AdapterNameError, "no adapter named 'z'; loaded: a, b"),
        ({"adapters": [], "weights": []}, ConfigError, "no adapters to combine"),
        ({"weights": [1.0]}, ConfigError, "got 2 adapters and 1 weights"),
        ({"weights": [1.0, float("nan")]}, ConfigError, "weights must be finite numbers; got nan"),
        ({"weights": [1.0, "1"]}, ConfigError, "weights must be finite numbers; got '1'"),
        ({"combination_type": "tie"}, ConfigError, "'tie' is unknown; did you mean 'ties'"),
        ({"combination_type": "ties"}, ConfigError, "density .* must be above 0 and at most 1, .* got None"),
        ({"combination_type": "ties_svd", "density": 0.0}, ConfigError, r"got 0\.0; try"),
        ({"combination_type": "dare_linear", "density": 1.1}, ConfigError, r"got 1\.1; try"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"}, ConfigError, "got 'most'"),
        ({"combination_type": "linear"}, ConfigError, "factors of the same rank; at 0 they are {'a': 4, 'b': 3}"),
        ({"svd_rank": 0}, ConfigError, "svd_rank must be an integer from 1 to 8, .* got 0"),
        ({"svd_rank": 9}, ConfigError, "svd_rank must be an integer from 1 to 8, .* got 9"),
        ({"svd_rank": 2.0}, ConfigError, r"svd_rank must be an integer .* got 2\.0"),
        ({"svd_clamp": 0.3}, ConfigError, r"svd_clamp is a quantile above 0\.5 .* got 0\.3"),
        ({"svd_driver": "fast"}, ConfigError, "svd_driver must be .* got 'fast'"),
    ],
    ids=str,
)
def test_of_weighted(given: dict[str, Any], kind: type[PeftError], message: str, linears: Any, snapshot: Any) -> None:
    model = linears(a={}, b={"r": 3})
    options = {"adapters": ["a", "b"], "weights": [1.0, 0.5], "adapter_name": "m", **given}
    unchanged(model, snapshot, kind, message, lambda: model.add_weighted_adapter(**options))


def test_a_name_that_is_taken_keeps_its_adapter(linears: Any, changes: Any) -> None:
    """PEFT returns without a word, and what one goes on with is the old adapter."""
    model = linears(a={}, b={})
    before = changes(model, "b")
    for call in (
        lambda: model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "b", "cat"),
        lambda: model.add_merged("b", {"a": 1.0, "b": 1.0}, SUM),
    ):
        with pytest.raises(AdapterNameError, match="delete it first or take another name"):
            call()
    assert all(torch.equal(before[path], change) for path, change in changes(model, "b").items())


@pytest.mark.parametrize(
    ("weights", "recipe", "message"),
    [
        ({}, SUM, "no adapters to combine"),
        ({"a": float("inf")}, SUM, "finite numbers; got inf"),
        ({"a": 1.0, "b": -1.0}, Recipe.linear(), "average needs weights of at least 0.*task_arithmetic"),
        ({"a": 0.0, "b": 0.0}, Recipe.linear(), "average needs weights"),
        ({"a": 1.0}, Recipe.slerp(), "two weights of at least 0"),
        ({"a": 1.0, "b": -0.5}, Recipe.slerp(), "two weights of at least 0"),
        ({"a": 1.0}, Recipe.model_stock(), "two adapters or more"),
        ({"a": 1.0, "b": 2.0}, Recipe.model_stock(), "each is given the same"),
        ({"a": 1.0, "b": 2.0}, "ties", "a recipe such as Recipe.ties.* got 'ties'"),
    ],
    ids=str,
)
def test_of_weights(weights: dict[str, float], recipe: Any, message: str, linears: Any, snapshot: Any) -> None:
    model = linears(a={}, b={})
    unchanged(model, snapshot, ConfigError, message, lambda: model.add_merged("m", weights, recipe))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsify": "random", "density": 0}, "density must be above 0"),
        ({"sparsify": "random", "density": True}, "density must be above 0"),
        ({"sparsify": "largest"}, "sparsify must be one of magnitude, random, row_rank, outliers; got 'largest'"),
        ({"weigh": None}, "weigh must be one of given, slerp, stock"),
        ({"elect": "most"}, "elect must be one of sum, count"),
        ({"normalise": "agreeing"}, "counts elected signs; give elect='sum'"),
        ({"scale": float("inf")}, "scale must be a finite number"),
        ({"sparsify": "row_rank", "density": 0.9, "epsilon": 0.2}, r"at most 1; got 0\.9 and 0\.2; try epsilon=0\.1"),
        ({"sparsify": "row_rank", "density": 0.2, "epsilon": 0.2}, "density - epsilon must be above 0"),
        ({"sparsify": "outliers", "density": 0.9, "gamma": 0.2}, r"from 0 to 1 - density = 0\.1"),
        ({"sparsify": "outliers", "density": 0.9, "gamma": -0.1}, "gamma must be from 0"),
        ({"weigh": "slerp", "sparsify": "random", "density": 0.5}, "makes its own weights of whole changes"),
    ],
    ids=str,
)
def test_of_recipes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**options)


def test_modules_that_more_than_one_trains_whole(linears: Any, snapshot: Any) -> None:
    options = {"target_modules": ["0"], "modules_to_save": ["1"]}
    model = linears(a=options, b=options, c={"target_modules": ["0"]})
    for call in (
        lambda: model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "m", "svd"),
        lambda: model.add_merged("m", {"a": 1.0, "b": 1.0}, SUM),
    ):
        unchanged(model, snapshot, MergeError, r"1 is trained whole .* by more than one of \['a', 'b'\]", call)


def test_the_same_rows_of_an_embedding(llama: Any, with_adapters: Any, snapshot: Any) -> None:
    options: Any = {"r": 2, "target_modules": ["q_proj"]}
    model = with_adapters(
        llama(),
        a=LoraConfig(trainable_token_indices=[1], **options),
        b=LoraConfig(trainable_token_indices=[2], **options),
    )
    message = "model.embed_tokens is trained whole .*trainable_token_indices"
    unchanged(model, snapshot, MergeError, message, lambda: model.add_merged("m", {"a": 1.0, "b": 1.0}, SUM))


def test_rows_and_a_change_of_one_embedding(llama: Any, with_adapters: Any, snapshot: Any) -> None:
    rows = LoraConfig(r=2, trainable_token_indices=[1], target_modules=["q_proj"])
    model = with_adapters(llama(), a=rows, b=LoraConfig(r=2, target_modules=["embed_tokens"]))
    call = lambda: model.add_merged("m", {"a": 1.0, "b": 1.0}, SUM)  # noqa: E731
    unchanged(model, snapshot, ConfigError, "model.embed_tokens is a target itself", call)


def test_biases_of_the_base(linears: Any, snapshot: Any) -> None:
    model = linears(a={"bias": "lora_only"}, b={})
    message = r"'a' trains the base's own biases \(bias='lora_only'\)"
    unchanged(model, snapshot, MergeError, message, lambda: model.add_merged("m", {"a": 1.0, "b": 1.0}, SUM))
    assert list(adapter_set(model).configs) == ["a", "b"]
