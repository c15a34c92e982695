"""A service from a model, adapters and limits: its context, its end tokens, and what a request may ask for."""

import queue
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from peftcore import CheckpointError, ConfigError
from peftcore.bases import PackedCopyLinear
from peftcore.bases.packed_copy import packs_bfloat16
from peftcore.composition import Only
from peftcore.routing import AdapterStore
from peftcore.serving import Limits, make_service
from peftcore.serving.errors import BadRequestError, ContextLengthError, QueueFullError
from peftcore.serving.protocol import ChatRequest, CompletionRequest
from peftcore.serving.service import Service, load_base


@pytest.fixture
def base(tiny_base: Path) -> Any:
    """A model with a context of 1,024 tokens, and its tokenizer, from a folder."""
    return load_base(tiny_base, "float32")


def service_of(base: Any, **options: Any) -> Service:
    """A service whose engine is not started."""
    model, tokenizer = base
    return make_service(model, tokenizer, AdapterStore(model), "base", **options)


def asked(service: Service, prompt: int, **options: Any) -> Any:
    """The generation of a completion request, for a prompt of so many tokens."""
    body = CompletionRequest(model="base", prompt=[5] * prompt, **options)
    return service.generation(body, [5] * prompt, 0, queue.Queue().put)


# -- making a service -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "context"), [(None, 1024), (100, 100), (5000, 1024)])
def test_the_context_is_the_smaller_of_the_models_and_the_limit(base: Any, limit: int | None, context: int) -> None:
    assert service_of(base, limits=Limits(max_context=limit)).context == context


class NoContext:
    """A configuration without the model's context, as models without position embeddings have."""

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name == "max_position_embeddings":
            raise AttributeError(name)
        return getattr(self._config, name)


def test_a_model_that_names_no_context_gets_the_limit_or_2048_tokens(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(base[0].config), "get_text_config", lambda self, **_: NoContext(self))
    assert service_of(base, limits=Limits(max_context=5000)).context == 5000
    assert service_of(base).context == 2048


@pytest.mark.parametrize(("configured", "expected"), [(7, {2, 7}), ([7, 8], {2, 7, 8}), (None, {2})])
def test_end_tokens_are_those_of_the_generation_config_and_of_the_tokenizer(
    base: Any, configured: Any, expected: set[int]
) -> None:
    model, tokenizer = base
    assert tokenizer.eos_token_id == 2
    model.generation_config.eos_token_id = configured
    assert service_of(base).eos_tokens == expected


def test_what_cannot_be_served_is_refused_when_the_service_is_made(base: Any) -> None:
    with pytest.raises(ConfigError, match="'base' has the name of the base model"):
        service_of(base, compositions={"base": Only("a")})
    with pytest.raises(ConfigError, match="key"):
        service_of(base, keys=[""])


def test_warnings_stay_those_of_the_caller(base: Any) -> None:
    """The caller changes them while the server runs."""
    warnings: dict[str, str] = {}
    service = service_of(base, warnings=warnings)
    warnings["champion"] = "not loaded"
    assert dict(service.warnings) == warnings and service.warnings is warnings


# -- requests ---------------------------------------------------------------------------------------------------------


def test_options_that_a_request_leaves_out_have_openais_defaults(base: Any) -> None:
    sampling = asked(service_of(base), 3).sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.stop) == (1.0, 1.0, None, ())
    assert sampling.max_tokens == 16
    sampling = asked(service_of(base), 3, temperature=0, top_p=0.5, seed=0, stop="a", max_tokens=7).sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.stop) == (0, 0.5, 0, ("a",))
    assert sampling.max_tokens == 7
    assert not sampling.logit_bias and sampling.logprobs is None
    given = {"presence_penalty": 0.5, "frequency_penalty": -1.0, "logit_bias": {"7": 2.0}, "logprobs": 3}
    sampling = asked(service_of(base), 3, **given).sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -1.0)
    assert sampling.logit_bias == {7: 2.0} and sampling.logprobs == 3


def test_a_chat_without_a_number_of_tokens_may_fill_the_context_up_to_the_servers_limit(base: Any) -> None:
    body = ChatRequest(model="base", messages=[{"role": "user", "content": "x"}])  # type: ignore[list-item]
    for limits, tokens in ((Limits(max_context=100), 90), (Limits(max_tokens=30), 30)):
        service = service_of(base, limits=limits)
        assert service.generation(body, [5] * 10, 0, queue.Queue().put).sampling.max_tokens == tokens


@pytest.mark.parametrize("prompt", [90, 91])
def test_prompt_and_completion_must_fit_into_the_context(base: Any, prompt: int) -> None:
    service = service_of(base, limits=Limits(max_context=100))
    if prompt == 90:
        assert asked(service, prompt, max_tokens=10).sampling.max_tokens == 10
        return
    with pytest.raises(ContextLengthError, match="the prompt has 91 tokens and the completion up to 10;"):
        asked(service, prompt, max_tokens=10)


def test_a_prompt_that_leaves_no_room_for_one_token_is_refused(base: Any) -> None:
    body = ChatRequest(model="base", messages=[{"role": "user", "content": "x"}])  # type: ignore[list-item]
    service = service_of(base, limits=Limits(max_context=100))
    assert service.generation(body, [5] * 99, 0, queue.Queue().put).sampling.max_tokens == 1
    with pytest.raises(ContextLengthError, match="the prompt has 100 tokens"):
        service.generation(body, [5] * 100, 0, queue.Queue().put)


def test_requests_beyond_the_limits_are_refused(base: Any) -> None:
    service = service_of(base, limits=Limits(max_tokens=20, max_queue=1))
    with pytest.raises(BadRequestError, match="max_tokens must be at most 20 on this server; got 21") as caught:
        asked(service, 3, max_tokens=21)
    assert caught.value.param == "max_tokens"
    with pytest.raises(BadRequestError, match="the prompt is empty"):
        asked(service, 0)
    body, unknown = CompletionRequest(model="base", prompt="x"), service.vocabulary  # a token without embedding
    with pytest.raises(BadRequestError, match=f"the prompt has the token {unknown} of the tokenizer"):
        service.generation(body, [5, unknown, 5], 0, queue.Queue().put)
    asked(service, 3)
    with pytest.raises(QueueFullError):
        asked(service, 3)


def test_only_a_completion_keeps_the_space_between_prompt_and_text(base: Any, sentencepiece: Any) -> None:
    service = replace(service_of(base), tokenizer=sentencepiece)
    the, cat = sentencepiece.convert_tokens_to_ids(["▁the", "▁cat"])
    message = {"role": "user", "content": "x"}
    for body, text in (
        (CompletionRequest(model="base", prompt="x"), " cat"),
        (ChatRequest.model_validate({"model": "base", "messages": [message]}), "cat"),
    ):
        events: queue.Queue[Any] = queue.Queue()
        service.generation(body, [the], 0, events.put).push(cat)
        assert events.get_nowait().text == text


# -- reading a base ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "slow", "expected"),
    [
        ("auto", False, torch.bfloat16),
        ("auto", True, torch.float32),
        ("bfloat16", True, torch.bfloat16),
        ("float32", False, torch.float32),
    ],
)
def test_a_base_is_loaded_in_its_own_type_in_a_faster_one_or_in_a_given_one(
    tiny_base: Path, dtype: str, slow: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftcore.bases.compute_dtype._is_slow", lambda dtype: slow)
    model, tokenizer = load_base(tiny_base, dtype)
    assert model.dtype == expected and isinstance(tokenizer, PreTrainedTokenizerBase)
    assert isinstance(model.lm_head, PackedCopyLinear) == (dtype == "auto" and (slow or packs_bfloat16()))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="contains no base model that can be served"):
        load_base(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="contains no base model that can be served"):
        load_base(tmp_path)
