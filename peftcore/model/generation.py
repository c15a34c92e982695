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


def generate_of(plain: Any) -> Any:
    """Return the class's own `generate` with the further argument `adapter_names`: one for all prompts, or one each."""

    @wraps(plain.generate)
    def generate(self: Any, *args: Any, adapter_names: Spec | Sequence[Spec] = None, **kwargs: Any) -> Any:
        route = contextlib.nullcontext() if adapter_names is None else self.route(adapter_names)
        with route, unchanging_weights(), forward_hooks.generation(self, kwargs, *args[:1]) as arguments:
            return plain.generate(self, *args, **arguments)

    return generate


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
