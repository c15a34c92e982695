"""The command `peftcore serve`: a base, a folder of adapters, compositions, and the promoted version.

The next promoted version replaces that one while requests run.
"""

import contextlib
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from flows.base.identity import base_identity, have_same_base
from flows.errors import BaseModelError, PipelineError, RegistryError, RepositoryError
from flows.params import Params, Quantization, load_params
from flows.paths import Paths
from flows.registry.project_registry import deciding_tags, registry_of
from flows.registry.registry import Registry, Version
from flows.registry.synchronise import synchronise
from flows.runtime.git import Git, GitError
from flows.runtime.project import dvc, files_at
from peftcore.errors import CheckpointError, ConfigError, PeftError
from peftcore.files import CONFIG_NAME, sha256

if TYPE_CHECKING:
    from peftcore.composition import Composition
    from peftcore.routing import AdapterStore
    from peftcore.serving import Limits

KEYS = "PEFTCORE_API_KEYS"
"""Environment variable with API keys, separated by commas; a command line can be read by everybody on the machine."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedBase:
    """A base model as it stands in memory: its files' digest, and how they are stored there."""

    digest: str
    quantization: Quantization
    manifest: str | None = None
    """Digest of the files as they are; None: `digest` is that one, as in records of earlier releases."""

    @classmethod
    def judged(cls, record: Mapping[str, Any]) -> "ServedBase":
        """Return the base on which a registered version was evaluated. Raises RegistryError if its record has none."""
        try:
            quantization = Quantization.model_validate(record["params"].get("quantization"))
        except ValidationError as error:
            raise RegistryError(
                f"the record of {record['name']} {record['version']} does not tell how its base was stored: {error}; "
                "register it again with `peftcore run`"
            ) from error
        return cls(record["base_model"], quantization, record.get("base_manifest"))

    def is_same(self, other: "ServedBase") -> bool:
        """Whether both are the same model in the same storage."""
        one, two = ({"base_model": base.digest, "base_manifest": base.manifest} for base in (self, other))
        return self.quantization == other.quantization and have_same_base(one, two)

    def __str__(self) -> str:
        storage = self.quantization.storage
        stored = "" if storage == "none" else f"dequantised {storage} in "
        return f"base {self.digest[:12]} as {stored}{self.quantization.compute_dtype}"


class StageWatch:
    """Serves the version that has a stage under the project's name.

    Args:
        paths: of the project.
        name: the project's name in the registry.
        stage: the stage to follow.
        store: where the version is loaded.
        base: the base of `store`'s model; a version that was evaluated on another one is refused.
        folder: for the version's files.
        seconds: between two looks.
        check: called with a loaded version's name in the model; its error refuses the version.
        remote: git remote whose tags are fetched before each look; None: only the tags that are here count.
    """

    def __init__(
        self,
        paths: Paths,
        name: str,
        stage: str,
        store: "AdapterStore",
        base: ServedBase,
        folder: Path,
        seconds: float = 5.0,
        check: Callable[[str], None] | None = None,
        remote: str | None = None,
    ):
        self.version: str | None = None
        """The one that is served."""
        self._commit: str | None = None
        """Its commit: after a fetch the same number may be another version's."""
        self.warnings: dict[str, str] = {}
        """{stage: why its version is not served, "fetch": why the tags of the remote are not known}; {} normally."""
        self._paths, self._stage, self._store, self._base = paths, stage, store, base
        self._folder, self._seconds, self._check, self._remote = folder, seconds, check, remote
        git = Git(paths.root)
        self._registry = Registry(git, name, decides=deciding_tags(load_params(paths.params).gate, git))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peftcore-watch", daemon=True)

    def check(self) -> bool:
        """Look once; returns whether another version is served now. Requests that run keep the old one.

        A new version is loaded before it takes the old one's place. Where no version has the stage any more, none is
        served.

        Raises:
            RegistryError, RepositoryError: the new version's files cannot be had as they were registered.
            BaseModelError: it was evaluated on another base than the one that is loaded.
            PeftError: it cannot be loaded or served. In all cases the old version is served on.
        """
        holder, name = self._registry.stages().get(self._stage), self._registry.name
        number, commit = (None, None) if holder is None else (holder.version, holder.commit)
        if number == self.version and (number is None or commit == self._commit):
            return False
        if number is None:
            self._store.remove(name)
            logger.warning("no version of %s is %s any more; %s is not served on", name, self._stage, self.version)
            self.version = None
            return True
        version = self._registry.version(number)
        judged = ServedBase.judged(self._registry.record(version))
        if not judged.is_same(self._base):
            raise BaseModelError(
                f"{version.tag} was evaluated on {judged}, and this server has loaded {self._base}; start the server "
                "again to serve it"
            )
        self._store.swap(name, self._files(version), (self._stage,), self._check)
        logger.info("%s is now %s, the %s", name, version.number, self._stage)
        self.version, self._commit = version.number, version.commit
        return True

    @contextmanager
    def running(self) -> Iterator[None]:
        """Look again and again while inside."""
        self._thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self._thread.join()

    def look(self) -> None:
        """Fetch from the remote, if there is one, and look once, as `check`.

        An error becomes a warning in the log and in `warnings`. After a failed fetch the tags that are here count.
        """
        if self._remote is not None:
            self._warned("fetch", partial(fetch, self._registry, self._remote))
        self._warned(self._stage, self.check)

    def _warned(self, what: str, act: Callable[[], object]) -> None:
        try:
            act()
        except (PipelineError, PeftError, OSError) as error:
            if self.warnings.get(what) != str(error):
                logger.warning("%s is served on: %s", self.version or "nothing of the registry", error)
            self.warnings[what] = str(error)
        else:
            self.warnings.pop(what, None)

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            self.look()

    def _files(self, version: Version) -> Path:
        """The version's adapter directory, checked against its record."""
        kept = self._folder / version.commit / version.number
        name = self._paths.adapter.relative_to(self._paths.root).as_posix()
        with files_at(self._paths.root, version.commit, [name]) as fetched:
            for file, digest in self._registry.record(version)["adapter"]["files"].items():
                if not (fetched / name / file).is_file() or sha256(fetched / name / file) != digest:
                    raise RegistryError(
                        f"{file} of {version.tag} is not what was registered: DVC's cache or remote is damaged; "
                        "`dvc push` it again from a machine that has it"
                    )
            shutil.copytree(fetched / name, kept, dirs_exist_ok=True)
        return kept


def fetch(registry: Registry, remote: str) -> None:
    """Take in the tags of a git remote. Raises RegistryError if that fails."""
    try:
        synchronise(registry, remote)
    except GitError as error:
        raise RegistryError(
            f"the tags of {remote} could not be fetched, so a newer version may be there: {error}"
        ) from error


def register_adapters(store: "AdapterStore", folder: Path) -> list[str]:
    """Register the adapters of a folder and give their names: its directories, and what its `NAME.dvc` files stand
    for, which DVC pulls from the remote when one that is not there is asked for. Raises ConfigError if there is none.
    """
    tracked = {pointer.stem: pointer for pointer in sorted(folder.glob("*.dvc")) if pointer.is_file()}
    here = {file.parent.name: file.parent for file in sorted(folder.glob(f"*/{CONFIG_NAME}"))}
    sources = {**here, **{name: partial(_pulled, pointer) for name, pointer in tracked.items()}}
    if not sources:
        raise ConfigError(
            f"{folder} holds no adapters; an adapter is a directory with an {CONFIG_NAME}, or a NAME.dvc file that "
            "`dvc add` made of one"
        )
    for name, source in sources.items():
        store.register(name, source)
    return list(sources)


def _pulled(pointer: Path) -> Path:
    """The directory that a `.dvc` file stands for. Raises CheckpointError where neither it nor a remote has it."""
    directory = pointer.with_suffix("")
    if not (directory / CONFIG_NAME).is_file():
        try:
            dvc(pointer.parent.resolve(), "pull", "--quiet", pointer.name)
        except RepositoryError as error:
            raise CheckpointError(f"{pointer}: {error}; `dvc push` it from a machine that has it") from error
    return directory


def compositions(given: Sequence[str]) -> "dict[str, Composition]":
    """{name: composition} from texts such as `mix={"sql": 0.7, "chat": 0.3}`. Raises ConfigError."""
    from peftcore.composition import Weighted

    found: dict[str, Composition] = {}
    for text in given:
        name, _, weights = text.partition("=")
        try:
            read = json.loads(weights)
        except json.JSONDecodeError:
            read = None
        if (
            not name
            or not isinstance(read, dict)
            or not all(type(w) in (int, float) for w in read.values())
            or not read
        ):
            raise ConfigError(f'--composition {text!r}: give NAME={{"adapter": weight, ...}} with numbers for weights')
        found[name] = Weighted(read)
    return found


@dataclass(frozen=True)
class ServeOptions:
    """What `peftcore serve` is told."""

    base: Path
    """Folder of the base model."""
    adapters: Path | None = None
    """Folder of adapters."""
    mixtures: Sequence[str] = ()
    """Compositions as `NAME={"adapter": weight}`."""
    watched: tuple[Paths, Params] | None = None
    """The project whose promoted version is served too, and the versions that follow it."""
    seconds: float = 5.0
    """Between two looks at the registry."""
    git_remote: str | None = None
    """Git remote whose tags are fetched at each look."""
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    """The base model's name; None: its folder's."""
    max_loaded: int = 64
    """Adapters in the model at a time (count)."""
    dtype: str = "auto"
    """Of the base without `watched`, with which it is as the version was evaluated."""
    keys: Sequence[str] = ()
    """API keys, those of the environment variable left out."""


def serve(options: ServeOptions, limits: "Limits") -> None:
    """Serve until told to end; see `peftcore.serving`.

    With `watched` the base is loaded as the promoted version was evaluated on it: the same files, dequantised from the
    same storage. So what is served is what the gate has judged.

    Raises:
        PeftError, PipelineError: something of it cannot be served.
    """
    from peftcore.routing import AdapterStore
    from peftcore.serving import check_servable, checked_keys, make_service
    from peftcore.serving import serve as run

    mixed = compositions(options.mixtures)
    keys = checked_keys([*options.keys, *(os.environ[KEYS].split(",") if KEYS in os.environ else ())])
    model, tokenizer, base = _loaded_base(options)
    store = AdapterStore(model, options.max_loaded)
    with tempfile.TemporaryDirectory(prefix="peftcore-serve-") as folder:
        if options.adapters is not None:
            register_adapters(store, options.adapters)
        watch = None
        if options.watched is not None and base is not None:
            paths, params = options.watched
            name, stage = params.project.name, params.gate.stage
            check = partial(check_servable, model, name)
            remote = options.git_remote
            watch = StageWatch(paths, name, stage, store, base, Path(folder), options.seconds, check, remote)
            watch.check()
        _check_known(mixed, store)
        served = options.name or options.base.resolve().name
        warnings = None if watch is None else watch.warnings
        service = make_service(model, tokenizer, store, served, mixed, limits, keys, warnings)
        with contextlib.nullcontext() if watch is None else watch.running():
            run(service, options.host, options.port)


def _loaded_base(options: ServeOptions) -> tuple[Any, Any, ServedBase | None]:
    """Return (model, tokenizer, base as judged); without a project to follow the base is None."""
    from peftcore.serving import load_base

    if options.watched is None:
        return *load_base(options.base, options.dtype), None
    from flows.base.model import check_base, load_dequantized, load_tokenizer

    paths, params = options.watched
    if options.dtype != "auto":
        raise ConfigError(f"--dtype {options.dtype}: with --watch the base is as the promoted version was evaluated")
    registry = registry_of(params, paths.root)
    if options.git_remote is not None:
        try:
            fetch(registry, options.git_remote)
        except RegistryError as error:  # the first look says it again, in the warnings of /ready
            logger.warning("%s", error)
    holder = registry.stages().get(params.gate.stage)
    manifest = check_base(options.base)
    base = ServedBase(base_identity(options.base), params.quantization, manifest)
    if holder is not None and holder.version is not None:
        judged = ServedBase.judged(registry.record(registry.version(holder.version)))
        base = replace(base, quantization=judged.quantization)
        if not judged.is_same(base):
            raise BaseModelError(
                f"{holder.version} was evaluated on {judged}, and {options.base} holds {base.digest[:12]}; give --base "
                "the folder of the other one"
            )
    logger.info("loading %s", base)
    return load_dequantized(options.base, base.quantization), load_tokenizer(options.base), base


def _check_known(mixed: "dict[str, Composition]", store: "AdapterStore") -> None:
    for name, one in mixed.items():
        if unknown := sorted(set(one.names()) - set(store.names())):
            known = ", ".join(store.names()[:8]) or "none"
            raise ConfigError(f"--composition {name}: no adapter {unknown[0]!r}; there is: {known}")
