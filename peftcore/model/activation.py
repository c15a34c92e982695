"""Choice of the adapters that act: for all calls, in a context, or for each row."""

import contextlib
from collections.abc import Sequence

from peftcore.composition.algebra import Spec
from peftcore.composition.route import Route
from peftcore.injection import activation
from peftcore.injection.adapter_set import adapter_set
from peftcore.model.adapted_module import AdaptedModule


class ActivationMethods(AdaptedModule):
    """Methods of `PeftModel` that set, disable and route adapters."""

    @property
    def has_active_enabled_adapter(self) -> bool:
        """True if adapters are in effect: at least one is active, and they are not disabled."""
        return bool(adapter_set(self._module).selection.in_effect)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters. As in PEFT, their parameters become trainable, and all other adapters are frozen.

        Merged adapters are unmerged first, with a warning.

        Args:
            adapter_name: one name or several, in order; [] for none.
            inference_mode: True freezes the active adapters, too.

        Raises:
            AdapterNameError: a name is not loaded, or given twice; several prompts are named; or several of the
                adapters train the same module in full (`modules_to_save`), or the same row of an embedding.
        """
        activation.set_adapter(self._module, adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Set `requires_grad` of all parameters of adapters.

        Args:
            adapter_names: one name or several.
            requires_grad: False freezes the adapters.

        Raises:
            AdapterNameError: a name is not loaded.
        """
        activation.set_requires_grad(self._module, adapter_names, requires_grad)

    def refresh_adapters(self) -> None:
        """Drop all values that were computed from weights; call this after edits in place through `.data`.

        Other changes are noticed without this call. See `peftcore.injection.activation.refresh_adapters`.
        """
        activation.refresh_adapters(self._module)

    def disable_adapters(self) -> None:
        """Disable the active adapters, in every thread, until `enable_adapters`; a method of transformers.

        `active_adapters` stays the same, and an open route has precedence.

        Raises:
            MergeError: adapters are merged; use the context `disable_adapter()`, or unmerge first.
        """
        activation.switch_adapters(self._module, on=False)

    def enable_adapters(self) -> None:
        """Enable the active adapters again after `disable_adapters`."""
        activation.switch_adapters(self._module, on=True)

    def disable_adapter_layers(self) -> None:
        """Do what `disable_adapters` does; PEFT's name."""
        self.disable_adapters()

    def enable_adapter_layers(self) -> None:
        """Do what `enable_adapters` does; PEFT's name."""
        self.enable_adapters()

    def disable_adapter(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which this thread's calls compute the base model, even if adapters are merged.

        Raises:
            RoutingError: a route with adapters is opened inside; or adapters are merged, and another thread calls the
                model.
        """
        return activation.adapters_disabled(self._module)

    def route(self, adapters: Spec | Sequence[Spec]) -> contextlib.AbstractContextManager[Route]:
        """Return a context in which this thread's calls use a composition of adapters, or one for each row.

        Args:
            adapters: a name, None for the base, {name: weight}, or a composition of `peftcore.composition`; or a list
                of these with one for each row of the batch (for `generate`, one for each prompt).

        Returns:
            A context that yields the route. Other threads are not affected.

        Raises:
            AdapterNameError: a name is not loaded.
            RoutingError: adapters are merged, `disable_adapter()` is open, or the model's rows cannot be routed.
        """
        return activation.routed(self._module, adapters)
