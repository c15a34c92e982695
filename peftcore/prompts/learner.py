"""The interface of prompt learners: a learner trains a prompt and leaves the model's weights unchanged.

A learner trains `embedding`, and `encoded` computes the prompt from it. HF PEFT stores only the computed prompt. A
learner with an encoder between the two, such as P-tuning's MLP, also saves `training_state` in a separate file. Without
that file the prompt can be loaded for inference, but not trained further.

Shapes: n virtual tokens, d embedding width, B rows.
"""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftcore.config import TaskType, options_at
from peftcore.errors import CheckpointError, ConfigError
from peftcore.files import PROMPT_STATE

EMBEDDINGS = "prompt_embeddings"
"""HF PEFT's checkpoint key of the computed prompt."""


def embedding_of(values: Tensor) -> nn.Embedding:
    """Return an embedding whose `weight` (n, d) is a new parameter with these values, not a copy of them."""
    count, width = values.shape
    return nn.Embedding(count, width, _weight=values)


class PromptLearner(nn.Module):
    """The prompt of one adapter. The prompt is for the whole model, while an `Adapter` is for one layer.

    Args:
        config: The configuration that `completed` returned.
        model: The model that the prompt is for.
    """

    layer_kinds: ClassVar[frozenset[str]] = frozenset({"model"})
    """Shown in the table of methods: a prompt is for the whole model, not for kinds of layers."""
    exclusive: ClassVar[bool] = True
    """True if the prompt is part of the model's input. Each row of a batch can have only one such prompt."""
    adapts_blocks: ClassVar[bool] = False
    """True if the method changes the model's blocks and adds no tokens; keys on disk begin with `base_model.model.`."""
    defines_loss: ClassVar[bool] = False
    """True if the loss with the prompt is not the next-token cross entropy of the text's tokens alone, or the prompt
    depends on the labels. The model's forward then gets the labels and computes the loss, without the faster code for
    next-token cross entropy.
    """

    acts_at_positions: ClassVar[bool] = False
    """True if the method acts at positions of the text. The rows of its calls can then have no virtual tokens."""

    generate_arguments: ClassVar[dict[str, Any]] = {}
    """Arguments that `generate` receives while the prompt is active."""

    embedding: Any
    """The module whose `weight` is trained, as in HF PEFT; `vectors` reads it."""

    def __init_subclass__(cls, **kwargs: Any):
        """Check that a saved prompt will be read back as what it was.

        Raises:
            TypeError: the class defines `encoded`, and no method that reads its result.
        """
        super().__init_subclass__(**kwargs)
        base = PromptLearner
        if cls.encoded is base.encoded or cls.load_checkpoint_tensors is not base.load_checkpoint_tensors:
            return
        if cls.has_encoder is base.has_encoder or cls.drop_encoder is base.drop_encoder:
            raise TypeError(
                f"{cls.__name__} defines encoded, so its saved prompt would be read into vectors and encoded again; "
                "define has_encoder and drop_encoder as well, or load_checkpoint_tensors"
            )

    def __init__(self, config: Any, model: nn.Module):
        super().__init__()
        self.config = config

    def extra_repr(self) -> str:
        """Return the options of the configuration that differ from their defaults, for `repr`."""
        return ", ".join(f"{name}={value}" for name, value in options_at(self.config).items())

    @classmethod
    def completed(cls, config: Any, model: nn.Module) -> Any:
        """Return a copy of the configuration with the model's sizes filled in.

        Args:
            config: The user's configuration.
            model: The model that the prompt is for.

        Raises:
            ConfigError: The model does not support this prompt method.
        """
        raise NotImplementedError(f"{cls.__name__} must define completed")

    def reset_parameters(self, model: nn.Module) -> None:
        """Set the initial values of a new prompt."""
        raise NotImplementedError(f"{type(self).__name__} must define reset_parameters")

    def attach(self, model: nn.Module, share: Any) -> None:
        """Register hooks when the prompt is added to a model; the default does nothing.

        Args:
            model: The model.
            share: A function share(B) that returns the weight of the prompt's effect in the current call of B rows: 1
                if the prompt is active, 0 if not, or a tensor (B,) with one weight per row.
        """

    def detach(self, model: nn.Module) -> None:
        """Remove the hooks of `attach`."""

    # -- forward ---------------------------------------------------------------------------------------------

    @classmethod
    def forward_arguments(cls, config: Any) -> frozenset[str] | None:
        """Return additional arguments, such as "task_ids", that the adapted model's call and `generate` accept.

        The result has the meaning of the result of `Adapter.forward_arguments`.
        """
        return frozenset()

    def before_forward(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Add the prompt to the arguments of a model call.

        Args:
            model: The model.
            inputs: The call's arguments by name; changed in place.
        """

    def begin_generation(self, arguments: Mapping[str, Any]) -> None:
        """Note the text that `generate` continues; called before the model's first call.

        Args:
            arguments: The arguments of `generate` that are not None; a positional text is in `input_ids`.
        """

    def end_generation(self) -> None:
        """Forget what `begin_generation` has noted; called when `generate` returns or fails."""

    def for_rows(self, model: nn.Module, rows: int, inputs: dict[str, Any]) -> Any:
        """Return the prompt for one call: virtual tokens, or a cache that holds the prefix.

        Args:
            model: The model.
            rows: Number of rows.
            inputs: The additional arguments of the call by name, such as "task_ids".

        Raises:
            ConfigError: The method adds nothing to the inputs, or does not take one of the arguments.
        """
        raise ConfigError(f"{type(self).__name__} adds nothing to the model's inputs, so there is no prompt to return")

    def check_arguments(self, inputs: dict[str, Any]) -> None:
        """Raise ConfigError unless the method takes all of these arguments."""
        if others := inputs.keys() - (self.forward_arguments(self.config) or frozenset()):
            raise ConfigError(f"{type(self).__name__} takes no {', '.join(sorted(others))}; leave it out")

    def before_encoder(self, encoder: nn.Module, inputs: dict[str, Any]) -> None:
        """Add the prompt to a separate call of an encoder, as `generate` makes for encoder-decoder models.

        Args:
            encoder: The model's encoder.
            inputs: The call's arguments by name; changed in place.
        """

    def after_forward(self, outputs: Any) -> Any:
        """Return the outputs for the caller, given the model's outputs; the default returns them unchanged."""
        return outputs

    @property
    def vectors(self) -> Tensor:
        """The trained tensor, from which `encoded` computes the prompt; (n, d) for virtual tokens."""
        return self.embedding.weight

    # -- disk ------------------------------------------------------------------------------------------------

    def encoded(self) -> Tensor:
        """Return the prompt in HF PEFT's checkpoint layout: (n, d) for virtual tokens."""
        return self.vectors

    def has_encoder(self) -> bool:
        """Return True if the prompt is computed by an encoder whose state is needed for training."""
        return False

    def drop_encoder(self, encoded: Tensor) -> None:
        """Remove the encoder and use a computed prompt.

        Args:
            encoded: A prompt as `encoded` returned it.
        """
        raise NotImplementedError(f"{type(self).__name__} has an encoder and must define drop_encoder")

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save, {HF PEFT's full key: tensor}, computed without dropout."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return {EMBEDDINGS: self.encoded().detach()}
        finally:
            self.train(training)

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load saved tensors into a prompt without encoder.

        Args:
            tensors: Tensors by key, as `checkpoint_tensors` returned them; keys and shapes are already checked.
        """
        self.vectors.copy_(tensors[EMBEDDINGS])

    def training_state(self) -> dict[str, Tensor]:
        """Return the tensors that training needs in addition to `checkpoint_tensors`; {} without an encoder."""
        return dict(self.state_dict()) if self.has_encoder() else {}

    def read(self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], trainable: bool) -> None:
        """Load the prompt, and the encoder's state if there is one, from the tensors of a saved adapter.

        Args:
            tensors: The saved prompt by key.
            state: The saved training state; {} if the directory has none.
            trainable: The prompt will be trained further.

        Raises:
            CheckpointError: The training state is needed and missing, does not fit the configuration, or does not
                belong to the saved prompt.
        """
        if not self.has_encoder():
            self.load_checkpoint_tensors(tensors)
        elif state:
            self._load_encoder(tensors, state)
        elif trainable:
            raise CheckpointError(
                f"{type(self).__name__}: this directory holds the computed prompt without its encoder, so training "
                "cannot continue; load it with is_trainable=False, or save the adapter again with peftcore"
            )
        else:
            self.drop_encoder(tensors[EMBEDDINGS])

    def _load_encoder(self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        # earlier releases saved these as parameters of the learner itself
        renamed = {key: f"{key}.weight" for key in ("embedding", "delta_embedding") if key in state}
        state = {renamed.get(key, key): tensor for key, tensor in state.items()}
        current = self.state_dict()
        if {k: t.shape for k, t in current.items()} != {k: t.shape for k, t in state.items()}:
            raise CheckpointError(
                f"{PROMPT_STATE} does not fit this {type(self).__name__} configuration; give the configuration that "
                "was saved with it, or delete the file to use the prompt without training it further"
            )
        before = {key: tensor.clone() for key, tensor in current.items()}
        self.load_state_dict(dict(state))
        computed, saved = self.checkpoint_tensors()[EMBEDDINGS], tensors[EMBEDDINGS]
        if (computed.cpu() - saved).abs().max() > 1e-2 * saved.abs().max():
            self.load_state_dict(before)
            raise CheckpointError(
                f"{PROMPT_STATE} computes another prompt than the saved {EMBEDDINGS}, so they are of two adapters; "
                "take another copy, or delete the file to use the prompt without training it further"
            )

    # -- hooks of `peftcore.adapter.Adapter` that have no effect for prompts ---------------------------------

    @classmethod
    def config_to_save(cls, config: Any, adapters: Mapping[str, Any]) -> Any:
        """Return the configuration to save."""
        return config

    @classmethod
    def regularizer(cls, config: Any, adapters: Mapping[str, Any]) -> Tensor | None:
        """Return a scalar to add to the loss, or None."""
        return None

    @classmethod
    def on_step(cls, config: Any, adapters: Mapping[str, Any], step: int, optimizer: Any) -> None:
        """Update the prompt after an optimiser step; the default does nothing."""


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return True for a transformers model with an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def is_causal(model: nn.Module) -> bool:
    """Return True if tokens attend to earlier tokens only."""
    generates = getattr(model, "can_generate", None)
    causal_attention = any(getattr(module, "is_causal", False) is True for module in model.modules())
    return causal_attention or (callable(generates) and bool(generates()))


def accepts(model: nn.Module, argument: str) -> bool:
    """Return True if the model's forward has an argument of this name."""
    return argument in inspect.signature(model.forward).parameters


def model_sizes(config: Any, model: nn.Module) -> dict[str, int]:
    """Return the sizes that HF PEFT saves for every prompt method, by option name; unknown sizes are left out.

    Sizes in the configuration are kept. Otherwise `num_transformer_submodules` is 2 for the task SEQ_2_SEQ_LM, and 1
    for other tasks.
    """
    text = model.config.get_text_config() if hasattr(model, "config") else None  # type: ignore[operator,union-attr]
    submodules = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1
    sizes = {
        "num_transformer_submodules": config.num_transformer_submodules or submodules,
        "num_layers": config.num_layers or getattr(text, "num_hidden_layers", None),
        "num_attention_heads": config.num_attention_heads or getattr(text, "num_attention_heads", None),
    }
    return {key: value for key, value in sizes.items() if value is not None}
