"""What a request's `model` can name: the base, an adapter, or a composition of adapters that was configured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftcore.composition import BASE, Composition, Only
from peftcore.errors import AdapterNameError, AdapterStoreError, ConfigError, PeftError
from peftcore.injection.adapter_set import adapter_set
from peftcore.routing import AdapterStore, Lease
from peftcore.serving.errors import AdapterFailedError, BadRequestError, NoRoomError, ServingError, UnknownModelError


@dataclass(frozen=True)
class Held:
    """Adapters that stay in the model until `release`. route: by their names in it."""

    route: Composition
    leases: tuple[Lease, ...] = ()

    def release(self) -> None:
        """Give them back."""
        for lease in self.leases:
            lease.release()


class Catalog:
    """The models of one server. Raises ConfigError for a composition whose name is taken."""

    def __init__(
        self, model: Any, base: str, store: AdapterStore, compositions: Mapping[str, Composition] | None = None
    ):
        self.base, self.store, self.compositions = base, store, dict(compositions or {})
        self._model = model
        for name in self.compositions:
            if name == base or name in store.names():
                raise ConfigError(f"the composition {name!r} has the name of the base or of an adapter; rename it")

    def names(self) -> list[str]:
        """The base first, then adapters and compositions."""
        return [self.base, *self.store.names(), *self.compositions]

    def require(self, name: str) -> None:
        """UnknownModelError for a name that stands for nothing."""
        if name != self.base and name not in self.compositions and name not in self.store.names():
            names = self.names()
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise UnknownModelError(f"there is no model {name!r}; there is: {', '.join(names[:8])}{more}", "model")

    def acquire(self, name: str) -> Held:
        """What a model's rows are computed by; loads adapters if need be. Raises ServingError."""
        if name == self.base:
            return Held(BASE)
        one = self.compositions.get(name) or Only(name)
        leases: dict[str, Lease] = {}
        try:
            for adapter in sorted(set(one.names())):
                leases[adapter] = self.store.acquire(adapter)
                check_servable(self._model, adapter, leases[adapter].name)
        except Exception as error:
            for lease in leases.values():
                lease.release()
            raise _as_serving_error(error, name) from error
        return Held(one.renamed({adapter: lease.name for adapter, lease in leases.items()}), tuple(leases.values()))


def check_servable(model: Any, adapter: str, loaded: str) -> None:
    """Check that rows can be decoded token by token with an adapter, whose name in the model is `loaded`.

    Raises:
        BadRequestError: its method looks at a whole text at once, or adds virtual tokens to it.
    """
    adapters = adapter_set(model)
    prompt, kind = adapters.prompt(loaded), adapters.configs[loaded].peft_type
    if prompt is not None and prompt.exclusive:
        raise BadRequestError(
            f"{adapter!r} is {kind}, which puts virtual tokens before the text, and this server's cache holds the "
            "text alone; use `generate`",
            "model",
        )
    if prompt is None and loaded in adapters.forward_arguments:
        raise BadRequestError(
            f"{adapter!r} ({kind}) looks at the whole text in each call, and this server reads it a token at a "
            "time; use `generate`",
            "model",
        )


def _as_serving_error(error: Exception, name: str) -> ServingError:
    if isinstance(error, ServingError):
        return error
    if isinstance(error, AdapterStoreError):
        return NoRoomError(str(error))
    if isinstance(error, AdapterNameError):
        return UnknownModelError(str(error), "model")
    said = str(error) if isinstance(error, PeftError) else f"{type(error).__name__}: {error}"
    return AdapterFailedError(f"{name!r} could not be loaded: {said}")
