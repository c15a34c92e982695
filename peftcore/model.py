"""`PeftModel`: the model itself with adapters in it, not a wrapper around it.

`get_peft_model` gives the model object a subclass `(PeftModel, its class)` of the same name, so its signature, paths,
`generate`, `config` and the code that looks at its class all stay as they were.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftcore import merging as combine
from peftcore.composition.algebra import Composition, Spec, weights_of
from peftcore.composition.fingerprint import unchanging_weights
from peftcore.composition.route import Route
from peftcore.config import PeftConfig
from peftcore.errors import ConfigError
from peftcore.injection import activation, inject, merge
from peftcore.injection import forward_hooks as forwarding
from peftcore.injection.adapter_set import adapter_set, untouched_names
from peftcore.merging import MergeReport, Recipe
from peftcore.storage import checkpoint
from peftcore.storage.trainer_checkpoints import teach_trainer

__all__ = ["PeftModel", "get_peft_model", "prepare_model_for_kbit_training"]


_CALLERS_ROUTE = "_callers_route"
"""Attribute of a replica that DataParallel made inside of a route: what opens it."""
_DDP_IGNORED = "_ddp_params_and_buffers_to_ignore"
"""Attribute of a model where DistributedDataParallel keeps the names of what it need not send."""


class _ActiveAdapters(list[str]):
    """A list, as in PEFT, that can also be called, as transformers does with its own method of this name."""

    def __call__(self) -> list[str]:
        return list(self)


class PeftModel:
    """What a model with adapters can do. Made by `get_peft_model` or `PeftModel.from_pretrained`, never directly."""

    # -- making ------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Put a saved adapter onto a model: `from_pretrained(model, directory, adapter_name="default",
        is_trainable=False, config=None)`.

        As with PEFT, the model is then in evaluation mode; with is_trainable, the adapter is in training mode, so its
        dropout acts, and the base stays in the mode it was in.

        Called on an adapted model's own class with a path instead, it loads that class's base model as ever.
        Raises CheckpointError for a damaged directory or one made for another base; the model is then as it was.
        """
        if isinstance(model, nn.Module):
            return _load_onto(model, *args, **kwargs)
        return super().from_pretrained(model, *args, **kwargs)  # type: ignore[misc]

    def add_adapter(self, adapter_name: str | PeftConfig, peft_config: PeftConfig | str | None = None) -> None:
        """Add an untrained adapter; it trains unless `inference_mode`, and acts once `set_adapter` names it.

        In transformers' order, `add_adapter(config, name="default")`, it is made the active one, as transformers does.
        """
        by_transformers = isinstance(adapter_name, PeftConfig)
        name: Any
        name, config = (peft_config or "default", adapter_name) if by_transformers else (adapter_name, peft_config)
        if not isinstance(config, PeftConfig):
            raise ConfigError(
                f"add_adapter takes a name and a configuration, such as LoraConfig(); got {adapter_name!r:.200} and "
                f"{peft_config!r:.200}"
            )
        inject.add_adapter(self._module, config, name)
        if by_transformers:
            self.set_adapter(name)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
    ) -> None:
        """Add an adapter from its directory; see `from_pretrained`. It acts once `set_adapter` names it.

        As with PEFT, the whole model is then in evaluation mode, unless is_trainable: the new adapter's dropout acts.
        """
        checkpoint.load_adapter(self._module, Path(model_id), adapter_name, is_trainable, config)
        wrappers = adapter_set(self._module).layers.values()
        if not is_trainable and (self._module.training or any(wrapper.training for wrapper in wrappers)):
            self._module.eval()  # looks at every adapter that is loaded

    def load_adapter_weights(self, directory: str | Path, adapter_name: str = "default") -> None:
        """Read a saved adapter's tensors into one that is there already and has the same configuration."""
        checkpoint.load_adapter_weights(self._module, Path(directory), adapter_name)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Remove an adapter, or several; layers that carry no other become plain again.

        If no active one is left, the first adapter that is left becomes active, with a warning.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        activation.delete_adapter(self._module, *names)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the tensors that `save_pretrained` writes of one adapter, by PEFT's keys without `base_model.model.`.

        Args:
            adapter_name: None: the first active one.
            state_dict: the model's, to take the values from; None: its own parameters.
        """
        name = self.active_adapter if adapter_name is None else adapter_name
        return checkpoint.adapter_state_dict(self._module, name, state_dict)

    # -- which act -----------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Configurations by adapter name."""
        return adapter_set(self._module).configs

    @property
    def active_adapters(self) -> Any:
        """Names of the adapters that act, in order (a list; calling it gives the list too)."""
        return _ActiveAdapters(adapter_set(self._module).selection.active)

    @property
    def active_adapter(self) -> str:
        """Name of the first active adapter, or '' when none is."""
        return next(iter(adapter_set(self._module).selection.active), "")

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Make adapters the active ones, in order, in constant time; see `set_requires_grad` for which train."""
        activation.set_adapter(self._module, adapter_name)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Let adapters train, or freeze them."""
        activation.set_requires_grad(self._module, adapter_names, requires_grad)

    def refresh_adapters(self) -> None:
        """Have what was computed from the weights computed anew: after edits in place through `.data`, which nothing
        shows. See `peftcore.injection.activation.refresh_adapters`."""
        activation.refresh_adapters(self._module)

    def disable_adapters(self) -> None:
        """Let no adapter act, in any thread, until `enable_adapters`: transformers' method of this name.

        Active adapters stay named by `active_adapters`, and an explicit route acts all the same. Raises MergeError
        while adapters are merged.
        """
        activation.switch_adapters(self._module, on=False)

    def enable_adapters(self) -> None:
        """Let the active adapters act again after `disable_adapters`."""
        activation.switch_adapters(self._module, on=True)

    def enable_peft_hotswap(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: transformers' way of swapping adapters needs HF PEFT's layers."""
        raise ConfigError(
            "enable_peft_hotswap prepares HF PEFT's layers, which this model does not have; read another adapter's "
            "weights into a loaded one by load_adapter_weights(directory, adapter_name), or use AdapterStore"
        )

    def disable_adapter(self) -> contextlib.AbstractContextManager[None]:
        """Context in which this thread's calls compute the base, merged or not.

        Raises RoutingError inside for `route` and `adapter_names` that name an adapter; and, with merged adapters,
        where another thread calls the model at the same time.
        """
        return activation.adapters_disabled(self._module)

    def route(self, adapters: Spec | Sequence[Spec]) -> contextlib.AbstractContextManager[Route]:
        """Context in which this thread's calls of the model go by a composition of adapters, or by one for each row.

        adapters: a name, None for the base, {name: weight}, a composition of `peftcore.composition`; or a list of these
        with one for each row of the batch (of `generate`, for each prompt). Other threads see nothing of it.
        Raises AdapterNameError, RoutingError.
        """
        return activation.routed(self._module, adapters)

    def __call__(self, *args: Any, adapter_names: Spec | Sequence[Spec] = None, **kwargs: Any) -> Any:
        """The model's own call, and so is `forward`; adapter_names: what `route` takes, for this call alone."""
        if adapter_names is None and _CALLERS_ROUTE not in self.__dict__:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with self.route(adapter_names) if adapter_names is not None else self.__dict__[_CALLERS_ROUTE]():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    # -- merging -------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the base weights; undone bit for bit by `unmerge_adapter`. See `peftcore.injection.merge`."""
        merge.merge_adapter(self._module, adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Put the base's own weights back, bit for bit."""
        merge.unmerge_adapter(self._module)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        """Fold adapters in for good; gives the plain model, with its own class again.

        progressbar: show one, layer by layer. safe_merge, adapter_names: see `merge_adapter`.
        """
        return _as_plain(merge.merge_and_unload(self._module, safe_merge, adapter_names, progressbar))

    def unload(self) -> Any:
        """Take the adapters out; gives the base model, with its own class and its own weights."""
        return _as_plain(merge.unload(self._module))

    def get_base_model(self) -> Any:
        """The model itself: adapters live inside it. (`unload` gives it without them.)"""
        return self

    # -- combining -----------------------------------------------------------------------------------------------

    def add_merged(
        self, adapter_name: str, weights: Mapping[str, float] | Composition, recipe: Recipe, rank: int | None = None
    ) -> MergeReport:
        """Add a LoRA that is a weighted combination of other adapters: `add_merged("m", {"a": 0.7, "b": 0.3},
        Recipe.ties(density=0.3), rank=16)`, or of a sum such as `0.7 * Only("a") + 0.3 * Only("b")`.
        See `peftcore.merging.add_merged`."""
        given = weights_of(weights) if isinstance(weights, Composition) else weights
        return combine.add_merged(self._module, adapter_name, given, recipe, rank)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> MergeReport:
        """The same by PEFT's names and with PEFT's meaning. See `peftcore.merging.add_weighted_adapter`."""
        svd = (svd_rank, svd_clamp, svd_full_matrices, svd_driver)
        return combine.add_weighted_adapter(
            self._module, adapters, weights, adapter_name, combination_type, *svd, density, majority_sign_method
        )

    # -- saving --------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **other: Any,
    ) -> None:
        """Write each adapter in PEFT's format: "default" into the directory itself, others into `<name>/`.

        Args:
            save_directory: made if need be. Each adapter's files replace its old ones together.
            safe_serialization: only True; other formats can run code when they are read.
            selected_adapters: names to save; None: all.
            save_embedding_layers: whether the base's input and output embeddings are saved too. "auto": those that
                the adapter targets by the names `embed_tokens` or `lm_head`, and both if the vocabulary was resized.
            is_main_process: False writes nothing, and only takes part in gathering sharded tensors.
            path_initial_model_for_weight_conversion: only None; see `peftcore.conversion.convert_to_lora`.
            state_dict: the model's, to take the values from; None: its own parameters.
            other: transformers' further options, at the values that mean one whole local file.

        Raises:
            ConfigError: a value that cannot be honoured. TypeError: an unknown option. CheckpointError: a state
                dictionary that is not this model's.
        """
        _check_saving(safe_serialization, path_initial_model_for_weight_conversion, other)
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        adapter_set(self._module).require(*names)
        for name in names:
            root = Path(save_directory)
            directory = root if name == "default" else root / name
            checkpoint.save_adapter(
                self._module, name, directory, save_embedding_layers, state_dict, writes=is_main_process
            )

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Say in a directory's model card that it holds an adapter, and of which base; Trainer's push asks for it."""
        checkpoint.update_model_card(self._module, Path(output_dir))

    # -- training ------------------------------------------------------------------------------------------------

    def adapter_regularizer(self) -> Tensor | None:
        """Sum of the active adapters' regularisers, to add to the loss once per optimiser step; None for none."""
        adapters = adapter_set(self._module)
        terms = [
            term
            for name in adapters.selection.active
            if (term := adapters.kinds[name].regularizer(adapters.configs[name], adapters.of_method(name))) is not None
        ]
        return torch.stack(terms).sum() if terms else None

    def on_optimizer_step(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """To be called after each optimiser step and before zero_grad; step counts from 1.

        optimizer: given, a method may shrink parameters together with their moments (AdaLoRA's final budget). Under
        DistributedDataParallel, which averages the gradients of those it was made with, the model has to be wrapped
        anew after that, as AdapterTrainer does; a loop of one's own gives None, and what is dropped is masked.
        """
        adapters = adapter_set(self._module)
        for name in adapters.selection.active:
            own = adapters.of_method(name)
            adapters.kinds[name].on_step(adapters.configs[name], own, step, optimizer)

    def adapter_state(self) -> dict[str, Tensor]:
        """Training state that is not in the saved adapter, for checkpoints: {"name/path/key": tensor}."""
        adapters = adapter_set(self._module)
        return {
            f"{name}/{path}/{key}": tensor
            for name in adapters.configs
            for path, adapter in adapters.adapters(name).items()
            for key, tensor in adapter.training_state().items()
        }

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `adapter_state` gave."""
        parts: dict[tuple[str, str], dict[str, Tensor]] = {}
        for whole, tensor in state.items():
            name, path, key = whole.split("/")
            parts.setdefault((name, path), {})[key] = tensor
        for (name, path), values in parts.items():
            adapter_set(self._module).adapters(name)[path].load_training_state(values)

    def adapter_ranks(self, adapter_name: str | None = None) -> dict[str, int]:
        """{path of a layer: its adapter's rank now}; of one adapter, the first active one if None. Layers of methods
        without ranks are left out."""
        adapters = adapter_set(self._module)
        names = adapters.selection.active[:1] if adapter_name is None else (adapter_name,)
        found = {path: adapter.rank for name in names for path, adapter in adapters.adapters(name).items()}
        return {path: rank for path, rank in found.items() if rank is not None}

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameter counts; of the adapters, trainable ones count while they are active."""
        adapters = adapter_set(self._module)
        idle = [n for n in adapters.configs if n not in adapters.selection.active]
        unused = {id(p) for name in idle for p in adapters.parameters(name)}
        counts = [(p.requires_grad and id(p) not in unused, _count(p)) for p in self._module.parameters()]
        return sum(count for trains, count in counts if trains), sum(count for _, count in counts)

    def print_trainable_parameters(self) -> None:
        """Print the counts of `get_nb_trainable_parameters` in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # -- being a model ---------------------------------------------------------------------------------------------

    @property
    def _module(self) -> nn.Module:
        assert isinstance(self, nn.Module)
        return self

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names that DistributedDataParallel, which reads this, need not send: each process has the same base.

        Those that `DistributedDataParallel._set_params_and_buffers_to_ignore_for_model` was given are among them.
        """
        return [*untouched_names(self._module), *vars(self).get(_DDP_IGNORED, ())]

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: Iterable[str]) -> None:
        vars(self)[_DDP_IGNORED] = list(names)

    def _replicate_for_data_parallel(self) -> Any:
        """A replica, which DataParallel calls in a thread of its own, computes by the route that is open here."""
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        selection = adapter_set(self._module).selection
        if (route := selection.route) is not None:
            replica.__dict__[_CALLERS_ROUTE] = lambda: selection.routed(copy.copy(route))
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made at run time, so a pickle names the class below it and makes ours again
        return _remade, (_plain_class(type(self)),), self.__dict__


_WHOLE_LOCAL_FILE: dict[str, tuple[Any, ...]] = {
    "max_shard_size": ("50GB", "5GB", None),
    "push_to_hub": (False, None),
    "token": (None,),
    "variant": (None,),
    "save_peft_format": (True,),
    "save_original_format": (True,),
    "distributed_checkpoint": (False,),
}
"""{option of transformers' `save_pretrained`: values at which it asks for nothing but what is done anyway}."""


def _check_saving(safe_serialization: Any, initial: Any, other: Mapping[str, Any]) -> None:
    if safe_serialization is not True:
        raise ConfigError(
            f"save_pretrained: safe_serialization must be True, since adapters are always saved as safetensors; got "
            f"{safe_serialization!r:.200}. Names of adapters are selected_adapters="
        )
    if initial is not None:
        raise ConfigError(
            "save_pretrained: path_initial_model_for_weight_conversion is not read; to get a plain LoRA for the "
            "original base, use peftcore.conversion.convert_to_lora and save its result"
        )
    for name, value in other.items():
        if name not in _WHOLE_LOCAL_FILE:
            raise TypeError(f"save_pretrained() has no option {name!r}")
        if value not in _WHOLE_LOCAL_FILE[name]:
            raise ConfigError(
                f"save_pretrained: {name}={value!r:.200} cannot be had: an adapter is saved as one local file in "
                "PEFT's format; leave it out (push_to_hub is a method of its own)"
            )


def _count(parameter: nn.Parameter) -> int:
    """Elements of a parameter; a 4-bit one packs two into each byte."""
    if type(parameter).__name__ == "Params4bit" and parameter.dtype == torch.uint8:
        return 2 * parameter.numel()
    return parameter.numel()


@cache
def _adapted_class(plain: type) -> type:
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    extra = {"generate": _generate, "create_masks_for_generate": _masks} if hasattr(plain, "generate") else {}
    return type(
        plain.__name__,
        (PeftModel, plain),
        {**names, **extra, "forward": _forward_of(plain), "_hf_peft_config_loaded": True},
    )


def _forward_of(plain: Any) -> Any:
    """The class's own `forward`, under its own signature, for an adapted model.

    PyTorch leaves hooks out where `forward` is called directly. What adapters are told of by hooks would then be lost
    in silence, so such a call becomes the model's own call.
    """

    @wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if forwarding.needs_call(self, kwargs):
            return self(*args, **kwargs)
        return plain.forward(self, *args, **kwargs)

    return forward


def _generate(self: Any, *args: Any, adapter_names: Spec | Sequence[Spec] = None, **kwargs: Any) -> Any:
    route = contextlib.nullcontext() if adapter_names is None else self.route(adapter_names)
    with route, unchanging_weights(), forwarding.generation(self, kwargs) as own:
        return _plain_class(type(self)).generate(self, *args, **own)


def _masks(self: Any, **given: Any) -> Any:
    """What `generate` makes for a static cache. Where a prompt is to come in, the forward makes it afterwards."""
    if adapter_set(self).prompts_in_effect():
        return given["attention_mask"]
    from transformers.masking_utils import create_masks_for_generate

    return getattr(super(type(self), self), "create_masks_for_generate", create_masks_for_generate)(**given)


def _plain_class(adapted: type) -> type:
    return adapted.__mro__[adapted.__mro__.index(PeftModel) + 1]


def _remade(plain: type) -> Any:
    teach_trainer()
    return object.__new__(_adapted_class(plain))


def _as_peft_model(model: nn.Module) -> Any:
    if not isinstance(model, PeftModel):
        model.__class__ = _adapted_class(type(model))
    teach_trainer()
    return model


def _as_plain(model: nn.Module) -> Any:
    if isinstance(model, PeftModel):
        model.__class__ = _plain_class(type(model))
    return model


def get_peft_model(model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default") -> Any:
    """Add an adapter to a model, in place, make it the active one, and give the model back as a `PeftModel`.

    The base is frozen and the adapter trains (unless `inference_mode`). An adapter that has this name is
    replaced, with a warning. On an error the model is as it was.
    As with PEFT, the adapter is in training mode, so its dropout acts at once; the base stays in the mode it was in.
    Raises ConfigError, TargetError or AdapterNameError.
    """
    inject.inject_adapter_in_model(peft_config, model, adapter_name)
    return _as_peft_model(model)


def _load_onto(
    model: nn.Module,
    model_id: str | Path,
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: PeftConfig | None = None,
) -> Any:
    adapters = checkpoint.load_adapter(model, Path(model_id), adapter_name, is_trainable, config)
    adapters.selection.active = (adapter_name,)
    adapted = _as_peft_model(model)
    return adapted if is_trainable else adapted.eval()


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Make a 4- or 8-bit model ready to train adapters on: frozen, 16-bit remainders in float32, checkpointing on.

    Checkpointing is non-reentrant, and the embeddings' output requires grad so that it reaches the adapters.
    """
    for parameter in model.parameters():
        parameter.requires_grad = False
        if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter) is nn.Parameter:
            parameter.data = parameter.data.float()
    if use_gradient_checkpointing:
        kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if kwargs["use_reentrant"]:
            warnings.warn(
                "reentrant checkpointing gives no gradients through a frozen base; use_reentrant=False",
                stacklevel=2,
            )
        transformer: Any = model
        transformer.activation_checkpointing_enable(kwargs)
        transformer.enable_input_require_grads()
    return model
