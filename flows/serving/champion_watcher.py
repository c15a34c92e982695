"""Thread that follows the registry and replaces the served champion."""

import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flows.errors import BaseModelError, PipelineError, RegistryError
from flows.params import load_params
from flows.paths import Paths
from flows.registry.project_registry import deciding_tags
from flows.registry.registry import Registry
from flows.registry.synchronise import synchronise
from flows.runtime.git import Git, GitError
from flows.serving.served_base import ServedBase
from flows.serving.version_files import adapter_files
from peftcore.errors import PeftError

if TYPE_CHECKING:
    from peftcore.routing import AdapterStore

logger = logging.getLogger(__name__)


class ChampionWatcher:
    """Serves the version that has a stage, under the project's name.

    Args:
        paths: The project's files.
        name: The project's name in the registry.
        stage: The stage to follow, such as champion.
        store: The store that loads the version.
        base: The base of the store's model; a version that was evaluated on another base is refused.
        folder: Folder for the versions' files.
        seconds: Seconds between two checks.
        check: Called with the name of a loaded version; an error from it refuses the version.
        remote: Git remote whose tags are fetched before each check; None: only local tags count.
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
        """Number of the served version."""
        self._commit: str | None = None
        """Commit of the served version; after a fetch, another version may have its number."""
        self.warnings: dict[str, str] = {}
        """{stage: reason why its version is not served, "fetch": reason why the remote's tags are unknown}; {} without
        warnings.
        """
        self._paths, self._stage, self._store, self._base = paths, stage, store, base
        self._folder, self._seconds, self._check, self._remote = folder, seconds, check, remote
        git = Git(paths.root)
        self._registry = Registry(git, name, decides=deciding_tags(load_params(paths.params).gate, git))
        self._directories: list[Path] = []
        """Directories of the served version and of the one before it, which a running request may still load."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peftcore-watch", daemon=True)

    def check(self) -> bool:
        """Check the registry once, and serve the version that has the stage now.

        A new version is loaded before it replaces the old one; running requests keep the old one. If no version has the
        stage any more, none is served. After an error the old version is still served.

        Returns:
            True if the served version changed.

        Raises:
            RegistryError, RepositoryError: The version's files are not available as registered.
            BaseModelError: The version was evaluated on another base than the loaded one.
            PeftError: The version cannot be loaded or served.
        """
        holder, name = self._registry.stages().get(self._stage), self._registry.name
        number, commit = (None, None) if holder is None else (holder.version, holder.commit)
        if number == self.version and (number is None or commit == self._commit):
            return False
        if number is None:
            self._store.remove(name)
            logger.warning("no version of %s is %s any more; %s is no longer served", name, self._stage, self.version)
            self.version = None
            return True
        version = self._registry.version(number)
        evaluated = ServedBase.of_record(self._registry.record(version))
        if not evaluated.is_same(self._base):
            raise BaseModelError(
                f"{version.tag} was evaluated on {evaluated}, and this server has loaded {self._base}; start the "
                "server again to serve it"
            )
        directory = adapter_files(self._paths, self._registry, version, self._folder)
        self._store.swap(name, directory, (self._stage,), self._check)
        self._remove_older_than(directory)
        logger.info("%s is now %s, the %s", name, version.number, self._stage)
        self.version, self._commit = version.number, version.commit
        return True

    def _remove_older_than(self, served: Path) -> None:
        self._directories.append(served)
        while len(self._directories) > 2:
            old = self._directories.pop(0)
            if old not in self._directories:  # else it was promoted again
                shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run checks in a thread while the context is open."""
        self._thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self._thread.join()

    def check_and_warn(self) -> None:
        """Fetch the remote's tags, if there is a remote, and check once.

        An error becomes a warning in the log and in `warnings`. After a failed fetch the local tags count.
        """
        if self._remote is not None:
            self._warn_on_error("fetch", partial(fetch_tags, self._registry, self._remote))
        self._warn_on_error(self._stage, self.check)

    def _warn_on_error(self, subject: str, action: Callable[[], object]) -> None:
        try:
            action()
        except (PipelineError, PeftError, OSError) as error:
            if self.warnings.get(subject) != str(error):
                logger.warning("%s is still served: %s", self.version or "no registered version", error)
            self.warnings[subject] = str(error)
        else:
            self.warnings.pop(subject, None)

    def _run(self) -> None:
        from peftcore.serving import in_own_thread  # needs the extra `serve`

        while not self._ended.wait(self._seconds):
            in_own_thread(self.check_and_warn).result()


def fetch_tags(registry: Registry, remote: str) -> None:
    """Fetch the tags of a git remote. Raises RegistryError if that fails."""
    try:
        synchronise(registry, remote)
    except GitError as error:
        raise RegistryError(
            f"the tags of {remote} could not be fetched, so a newer version may be there: {error}"
        ) from error
