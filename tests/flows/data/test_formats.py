"""Rows as others write them, and what is said of those that cannot be used."""

import json
from typing import Any

import pytest

from flows.data import formats
from flows.data.formats import FaultyRow

USER, ANSWER = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1."}
CHAT = [USER, ANSWER]
WORSE = {"role": "assistant", "content": "2."}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"messages": None, "conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1."}]},
        {"prompt": "One?", "completion": "1."},
        {"question": "One?", "answer": "1."},
        {"instruction": "One?", "input": "", "output": "1."},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "One?"}]}, ANSWER | {"train": True}]},
        {"messages": [USER | {"weight": 0}, ANSWER | {"weight": 1, "tool_calls": None}]},
    ],
)
def test_the_same_chat(row: dict[str, Any]) -> None:
    turns = formats.chat(row)
    assert [{key: turn[key] for key in ("role", "content")} for turn in turns] == CHAT
    assert turns[1].get("train", True)


def test_alpacas_input_follows_its_instruction() -> None:
    [turn, _] = formats.chat({"instruction": "Add.", "input": "1, 2", "output": "3"})
    assert turn["content"] == "Add.\n\n1, 2"


def test_a_row_may_have_its_own_system_prompt() -> None:
    assert formats.chat({"system": "Be brief.", "prompt": "a", "completion": "b"})[0]["content"] == "Be brief."


@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}, {"weight": 0.0}])
def test_turns_that_are_context_only(flag: dict[str, Any]) -> None:
    turns = formats.chat({"messages": [USER, ANSWER | flag, USER, ANSWER]})
    assert [turn.get("train", True) for turn in turns] == [True, False, True, True]


def test_tools_and_their_calls() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    result = {"role": "tool", "content": "3", "tool_call_id": "1"}
    row = {"messages": [USER, call, result, ANSWER], "tools": '[{"name": "add"}]'}
    assert formats.chat(row) == [USER, call | {"content": ""}, result, ANSWER]
    assert formats.tools(row) == [{"name": "add"}]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"messages": [USER, {"role": "assistant", "content": "x", "weight": 0.5}]}, "turn 2 has the weight 0.5"),
        ({"messages": [USER | {"train": True}, ANSWER]}, r"turn 1 \(user\) has `train`: true"),
        ({"messages": [USER, {"role": "tool", "content": "3"}, ANSWER]}, "a tool answers the assistant"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]}, "turn 2 .* the part .*image"),
        ({"messages": [USER | {"content": 5}, ANSWER]}, r"turn 1 \(user\) has no text as its content, but 5; write it"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "no user turn"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "turn 1 has the role 'alien'"),
        ({"prompt": "a", "completion": "\ud83d"}, "half a character"),
        ({"messages": [USER, {"role": "assistant", "content": "a\udc00"}]}, r"turn 2 \(assistant\) has half"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "set data.kind to preference"),
        ({"text": "a", "label": 1}, "set data.kind to classification"),
        ({"query": "a", "positive": "b"}, "set data.kind to retrieval"),
    ],
)
def test_a_chat_that_cannot_be_used(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(FaultyRow, match=fault):
        formats.chat(row)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "One?", "chosen": "1.", "rejected": "2."},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
        {"prompt": "One?", "chosen": CHAT, "rejected": [USER, WORSE]},
        {"chosen": CHAT, "rejected": [USER, WORSE]},
    ],
)
def test_the_same_preference(row: dict[str, Any]) -> None:
    assert formats.preference(row) == ([USER], [ANSWER], [WORSE])


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("reasoning", [{"text": "Because."}], "reasoning that is no text"),
        ("refusal", "No.", "content beside a value or refusal"),
        ("images", ["a.png"], "images, and only text can be trained on"),
        ("audio", {"id": "a"}, "audio, and only text can be trained on"),
    ],
)
def test_what_a_turn_would_lose_in_silence_is_refused(key: str, value: Any, fix: str) -> None:
    turn = ANSWER | {key: value}
    for row in ({"messages": [USER, turn]}, {"prompt": "One?", "chosen": [turn], "rejected": "2."}):
        read = formats.preference if "chosen" in row else formats.chat
        with pytest.raises(FaultyRow, match=rf"turn \d \(assistant\) has {fix}"):
            read(row)
    assert formats.chat({"messages": [USER, ANSWER | {key: None}]}) == CHAT


def test_equal_answers_are_left_to_the_doctor() -> None:
    assert formats.preference({"chosen": CHAT, "rejected": CHAT}) == ([USER], [ANSWER], [ANSWER])


def test_whole_chats_may_part_for_several_turns() -> None:
    system = {"role": "system", "content": "Be brief."}
    chosen, rejected = [system, *CHAT, USER, ANSWER], [system, USER, WORSE, USER, WORSE]
    prompt, one, other = formats.preference({"prompt": "One?", "chosen": chosen, "rejected": rejected})
    assert (prompt, len(one), len(other)) == ([system, USER], 3, 3)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "a", "chosen": "b"}, "no rejected"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": "Two?", "chosen": CHAT, "rejected": [USER, WORSE]}, "do not both begin with its prompt"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "its chosen is empty"),
        ({"chosen": CHAT, "rejected": [{"role": "user", "content": "Two?"}, WORSE]}, "only answers may differ"),
        ({"prompt": "a", "chosen": [USER], "rejected": "b"}, "do not both begin"),
    ],
)
def test_a_preference_that_cannot_be_used(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(FaultyRow, match=fault):
        formats.preference(row)


@pytest.mark.parametrize(("label", "name"), [("spam", "spam"), (1, "1"), (True, "True"), (" ham ", "ham")])
def test_labels_are_names(label: Any, name: str) -> None:
    assert formats.labelled({"text": "a", "label": label}) == ("a", name)


@pytest.mark.parametrize("row", [{"text": "a"}, {"label": 1}, {"text": "a", "label": 0.5}, {"text": "", "label": 1}])
def test_a_labelled_text_that_cannot_be_used(row: dict[str, Any]) -> None:
    with pytest.raises(FaultyRow):
        formats.labelled(row)


@pytest.mark.parametrize(("given", "value"), [(None, 1.0), ("", 1.0), (0, 0.0), ("2.5", 2.5), (3, 3.0)])
def test_weights(given: Any, value: float) -> None:
    assert formats.weight({"weight": given}) == value


@pytest.mark.parametrize("given", [-1, "heavy", float("nan"), float("inf"), True, [1]])
def test_impossible_weights(given: Any) -> None:
    with pytest.raises(FaultyRow, match="its weight is"):
        formats.weight({"weight": given})


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1."}], "system": "Be brief."},
        {"messages": [{"role": "developer", "content": "Be brief."}, USER, ANSWER]},
        {"messages": [SYSTEM, USER, ANSWER], "system": "Be brief."},
        {"instruction": "One?", "input": "", "output": "1.", "system": "Be brief.", "history": []},
        {"messages": [SYSTEM, USER, {"role": "assistant", "content": None, "refusal": "1."}]},
    ],
)
def test_the_system_prompt_of_each_format(row: dict[str, Any]) -> None:
    assert formats.chat(row) == [SYSTEM, USER, ANSWER]


def test_two_system_prompts_that_differ_are_refused() -> None:
    with pytest.raises(FaultyRow, match="column system differs"):
        formats.chat({"messages": [SYSTEM, USER, ANSWER], "system": "Be long."})


@pytest.mark.parametrize(
    ("row", "items"),
    [
        ({"tools": [1]}, r'no list of {"type": "function"'),
        ({"tools": "search"}, r'no JSON: .*; write a list of {"type": "function"'),
        ({"functions": {"a": 1}}, r'no list of {"name": '),
        ({"history": '["One?"]'}, r"no list of \[question, answer\]"),
    ],
)
def test_a_list_of_other_items_names_those_that_fit(row: dict[str, Any], items: str) -> None:
    row = {"prompt": "Two?", "completion": "2.", "instruction": "Two?", "output": "2."} | row
    with pytest.raises(FaultyRow, match=items):
        formats.tools(row)
        formats.chat({name: value for name, value in row.items() if name not in ("prompt", "completion")})


def test_a_text_that_is_null_is_called_empty() -> None:
    with pytest.raises(FaultyRow, match="its text is empty"):
        formats.document({"text": None})


def test_alpacas_history_comes_first() -> None:
    row = {"instruction": "Two?", "input": "", "output": "2.", "history": [["One?", "1."]]}
    assert formats.chat(row) == [USER, ANSWER, {"role": "user", "content": "Two?"}, WORSE]
    with pytest.raises(FaultyRow, match=r"its history has \['One\?'\]; give a list of pairs"):
        formats.chat(row | {"history": [["One?"]]})


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "One?", "input": "", "chosen": "1.", "rejected": "2."},
        {
            "conversations": [{"from": "human", "value": "One?"}],
            "chosen": {"from": "gpt", "value": "1."},
            "rejected": {"from": "gpt", "value": "2."},
        },
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [ANSWER],
            "non_preferred_output": [WORSE],
        },
    ],
)
def test_preferences_of_other_tools(row: dict[str, Any]) -> None:
    assert formats.preference(row) == ([USER], [ANSWER], [WORSE])


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning", "thoughts"])
def test_reasoning_has_one_name(name: str) -> None:
    row = {"messages": [USER, ANSWER | {name: "Count."}]}
    assert formats.chat(row) == [USER, ANSWER | {"reasoning_content": "Count."}]
    assert formats.chat(row, [name]) == CHAT


def test_reasoning_in_parts_of_the_content_and_beside_an_answer() -> None:
    parts = [{"type": "thinking", "thinking": "Count."}, {"type": "text", "text": "1."}]
    expected = [USER, ANSWER | {"reasoning_content": "Count."}]
    assert formats.chat({"messages": [USER, ANSWER | {"content": parts}]}) == expected
    assert formats.chat({"messages": [USER, ANSWER | {"content": parts}]}, ["thinking"]) == CHAT
    assert formats.chat({"prompt": "One?", "completion": "1.", "thinking": "Count."}) == expected


@pytest.mark.parametrize(
    ("turns", "fault"),
    [
        ([USER | {"thinking": "Hm."}, ANSWER], r"turn 1 \(user\) has thinking; only the assistant"),
        ([USER, ANSWER | {"thinking": "a", "reasoning": "b"}], "two names that differ"),
        ([USER | {"tool_calls": [{"function": {"name": "add"}}]}, ANSWER], "only the assistant calls tools"),
        ([USER, ANSWER | {"value": "2."}], "content beside a value"),
        ([USER | {"from": "gpt"}, ANSWER], "leave one out"),
        ([USER, ANSWER | {"content": [{"type": "text", "text": "1.", "logprobs": [1]}]}], "logprobs in a part"),
    ],
)
def test_a_field_that_contradicts_its_turn_is_refused(turns: list[Any], fault: str) -> None:
    with pytest.raises(FaultyRow, match=fault):
        formats.chat({"messages": turns})


CALL = {"name": "add", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    ("turns", "result"),
    [
        (
            [
                {
                    "role": "assistant",
                    "tool_calls": [{"type": "function", "function": CALL | {"arguments": '{"a": 1}'}}],
                },
                {"role": "tool", "content": "2"},
            ],
            {"role": "tool", "content": "2"},
        ),
        (
            [
                {"role": "assistant", "content": None, "function_call": CALL | {"arguments": '{"a": 1}'}},
                {"role": "function", "name": "add", "content": "2"},
            ],
            {"role": "tool", "content": "2", "name": "add"},
        ),
        (
            [{"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "2"}],
            {"role": "tool", "content": "2"},
        ),
    ],
)
def test_calls_have_the_form_that_templates_expect(turns: list[Any], result: dict[str, Any]) -> None:
    chat = formats.chat({"messages": [USER, *turns, ANSWER]})
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
    assert chat == [USER, called, result, ANSWER]


def test_functions_are_tools() -> None:
    assert formats.tools({"functions": [{"name": "add"}]}) == [{"type": "function", "function": {"name": "add"}}]
    assert formats.tools({"input": {"messages": [USER], "tools": [CALL]}, "preferred_output": [ANSWER]}) == [CALL]


def test_other_fields_stay_for_the_template() -> None:
    chat = formats.chat({"messages": [USER | {"name": "Ada", "id": 7}, ANSWER | {"mood": "calm"}]}, ["id"])
    assert chat == [USER | {"name": "Ada"}, ANSWER | {"mood": "calm"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": USER["content"], "completion": ANSWER["content"]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "completion": ANSWER["content"]},
        {"messages": [USER, ANSWER]},
        {"question": USER["content"], "answer": ANSWER["content"]},
        {"instruction": USER["content"], "output": ANSWER["content"]},
    ],
)
@pytest.mark.parametrize("label", [True, 1, "true", "True", "1"])
def test_the_same_answer_with_a_label(row: dict[str, Any], label: Any) -> None:
    assert formats.unpaired_preference(row | {"label": label}) == ([USER], [ANSWER], True)
    assert formats.unpaired_preference(row | {"label": False}) == ([USER], [ANSWER], False)


def test_a_system_prompt_of_the_row_comes_before_a_labelled_answer() -> None:
    row = {"prompt": "One?", "completion": "1.", "system": "Be brief.", "label": "0"}
    prompt, _, desirable = formats.unpaired_preference(row)
    assert [turn["role"] for turn in prompt] == ["system", "user"] and not desirable


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "a", "completion": "b"}, r"it has no label; a row of .* \(true for a good answer, false for a bad"),
        ({"prompt": "a", "completion": "b", "Label": True}, "write 'Label' as label"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "set data.kind to preference"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "its label is 'good'; give true for a good answer"),
        ({"prompt": "a", "completion": "b", "label": 2}, "its label is 2; give true"),
        ({"prompt": "a", "completion": "b", "label": 0.5}, "its label is 0.5; give true"),
        ({"prompt": "a", "label": True}, "it has no completion"),
        (
            {"prompt": "a", "completion": [USER, ANSWER], "label": True},
            "begins with a turn of the role user, not assistant",
        ),
        ({"messages": [USER], "label": True}, "its last turn is not the assistant's"),
    ],
)
def test_an_answer_with_a_label_that_cannot_be_used(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(FaultyRow, match=fault):
        formats.unpaired_preference(row)


@pytest.mark.parametrize(
    ("row", "scheme"),
    [
        ({"tokens": ["Ada", "wrote"], "tags": ["B-PER", "O"]}, "bio"),
        ({"tokens": '["Ada", "wrote"]', "tags": '["B-PER", "O"]'}, "bio"),
        ({"tokens": ["Ada", "wrote"], "tags": ["B-PER", "O"]}, "plain"),
    ],
)
def test_tagged_words(row: dict[str, Any], scheme: str) -> None:
    assert formats.tagged(row, scheme) == (["Ada", "wrote"], ["B-PER", "O"])


def test_plain_tags_may_be_numbers() -> None:
    assert formats.tagged({"tokens": ["a", "b"], "tags": [0, 7]}, "plain") == (["a", "b"], ["0", "7"])


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"tokens": ["a"]}, "it has no tags; a row of data.kind token_classification has tokens and tags"),
        ({"Tokens": ["a"], "tags": ["O"]}, "it has no tokens.*write 'Tokens' as tokens"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens and 1 tags; give one tag for each token"),
        ({"tokens": [], "tags": []}, "its tokens are empty"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "its token 2 is empty or white space"),
        ({"tokens": ["a"], "tags": ["B PER"]}, "its tag 1 is 'B PER'; a tag is a word without spaces"),
        ({"tokens": ["a"], "tags": ["NOUN"]}, "its tag 1 is 'NOUN', not O, B-TYPE or I-TYPE.*data.tag_scheme: plain"),
        ({"tokens": ["a"], "tags": ["I-"]}, "its tag 1 is 'I-', not O"),
        ({"tokens": ["a"], "tags": [3]}, "its tag 1 is '3', not O"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "its tokens are no JSON list"),
        ({"tokens": [None], "tags": ["O"]}, r"its tokens are \[None\]; give a list of texts"),
    ],
)
def test_tagged_words_that_cannot_be_used(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(FaultyRow, match=fault):
        formats.tagged(row)


def test_tagged_words_are_no_chat() -> None:
    with pytest.raises(FaultyRow, match=r"it has tokens and tags; set data\.kind to token_classification"):
        formats.chat({"tokens": ["a"], "tags": ["O"]})


@pytest.mark.parametrize(("value", "margin"), [(0, 0.0), (1.5, 1.5), ("2", 2.0)])
def test_a_margin_is_a_number_of_at_least_zero(value: Any, margin: float) -> None:
    assert formats.margin({"by": value}, "by") == margin


@pytest.mark.parametrize("value", [-1, True, "much", float("nan"), float("inf"), [1]])
def test_a_wrong_margin_is_told_what_fits(value: Any) -> None:
    with pytest.raises(FaultyRow, match="give a number of at least 0: by how much chosen is better"):
        formats.margin({"by": value}, "by")


def test_a_missing_margin_names_the_columns() -> None:
    with pytest.raises(
        FaultyRow, match=r"it has no by \(data.margin_column\); its columns are By, x; write 'By' as by"
    ):
        formats.margin({"By": 1, "x": 2}, "by")


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "positive": "p", "negatives": ["n", "m"]},
        {"query": "q", "positive": "p", "negatives": '["n", "m"]', "anchor": None},
        {"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m"},
        {"anchor": "q", "positive": "p", "negative": "n", "negatives": ["m"]},
    ],
)
def test_queries_with_passages(row: dict[str, Any]) -> None:
    query, positive, negatives = formats.retrieval(row)
    assert (query, positive, set(negatives)) == ("q", "p", {"n", "m"})


@pytest.mark.parametrize("absent", [None, ""])
def test_a_query_needs_no_negatives(absent: str | None) -> None:
    row = {"query": "q", "positive": "p", "negatives": absent, "negative_1": "n", "negative_2": absent}
    assert formats.retrieval(row) == ("q", "p", ("n",))


@pytest.mark.parametrize("absent", [None, ""])
def test_a_chat_needs_no_tools(absent: str | None) -> None:
    assert formats.tools({"tools": absent, "functions": absent}) is None


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"positive": "p"}, r"no query; a row of data.kind retrieval has query \(or anchor\), positive"),
        ({"query": "q", "Positive": "p"}, "no positive; .*write 'Positive' as positive"),
        ({"query": " ", "positive": "p"}, "its query is no text|its query is empty"),
        ({"query": "q", "anchor": "r", "positive": "p"}, "its query and anchor differ"),
        ({"query": "q", "positive": "p", "negatives": "n"}, r"its negatives are no list of texts"),
        ({"query": "q", "positive": "p", "negatives": ["n", 3]}, r"its negatives\[1\] is no text"),
        ({"query": "q", "positive": "p", "negatives": ["p"]}, "its positive is one of its negatives"),
    ],
)
def test_a_query_that_cannot_be_used(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(FaultyRow, match=fault):
        formats.retrieval(row)
