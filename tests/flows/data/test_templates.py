"""Turns by other templates than ChatML: what is learned, what a tool says, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flows.data.chat import IGNORED, ChatTokenizer, Tokens
from flows.data.examples import Message, question_and_answer
from flows.errors import DataError

Templated = Callable[[str], PreTrainedTokenizerBase]


def turns(*contents: str) -> list[Message]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def learned(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode([label for label in tokens.labels if label != IGNORED]))


CHAT = turns("One?", "1.", "Two?", "2.")


@pytest.mark.parametrize(("name", "text"), [("llama3", "1.<|eot_id|>2.<|eot_id|>"), ("mistral", " 1.</s> 2.</s>")])
def test_each_answer_with_its_end(templates: dict[str, str], templated: Templated, name: str, text: str) -> None:
    tokenizer = templated(templates[name])
    tokens = ChatTokenizer(tokenizer).tokenize(CHAT)
    assert learned(tokens, tokenizer) == text
    assert tokens.input_ids[: tokens.prompt_length] == tokenizer(tokens.prompt, add_special_tokens=False)["input_ids"]
    assert tokens.completion == "2."


def test_the_last_answer_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    assert learned(ChatTokenizer(tokenizer, "last").tokenize(CHAT), tokenizer) == "2.<|im_end|>"


def test_a_turn_that_is_not_to_be_trained_is_context(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [CHAT[0], CHAT[1] | {"train": False}, *CHAT[2:]]
    assert learned(ChatTokenizer(tokenizer).tokenize(chat), tokenizer) == "2.<|im_end|>"
    chat = [*CHAT[:3], CHAT[3] | {"train": False}]
    tokens = ChatTokenizer(tokenizer).tokenize(chat)
    assert (learned(tokens, tokenizer), tokens.completion) == ("1.<|im_end|>", "1.")
    assert "Two?" not in tokenizer.decode(tokens.input_ids)


@pytest.mark.parametrize("supervise", ["all", "last"])
def test_a_chat_of_which_nothing_is_to_be_trained_is_refused(tokenizer: Any, supervise: Any) -> None:
    with pytest.raises(DataError, match="it has no assistant turn to train on"):
        ChatTokenizer(tokenizer, supervise).tokenize([CHAT[0], CHAT[1] | {"train": False}])


def test_a_template_that_strips_earlier_thoughts_is_refused_but_for_the_last_answer(
    templates: dict[str, str], templated: Templated
) -> None:
    tokenizer = templated(templates["without_thoughts"])
    chat = turns("One?", "<think>Hm.</think>1.", "Two?", "<think>So.</think>2.")
    with pytest.raises(DataError, match=r"rewrites a turn(?s:.)*data\.supervise: last"):
        ChatTokenizer(tokenizer).tokenize(chat)
    tokens = ChatTokenizer(tokenizer, "last").tokenize(chat)
    assert learned(tokens, tokenizer) == "<think>So.</think>2.<|im_end|>"
    assert "Hm." not in tokens.prompt


CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
WITH_TOOL = [CHAT[0], CALL, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "It is 3."}]


def test_tool_calls_are_learned_and_what_tools_say_is_not(templates: dict[str, str], templated: Templated) -> None:
    tokenizer = templated(templates["tools"])
    tokens = ChatTokenizer(tokenizer).tokenize(WITH_TOOL, [{"name": "add"}])
    text = learned(tokens, tokenizer)
    assert text == '<tool_call>{"name": "add", "arguments": {}}<|im_end|>It is 3.<|im_end|>'
    assert tokens.prompt.startswith('tools: [{"name": "add"}]')


@pytest.mark.parametrize(
    ("chat", "tools", "what"),
    [
        (WITH_TOOL, None, "leaves out the tool calls in turn 2"),
        (CHAT, [{"name": "add"}], "has no tools"),
    ],
)
def test_a_template_that_knows_no_tools_is_refused(tokenizer: Any, chat: Any, tools: Any, what: str) -> None:
    with pytest.raises(DataError, match=what):
        ChatTokenizer(tokenizer).tokenize(chat, tools)


def test_a_template_that_skips_tool_turns_is_refused(templates: dict[str, str], templated: Templated) -> None:
    template = templates["tools"].replace("+ m['content'] }}", "+ (m['content'] if m['role'] != 'tool' else '') }}")
    with pytest.raises(DataError, match="leaves out the result of a tool in turn 3"):
        ChatTokenizer(templated(template)).tokenize(WITH_TOOL, [{"name": "add"}])


def test_where_prompt_and_answer_would_be_one_token_they_are_tokenised_apart(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    vocabulary = tokenizer.get_vocab()
    backend = Tokenizer(models.BPE(vocabulary | {"ĊĊ": len(vocabulary)}, [("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    joining = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        chat_template=tokenizer.chat_template,
    )
    assert len(joining("\n\n")["input_ids"]) == 1
    tokens = ChatTokenizer(joining).tokenize(question_and_answer("a", "\nYes.", None))
    assert learned(tokens, joining) == "\nYes.<|im_end|>"
    assert tokens.input_ids[: tokens.prompt_length] == joining(tokens.prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("answer", ["👍🏽", "é", "x" * 3000, " padded ", "a\n\nb", "</think>", "[INST]", "量"])
def test_any_text_survives(tokenizer: PreTrainedTokenizerBase, answer: str) -> None:
    tokens = ChatTokenizer(tokenizer).tokenize(question_and_answer("q", answer, None))
    assert learned(tokens, tokenizer) == f"{answer}<|im_end|>"
    assert tokenizer.decode(tokens.input_ids) == f"{tokens.prompt}{answer}<|im_end|>"


THOUGHT = [CHAT[0], CHAT[1] | {"reasoning_content": "Hm."}, CHAT[2], CHAT[3] | {"reasoning_content": "So."}]


def test_reasoning_is_learned_under_the_templates_own_name(templates: dict[str, str], templated: Templated) -> None:
    tokenizer = templated(templates["reasoning"])
    tokens = ChatTokenizer(tokenizer).tokenize(THOUGHT)
    assert learned(tokens, tokenizer) == "<think>Hm.</think>1.<|im_end|><think>So.</think>2.<|im_end|>"


def test_a_template_that_drops_reasoning_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"leaves out the reasoning of turn 2 .*data\.reasoning: none"):
        ChatTokenizer(tokenizer).tokenize(THOUGHT)


def test_reasoning_of_earlier_turns_is_left_to_the_template_by_choice_alone(
    templates: dict[str, str], templated: Templated
) -> None:
    tokenizer = templated(templates["last_reasoning"])
    with pytest.raises(DataError, match=r"the reasoning of turn 2 .*data\.supervise: last"):
        ChatTokenizer(tokenizer).tokenize(THOUGHT)
    with pytest.raises(DataError, match=r"the reasoning of turn 2 .*data\.reasoning: supervised"):
        ChatTokenizer(tokenizer, "last").tokenize(THOUGHT)
    tokens = ChatTokenizer(tokenizer, "last", "supervised").tokenize(THOUGHT)
    assert learned(tokens, tokenizer) == "<think>So.</think>2.<|im_end|>"
    assert "Hm." not in tokens.prompt


@pytest.mark.parametrize(("field", "hint"), [("mood", ""), ("reasoning_contents", "did you mean reasoning_content")])
def test_a_field_that_the_template_does_not_show_is_refused(
    templates: dict[str, str], templated: Templated, field: str, hint: str
) -> None:
    chat = [CHAT[0], CHAT[1] | {field: "calm"}]
    tokenizer = templated(templates["reasoning"])
    with pytest.raises(DataError, match=rf"turn 2 \(assistant\) has {field}, .*data\.ignored_fields.*{hint}"):
        ChatTokenizer(tokenizer).tokenize(chat)
    tokenizer.chat_template = templates["reasoning"].replace("m.thinking", f"m.{field}")
    assert "<think>calm</think>" in learned(ChatTokenizer(tokenizer).tokenize(chat), tokenizer)
