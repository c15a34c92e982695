"""The models that `peftcore chat` can talk to: the versions of a project, or one adapter and its base."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.base.calibrated import calibrated_identity, check_adapter
from flows.errors import BaseModelError, ChatError
from flows.params import Params
from flows.paths import Paths
from flows.registry.project_registry import registry_of
from flows.runtime.temporary import temporary_folder
from flows.serving.conversation import BASE
from flows.serving.served_base import ServedBase, load_evaluated_base, load_given_base
from flows.serving.version_files import adapter_files

if TYPE_CHECKING:
    from peftcore.routing import AdapterStore

Models = tuple[Any, Any, "AdapterStore", Sequence[str], Callable[[str], str]]
"""Base, tokenizer, store, names of the models, and the function that loads one and returns its name in the store."""


@contextmanager
def project_models(paths: Paths, params: Params, base: Path) -> Iterator[Models]:
    """Give the base, the stages and the versions of a project.

    The base is loaded as in the evaluation of the promoted version. A version's files come from DVC's cache or remote
    when the version is first talked to.

    Args:
        paths: The project's files.
        params: The project's parameters.
        base: The base's folder.

    Raises:
        BaseModelError: The folder is damaged, or another base than that of the promoted version.
    """
    from peftcore.routing import AdapterStore

    registry = registry_of(params, paths.root)
    model, tokenizer, loaded = load_evaluated_base(base, paths, registry, params)
    store = AdapterStore(model)
    stages = {stage: holder.version for stage, holder in registry.stages().items() if holder.version is not None}
    versions = {version.number: version for version in registry.versions()}
    with temporary_folder("peftcore-chat-") as folder:

        def add(name: str) -> str:
            number = stages.get(name, name)
            if number == BASE or number in store.names():
                return number
            if number not in versions:
                raise ChatError(f"there is no model {name}; there is: {', '.join((BASE, *stages, *versions))}")
            version = versions[number]
            evaluated = ServedBase.of_record(registry.record(version))
            if not evaluated.is_same(loaded):
                raise BaseModelError(
                    f"{number} was evaluated on {evaluated}, and this chat has loaded {loaded}; start `peftcore chat "
                    f"{number}` to talk to it"
                )
            store.register(number, adapter_files(paths, registry, version, folder))
            return number

        yield model, tokenizer, store, (BASE, *stages, *versions), add
        store.close()


@contextmanager
def adapter_models(adapter: Path, base: Path) -> Iterator[Models]:
    """Give a base and one adapter, which has the name of its folder.

    Args:
        adapter: An adapter's directory.
        base: The base's folder, or that of the calibrated base.

    Raises:
        BaseModelError: The adapter was trained on another calibrated base.
    """
    from peftcore.routing import AdapterStore

    check_adapter(adapter, calibrated_identity(base))
    model, tokenizer = load_given_base(base, "auto")
    store = AdapterStore(model)
    name = adapter.resolve().name
    store.register(name, adapter)

    def add(chosen: str) -> str:
        if chosen not in (BASE, name):
            raise ChatError(f"there is no model {chosen}; there is: {BASE}, {name}")
        return chosen

    yield model, tokenizer, store, (BASE, name), add
    store.close()
