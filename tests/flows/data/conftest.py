"""Chat templates as they are found: each on the tiny tokenizer, with the special tokens that it writes."""

from collections.abc import Callable

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

LLAMA3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
WITHOUT_THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ 'tools: ' + tools | tojson + '\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if m.tool_calls %}{{ '<tool_call>' + m.tool_calls[0]['function'] | tojson }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m.thinking is defined %}{{ '<think>' + m.thinking + '</think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAST_REASONING = REASONING.replace("m.thinking is defined", "loop.last and m.thinking is defined")
_SPECIAL = {LLAMA3: ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], MISTRAL: ["[INST]", "[/INST]", "</s>"]}


@pytest.fixture
def templated(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], PreTrainedTokenizerBase]:
    """`templated(LLAMA3)`: the tokenizer with that template."""

    def make(template: str) -> PreTrainedTokenizerBase:
        tokens = [AddedToken(token, special=True) for token in _SPECIAL.get(template, [])]
        tokenizer.add_tokens(tokens, special_tokens=True)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def templates() -> dict[str, str]:
    """Their texts by name."""
    return {"llama3": LLAMA3, "mistral": MISTRAL, "without_thoughts": WITHOUT_THOUGHTS, "tools": TOOLS} | {
        "reasoning": REASONING,
        "last_reasoning": LAST_REASONING,
    }
