"""`generate` of a model with adapters: a route for each prompt, and the masks of a static cache."""

import contextlib
import inspect
from collections.abc import Sequence
from functools import wraps
from typing import Any

from peftcore._util.fingerprint import unchanging_weights
from peftcore.composition.algebra import Spec
from peftcore.injection import forward_hooks
from peftcore.injection.adapter_set import adapter_set
from peftcore.prompts.learner import is_encoder_decoder

_TOKENS = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
"""Options of a `generation_config` without which an encoder-decoder model cannot begin a text, or never ends it."""


def generate_of(plain: Any) -> Any:
    """Return the class's own `generate` with the further argument `adapter_names`: one for all prompts, or one each."""

    @wraps(plain.generate)
    def generate(self: Any, *args: Any, adapter_names: Spec | Sequence[Spec] = None, **kwargs: Any) -> Any:
        route = contextlib.nullcontext() if adapter_names is None else self.route(adapter_names)
        with route, unchanging_weights(), forward_hooks.generation(self, kwargs, *args[:1]) as arguments:
            return plain.generate(self, *args, **_missing_tokens(self, arguments), **arguments)

    return generate


def _missing_tokens(model: Any, arguments: dict[str, Any]) -> dict[str, int]:
    """Return the token ids of an encoder-decoder model's configuration that its `generation_config` lacks.

    `Seq2SeqTrainer` sets the `generation_config` of its arguments on the model, often with a length alone. In HF PEFT
    it is set on the wrapper, so the base model still generates with its own token ids.
    """
    config = getattr(model, "config", None)
    if not is_encoder_decoder(model) or config is None:
        return {}
    sources = [arguments.get("generation_config"), getattr(model, "generation_config", None)]
    return {
        name: getattr(config, name)
        for name in _TOKENS
        if name not in arguments
        and getattr(config, name, None) is not None
        and all(getattr(source, name, None) is None for source in sources)
    }


def masks_of(plain: Any) -> Any:
    """Return a method that makes the masks of a static cache for `generate`; with a prompt, the forward makes them."""

    def create_masks_for_generate(self: Any, **kwargs: Any) -> Any:
        if adapter_set(self).prompts_in_effect():
            return kwargs["attention_mask"]
        from transformers import masking_utils

        own = inspect.getattr_static(plain, "create_masks_for_generate", None)  # a static method in some models
        create = masking_utils.create_masks_for_generate if own is None else own.__get__(self)
        return create(**kwargs)

    return create_masks_for_generate
