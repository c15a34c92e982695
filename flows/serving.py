"""What `peftcore serve` serves: a base, a folder of adapters, compositions of them, and the promoted version of this
project, whose place the next one takes while requests run."""

import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flows.errors import PipelineError, RegistryError, RepositoryError
from flows.git import Git
from flows.params import load_params
from flows.paths import Paths
from flows.project import dvc, files_at
from flows.promotion.project_registry import deciding_tags
from flows.promotion.registry import Registry, Version
from peftcore.config import CONFIG_NAME
from peftcore.errors import CheckpointError, ConfigError, PeftError
from peftcore.files import sha256
from peftcore.tensors import read_tensors

if TYPE_CHECKING:
    from peftcore.composition import Composition
    from peftcore.routing import AdapterStore
    from peftcore.serving import Limits

KEYS = "PEFTCORE_API_KEYS"
"""Environment variable with API keys, separated by commas; a command line can be read by everybody on the machine."""

logger = logging.getLogger(__name__)


class StageWatch:
    """Serves the version that has a stage under the project's name. seconds: between looks; folder: for its files."""

    def __init__(self, paths: Paths, name: str, stage: str, store: "AdapterStore", folder: Path, seconds: float = 5.0):
        self.version: str | None = None
        """The one that is served."""
        self._paths, self._stage, self._store, self._folder, self._seconds = paths, stage, store, folder, seconds
        git = Git(paths.root)
        self._registry = Registry(git, name, decides=deciding_tags(load_params(paths.params).gate, git))
        self._said = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peftcore-watch", daemon=True)

    def check(self) -> bool:
        """Look once; whether another version is served now. What runs goes on with the old one.

        Raises RegistryError, RepositoryError or CheckpointError if the new version's files cannot be had as they were
        registered; the old one is then served on.
        """
        holder = self._registry.stages().get(self._stage)
        if holder is None or holder.version is None or holder.version == self.version:
            return False
        version = self._registry.version(holder.version)
        directory, name = self._files(version), self._registry.name
        if name in self._store.names():
            self._store.replace(name, directory)
        else:
            self._store.register(name, directory, tags=(self._stage,))
        self._store.prefetch(name)
        logger.info("%s is now %s, the %s", name, version.number, self._stage)
        self.version = version.number
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

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            try:
                self.check()
                self._said = ""
            except (PipelineError, PeftError, OSError) as error:
                if str(error) != self._said:
                    logger.warning("%s is served on: %s", self.version or "nothing of the registry", error)
                self._said = str(error)

    def _files(self, version: Version) -> Path:
        """The version's adapter directory, checked against its record."""
        kept = self._folder / version.number
        name = self._paths.adapter.relative_to(self._paths.root).as_posix()
        with files_at(self._paths.root, version.commit, [name]) as fetched:
            for file, digest in self._registry.record(version)["adapter"]["files"].items():
                if not (fetched / name / file).is_file() or sha256(fetched / name / file) != digest:
                    raise RegistryError(
                        f"{file} of {version.tag} is not what was registered: DVC's cache or remote is damaged; "
                        "`dvc push` it again from a machine that has it"
                    )
            read_tensors(fetched / name)
            shutil.copytree(fetched / name, kept, dirs_exist_ok=True)
        return kept


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


def serve(
    base: Path,
    adapters: Path | None,
    mixtures: Sequence[str],
    watched: tuple[Paths, str, str] | None,
    address: tuple[str, int],
    limits: "Limits",
    name: str | None,
    max_loaded: int,
    dtype: str,
    keys: Sequence[str],
    seconds: float,
) -> None:
    """Serve until told to end; see `peftcore.serving`.

    watched: (paths, project, stage) of the registry to follow, looked at every so many seconds. name: the base's, its
    folder's if None. Raises PeftError or PipelineError for what cannot be served.
    """
    from peftcore.routing import AdapterStore
    from peftcore.serving import make_service
    from peftcore.serving.server import serve as run
    from peftcore.serving.service import load_base

    mixed = compositions(mixtures)
    model, tokenizer = load_base(base, dtype)
    store = AdapterStore(model, max_loaded)
    with tempfile.TemporaryDirectory(prefix="peftcore-serve-") as folder:
        if adapters is not None:
            register_adapters(store, adapters)
        watch = None if watched is None else StageWatch(*watched, store, Path(folder), seconds)
        if watch is not None:
            watch.check()
        _check_known(mixed, store)
        every = [*keys, *filter(None, os.environ.get(KEYS, "").split(","))]
        service = make_service(model, tokenizer, store, name or base.resolve().name, mixed, limits, every)
        if watch is None:
            run(service, *address)
        else:
            with watch.running():
                run(service, *address)


def _check_known(mixed: "dict[str, Composition]", store: "AdapterStore") -> None:
    for name, one in mixed.items():
        if unknown := sorted(set(one.names()) - set(store.names())):
            known = ", ".join(store.names()[:8]) or "none"
            raise ConfigError(f"--composition {name}: no adapter {unknown[0]!r}; there is: {known}")
