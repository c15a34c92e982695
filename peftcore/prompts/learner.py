"""The contract of a prompt learner: what the model reads besides its text is learned, the model stays as it is.

A learner trains `embedding`, from which `encoded` computes what the model reads. PEFT's directory holds that result
alone. So a learner with an encoder between the two keeps what training goes on with in `training_state`, a file of
its own; a directory without that file can be read, but not trained further.
"""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftcore.config import TaskType, options_at
from peftcore.errors import CheckpointError

EMBEDDINGS = "prompt_embeddings"
"""PEFT's name for what the model reads."""


class PromptLearner(nn.Module):
    """One prompt of one name for a whole model. Shapes: n virtual tokens, d their width."""

    layer_kinds: ClassVar[frozenset[str]] = frozenset({"model"})
    exclusive: ClassVar[bool] = True
    """Whether it feeds the model's input, which one adapter at a time can do."""
    defines_loss: ClassVar[bool] = False
    """Whether the loss is more than that of predicting each word of the text from those before it."""

    generate_arguments: ClassVar[dict[str, Any]] = {}
    """Arguments that `generate` is given while this acts."""

    embedding: Tensor

    def __init__(self, config: Any, model: nn.Module):
        """Make the parameters for `model`; `config` is what `completed` gave."""
        super().__init__()
        self.config = config

    def extra_repr(self) -> str:
        """The method's options: numbers that are not zero, and what is not at its default."""
        return ", ".join(f"{name}={value}" for name, value in options_at(self.config).items())

    @classmethod
    def completed(cls, config: Any, model: nn.Module) -> Any:
        """A copy of the configuration with the model's sizes; raises ConfigError for a model that cannot have it."""
        raise NotImplementedError(f"{cls.__name__} must define completed")

    def reset_parameters(self, model: nn.Module) -> None:
        """Set the start state of a prompt that is not read from disk."""
        raise NotImplementedError(f"{type(self).__name__} must define reset_parameters")

    def attach(self, model: nn.Module, share: Any) -> None:
        """Called when the prompt is put into the model; `share(rows)` tells how much of it acts at that moment: a
        number, or (rows,)."""

    def detach(self, model: nn.Module) -> None:
        """Undo `attach`."""

    # -- forward ---------------------------------------------------------------------------------------------

    @classmethod
    def forward_arguments(cls, config: Any) -> frozenset[str] | None:
        """Further arguments, such as "task_ids", that the adapted model's call and `generate` take."""
        return frozenset()

    def before_forward(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Change the model's arguments, given by name, before its forward."""

    def before_encoder(self, encoder: nn.Module, inputs: dict[str, Any]) -> None:
        """The same for the encoder of an encoder-decoder model, which `generate` calls alone."""

    def after_forward(self, outputs: Any) -> Any:
        """The outputs that the caller gets."""
        return outputs

    # -- disk ------------------------------------------------------------------------------------------------

    def encoded(self) -> Tensor:
        """What the model reads, as it stands on PEFT's disk."""
        return self.embedding

    def has_encoder(self) -> bool:
        """Whether training needs more than `encoded`."""
        return False

    def drop_encoder(self, encoded: Tensor) -> None:
        """Keep what the model reads and nothing to train it with."""
        raise NotImplementedError(f"{type(self).__name__} has an encoder and must define drop_encoder")

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """What is saved: {PEFT's whole key: tensor}; without dropout, also in the middle of training."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return {EMBEDDINGS: self.encoded().detach()}
        finally:
            self.train(training)

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy saved tensors in, where there is no encoder; names and shapes have been checked."""
        self.embedding.copy_(tensors[EMBEDDINGS])

    def training_state(self) -> dict[str, Tensor]:
        """What resuming needs beyond `checkpoint_tensors`."""
        return dict(self.state_dict()) if self.has_encoder() else {}

    def read(self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], trainable: bool) -> None:
        """Take a directory's tensors; `state` is {} where it holds no training state.

        Raises CheckpointError if that is what training needs, or is not what the tensors were computed from.
        """
        if not self.has_encoder():
            self.load_checkpoint_tensors(tensors)
        elif state:
            self._load_encoder(tensors, state)
        elif trainable:
            raise CheckpointError(
                f"{type(self).__name__}: this directory holds the computed prompt without the encoder it comes from, "
                "so training cannot go on; load it with is_trainable=False, or save it with peftcore"
            )
        else:
            self.drop_encoder(tensors[EMBEDDINGS])

    def _load_encoder(self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        own = self.state_dict()
        if {k: t.shape for k, t in own.items()} != {k: t.shape for k, t in state.items()}:
            raise CheckpointError(f"the saved training state is not that of this {type(self).__name__} configuration")
        before = {key: tensor.clone() for key, tensor in own.items()}
        self.load_state_dict(dict(state))
        ours, saved = self.checkpoint_tensors()[EMBEDDINGS], tensors[EMBEDDINGS]
        if (ours.cpu() - saved).abs().max() > 1e-2 * saved.abs().max():
            self.load_state_dict(before)
            raise CheckpointError(f"the saved training state does not belong to the {EMBEDDINGS} beside it")

    # -- what adapters of layers have and prompts do without -------------------------------------------------

    @classmethod
    def config_to_save(cls, config: Any, adapters: Mapping[str, Any]) -> Any:
        """The configuration to write."""
        return config

    @classmethod
    def regularizer(cls, config: Any, adapters: Mapping[str, Any]) -> Tensor | None:
        """A scalar to add to the loss; None for none."""
        return None

    @classmethod
    def on_step(cls, config: Any, adapters: Mapping[str, Any], step: int, optimizer: Any) -> None:
        """Work between optimiser steps."""


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a transformers model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def is_causal(model: nn.Module) -> bool:
    """Whether tokens attend to those before them only."""
    generates = getattr(model, "can_generate", None)
    said = any(getattr(module, "is_causal", False) is True for module in model.modules())
    return said or (callable(generates) and bool(generates()))


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return argument in inspect.signature(model.forward).parameters


def model_sizes(config: Any, model: nn.Module) -> dict[str, int]:
    """The sizes that PEFT writes for every prompt: layers, heads, and 2 submodules for an encoder and a decoder."""
    text = model.config.get_text_config() if hasattr(model, "config") else None  # type: ignore[operator,union-attr]
    submodules = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1
    sizes = {
        "num_transformer_submodules": config.num_transformer_submodules or submodules,
        "num_layers": config.num_layers or getattr(text, "num_hidden_layers", None),
        "num_attention_heads": config.num_attention_heads or getattr(text, "num_attention_heads", None),
    }
    return {key: value for key, value in sizes.items() if value is not None}
