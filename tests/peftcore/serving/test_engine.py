"""The engine without HTTP: rows of any adapters together are exact, and what goes wrong is one request's alone."""

import itertools
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from choice_grammar import ChoiceGrammar
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from peftcore import LoraConfig
from peftcore.errors import ConfigError
from peftcore.prompts.adaption_prompt import AdaptionPromptConfig
from peftcore.serving import Limits
from peftcore.serving.engine import Prefill
from peftcore.serving.errors import (
    AdapterFailedError,
    GrammarError,
    ServingError,
    ShuttingDownError,
)
from peftcore.serving.forward import RoutedForward
from peftcore.serving.sampling import next_tokens

NAMES = ("base", "sql", "chat", "dora", "ia3", "mix")
LORA: dict[str, Any] = {"r": 2, "init_lora_weights": False, "target_modules": "all-linear"}


class Scaled(LlamaRMSNorm):
    """A norm with a matrix of its own after it."""

    matrix: Any

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) @ self.matrix


def prompts(count: int) -> list[list[int]]:
    chance = random.Random(1)
    return [chance.choices(range(3, 200), k=chance.randint(1, 30)) for _ in range(count)]


# -- exactness ------------------------------------------------------------------------------------------------------


def test_whatever_is_in_the_batch_a_request_gets_what_generate_gives_it_alone(
    serving: Callable[..., Any], world: Any
) -> None:
    chance = random.Random(2)
    jobs = [(NAMES[n % len(NAMES)], prompt, chance.randint(1, 25)) for n, prompt in enumerate(prompts(18))]
    expected = [world.expected(*job) for job in jobs]
    for limits in (Limits(), Limits(max_batch=3), Limits(max_batch=5, prefill_tokens=16)):
        served = serving(limits=limits, max_loaded=4)
        asked = []
        for name, prompt, tokens in jobs:
            asked.append(served.begin(name, prompt, tokens))
            time.sleep(chance.choice([0, 0, 0.01]))
        for one, text, (name, _, tokens) in zip(asked, expected, jobs, strict=True):
            found, finish, count = one.result()
            assert found == text, (name, limits)
            assert (finish == "length") == (count == tokens) or finish == "stop"
        served.wait(lambda engine=served.service.engine: engine.idle)
        assert served.service.catalog.store.statistics()["in_use"] == 0


def test_adapters_make_a_difference(world: Any) -> None:
    prompt = prompts(1)[0]
    assert len({world.expected(name, prompt, 20) for name in ("base", "sql", "chat", "dora", "mix")}) == 5


def test_a_stop_text_ends_it(serving: Callable[..., Any]) -> None:
    served = serving()
    prompt = prompts(1)[0]
    whole, _, count = served.begin("sql", prompt, 40).result()
    stop = next(part for part in (whole[n : n + 2] for n in range(3, len(whole))) if "�" not in part)
    text, finish, fewer = served.begin("sql", prompt, 40, stop=(stop,)).result()
    assert (text, finish) == (whole[: whole.index(stop)], "stop")
    assert fewer < count


def test_an_end_token_ends_it_as_it_ends_generate(serving: Callable[..., Any], world: Any) -> None:
    world.model.lm_head.weight.data[2] *= 3  # the end is now likely
    served = serving()
    asked = [served.begin("sql", prompt, 40) for prompt in prompts(8)]
    found = [one.result() for one in asked]
    assert any(finish == "stop" and count < 40 for _, finish, count in found)
    assert [text for text, *_ in found] == [world.expected("sql", prompt, 40) for prompt in prompts(8)]


def test_a_seed_gives_the_same_again_beside_others(serving: Callable[..., Any]) -> None:
    served = serving()
    prompt = prompts(1)[0]
    alone = served.begin("sql", prompt, 30, temperature=1.0, top_p=0.9, seed=5).result()
    others = [served.begin(name, prompt, 30, temperature=1.0, seed=n) for n, name in enumerate(NAMES)]
    assert served.begin("sql", prompt, 30, temperature=1.0, top_p=0.9, seed=5).result() == alone
    assert served.begin("sql", prompt, 30, temperature=1.0, top_p=0.9, seed=6).result() != alone
    assert all(len(one.result()) == 3 for one in others)


# -- one request's own errors ---------------------------------------------------------------------------------------


def spoil_with(value: float) -> Callable[[Any], None]:
    def spoil(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "layers.1.mlp.up_proj" in name and "lora_A" in name:
                parameter.fill_(value)

    return spoil


@pytest.mark.parametrize(
    ("value", "said"), [(float("nan"), "is not finite"), (1e306, "returned logits that are not finite")]
)
def test_a_broken_adapter_hurts_only_its_own_request(serving: Callable[..., Any], world: Any, value: float, said: str):
    """NaN weights are found when it is loaded; weights that overflow would make 0 · ∞ of every row beside them."""
    world.add("broken", LoraConfig(**LORA), 9, spoil_with(value))
    if value == 1e306:
        path = world.folder / "broken"
        _store_in_double(path, value)
    served = serving()
    jobs = [("sql", prompts(8)[n]) for n in range(4)] + [("broken", [5, 6])] + [("mix", prompts(8)[n]) for n in (5, 6)]
    for _ in range(2):
        asked = [served.begin(name, prompt, 20) for name, prompt in jobs]
        for one, (name, prompt) in zip(asked, jobs, strict=True):
            found = one.result()
            if name == "broken":
                assert isinstance(found, AdapterFailedError) and said in str(found), found
            else:
                assert found[0] == world.expected(name, prompt, 20)


def _store_in_double(directory: Path, value: float) -> None:
    from safetensors.torch import load_file, save_file

    from peftcore.files import write_manifest

    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: torch.where(v.isfinite(), v, 3e38) for k, v in tensors.items()}, path)
    write_manifest(directory)


def test_an_adapter_that_fails_in_the_middle_leaves_and_the_others_go_on(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving()
    original, calls = RoutedForward._logits, []

    def failing(self: Any, cache: Any, tokens: Any, mask: Any, routes: Any) -> Any:
        calls.append(len(routes))
        logits = original(self, cache, tokens, mask, routes)
        if cache.length > 20 and any("chat" in name for one in routes for name in one.names()):
            raise RuntimeError("too much for it")
        return logits

    monkeypatch.setattr(RoutedForward, "_logits", failing)
    names = ("sql", "chat", "base", "mix", "dora")
    asked = {name: served.begin(name, [5, 6, 7], 40) for name in names}
    for name, one in asked.items():
        found = one.result()
        if name in ("chat", "mix"):
            assert isinstance(found, AdapterFailedError) and "too much for it" in str(found)
        else:
            assert found[0] == served.world.expected(name, [5, 6, 7], 40)
    assert max(calls) > 1


def test_a_request_gets_the_place_of_an_adapter_that_fails_in_the_middle(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving(max_loaded=1)
    original, waits = RoutedForward._logits, threading.Event()

    def failing(self: Any, cache: Any, tokens: Any, mask: Any, routes: Any) -> Any:
        logits = original(self, cache, tokens, mask, routes)
        if cache.length > 20 and any("chat" in name for one in routes for name in one.names()):
            until = time.monotonic() + 30
            while not (waits.is_set() or time.monotonic() > until):
                time.sleep(0.01)
            raise RuntimeError("too much for it")
        return logits

    monkeypatch.setattr(RoutedForward, "_logits", failing)
    chat = served.begin("chat", [5, 6, 7], 40)
    sql = served.begin("sql", [5, 6, 7], 4)  # there is no room for its adapter until chat's has gone
    waits.set()
    assert isinstance(chat.result(), AdapterFailedError)
    assert sql.result()[0] == served.world.expected("sql", [5, 6, 7], 4)


def test_adapters_that_cannot_share_a_batch_are_computed_one_after_another(
    serving: Callable[..., Any], world: Any
) -> None:
    """A raw parameter is one for all rows of a forward; the model here has such a one."""
    world.model.model.norm.__class__ = Scaled
    one: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": ["norm.matrix"]}
    world.model.model.norm.matrix = nn.Parameter(torch.eye(32).double())
    for seed, name in enumerate(("raw-a", "raw-b")):
        world.add(name, LoraConfig(r=2, init_lora_weights=False, **one), seed)
    served = serving()
    asked = [(name, served.begin(name, [8, 9], 12)) for name in ("raw-a", "sql", "raw-b", "base", "raw-a")]
    for name, one_of in asked:
        assert one_of.result()[0] == world.expected(name, [8, 9], 12), name


def test_a_prompt_inside_the_attention_is_served(serving: Callable[..., Any], world: Any) -> None:
    def act(model: Any) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(1.0) if parameter.numel() == 1 else parameter.mul_(100)

    world.add("inside", AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"), 4, act)
    served = serving()
    jobs = [(name, [8] * length) for length, name in enumerate(("inside", "sql", "base", "inside"), 2)]
    asked = [served.begin(name, prompt, 12) for name, prompt in jobs]
    assert [one.result()[0] for one in asked] == [world.expected(name, prompt, 12) for name, prompt in jobs]
    assert world.expected("inside", [8, 8], 12) != world.expected("base", [8, 8], 12)


def test_models_that_keep_more_than_keys_and_values_are_refused(world: Any) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    small = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1)
    with pytest.raises(ConfigError, match="is not a decoder with a cache"):
        RoutedForward(T5ForConditionalGeneration(small))


# -- load -----------------------------------------------------------------------------------------------------------


def test_a_long_prompt_is_read_in_parts_between_which_others_decode(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving(limits=Limits(max_batch=4, prefill_tokens=16))
    widths: list[int] = []
    forward = served.service.engine._forward
    step = forward.step

    def noted(cache: Any, tokens: torch.Tensor, *rest: Any) -> Any:
        widths.append(tokens.numel())
        return step(cache, tokens, *rest)

    monkeypatch.setattr(forward, "step", noted)
    long = [5 + n % 150 for n in range(400)]
    running = served.begin("base", [7, 8], 60)
    begun = running.first().text
    asked = [served.begin("sql", long, 4), served.begin("chat", long[:170], 3)]
    results = [begun + running.result()[0], *(one.result()[0] for one in asked)]
    assert results == [
        served.world.expected("base", [7, 8], 60),
        served.world.expected("sql", long, 4),
        served.world.expected("chat", long[:170], 3),
    ]
    assert max(widths) <= 16
    parts = [number for number, width in enumerate(widths) if width == 16]
    between = [widths[a + 1 : b] for a, b in itertools.pairwise(parts)]
    assert sum(bool(one) for one in between) >= 20  # a row that decodes has a step between two parts


def test_a_request_whose_client_leaves_while_its_prompt_is_read_makes_room(serving: Callable[..., Any]) -> None:
    served = serving(limits=Limits(max_batch=2, prefill_tokens=1))
    leaving = served.begin("sql", list(range(5, 155)) * 3, 4)
    served.wait(lambda: served.metric("peftcore_prompt_tokens_total") > 3)
    served.service.engine.cancel(leaving.generation)
    assert served.begin("chat", [5, 6], 4).result()[0] == served.world.expected("chat", [5, 6], 4)
    served.wait(lambda: served.service.engine.idle)
    assert served.metric("peftcore_prompt_tokens_total") < 450
    assert served.service.catalog.store.statistics()["in_use"] == 0


def test_a_bug_in_a_turn_ends_its_requests_and_not_the_engine(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving()
    with monkeypatch.context() as patch:
        patch.setattr("peftcore.serving.engine.next_tokens", lambda *_: 1 / 0)
        found = served.begin("sql", [5, 6], 4).result()
    assert type(found) is ServingError and "see the server's log" in str(found)
    assert served.begin("sql", [5, 6], 4).result()[0] == served.world.expected("sql", [5, 6], 4)
    assert served.service.catalog.store.statistics()["in_use"] == 0


def test_waiting_requests_are_answered_after_a_bug_in_a_turn(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving(limits=Limits(max_batch=1))
    original, fails = next_tokens, threading.Event()

    def failing(*arguments: Any) -> Any:
        if fails.is_set():
            fails.clear()
            raise ZeroDivisionError
        return original(*arguments)

    monkeypatch.setattr("peftcore.serving.engine.next_tokens", failing)
    served.slow_down(0.02)
    running = served.begin("sql", [5, 6], 100)
    running.first()
    waiting = served.begin("sql", [5, 6], 4)
    time.sleep(0.1)  # the engine has seen it
    fails.set()
    assert type(running.result()) is ServingError
    assert waiting.result()[1:] == ("length", 4)


def test_a_request_that_cannot_begin_fails_and_the_next_one_is_answered(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving()
    original = Prefill

    def failing(generations: Any, *rest: Any) -> Any:
        if any(len(one.prompt) == 3 for one in generations):
            raise MemoryError
        return original(generations, *rest)

    monkeypatch.setattr("peftcore.serving.engine.Prefill", failing)
    assert type(served.begin("sql", [5, 6, 7], 4).result()) is ServingError
    assert served.begin("sql", [5, 6], 4).result()[0] == served.world.expected("sql", [5, 6], 4)
    assert served.service.catalog.store.statistics()["in_use"] == 0


def test_draining_ends_what_runs_and_stopping_does_not(serving: Callable[..., Any]) -> None:
    served = serving()
    running = served.begin("sql", [5, 6], 30)
    served.service.engine.drain()
    with pytest.raises(ShuttingDownError):
        served.begin("sql", [5, 6], 4)
    assert running.result()[0] == served.world.expected("sql", [5, 6], 30)

    other = serving(limits=Limits(max_batch=1))
    asked = [other.begin("base", [5, 6], 400) for _ in range(3)]
    asked[0].first()
    other.service.engine.stop()
    assert all(isinstance(one.result(), ShuttingDownError) for one in asked)
    assert not other.service.engine.alive


# -- new versions ---------------------------------------------------------------------------------------------------


def test_a_new_version_is_for_requests_that_come_after_it(serving: Callable[..., Any], world: Any) -> None:
    served = serving()
    new = world.add("sql-next", LoraConfig(**LORA), 77)
    old = served.begin("sql", [5, 6, 7], 60)
    old.first()
    served.service.catalog.store.replace("sql", new)
    fresh = served.begin("sql", [5, 6, 7], 60).result()
    assert fresh[0] == world.expected("sql-next", [5, 6, 7], 60)
    finished = old.result()
    assert finished[1:] == (("length", 60) if finished[1] == "length" else finished[1:])
    whole = world.expected("sql", [5, 6, 7], 60)
    assert whole.endswith(finished[0]) and whole != fresh[0]


# -- grammars -------------------------------------------------------------------------------------------------------


def choices(served: Any, *texts: str, fails_at: int | None = None) -> Any:
    """A matcher of fixed texts."""
    ids = [served.world.tokenizer(text)["input_ids"] for text in texts]
    return ChoiceGrammar(ids, len(served.world.tokenizer), fails_at).matcher()


def test_each_row_has_its_own_grammar_and_rows_without_one_are_as_alone(
    serving: Callable[..., Any], world: Any
) -> None:
    served = serving()
    texts = [("yes", "no"), ("übermorgen",), ("a", "ab", "abc"), ("", "x")]
    free = [(name, prompt) for name, prompt in zip(NAMES, prompts(6), strict=True)]
    asked = [served.begin(name, prompt, 25) for name, prompt in free]
    bound = [
        (one, served.begin(name, prompts(8)[number], 40, choices(served, *one), temperature=temperature, seed=3))
        for number, one in enumerate(texts)
        for name in ("base", "sql", "mix")
        for temperature in (0.0, 1.5)
    ]
    for one, request in bound:
        text, finish, _ = request.result()
        assert text in one and finish == "stop"
    for (name, prompt), request in zip(free, asked, strict=True):
        assert request.result()[0] == world.expected(name, prompt, 25)
    assert served.metric("peftcore_grammar_tokens_total") > 0
    assert served.metric("peftcore_grammar_mask_seconds_total") > 0


def test_a_request_without_a_grammar_computes_no_mask(serving: Callable[..., Any]) -> None:
    served = serving()
    served.begin("sql", prompts(1)[0], 9).result()
    assert served.metric("peftcore_grammar_mask_seconds_total") == 0


def test_a_complete_text_ends_without_an_end_token_and_the_token_limit_ends_it_early(
    serving: Callable[..., Any],
) -> None:
    served = serving()
    prompt = prompts(1)[0]
    assert served.begin("sql", prompt, 40, choices(served, "hello")).result() == ("hello", "stop", 5)
    assert served.begin("sql", prompt, 5, choices(served, "hello")).result() == ("hello", "stop", 5)
    assert served.begin("sql", prompt, 3, choices(served, "hello")).result() == ("hel", "length", 3)
    assert served.begin("sql", prompt, 40, choices(served, "hello"), stop=("l",)).result() == ("he", "stop", 3)


def test_a_grammar_that_fails_ends_its_own_request_alone(serving: Callable[..., Any], world: Any) -> None:
    served = serving()
    prompt = prompts(1)[0]
    asked = [served.begin("sql", prompt, 20)]
    failing = [served.begin("sql", prompt, 20, choices(served, "hello", fails_at=place)) for place in (0, 3)]
    asked += [served.begin("chat", prompt, 20), served.begin("sql", prompt, 20, choices(served, "hello"))]
    for one in failing:
        error = one.result()
        while not isinstance(error, ServingError):
            error = one.first()
        assert isinstance(error, GrammarError) and error.status == 400
    assert asked[0].result()[0] == world.expected("sql", prompt, 20)
    assert asked[1].result()[0] == world.expected("chat", prompt, 20)
    assert asked[2].result()[0] == "hello"
    served.wait(lambda: served.service.engine.idle)
    assert served.service.catalog.store.statistics()["in_use"] == 0


def test_a_grammar_and_the_prefix_cache_go_together(serving: Callable[..., Any]) -> None:
    served = serving()
    prompt = [chance % 200 + 3 for chance in range(100)]
    for _ in range(2):
        assert served.begin("sql", prompt, 40, choices(served, "yes", "no")).result()[0] in ("yes", "no")
    assert served.metric("peftcore_prefix_cache_tokens_total") == 96


def test_log_probabilities_under_a_grammar_are_the_models_own(serving: Callable[..., Any]) -> None:
    served = serving()
    prompt = prompts(1)[0]
    free = served.begin("sql", prompt, 1, logprobs=20).first().logprobs
    bound = served.begin("sql", prompt, 1, choices(served, "z"), logprobs=20).first().logprobs
    assert bound.top == free.top
    token = served.world.tokenizer("z")["input_ids"][0]
    assert bound.token == token and bound.logprob <= free.logprob
