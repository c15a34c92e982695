"""Saving of adapters: to a directory, to the hub, and as a state dict."""

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from peftcore.errors import ConfigError
from peftcore.files import hub
from peftcore.injection.adapter_set import adapter_set
from peftcore.model.adapted_module import AdaptedModule
from peftcore.storage import checkpoint
from peftcore.storage.initial_adapter import start_subtracted

_ONE_SHARD = ("50GB", "5GB", None)
"""Values of `max_shard_size` that are the defaults of libraries."""
_WHOLE_LOCAL_FILE: dict[str, tuple[Any, ...]] = {
    "push_to_hub": (False, None),
    "token": (None,),
    "variant": (None,),
    "save_peft_format": (True,),
    "save_original_format": (True,),
    "distributed_checkpoint": (False,),
}
"""{option of transformers' `save_pretrained`: supported values, which change nothing}"""


class SavingMethods(AdaptedModule):
    """Methods of `PeftModel` that save adapters."""

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the tensors that `save_pretrained` writes for one adapter.

        Args:
            adapter_name: the adapter; None for the first active one.
            state_dict: a state dict of the model to take the values from; None for the model's own parameters.

        Returns:
            {PEFT's key without `base_model.model.`: tensor}, without embeddings of the base.

        Raises:
            AdapterNameError: the adapter is not loaded.
            CheckpointError: the state dict lacks parameters of the adapter.
        """
        name = self.active_adapter if adapter_name is None else adapter_name
        return checkpoint.adapter_state_dict(self._module, name, state_dict)

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
        """Save each adapter in PEFT's format: "default" in the directory itself, others in `<name>/`.

        The directory itself gets a model card, unless it has one.

        Args:
            save_directory: the directory; created if it does not exist. An adapter's files are replaced together.
            safe_serialization: only True; other formats can run code when they are loaded.
            selected_adapters: names of the adapters to save; None for all.
            save_embedding_layers: whether to save the base's input and output embeddings, too. "auto": those that the
                adapter targets by the names `embed_tokens` or `lm_head`, and both if the vocabulary was resized.
            is_main_process: False writes nothing, and only takes part in gathering sharded tensors.
            path_initial_model_for_weight_conversion: a LoRA as it was saved before training. Each saved LoRA then
                subtracts it, as a plain LoRA of rank 2r for the original base. LoRAs that started from the base's
                weights in this process (PiSSA, OLoRA, CorDA) are always saved so.
            state_dict: a state dict of the model to take the values from; None for the model's own parameters.
            other: further options of transformers, only with values that mean one whole local file; and
                `save_function` and `max_shard_size`, which only give a warning.

        Raises:
            ConfigError: an option has a value that is not supported.
            TypeError: an option is unknown.
            CheckpointError: the state dict lacks parameters of an adapter, or the initial adapter does not fit.
            AdapterNameError: a name is not loaded.
        """
        _check_saving(safe_serialization, other)
        initial = path_initial_model_for_weight_conversion
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        adapter_set(self._module).require(*names)
        root = Path(save_directory)
        for name in names:
            directory = root if name == "default" else root / name
            with contextlib.nullcontext() if initial is None else start_subtracted(self._module, name, initial):
                checkpoint.save_adapter(
                    self._module, name, directory, save_embedding_layers, state_dict, writes=is_main_process
                )
        if is_main_process and names and not (root / checkpoint.MODEL_CARD).exists():  # no adapter named "default"
            checkpoint.update_model_card(self._module, root)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> Any:
        """Upload the adapters, as `save_pretrained` writes them, with a model card, in one commit.

        Args:
            repo_id: "name" or "owner/name"; the repository is created if it does not exist.
            commit_message: first line of the commit's message; None for "Upload model".
            commit_description: the rest of the message.
            private: True for a private repository, if it is new; None for the owner's default.
            token: a token; None for the stored one.
            revision: branch to commit to, created if it does not exist.
            create_pr: True opens a pull request in place of a commit.
            max_shard_size: only the default, because an adapter is saved as one file.
            tags: tags to add to the model card.

        Returns:
            `huggingface_hub.CommitInfo`: a string, the commit's URL, with `pr_url` for a pull request.

        Raises:
            CheckpointError: the hub refuses the upload or cannot be reached; nothing is changed there.
            ConfigError: an option has a value that is not supported.
        """
        return hub.push(
            repo_id,
            self.save_pretrained,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            max_shard_size=max_shard_size,
            tags=tags,
        )

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write library, base model and tags of the adapters into a directory's model card; used by Trainer's push.

        Args:
            output_dir: the directory; without a model card, it gets a new one.
        """
        checkpoint.update_model_card(self._module, Path(output_dir))


def _check_saving(safe_serialization: Any, other: Mapping[str, Any]) -> None:
    if safe_serialization is not True:
        raise ConfigError(
            f"save_pretrained: safe_serialization must be True, since adapters are always saved as safetensors; got "
            f"{safe_serialization!r:.200}. Names of adapters are selected_adapters="
        )
    for name, value in other.items():
        if name == "save_function":
            warnings.warn(
                "save_pretrained: save_function is not called, because all files of an adapter are replaced together; "
                "is_main_process decides which process writes",
                stacklevel=3,
            )
            continue
        if name == "max_shard_size":
            if value not in _ONE_SHARD:
                warnings.warn(
                    f"save_pretrained: max_shard_size={value!r:.200} has no effect, because an adapter is saved as one "
                    "file",
                    stacklevel=3,
                )
            continue
        if name not in _WHOLE_LOCAL_FILE:
            raise TypeError(f"save_pretrained() has no option {name!r}")
        if value not in _WHOLE_LOCAL_FILE[name]:
            raise ConfigError(
                f"save_pretrained: {name}={value!r:.200} is not supported: an adapter is saved as one local file in "
                "PEFT's format; leave it out (push_to_hub is a method of its own)"
            )
