"""Model names of a server: the base model, each adapter, and each configured composition of adapters."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcore.composition import BASE, Composition, Only
from peftcore.errors import AdapterNameError, AdapterStoreError, ConfigError, PeftError
from peftcore.injection.adapter_set import adapter_set
from peftcore.routing import AdapterStore, Lease
from peftcore.serving.errors import AdapterFailedError, BadRequestError, NoRoomError, ServingError, UnknownModelError


@dataclass(frozen=True)
class ModelLease:
    """Adapters that stay loaded until `release`, and the composition of their loaded names for one row."""

    route: Composition
    leases: tuple[Lease, ...] = ()

    @property
    def weights(self) -> Hashable:
        """Identifies what the model computes: leases with equal values give equal outputs."""
        return self.route, tuple(lease.weights for lease in self.leases)

    @property
    def version(self) -> str | None:
        """Names of the directories of the adapters, joined by "+"; None for the base model."""
        return "+".join(lease.directory.name for lease in self.leases) or None

    def release(self) -> None:
        """Allow the adapters to be unloaded."""
        for lease in self.leases:
            lease.release()


class Catalog:
    """Models of one server.

    Args:
        model: The base model that adapters are loaded into.
        base: Name of the base model.
        store: The adapters by name.
        compositions: {name: composition of adapters}.

    Raises:
        ConfigError: Two models have the same name.
    """

    def __init__(
        self, model: Any, base: str, store: AdapterStore, compositions: Mapping[str, Composition] | None = None
    ):
        self.base, self.store, self.compositions = base, store, dict(compositions or {})
        self._model = model
        if base in store.names():
            raise ConfigError(f"the base model and an adapter are named {base!r}; rename one of them (`serve --name`)")
        for name in self.compositions:
            if name == base or name in store.names():
                raise ConfigError(
                    f"the composition {name!r} has the name of the base model or of an adapter; rename it"
                )

    def names(self) -> list[str]:
        """Return all model names: the base model, adapters, compositions."""
        return [self.base, *self.store.names(), *self.compositions]

    def require(self, name: str) -> None:
        """Raise UnknownModelError if no model has this name."""
        if name != self.base and name not in self.compositions and name not in self.store.names():
            names = self.names()
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise UnknownModelError(
                f"the model {name!r} does not exist; available models: {', '.join(names[:8])}{more}", "model"
            )

    def add(self, name: str, directory: Path, replace: bool) -> None:
        """Load an adapter from a directory, and serve it under a name.

        Args:
            name: The new model's name.
            directory: The adapter's directory.
            replace: Replace an adapter of this name, whose running requests keep the old one.

        Raises:
            BadRequestError: The name is in use, or the directory holds no adapter that can be loaded and served.
            NoRoomError: The adapters in use leave no room.
        """
        if name == self.base or name in self.compositions:
            raise BadRequestError(f"{name!r} is the base model or a composition; take another name", "lora_name")
        if name in self.store.names() and not replace:
            raise BadRequestError(
                f"the adapter {name!r} is loaded already; set load_inplace to true to replace it", "lora_name"
            )
        try:
            self.store.swap(name, directory, check=lambda loaded: check_servable(self._model, name, loaded))
        except ServingError:
            raise
        except AdapterStoreError as error:
            raise NoRoomError(str(error)) from error
        except PeftError as error:
            raise BadRequestError(f"{name!r} cannot be loaded: {error}", "lora_path") from error

    def remove(self, name: str) -> None:
        """Stop serving an adapter; its running requests are completed. Raise UnknownModelError if there is none."""
        if name not in self.store.names():
            raise UnknownModelError(f"there is no adapter {name!r}", "lora_name")
        self.store.remove(name)

    def acquire(self, name: str) -> ModelLease:
        """Load the adapters of a model unless they are loaded, and return a lease that keeps them loaded.

        The lease of the base model holds no adapter. After an error no adapter stays leased.

        Raises:
            ServingError: An adapter is unknown, cannot be loaded, does not fit beside the adapters in use, or cannot be
                served (see `check_servable`).
        """
        if name == self.base:
            return ModelLease(BASE)
        composition = self.compositions.get(name) or Only(name)
        leases: dict[str, Lease] = {}
        try:
            for adapter in sorted(set(composition.names())):
                leases[adapter] = self.store.acquire(adapter)
                check_servable(self._model, adapter, leases[adapter].name)
        except Exception as error:
            for lease in leases.values():
                lease.release()
            raise _as_serving_error(error, name) from error
        return ModelLease(
            composition.renamed({adapter: lease.name for adapter, lease in leases.items()}), tuple(leases.values())
        )


def check_servable(model: Any, adapter: str, loaded: str) -> None:
    """Check that an adapter supports token-by-token decoding with a cache.

    Args:
        model: The model that holds the adapter.
        adapter: Name of the adapter for the error message.
        loaded: Name of the adapter in the model.

    Raises:
        BadRequestError: The method needs the whole text in each forward, adds virtual tokens, or computes with other
            adapters (Arrow).
    """
    adapters = adapter_set(model)
    prompt, kind = adapters.prompt(loaded), adapters.configs[loaded].method
    if prompt is not None and prompt.exclusive:
        raise BadRequestError(
            f"{adapter!r} cannot be served: {kind} adds virtual tokens before the text, which this server's cache does "
            "not hold; use `generate` instead",
            "model",
        )
    if loaded in adapters.forward_arguments and (prompt is None or adapters.forward_arguments[loaded]):
        raise BadRequestError(
            f"{adapter!r} cannot be served: {kind} needs the whole text in each forward, and this server decodes one "
            "token at a time; use `generate` instead",
            "model",
        )
    if prompt is None and any(part.sees_others for part in adapters.of_method(loaded).values()):
        raise BadRequestError(
            f"{adapter!r} cannot be served: it computes with the other adapters of its layers, and this server loads "
            "and drops adapters by demand; use `generate` instead",
            "model",
        )


def _as_serving_error(error: Exception, name: str) -> ServingError:
    if isinstance(error, ServingError):
        return error
    if isinstance(error, AdapterStoreError):
        return NoRoomError(str(error))
    if isinstance(error, AdapterNameError):
        return UnknownModelError(str(error), "model")
    reason = str(error) if isinstance(error, PeftError) else f"{type(error).__name__}: {error}"
    return AdapterFailedError(f"{name!r} could not be loaded: {reason}")
