"""What one server consists of, put together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftcore.composition import Composition
from peftcore.errors import CheckpointError
from peftcore.routing import AdapterStore
from peftcore.serving.catalog import Catalog
from peftcore.serving.engine import Engine
from peftcore.serving.errors import BadRequestError, ContextLengthError
from peftcore.serving.forward import RoutedForward
from peftcore.serving.generation import Event, Generation
from peftcore.serving.guard import checked_keys
from peftcore.serving.limits import Limits
from peftcore.serving.metrics import Metrics
from peftcore.serving.protocol import GenerationRequest
from peftcore.serving.sampling import Sampling


@dataclass(frozen=True)
class Service:
    """One base model, its tokenizer, its adapters and the engine that runs them."""

    engine: Engine
    catalog: Catalog
    tokenizer: Any
    limits: Limits
    metrics: Metrics
    context: int
    """Tokens that the model reads at most, its own answer included."""
    ends: frozenset[int]
    """Tokens that end an answer."""
    keys: tuple[str, ...] = ()
    warnings: Mapping[str, str] = field(default_factory=dict)
    """{source: what is wrong there now}, such as a new version that could not be loaded; the server goes on."""

    def generation(self, given: GenerationRequest, prompt: Sequence[int], sink: Callable[[Event], None]) -> Generation:
        """A request whose prompt has been read as tokens, submitted. Raises ServingError."""
        sampling = Sampling(
            self._tokens_for(given, len(prompt)),
            1.0 if given.temperature is None else given.temperature,
            1.0 if given.top_p is None else given.top_p,
            given.seed,
            given.stops,
        )
        made = Generation(given.model, prompt, sampling, self.tokenizer, self.ends, sink)
        self.engine.submit(made)
        return made

    def _tokens_for(self, given: GenerationRequest, prompt: int) -> int:
        """How many tokens the answer may have. Raises BadRequestError."""
        wanted, most = given.wanted_tokens, self.limits.max_tokens
        if not prompt:
            raise BadRequestError("the prompt is empty; give at least one token")
        if wanted is not None and wanted > most:
            raise BadRequestError(f"max_tokens: at most {most:,} on this server, got {wanted:,}", "max_tokens")
        if prompt + (wanted or 1) > self.context:
            raise ContextLengthError(
                f"the prompt has {prompt:,} tokens and the answer up to {wanted or 1:,}, and the model reads "
                f"{self.context:,} in all; shorten the one or the other"
            )
        return min(most, self.context - prompt) if wanted is None else wanted


def make_service(
    model: Any,
    tokenizer: Any,
    store: AdapterStore,
    name: str,
    compositions: Mapping[str, Composition] | None = None,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    warnings: Mapping[str, str] | None = None,
) -> Service:
    """A server of `model`, which is called `name`, with the adapters of `store` and compositions of them by name.

    keys: API keys, of which a client has to send one; none: anybody may ask. Raises ConfigError for a model or a
    composition that cannot be served, and for an empty key. warnings: {source: text}, read at each look; `/ready` and
    `/metrics` show them.
    """
    limits = limits or Limits()
    warnings = {} if warnings is None else warnings
    catalog, forward = Catalog(model, name, store, compositions), RoutedForward(model)
    metrics = Metrics(store, warnings)
    engine = Engine(forward, catalog, limits, metrics)
    config = model.config.get_text_config(decoder=True)
    made_for = getattr(config, "max_position_embeddings", None) or limits.max_context or 2048
    context = min(made_for, limits.max_context or made_for)
    ends = _ends(model, tokenizer)
    return Service(engine, catalog, tokenizer, limits, metrics, context, ends, checked_keys(keys), warnings)


def load_base(folder: Path, dtype: str = "auto") -> tuple[Any, Any]:
    """A base model's folder as (model, tokenizer). Raises CheckpointError if it holds none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no base model that can be served: {error}") from error
    placed: Any = model
    return placed.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """As `generate` has them, and the tokenizer's own."""
    given = model.generation_config.eos_token_id
    listed = given if isinstance(given, list) else [given]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)
