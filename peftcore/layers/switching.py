"""HF PEFT's layer methods that switch, merge and delete adapters; diffusers and transformers call them.

As in HF PEFT, each method acts on one layer. Once all wrappers of a model have the same active adapters, and all are
enabled or all disabled, the model takes over this state.
"""

import warnings
from collections.abc import Iterable
from typing import Any

from peftcore.errors import MergeError
from peftcore.layers.adapter_slot import AdapterSlot


class SwitchingMethods:
    """Methods of a wrapper for libraries that visit a model's modules one by one and switch their adapters."""

    selection: Any
    """The model's `Selection`; a `LayerSelection` while this wrapper differs from the model."""

    def _holders(self) -> Iterable[Any]:
        """Return the `NamedModules` that hold this wrapper's adapters or trained copies by adapter name."""
        raise NotImplementedError

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(self.selection.active)

    @property
    def active_adapter(self) -> list[str]:
        """Names of the active adapters."""
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """True while the adapters are disabled."""
        return self.selection.disabled

    @property
    def _active_adapter(self) -> list[str]:
        """Names of the active adapters; scripts also assign this attribute, which leaves `requires_grad` as it is."""
        return self.active_adapters

    @_active_adapter.setter
    def _active_adapter(self, names: str | list[str]) -> None:
        self.selection.owner.switch_wrapper(self, active=[names] if isinstance(names, str) else names)

    @property
    def _disable_adapters(self) -> bool:
        """True while this layer's adapters are switched off; an assignment does what `enable_adapters` does."""
        return self.selection.switched_off

    @_disable_adapters.setter
    def _disable_adapters(self, switched_off: bool) -> None:
        self.enable_adapters(not switched_off)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters of this layer. In this layer, only their parameters are trainable afterwards.

        If all layers of the model have the same active adapters afterwards, these become the model's active adapters.

        Args:
            adapter_names: one name or several, in order; [] for none. A name that the model has no adapter of has no
                effect, as in HF PEFT.
            inference_mode: True freezes the active adapters of this layer, too.

        Raises:
            AdapterNameError: a name is given twice; or several prompts are named.
        """
        active = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.selection.owner.switch_wrapper(self, active=active)
        present = [(name, holder[name]) for holder in self._holders() for name in holder]
        for _, module in present:
            module.requires_grad_(False)
        if inference_mode:
            return
        for name, module in present:  # last, because adapters may share parameters
            if name in active:
                module.requires_grad_(True)
        self.selection.owner.trainable.update(self.active_adapters)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Set `requires_grad` of this layer's parameters of adapters; a layer without one of them stays as it is.

        Args:
            adapter_names: one name or several.
            requires_grad: False freezes the adapters in this layer.
        """
        names = {adapter_names} if isinstance(adapter_names, str) else {*adapter_names}
        present = [(name, holder[name]) for holder in self._holders() for name in holder if name in names]
        for name, module in present:
            module.requires_grad_(requires_grad)
            if requires_grad:
                self.selection.owner.trainable.add(name)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable the active adapters of this layer.

        Args:
            enabled: False disables them, and restores this layer's unmerged weight.
        """
        if not enabled:
            self.restore_unmerged()
        self.selection.owner.switch_wrapper(self, switched_off=not enabled)

    def use_selection(self, selection: Any) -> None:
        """Replace the selection that decides which adapters are active in this wrapper.

        Args:
            selection: the model's `Selection`, or a `LayerSelection` of this wrapper.
        """
        self.selection = selection

    def restore_unmerged(self) -> None:
        """Restore the unmerged weight; does nothing for a wrapper that has no base weight."""

    def unmerge(self) -> None:
        """Restore the unmerged weight; does nothing for a wrapper that has no base weight."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter of this layer alone; a layer without the adapter stays as it is.

        The model keeps the adapter's name until its `delete_adapter`, or until `del model.peft_config[adapter_name]`.

        Args:
            adapter_name: the adapter's name.

        Raises:
            MergeError: the adapter is merged into this layer's weight.
        """
        for holder in self._holders():
            if adapter_name in holder:
                del holder[adapter_name]
        self.selection.forget()


class MergingMethods(SwitchingMethods):
    """Methods of a wrapper whose adapters can be merged into base weights."""

    def _slots(self) -> list[AdapterSlot]:
        """Return the slots of this wrapper."""
        raise NotImplementedError

    def _holders(self) -> Iterable[Any]:
        return [slot.adapters for slot in self._slots()]

    def use_selection(self, selection: Any) -> None:
        """Replace the selection of this wrapper and of its slots; see `SwitchingMethods.use_selection`."""
        super().use_selection(selection)
        for slot in self._slots():
            slot.selection = selection

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into this layer's weight, in place; `unmerge` restores it bit for bit.

        Args:
            safe_merge: check the merged weight for NaN and Inf before it is written.
            adapter_names: the adapters, in order; None for the active ones.

        Raises:
            MergeError: an adapter cannot be merged, or a merged weight is not finite; nothing is changed then.
            AdapterNameError: a name is not loaded.
        """
        names = list(self.selection.active) if adapter_names is None else adapter_names
        is_changed = self.selection.owner.merge_slots(self._slots(), names, safe_merge)
        if not is_changed and self._has_merged():
            warnings.warn(f"All adapters are already merged into {self._slots()[0].path}", stacklevel=2)

    def unmerge(self) -> None:
        """Restore the unmerged weight of this layer, bit for bit; warns if no adapter is merged into it."""
        if not self._has_merged():
            warnings.warn(f"Already unmerged: no adapter is merged into {self._slots()[0].path}", stacklevel=2)
        self.restore_unmerged()

    def restore_unmerged(self) -> None:
        """Restore the unmerged weight of this layer; a layer without merged adapters stays as it is."""
        self.selection.owner.unmerge_slots(self._slots())

    def _has_merged(self) -> bool:
        """Return True if an adapter is merged into a weight of this layer."""
        return any(slot.merged_names for slot in self._slots())

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter of this layer alone; see `SwitchingMethods.delete_adapter`."""
        for slot in self._slots():
            if adapter_name in slot.merged_names:
                raise MergeError(f"adapter {adapter_name!r} is merged into {slot.path}; call unmerge first")
        super().delete_adapter(adapter_name)
        for slot in self._slots():
            slot.restore_base(adapter_name)
