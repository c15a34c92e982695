"""Facts about the adapters of a model: configurations, status, ranks, numbers of parameters and prompts."""

from typing import Any

import torch
from torch import Tensor, nn

from peftcore.bases import GgufLinear
from peftcore.config import PeftConfig
from peftcore.errors import ConfigError
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from peftcore.injection.tuner_model import tuner_model
from peftcore.merging.convertible import is_convertible
from peftcore.model.adapted_module import AdaptedModule


class InspectionMethods(AdaptedModule):
    """Methods of `PeftModel` that describe its adapters, and change nothing."""

    @property
    def active_peft_config(self) -> PeftConfig:
        """Configuration of the first active adapter. Raises ConfigError if no adapter is active."""
        if not self.active_adapter:
            raise ConfigError(f"no adapter is active; call set_adapter with one of {', '.join(self.peft_config)}")
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> str:
        """Method of the first adapter, such as `PeftType.LORA`, which is a string; '' without an adapter."""
        return next((config.peft_type for config in self.peft_config.values()), "")

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that adapters train in full; None if there are none."""
        names = {name for config in self.peft_config.values() for name in config.modules_to_save or ()}
        return names or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """Dtype of a transformers model; None for other models."""
        return getattr(self, "dtype", None)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """Return the status of each layer with adapters; see `peftcore.get_layer_status`."""
        return get_layer_status(self._module)

    def get_model_status(self) -> TunerModelStatus:
        """Return the status of all layers with adapters together; see `peftcore.get_model_status`."""
        return get_model_status(self._module)

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the layers with adapters, without raw parameters."""
        return tuner_model(self._module).targeted_module_names

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Paths of the raw parameters with adapters."""
        return tuner_model(self._module).targeted_parameter_names

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True if `peftcore.convert_to_lora` can express an adapter as a LoRA, exactly or approximately.

        Args:
            adapter_name: the adapter.

        Raises:
            AdapterNameError: the adapter is not loaded.
        """
        return is_convertible(self._module, adapter_name)

    def adapter_ranks(self, adapter_name: str | None = None) -> dict[str, int]:
        """Return the current ranks of one adapter.

        Args:
            adapter_name: the adapter; None for the first active one.

        Returns:
            {path of a layer: rank}, without layers of methods that have no rank.
        """
        adapters = adapter_set(self._module)
        names = adapters.selection.active[:1] if adapter_name is None else (adapter_name,)
        ranks = {path: adapter.rank for name in names for path, adapter in adapters.adapters(name).items()}
        return {path: rank for path, rank in ranks.items() if rank is not None}

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of (trainable, all) parameters; inactive adapters do not count as trainable."""
        adapters = adapter_set(self._module)
        idle = [n for n in adapters.configs if n not in adapters.selection.active]
        unused = {id(p) for name in idle for p in adapters.parameters(name)}
        gguf = [module for module in self._module.modules() if isinstance(module, GgufLinear)]
        packed = {id(layer.weight): layer.in_features * layer.out_features for layer in gguf}
        counts = [
            (p.requires_grad and id(p) not in unused, packed.get(id(p), _count(p))) for p in self._module.parameters()
        ]
        return sum(count for trains, count in counts if trains), sum(count for _, count in counts)

    def print_trainable_parameters(self) -> None:
        """Print the numbers of `get_nb_trainable_parameters` in PEFT's format."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """Return what the active prompt adds to a call.

        Args:
            batch_size: rows (count).
            task_ids: the task of each row (batch_size,), for multitask prompt tuning.
            max_cache_len: only None; caches of fixed size get room for the prompt by themselves.

        Returns:
            The virtual tokens (batch_size, tokens, embedding width); for prefix tuning, a cache with the prefix.

        Raises:
            ConfigError: no adapter is active, the active one is no prompt, or an argument does not fit it.
        """
        if max_cache_len is not None:
            raise ConfigError("get_prompt: max_cache_len must be None; caches get room for the prompt by themselves")
        adapters = adapter_set(self._module)
        method = self.active_peft_config.method
        prompt = adapters.prompt(self.active_adapter)
        if prompt is None:
            raise ConfigError(
                f"get_prompt: the active adapter {self.active_adapter!r} is {method}, which "
                "adds no prompt to the model's inputs; call set_adapter with the name of a prompt"
            )
        return prompt.for_rows(self._module, batch_size, {} if task_ids is None else {"task_ids": task_ids})

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """Return the tensor that a prompt method saves: (tokens, token_dim) for prompt tuning.

        Args:
            adapter_name: the adapter.

        Raises:
            AdapterNameError: the adapter is not loaded.
            ConfigError: the adapter has no prompt embeddings.
        """
        adapters = adapter_set(self._module)
        adapters.require(adapter_name)
        prompt = adapters.prompt(adapter_name)
        tensors = {} if prompt is None else prompt.checkpoint_tensors()
        if "prompt_embeddings" not in tensors:
            raise ConfigError(
                f"get_prompt_embedding_to_save: {adapter_name!r} is {self.peft_config[adapter_name].method}, which "
                "has no prompt embeddings; call get_adapter_state_dict for the tensors of any adapter"
            )
        return tensors["prompt_embeddings"]

    @property
    def prompt_encoder(self) -> nn.ModuleDict:
        """The prompts by adapter name, under HF PEFT's name of this attribute; only with a prompt method."""
        if not len(prompts := adapter_set(self._module).prompts):
            raise AttributeError("prompt_encoder")
        return prompts


def _count(parameter: nn.Parameter) -> int:
    """Return the number of elements of a parameter; a 4-bit parameter packs two into each byte."""
    if type(parameter).__name__ == "Params4bit" and parameter.dtype == torch.uint8:
        return 2 * parameter.numel()
    return parameter.numel()
