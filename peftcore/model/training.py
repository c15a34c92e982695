"""Training of adapters: regularisers, updates and state of a step, and the preparation of a quantised model."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.bases import has_quantized_layers, has_uncast_inputs
from peftcore.injection.adapter_set import adapter_set
from peftcore.model.adapted_module import AdaptedModule


class TrainingMethods(AdaptedModule):
    """Methods of `PeftModel` that a training loop calls."""

    def adapter_regularizer(self) -> Tensor | None:
        """Return the sum of the active adapters' regularisers, a scalar; None if there is none.

        Add it to each step's loss. The loss that the model returns (`outputs.loss`) contains AdaLoRA's already.
        """
        return self._sum_of_regularizers(adapter_set(self._module).selection.active)

    def _sum_of_regularizers(self, names: Iterable[str]) -> Tensor | None:
        adapters = adapter_set(self._module)
        terms = [
            term
            for name in names
            if (term := adapters.kinds[name].regularizer(adapters.configs[name], adapters.of_method(name))) is not None
        ]
        return torch.stack(terms).sum() if terms else None

    def _get_kasa_loss(self, adapter_names: str | list[str] | None = None) -> Tensor | float:
        """Return the sum of the regularisers of adapters with `kasa_config`; 0.0 without one.

        Args:
            adapter_names: the adapters; None for the active ones.
        """
        return self._regularizers_with("kasa_config", adapter_names)

    def _get_monteclora_loss(self, adapter_names: str | list[str] | None = None) -> Tensor | float:
        """Return the sum of the regularisers of adapters with `monteclora_config`; 0.0 without one.

        Args:
            adapter_names: the adapters; None for the active ones.
        """
        return self._regularizers_with("monteclora_config", adapter_names)

    def _regularizers_with(self, option: str, adapter_names: str | list[str] | None) -> Tensor | float:
        """Return the sum of the regularisers of those adapters whose configuration has an option; 0.0 without one."""
        adapters = adapter_set(self._module)
        names = adapters.selection.active if adapter_names is None else adapter_names
        names = [names] if isinstance(names, str) else names
        total = self._sum_of_regularizers(name for name in names if getattr(adapters.configs.get(name), option, None))
        return 0.0 if total is None else total

    def on_optimizer_step(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Run the active adapters' update of a training step, such as AdaLoRA's rank allocation.

        Call this method after each optimiser step and before `zero_grad`; `AdapterTrainer` calls it by itself.

        Args:
            step: number of the step, from 1.
            optimizer: the optimiser, with which a method may prune parameters together with their optimiser state. A
                model in DistributedDataParallel must be wrapped again after pruning. None: the method masks values
                instead of pruning.
        """
        adapters = adapter_set(self._module)
        for name in adapters.selection.active:
            adapters.kinds[name].on_step(adapters.configs[name], adapters.of_method(name), step, optimizer)

    def adapter_state(self) -> dict[str, Tensor]:
        """Return the training state that `save_pretrained` leaves out, for checkpoints: {"name/path/key": tensor}."""
        adapters = adapter_set(self._module)
        return {
            f"{name}/{path}/{key}": tensor
            for name in adapters.configs
            for path, adapter in adapters.adapters(name).items()
            for key, tensor in adapter.training_state().items()
        }

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state that `adapter_state` returned.

        Args:
            state: {"name/path/key": tensor}.
        """
        parts: dict[tuple[str, str], dict[str, Tensor]] = {}
        for full_key, tensor in state.items():
            name, path, key = full_key.split("/")
            parts.setdefault((name, path), {})[key] = tensor
        for (name, path), values in parts.items():
            adapter_set(self._module).adapters(name)[path].load_training_state(values)

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:
        """Make the output of a model's input embeddings require gradients, so that they reach adapters of its blocks.

        Args:
            model: a transformers model; changed in place.

        Returns:
            The model.
        """
        model.enable_input_require_grads()
        return model


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Prepare a 4- or 8-bit model for training adapters.

    All parameters are frozen, 16-bit ones are cast to float32, and gradient checkpointing is enabled if the model is
    quantised, as in HF PEFT. Checkpointing is non-reentrant by default. The embeddings' output then requires grad,
    so that gradients also reach the adapters with reentrant checkpointing. As in HF PEFT, nothing is cast beside
    torchao's, HQQ's, GPTQ's and AWQ's layers, because they multiply inputs of their own dtype.

    Args:
        model: the quantised model; changed in place.
        use_gradient_checkpointing: True enables gradient checkpointing of a quantised model; call
            `gradient_checkpointing_enable` for others.
        gradient_checkpointing_kwargs: options of `torch.utils.checkpoint.checkpoint`.
        auto_clear_cache: True returns the memory of the former 16-bit parameters to the device after the cast.

    Returns:
        The model.
    """
    casts = not has_uncast_inputs(model)
    for parameter in model.parameters():
        parameter.requires_grad = False
        if casts and parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter) is nn.Parameter:
            parameter.data = parameter.data.float()
    if auto_clear_cache and torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    if use_gradient_checkpointing and has_quantized_layers(model):
        transformer: Any = model
        transformer.activation_checkpointing_enable({"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})
        transformer.enable_input_require_grads()
    return model
