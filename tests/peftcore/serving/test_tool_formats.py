"""The form of tool calls follows from the chat template."""

from typing import Any

import pytest
from tool_template import TOOL_TEMPLATE

from peftcore.errors import ConfigError
from peftcore.serving.errors import BadRequestError
from peftcore.serving.tool_formats import HERMES, LLAMA3, MISTRAL, format_of_name, format_of_template

LLAMA_TEMPLATE = """{% if tools %}Environment: ipython
Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.{% endif %}"""
MISTRAL_TEMPLATE = "{% if tools %}[AVAILABLE_TOOLS]{% endif %}{% if m.tool_calls %}[TOOL_CALLS] [{% endif %}"


def test_the_form_of_a_template() -> None:
    assert format_of_template(TOOL_TEMPLATE) is HERMES
    assert format_of_template(LLAMA_TEMPLATE) is LLAMA3
    assert format_of_template(MISTRAL_TEMPLATE) is MISTRAL


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages }}", "the chat template of this model has no notion of tools"),
        ("{% if tools %}<tools>{% endif %}", "not known; start the server with --tool-call-parser"),
        ("{% if tools %}<tool_call>\n<function=f>{% endif %}", "not known"),  # Qwen3-Coder's XML
        ("{% if tools %}[TOOL_CALLS]f[ARGS]{% endif %}", "not known"),  # newer models of Mistral
    ],
)
def test_a_template_without_a_known_form_is_refused(template: str, said: str) -> None:
    with pytest.raises(BadRequestError, match=said):
        format_of_template(template)


def test_a_parser_by_name() -> None:
    assert format_of_name("mistral") is MISTRAL
    with pytest.raises(ConfigError, match="no parser of tool calls 'hermies'; did you mean 'hermes'"):
        format_of_name("hermies")


def test_ids_are_what_the_templates_take() -> None:
    assert len(MISTRAL.call_id()) == 9 and MISTRAL.call_id().isalnum()
    assert HERMES.call_id().startswith("call_") and HERMES.call_id() != HERMES.call_id()


def test_only_a_marker_that_is_a_special_token_is_shown_by_its_id(tokenizer: Any) -> None:
    assert MISTRAL.markers(tokenizer) == {}
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    assert list(MISTRAL.markers(tokenizer).values()) == ["[TOOL_CALLS]"]
    assert HERMES.markers(tokenizer) == {}
