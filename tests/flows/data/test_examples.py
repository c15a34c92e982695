"""A chat of one question and its answer, and the system prompt that a chat of its own keeps."""

import pytest

from flows.data.examples import Labelled, Message, question_and_answer, with_system_prompt

CHAT: list[Message] = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1."}]
SYSTEM: Message = {"role": "system", "content": "Be brief."}


def test_a_question_and_its_answer_are_two_turns() -> None:
    assert question_and_answer("One?", "1.", None) == CHAT
    assert question_and_answer("One?", "1.", "Be brief.") == [SYSTEM, *CHAT]


def test_a_system_prompt_is_put_before_a_chat_that_has_none() -> None:
    chat = list(CHAT)
    assert with_system_prompt(chat, "Be brief.") == [SYSTEM, *CHAT]
    assert chat == CHAT, "the chat itself stays"


@pytest.mark.parametrize("prompt", ["Be verbose.", None])
def test_a_chat_keeps_its_own_system_prompt(prompt: str | None) -> None:
    assert with_system_prompt([SYSTEM, *CHAT], prompt) == [SYSTEM, *CHAT]


def test_an_empty_system_prompt_is_a_turn_and_none_is_not() -> None:
    """Templates render the two differently: some put their own default where there is no system turn."""
    assert with_system_prompt(CHAT, "")[0] == {"role": "system", "content": ""}
    assert with_system_prompt(CHAT, None) == CHAT


def test_an_example_weighs_one() -> None:
    assert Labelled("text", "label", group="g", slice="s", where="rows.jsonl:1").weight == 1.0
