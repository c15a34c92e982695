"""The base's template and tokens: replaced, added, and compared with the fetched base before data are prepared."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from flows.data.chat import ChatTokenizer
from flows.data.vocabulary import add_special_tokens, chat_template, check_applied, set_chat_template
from flows.errors import BaseModelError, DataError
from flows.params import Data, load_params

TEMPLATE = "{% for m in messages %}{{ '<|turn|>' + m['content'] + '<|im_end|>' }}{% endfor %}"


def data(**values: Any) -> Data:
    return Data(source="rows.jsonl", **values)


def test_a_template_is_text_or_the_path_of_a_file(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    for value in (TEMPLATE, "chat.jinja", str(tmp_path / "chat.jinja")):
        assert chat_template(data(chat_template=value), tmp_path) == TEMPLATE
    before = tokenizer.chat_template
    set_chat_template(tokenizer, data(), tmp_path)
    assert tokenizer.chat_template == before
    set_chat_template(tokenizer, data(chat_template=TEMPLATE), tmp_path)
    assert tokenizer.chat_template == TEMPLATE
    with pytest.raises(DataError, match=r"data\.chat_template other\.jinja: .* cannot be read"):
        chat_template(data(chat_template="other.jinja"), tmp_path)


def test_an_added_token_starts_as_the_mean_of_the_others(tiny_base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_special_tokens(model, tokenizer, ["<|action|>", "<|im_end|>"])
    number = tokenizer.convert_tokens_to_ids("<|action|>")
    assert tokenizer("a<|action|>b", add_special_tokens=False)["input_ids"][1] == number == len(tokenizer) - 1
    for name, values in model.named_parameters():
        if values.shape == before[name].shape:
            assert torch.equal(values, before[name]), name
        else:
            torch.testing.assert_close(values[number], before[name].mean(0))
            assert torch.equal(values[:number], before[name])
    assert model.config.vocab_size == len(tokenizer)


def test_spare_rows_are_used_before_the_model_grows(tokenizer: PreTrainedTokenizerBase) -> None:
    size = len(tokenizer) + 8
    shape: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, num_key_value_heads=1, **shape))
    add_special_tokens(model, tokenizer, ["<|action|>"])
    assert model.config.vocab_size == size


def test_tokens_that_the_template_writes_are_special(tiny_base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    tokenizer.chat_template = TEMPLATE
    add_special_tokens(model, tokenizer, ["<|turn|>", "<|action|>"])
    ids = tokenizer("<|turn|>a<|action|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<|action|>"


def test_a_gguf_file_cannot_grow(tiny_base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with pytest.raises(BaseModelError, match=r"<\|action\|> cannot be added to a GGUF file"):
        add_special_tokens(model, tokenizer, ["<|action|>"], packed=True)
    add_special_tokens(model, tokenizer, ["<|im_end|>"], packed=True)


def test_a_base_that_was_fetched_before_a_change_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    check_applied(tokenizer, data(), tmp_path)
    with pytest.raises(DataError, match=r"data\.chat_template has changed .*peftcore stage fetch"):
        check_applied(tokenizer, data(chat_template=TEMPLATE), tmp_path)
    with pytest.raises(DataError, match=r"lacks <\|action\|>; run"):
        check_applied(tokenizer, data(special_tokens=["<|action|>"]), tmp_path)


def test_the_template_of_the_documentation_shows_reasoning(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "data.md").read_text()
    text = next(text for text in re.findall(r"```yaml\n(.+?)```", page, re.DOTALL) if "chat_template" in text)
    (tmp_path / "params.yaml").write_text(text)
    documented = load_params(tmp_path / "params.yaml").data
    set_chat_template(tokenizer, documented, tmp_path)
    chat = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "Twice 2."},
    ]
    tokens = ChatTokenizer(tokenizer).tokenize(chat)
    assert tokens.prompt == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert tokens.completion == "<think>Twice 2.</think>4"
    check_applied(tokenizer, documented, tmp_path)
