"""fetch: the base model, converted once to a bfloat16 transformers folder whose generation ends turns.

A base is a causal language model, an encoder such as BERT, or a sequence classifier.

With `quantization.storage: gguf` the folder holds the base's GGUF file in place of bfloat16 weights.
"""

import logging
import tempfile
import time
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flows.base.gguf import save_packed
from flows.base.heads import is_encoder, is_encoder_decoder
from flows.base.source import load, load_packed, obtain
from flows.data.chat import end_token, render
from flows.data.vocabulary import add_special_tokens, set_chat_template
from flows.params import Params
from flows.paths import Paths
from flows.runtime.stage import start
from peftcore.files import directory_written_atomically, write_manifest

logger = logging.getLogger("flows.fetch")


def run(params: Params, paths: Paths) -> None:
    """Write `paths.base`. If the base or the parameters cannot be used, the folder of an earlier run stays."""
    source, begin = params.base.source, time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, packed = obtain(source, paths.root, Path(scratch)), params.quantization.storage == "gguf"
        model, tokenizer = load_packed(source, checkpoint) if packed else load(source, checkpoint)
        set_chat_template(tokenizer, params.data, paths.root)
        generates_turns = not (is_encoder(model.config) or is_encoder_decoder(model.config))
        if not tokenizer.chat_template and generates_turns:
            logger.warning("%s has no chat template; chats need data.chat_template", source)
        add_special_tokens(model, tokenizer, params.data.special_tokens, packed)
        settle_special_tokens(model, tokenizer)
        with directory_written_atomically(paths.base) as folder:
            if packed:
                save_packed(model, checkpoint.folder / str(checkpoint.gguf), folder)
            else:
                model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            for file in folder.iterdir():
                file.chmod(0o644)  # safetensors makes files that only their owner can read
            write_manifest(folder)
    count = model.num_parameters()
    logger.info("%s: %.1f M parameters in %.0f s", source, count / 1e6, time.monotonic() - begin)


def settle_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make generation stop at the chat template's end of turn (or end of a text), and pad with another token.

    If padding were the end of turn, masking padding would also hide the ends of turns. An encoder generates nothing, so
    it gets its padding alone.
    """
    if is_encoder(model.config):
        if tokenizer.pad_token_id is None:
            _choose_padding(tokenizer, [])
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        _settle_ends(model, tokenizer)
    context = getattr(model.config, "max_position_embeddings", None)
    if context and context < tokenizer.model_max_length:
        tokenizer.model_max_length = context


def _settle_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the tokens that end a generation, and the padding, of a model that generates."""
    end = end_token(tokenizer)
    assert model.generation_config is not None
    configured = model.generation_config.eos_token_id
    others = configured if isinstance(configured, list) else [] if configured is None else [configured]
    ends = [end, *(token for token in others if token != end)]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        _choose_padding(tokenizer, ends)
    for config in (model.config, model.generation_config):
        config.eos_token_id = ends if len(ends) > 1 else end
        config.pad_token_id = tokenizer.pad_token_id
    model.generation_config._from_model_config = False  # otherwise generate() rebuilds it without the list of ends


def _choose_padding(tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> None:
    """Set a special token that no chat contains as padding; the vocabulary does not grow."""
    chat = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    text = render(tokenizer, chat) if tokenizer.chat_template else ""
    used = {*ends, *tokenizer(text, add_special_tokens=False)["input_ids"]}
    preferred = [tokenizer.unk_token_id, *tokenizer.all_special_ids, *sorted(tokenizer.added_tokens_decoder)]
    free = [token for token in preferred if token is not None and token not in used]
    if not free:
        logger.warning("the tokenizer has no unused special token for padding; the end of turn is used")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(free[0] if free else (*ends, 0)[0])


if __name__ == "__main__":
    start(run)
