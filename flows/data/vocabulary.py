"""The base's chat template and tokens, with those that the parameters replace or add.

The fetch stage applies both to the base, so that every later stage, and serving, read one tokenizer. An added token's
embedding starts as the mean of the base's embeddings, which makes its probability an average one. Training then trains
its row (`trainable_token_indices`), which is saved with the adapter.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedTokenizerBase

from flows.data.chat import render
from flows.errors import BaseModelError, DataError
from flows.params import Data

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # its module takes seconds to import, and prepare needs no model


def chat_template(data: Data, root: Path) -> str | None:
    """Return the text of `data.chat_template`; None if the base's template is used.

    Args:
        data: The section of params.yaml.
        root: Folder that a relative path starts from.

    Raises:
        DataError: The file does not exist, or the text is no template.
    """
    value = data.chat_template
    if value is None or not _is_path(value):
        return value
    path = root / Path(value).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.chat_template {value}: {path} cannot be read ({error}); give the path of a Jinja file, or the "
            "template's text"
        ) from error


def _is_path(value: str) -> bool:
    return "\n" not in value and "{" not in value


def set_chat_template(tokenizer: PreTrainedTokenizerBase, data: Data, root: Path) -> None:
    """Replace the tokenizer's chat template by that of the parameters, if they have one."""
    template = chat_template(data, root)
    if template is not None:
        tokenizer.chat_template = template


def add_special_tokens(
    model: "PreTrainedModel", tokenizer: PreTrainedTokenizerBase, tokens: list[str], packed: bool = False
) -> None:
    """Add tokens to the tokenizer, and rows with the mean embedding to the model, in place.

    A token that the chat template writes becomes a special token: no text of a chat may hold it, and answers are shown
    without it. Any other may stand in texts. A token that the tokenizer has already stays as it is.

    Args:
        model: The base.
        tokenizer: Its tokenizer, with the chat template that is used.
        tokens: The tokens.
        packed: True if the embeddings are those of a GGUF file, which cannot grow.

    Raises:
        BaseModelError: `packed`, and a token is new.
    """
    new = [token for token in tokens if token not in tokenizer.get_vocab()]
    if not new:
        return
    if packed:
        raise BaseModelError(
            f"data.special_tokens: {', '.join(new)} cannot be added to a GGUF file (quantization.storage gguf); give "
            "tokens that it has, or another storage"
        )
    known, markers = len(tokenizer), _written_by_template(tokenizer)
    for token in new:
        special = token in markers
        tokenizer.add_tokens(AddedToken(token, special=special, normalized=False), special_tokens=special)  # pyright: ignore[reportArgumentType]
    _grow(model, known, len(tokenizer))


def check_applied(tokenizer: PreTrainedTokenizerBase, data: Data, root: Path) -> None:
    """Raise DataError if the fetched base has another template, or lacks a token, of the parameters."""
    template = chat_template(data, root)
    fetch = "run `dvc repro --force --single-item fetch`, or `peftcore stage fetch --force`"
    if template is not None and tokenizer.chat_template != template:
        raise DataError(f"data.chat_template has changed since the base was fetched; {fetch}")
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in data.special_tokens if token not in vocabulary]:
        raise DataError(f"data.special_tokens: the fetched base lacks {', '.join(missing)}; {fetch}")


def _written_by_template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        return ""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return render(tokenizer, turns) + render(tokenizer, turns[:1], generate=True)


@torch.no_grad()
def _grow(model: "PreTrainedModel", known: int, size: int) -> None:
    """Give the rows from `known` to `size` the mean of those before, in both embeddings."""
    inputs = model.get_input_embeddings()
    assert isinstance(inputs, nn.Embedding)
    if size > inputs.num_embeddings:
        model.resize_token_embeddings(size, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for values in [] if layer is None else [layer.weight, getattr(layer, "bias", None)]:
            if isinstance(values, Tensor):
                values[known:size] = values[:known].float().mean(0).to(values.dtype)
