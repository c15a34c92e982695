"""A conversation writes what the model generates, and each model sees its own answers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.data.chat import end_of_turn
from flows.errors import ChatError
from flows.serving.conversation import Conversation, talk
from peftcore import LoraConfig, get_peft_model
from peftcore.routing import AdapterStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_tiny_base: Callable[[Path], Path]) -> Path:
    """A base, and an adapter `poet` beside it."""
    base = write_tiny_base(tmp_path_factory.mktemp("conversation") / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(base.with_name("poet"))
    return base


@pytest.fixture
def loaded(folder: Path) -> Iterator[tuple[Any, Any, AdapterStore]]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    store = AdapterStore(model)
    store.register("poet", folder.with_name("poet"))
    yield model, AutoTokenizer.from_pretrained(folder), store
    store.close()


def expected(folder: Path, adapted: bool, turns: list[dict[str, str]], tokens: int) -> str:
    """The greedy answer of a model apart."""
    from peftcore import PeftModel

    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    if adapted:
        model = PeftModel.from_pretrained(model, folder.with_name("poet")).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    end = end_of_turn(tokenizer)
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=end, pad_token_id=0)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_each_model_answers_by_its_own_turns(loaded: Any, folder: Path) -> None:
    conversation, written = Conversation(*loaded, system="Be brief.", max_tokens=5), []
    for name in ("base", "poet"):
        turns = [{"role": "system", "content": "Be brief."}]
        for question in ("Hello?", "And then?"):
            written.clear()
            spoken = conversation.say(question, name, written.append)
            turns.append({"role": "user", "content": question})
            answer = expected(folder, name == "poet", turns, 5)
            assert spoken.text == answer == "".join(written).strip() and 0 < spoken.tokens <= 5
            turns.append({"role": "assistant", "content": answer})


def test_a_new_beginning_forgets_the_turns(loaded: Any, folder: Path) -> None:
    conversation = Conversation(*loaded, max_tokens=4)
    question = [{"role": "user", "content": "Hello?"}]
    first = conversation.say("Hello?", "base", lambda _: None)
    conversation.reset()
    assert conversation.say("Hello?", "base", lambda _: None).text == first.text
    conversation.begin("Be brief.")
    system = [{"role": "system", "content": "Be brief."}]
    assert conversation.say("Hello?", "base", lambda _: None).text == expected(folder, False, system + question, 4)


def test_what_does_not_fit_into_the_context_is_not_said(loaded: Any) -> None:
    conversation = Conversation(*loaded, max_tokens=4)
    with pytest.raises(ChatError, match=r"/reset"):
        conversation.say("word " * 1024, "base", lambda _: None)
    conversation.say("Hello?", "base", lambda _: None)  # the long turn is not in it


def test_an_interrupted_answer_keeps_its_pieces(loaded: Any) -> None:
    conversation, pieces = Conversation(*loaded, max_tokens=64), []

    def write(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    spoken = conversation.say("Hello?", "poet", write)
    assert spoken.tokens < 64 and spoken.text == "".join(pieces).strip()


def test_samples_follow_the_seed(loaded: Any) -> None:
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(Conversation(*loaded, max_tokens=12, temperature=2.0).say("Hello?", "base", lambda _: None).text)
    assert texts[0] == texts[1] != texts[2]


class Told:
    """A conversation that answers with the model's name."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def say(self, text: str, name: str, write: Callable[[str], object]) -> Any:
        from flows.serving.conversation import Spoken

        self.calls.append((text, name))
        write(f"I am {name}.")
        return Spoken(f"I am {name}.", 4, 0.5)

    def begin(self, system: str | None) -> None:
        self.calls.append(("begin", system))

    def reset(self) -> None:
        self.calls.append(("reset",))


def session(*lines: str) -> tuple[Told, str]:
    told, written, rest = Told(), [], iter(lines)

    def read() -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    def add(name: str) -> str:
        if name == "gone":
            raise ChatError("there is no model gone")
        return "v1" if name == "champion" else name

    talk(told, ("base", "v1"), add, ["champion"], read, written.append)  # type: ignore[arg-type]
    return told, "".join(written)


def test_lines_are_said_to_the_models_chosen() -> None:
    told, text = session("Hi", "", "/model base v1", "Who?")
    assert told.calls == [("Hi", "v1"), ("Who?", "base"), ("Who?", "v1")]
    assert text == (
        "I am v1.\n[4 tokens, 0.5 s]\ntalking to base and v1\n"
        "--- base\nI am base.\n[4 tokens, 0.5 s]\n--- v1\nI am v1.\n[4 tokens, 0.5 s]\n\n"
    )


def test_commands_and_their_errors_leave_the_chat_open() -> None:
    lines = ("/models", "/system Be brief.", "/system", "/reset", "/model gone", "/model", "/no", "Hi", "/exit", "x")
    told, text = session(*lines)
    assert told.calls == [("begin", "Be brief."), ("begin", None), ("reset",), ("Hi", "v1")]
    assert text.startswith("base\nv1\na new conversation\n") and "error: there is no model gone" in text
    assert "/model takes one name, or two" in text and "there is no /no" in text
