"""`peftcore serve`: one base with many adapters, behind OpenAI's HTTP interface."""

import contextlib
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.base.calibrated import calibrated_identity
from flows.errors import RegistryError
from flows.registry.project_registry import registry_of
from flows.runtime.temporary import temporary_folder
from flows.serving.adapters_folder import check_folder, register_adapters
from flows.serving.champion_watcher import ChampionWatcher, fetch_tags
from flows.serving.options import KEYS, ServeOptions, parse_compositions
from flows.serving.redaction import read_redaction
from flows.serving.served_base import ServedBase, load_evaluated_base, load_given_base
from peftcore.errors import ConfigError

if TYPE_CHECKING:
    from peftcore.composition import Composition
    from peftcore.routing import AdapterStore

logger = logging.getLogger(__name__)


def serve(options: ServeOptions) -> None:
    """Serve until SIGTERM or Ctrl-C; see `peftcore.serving`.

    With `options.project` the base is loaded as in the champion's evaluation: the same files, dequantised from the
    same storage. The server then computes what the gate has evaluated.

    Raises:
        PeftError, PipelineError: The base, an adapter or an option cannot be served.
    """
    from peftcore.routing import AdapterStore
    from peftcore.serving import Recorder, check_servable, checked_keys, in_own_thread, make_service
    from peftcore.serving import serve as run

    if options.adapter_dtype not in ("auto", "float32"):
        raise ConfigError(f"--adapter-dtype {options.adapter_dtype!r} is unknown; give auto or float32")
    compositions = parse_compositions(options.mixtures)
    keys = checked_keys([*options.keys, *(os.environ[KEYS].split(",") if KEYS in os.environ else ())])
    template = None if options.chat_template is None else _chat_template(options.chat_template)
    redaction = None if options.redact is None else read_redaction(options.redact)
    if options.adapters is not None:
        check_folder(options.adapters)  # before the base, whose loading takes minutes
    model, tokenizer, base = in_own_thread(_load_base, options).result()
    tokenizer.chat_template = template or tokenizer.chat_template
    has_float32_adapters = options.adapter_dtype == "float32"
    store = AdapterStore(model, options.max_loaded, autocast_adapter_dtype=has_float32_adapters)
    served_name = options.name or options.base.resolve().name
    with temporary_folder("peftcore-serve-") as folder:
        if options.adapters is not None:
            calibrated = calibrated_identity(options.base) if base is None else base.calibrated
            register_adapters(store, options.adapters, calibrated)
        watcher = None
        if options.project is not None and base is not None:
            paths, params = options.project
            name = params.project.name
            _check_is_free(name, [served_name, *compositions, *store.names()])
            check = partial(check_servable, model, name)
            watcher = ChampionWatcher(
                paths, name, params.gate.stage, store, base, folder, options.seconds, check, options.git_remote
            )
            in_own_thread(watcher.check).result()
        _check_adapters_exist(compositions, store)
        warnings: dict[str, str] = {} if watcher is None else watcher.warnings
        recorder = None
        if options.record is not None:
            recorder = Recorder(options.record, options.record_bytes, redaction, warnings)
        with contextlib.nullcontext() if recorder is None else contextlib.closing(recorder):
            service = make_service(
                model,
                tokenizer,
                store,
                served_name,
                compositions,
                options.limits,
                keys,
                warnings,
                options.load_from,
                options.tool_call_parser,
                recorder=recorder,
            )
            with contextlib.nullcontext() if watcher is None else watcher.running():
                run(service, options.host, options.port, options.metrics_port)


def _chat_template(path: Path) -> str:
    """Return the chat template of a file. Raise ConfigError if the file holds none."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        template = path.read_text(encoding="utf-8")
        _compile_jinja_template(template)
    except (OSError, UnicodeDecodeError, TemplateSyntaxError) as error:
        raise ConfigError(f"--chat-template {path}: {error}; give a file with a Jinja chat template") from error
    if not template.strip():
        raise ConfigError(f"--chat-template {path}: the file is empty; give a file with a Jinja chat template")
    return template


def _load_base(options: ServeOptions) -> tuple[Any, Any, ServedBase | None]:
    """Load the base of a server.

    Returns:
        The model, its tokenizer, and the base's identity; the identity is None without a project to follow.

    Raises:
        ConfigError: The options exclude each other.
        BaseModelError: The champion was evaluated on another base.
    """
    if options.project is None:
        return *load_given_base(options.base, options.dtype), None
    paths, params = options.project
    if options.dtype != "auto":
        raise ConfigError(
            f"--dtype {options.dtype}: with --watch, the base's dtype is that of the champion's evaluation; leave it "
            "out"
        )
    registry = registry_of(params, paths.root)
    if options.git_remote is not None:
        try:
            fetch_tags(registry, options.git_remote)
        except RegistryError as error:  # the watcher's first check repeats the warning in /ready
            logger.warning("%s", error)
    return load_evaluated_base(options.base, paths, registry, params)


def _check_is_free(project: str, names: Sequence[str]) -> None:
    """Raise ConfigError if another model has the project's name, under which the promoted version is served."""
    if project in names:
        raise ConfigError(
            f"--watch serves the promoted version as {project!r}, and another model has this name; rename the adapter "
            "or the composition, or give the base another name with --name"
        )


def _check_adapters_exist(compositions: "dict[str, Composition]", store: "AdapterStore") -> None:
    for name, composition in compositions.items():
        if unknown := sorted(set(composition.names()) - set(store.names())):
            known = ", ".join(store.names()[:8]) or "none"
            raise ConfigError(f"--composition {name}: no adapter {unknown[0]!r}; there is: {known}")
