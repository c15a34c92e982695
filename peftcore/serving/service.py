"""Assembly of a server from model, adapters, engine and limits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftcore.bases import add_packed_copies, fast_dtype
from peftcore.composition import Composition
from peftcore.errors import CheckpointError
from peftcore.routing import AdapterStore
from peftcore.serving.catalog import Catalog
from peftcore.serving.engine import Engine
from peftcore.serving.errors import BadRequestError, ContextLengthError, NotAllowedError
from peftcore.serving.forward import RoutedForward
from peftcore.serving.generation import Event, Generation
from peftcore.serving.grammar import Compile, Grammar, GrammarCache
from peftcore.serving.limits import Limits
from peftcore.serving.metrics import Metrics
from peftcore.serving.middleware import checked_keys
from peftcore.serving.protocol import GenerationRequest, LoadRequest, UnloadRequest
from peftcore.serving.recording import Recorder
from peftcore.serving.sampling import Sampling
from peftcore.serving.tool_calling import ToolCalling
from peftcore.serving.tool_formats import ToolFormat, format_of_name


@dataclass(frozen=True)
class Service:
    """A base model with its tokenizer, its adapters and the engine that runs them."""

    engine: Engine
    catalog: Catalog
    tokenizer: Any
    limits: Limits
    metrics: Metrics
    context: int
    """Context length: most tokens of prompt and completion together (count)."""
    vocabulary: int
    """Tokens of the model (count)."""
    eos_tokens: frozenset[int]
    """Token ids that end a completion."""
    grammars: GrammarCache
    """Compiles grammars of answers."""
    keys: tuple[str, ...] = ()
    warnings: Mapping[str, str] = field(default_factory=dict)
    """{source: text} of present problems, such as a new version that could not be loaded."""
    loadable: Path | None = None
    """Folder below which clients may load adapters; None: they may not."""
    recorder: Recorder | None = None
    """Records answers and ratings; None: nothing is recorded."""
    tool_format: ToolFormat | None = None
    """Form of tool calls; None: that of the chat template."""

    async def grammar(self, body: GenerationRequest, calling: ToolCalling | None) -> Grammar | None:
        """Return the compiled grammar of a request's answers, or None if any text may be the answer.

        Args:
            body: The request.
            calling: How the answer may call tools.

        Raises:
            ServingError: The grammar is invalid, or this server cannot enforce one.
        """
        spec = body.grammar(calling, self.tokenizer)
        return None if spec is None else await self.grammars.compile(spec)

    def generation(
        self,
        body: GenerationRequest,
        prompt: Sequence[int],
        index: int,
        sink: Callable[[Event], None],
        grammar: Grammar | None = None,
        calling: ToolCalling | None = None,
    ) -> Generation:
        """Submit one completion of a request to the engine, and return its generation.

        Args:
            body: The request.
            prompt: Its prompt as token ids.
            index: Number of the completion, from 0; each samples by a seed of its own, the request's seed plus index.
            sink: Receives the events, in the engine's thread.
            grammar: Constrains the completion.
            calling: How the completion may call tools.

        Raises:
            ServingError: The request cannot be answered.
        """
        sampling = Sampling(
            self._completion_tokens(body, prompt),
            1.0 if body.temperature is None else body.temperature,
            1.0 if body.top_p is None else body.top_p,
            None if body.seed is None else body.seed + index,
            body.stops,
            body.presence_penalty or 0.0,
            body.frequency_penalty or 0.0,
            body.biases(self.vocabulary),
            body.wanted_logprobs,
        )
        matcher = None if grammar is None else grammar.matcher()
        markers = None if calling is None else calling.form.markers(self.tokenizer)
        generation = Generation(
            body.model,
            prompt,
            sampling,
            self.tokenizer,
            self.eos_tokens,
            sink,
            matcher,
            markers,
            continues=body.continues_prompt,
        )
        self.engine.submit(generation)
        return generation

    def load_adapter(self, body: LoadRequest) -> None:
        """Load an adapter from below the folder `loadable`.

        Raises:
            NotAllowedError: Clients may not load adapters, or not from this path.
            ServingError: The adapter cannot be loaded; see `Catalog.add`.
        """
        folder = self._loadable()
        try:
            path = (folder / body.lora_path).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise NotAllowedError("lora_path must be a path in the folder that the server allows", "lora_path")
            if not path.is_dir():
                raise BadRequestError(f"there is no directory {body.lora_path!r:.200}", "lora_path")
        except (OSError, ValueError) as error:  # a name is too long, or contains a null character
            raise BadRequestError(f"lora_path cannot be a path: {body.lora_path!r:.200}", "lora_path") from error
        self.catalog.add(body.lora_name, path, bool(body.load_inplace))

    def unload_adapter(self, body: UnloadRequest) -> None:
        """Stop serving an adapter.

        Raises:
            NotAllowedError: Clients may not change which adapters are served.
            UnknownModelError: There is no such adapter.
        """
        self._loadable()
        self.catalog.remove(body.lora_name)

    def _loadable(self) -> Path:
        if self.loadable is None:
            raise NotAllowedError("this server loads no adapters at run time; start it with --load-from FOLDER")
        return self.loadable

    def _completion_tokens(self, body: GenerationRequest, prompt: Sequence[int]) -> int:
        """Return the most tokens of the completion. Raise BadRequestError if the request exceeds a limit."""
        requested, most = body.requested_tokens, self.limits.max_tokens
        if not prompt:
            raise BadRequestError("the prompt is empty; send at least one token")
        if (largest := max(prompt)) >= self.vocabulary:
            raise BadRequestError(
                f"the prompt has the token {largest} of the tokenizer, and the model has {self.vocabulary} tokens; "
                "remove that token from the prompt"
            )
        length = len(prompt)
        if requested is not None and requested > most:
            raise BadRequestError(
                f"max_tokens must be at most {most:,} on this server; got {requested:,}", "max_tokens"
            )
        if length + (requested or 1) > self.context:
            raise ContextLengthError(
                f"the context length is {self.context:,} tokens, but the prompt has {length:,} tokens and the "
                f"completion up to {requested or 1:,}; shorten the prompt or lower max_tokens"
            )
        return min(most, self.context - length) if requested is None else requested


def make_service(
    model: Any,
    tokenizer: Any,
    store: AdapterStore,
    name: str,
    compositions: Mapping[str, Composition] | None = None,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    warnings: Mapping[str, str] | None = None,
    loadable: Path | None = None,
    tool_call_parser: str | None = None,
    compile_grammar: Compile | None = None,
    recorder: Recorder | None = None,
) -> Service:
    """Assemble a server.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        store: The adapters by name.
        name: Name of the base model for clients.
        compositions: {name: composition of adapters}.
        limits: Resource limits. None: the defaults.
        keys: Accepted API keys. Empty: no key is needed.
        warnings: {source: text} that `/ready` and `/metrics` show; may change while the server runs.
        loadable: Folder below which clients may load adapters by `/v1/load_lora_adapter`; None: they may not.
        tool_call_parser: Form of the model's tool calls, a name of `tool_formats`; None: that of the chat template.
        compile_grammar: Compiles grammars of answers; None: llguidance does (extra `structured`).
        recorder: Records answers and ratings; None: nothing is recorded. The caller closes it.

    Raises:
        ConfigError: The model or a composition cannot be served, a key is empty, or there is no such parser.
    """
    limits = limits or Limits()
    warnings = {} if warnings is None else warnings
    catalog, forward = Catalog(model, name, store, compositions), RoutedForward(model)
    metrics = Metrics(store, warnings, recorder)
    engine = Engine(forward, catalog, limits, metrics)
    config = model.config.get_text_config(decoder=True)
    made_for = getattr(config, "max_position_embeddings", None) or limits.max_context or 2048
    context = min(made_for, limits.max_context or made_for)
    eos_tokens = _eos_tokens(model, tokenizer)

    def load_compiler() -> Compile:
        if compile_grammar is not None:
            return compile_grammar
        from peftcore.serving.llguidance_grammars import load

        return load(tokenizer, config.vocab_size, eos_tokens)

    return Service(
        engine,
        catalog,
        tokenizer,
        limits,
        metrics,
        context,
        config.vocab_size,
        eos_tokens,
        GrammarCache(load_compiler, limits, metrics),
        checked_keys(keys),
        warnings,
        loadable,
        recorder,
        None if tool_call_parser is None else format_of_name(tool_call_parser),
    )


def load_base(folder: Path, dtype: str = "auto") -> tuple[Any, Any]:
    """Load a base model and its tokenizer from a folder. Raise CheckpointError if that fails.

    With `dtype="auto"` the type is the checkpoint's, or float32 on a CPU without fast 16-bit products. On a CPU, the
    linear layers of a 16-bit checkpoint then also have a packed copy of their weight, which decodes faster
    (`add_packed_copies`).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} contains no base model that can be served: {error}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stored: torch.dtype = model.dtype
    computed = fast_dtype(stored, device) if dtype == "auto" else stored
    placed: Any = model
    placed.to(device, computed)
    if dtype == "auto" and stored.itemsize == 2:  # a float16 copy of float32 values would round them
        add_packed_copies(placed)
    return placed, tokenizer


def _eos_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the EOS tokens of the generation config and of the tokenizer."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)
