"""Shadow: a small trained decoder s beside the frozen one corrects the input of its blocks.

With s₀ = P·decoder(E(x)) from the shadow decoder, each block l computes h' = h + α·W_up W_down (h − s), then the block,
then s ← (1 − g) ⊙ s + g ⊙ T(h) with g = σ(G(h)). T and G are two-layer networks. The loss of s₀ as a language model, or
as a classifier, is added to the model's.

The shadow decoder has the model's class and fewer layers. Its keys and values are further layers of the model's cache.
Models: transformers' decoders, for causal language modelling and sequence classification. A decoder that is called by
itself, not through the model, runs without the shadow.
Shapes: B rows, T tokens, d width of the model, r rank; h and s (B, T, d), W_down (r, d), W_up (d, r), P (d, d of the
shadow decoder), which is the identity for equal widths.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from peftcore._util.per_thread import PerThread
from peftcore.config import TaskType, TunerConfig
from peftcore.detection import detect
from peftcore.errors import ConfigError, TrainingError
from peftcore.kernels.start_values import kaiming_uniform_, module_, without_values
from peftcore.prompts.blocks import chosen_blocks
from peftcore.prompts.cache import cache_name, cache_of, decoder_config, new_cache, wants_cache
from peftcore.prompts.learner import PromptLearner, is_encoder_decoder
from peftcore.registry import register

_SIZES = {
    "shadow_num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "shadow_hidden_size": ("hidden_size", "n_embd", "d_model"),
    "shadow_intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
    "shadow_num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
}
"""{option: names of this size in configurations of transformers}"""


@dataclass
class ShadowConfig(TunerConfig):
    """Shadow's options under PEFT's names. Its targets are blocks that follow each other; None: all blocks."""

    r: int = 8
    """Rank of the correction (count)."""
    shadow_alpha: float = 0.1
    """α."""
    shadow_dropout: float = 0.2
    """Probability of dropping an element of h − s in training."""
    init_weights: bool = True
    """True: W_up starts at zero, so that the model starts at its base; False: at random, for tests."""
    shadow_model: str = "mirror"
    """Only "mirror": a new decoder of the model's class."""
    shadow_num_hidden_layers: int | None = None
    """Layers of the shadow decoder (count); None: 1."""
    shadow_hidden_size: int | None = None
    """Width of the shadow decoder; None: d."""
    shadow_num_attention_heads: int | None = None
    """Attention heads of the shadow decoder (count); None: the model's number."""
    shadow_intermediate_size: int | None = None
    """Inner width of the shadow decoder's feed-forward layers; None: the model's."""
    share_embeddings: bool = True
    """The shadow decoder reads the model's frozen embeddings, if it has the model's width; False: it trains its own."""
    update_hidden_size: int | None = None
    """Inner width of T and G; None: r."""
    auxiliary_loss_weight: float = 0.05
    """Factor of the loss of s₀ in the loss of a call with labels, for the tasks CAUSAL_LM and SEQ_CLS."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", *(name for name in (*_SIZES, "update_hidden_size") if getattr(self, name) is not None))
        self.probability("shadow_dropout")
        if not self.auxiliary_loss_weight >= 0:
            raise ConfigError(
                f"ShadowConfig: auxiliary_loss_weight must be at least 0; got {self.auxiliary_loss_weight}"
            )
        if self.shadow_model != "mirror":
            raise ConfigError(
                "ShadowConfig: peftcore makes new shadow decoders only, none from a checkpoint; shadow_model must be "
                f"'mirror', got {self.shadow_model!r}"
            )
        if self.task_type not in (None, TaskType.CAUSAL_LM, TaskType.SEQ_CLS):
            given = TaskType(self.task_type).value
            raise ConfigError(f"ShadowConfig: task_type must be 'CAUSAL_LM' or 'SEQ_CLS'; got {given!r}")

    def without_effect(self) -> dict[str, str]:
        unused = self.task_type is None and self.auxiliary_loss_weight != type(self).auxiliary_loss_weight
        return {"auxiliary_loss_weight": "task_type='CAUSAL_LM' or 'SEQ_CLS'"} if unused else {}


class _Block(nn.Module):
    """The trained part at one block."""

    def __init__(self, config: ShadowConfig, width: int):
        super().__init__()
        inner = config.update_hidden_size or config.r
        self.shadow_down = without_values(nn.Linear, width, config.r, bias=False)
        self.shadow_up = without_values(nn.Linear, config.r, width, bias=False)
        self.shadow_update_transform = _network(width, inner)
        self.shadow_update_gate = _network(width, inner)
        self.dropout, self.alpha = nn.Dropout(config.shadow_dropout), config.shadow_alpha

    def reset_parameters(self, init_weights: bool) -> None:
        """Draw start values in PEFT's order."""
        kaiming_uniform_(self.shadow_down.weight)
        kaiming_uniform_(self.shadow_up.weight)
        if init_weights:
            nn.init.zeros_(self.shadow_up.weight)
        module_(self.shadow_update_transform)
        module_(self.shadow_update_gate)

    def corrected(self, hidden: Tensor, shadow: Tensor) -> Tensor:
        """Return the block's input h'."""
        difference = self.dropout((hidden - shadow.to(hidden.dtype)).to(self.shadow_down.weight.dtype))
        return hidden + (self.alpha * self.shadow_up(self.shadow_down(difference))).to(hidden.dtype)

    def updated(self, hidden: Tensor, shadow: Tensor) -> Tensor:
        """Return the next s."""
        hidden = hidden.to(self.shadow_down.weight.dtype)
        gate = self.shadow_update_gate(hidden).sigmoid()
        return ((1 - gate) * shadow.to(gate.dtype) + gate * self.shadow_update_transform(hidden)).to(shadow.dtype)


def _network(width: int, inner: int) -> nn.Sequential:
    first, second = (without_values(nn.Linear, *size) for size in ((width, inner), (inner, width)))
    return nn.Sequential(first, nn.GELU(), second)


@register("SHADOW", ShadowConfig)
class Shadow(PromptLearner):
    """The shadow decoder of one model, and what it trains at each block."""

    adapts_blocks = True
    defines_loss = True
    _state = PerThread(None)
    """s of the present call of the model; None outside of calls."""
    _call = PerThread(None)
    """(model, s₀, labels, attention mask) of a call with labels; None for other calls."""

    def __init__(self, config: ShadowConfig, model: nn.Module):
        super().__init__(config, model)
        self.paths = _targets(config, model)
        decoder = _decoder(model)
        width = decoder.config.hidden_size
        with torch.random.fork_rng(devices=[]):
            self.shadow_backbone: Any = _mirror(config, decoder)
        own = self.shadow_backbone.config.hidden_size
        self.shadow_projection = nn.Identity() if own == width else without_values(nn.Linear, own, width, bias=False)
        self.shares = config.share_embeddings and own == width
        if self.shares and hasattr(self.shadow_backbone, "embed_tokens"):
            del self.shadow_backbone.embed_tokens
        self.shadow_head = copy.deepcopy(_classifier(model)) if config.task_type == TaskType.SEQ_CLS else None
        self.blocks: Any = nn.ModuleList(_Block(config, width) for _ in self.paths)
        self.cache_layers = len(new_cache(model).layers)

    @classmethod
    def completed(cls, config: ShadowConfig, model: nn.Module) -> ShadowConfig:
        if not isinstance(model, PreTrainedModel) or is_encoder_decoder(model):
            raise ConfigError(
                f"SHADOW adapts decoders of transformers, such as LlamaForCausalLM; got {type(model).__name__}; take "
                "another method, such as LoraConfig"
            )
        if config.task_type == TaskType.SEQ_CLS:
            _classifier(model)
        return dataclasses.replace(config, target_modules=set(_targets(config, model)))

    @torch.no_grad()
    def reset_parameters(self, model: nn.Module) -> None:
        decoder = _decoder(model)
        with torch.device("cpu"):
            fresh = _mirror(self.config, decoder).state_dict()
        for name, tensor in self.shadow_backbone.state_dict().items():  # PEFT's shadow decoder has the model's type
            tensor.copy_(fresh[name].to(decoder.dtype))
        if isinstance(self.shadow_projection, nn.Linear):
            kaiming_uniform_(self.shadow_projection.weight)
            self.shadow_projection.weight.copy_(self.shadow_projection.weight.to(decoder.dtype))
        for block in self.blocks:
            block.reset_parameters(self.config.init_weights)

    # -- forward: hooks on the blocks; s₀ is computed before the model's own forward ---------------------------

    def attach(self, model: nn.Module, share: Callable[[int], float | Tensor]) -> None:
        for number, path in enumerate(self.paths):
            block = model.get_submodule(path)
            block.register_forward_pre_hook(partial(_enter, self, number, share), with_kwargs=True)
            block.register_forward_hook(partial(_leave, self, number, share))

    def detach(self, model: nn.Module) -> None:
        for path in self.paths:
            block = model.get_submodule(path)
            for hooks, others in (
                (block._forward_pre_hooks, block._forward_pre_hooks_with_kwargs),
                (block._forward_hooks, block._forward_hooks_with_kwargs),
            ):
                for key, hook in list(hooks.items()):
                    if isinstance(hook, partial) and hook.func in (_enter, _leave) and hook.args[0] is self:
                        del hooks[key]
                        others.pop(key, None)

    def before_forward(self, model: Any, inputs: dict[str, Any]) -> None:
        cache, name = cache_of(model, inputs), cache_name(model)
        if cache is None and name is not None and wants_cache(model, inputs):
            cache = inputs[name] = new_cache(model)
        embedded, ids = inputs.get("inputs_embeds"), inputs.get("input_ids")
        if embedded is None and self.shares:
            embedded = model.get_input_embeddings()(ids)
        arguments = {
            "attention_mask": inputs.get("attention_mask"),
            "position_ids": inputs.get("position_ids"),
            "use_cache": cache is not None,
            str(cache_name(self.shadow_backbone)): None if cache is None else self._own_cache(cache),
        }
        if embedded is None:
            arguments["input_ids"] = ids
        else:
            arguments["inputs_embeds"] = embedded.to(next(self.blocks.parameters()).dtype)
        hidden = self.shadow_backbone(**arguments, return_dict=True).last_hidden_state
        self._state = self.shadow_projection(hidden)
        labels = inputs.get("labels")
        self._call = None if labels is None else (model, self._state, labels, inputs.get("attention_mask"))

    def _own_cache(self, cache: Any) -> Cache:
        """Return the cache of the shadow decoder: the layers of the model's cache behind the model's own.

        Operations on the cache, such as reordering for beams, then reach both.
        """
        while len(cache.layers) < self.cache_layers:  # a cache without the model's configuration grows by itself
            cache.layers.append(cache.layer_class_to_replicate())
        if len(cache.layers) == self.cache_layers:
            if cache.get_seq_length() > 0:
                raise ConfigError(
                    "this cache was filled without the shadow decoder; give the whole text and an empty cache, or none"
                )
            first = cache.layers[0]
            config = decoder_config(self.shadow_backbone)
            own = StaticCache(config, first.max_cache_len) if isinstance(first, StaticLayer) else None
            cache.layers += (own or new_cache(self.shadow_backbone)).layers
        return Cache(layers=cache.layers[self.cache_layers :])

    def after_forward(self, outputs: Any) -> Any:
        call: Any = self._call
        self._call = self._state = None
        weight, is_tuple = self.config.auxiliary_loss_weight, isinstance(outputs, tuple)
        if call is None or self.config.task_type is None or not (is_tuple or hasattr(outputs, "loss")):
            return outputs
        loss = self._loss(*call)
        if is_tuple:
            return (outputs[0] + weight * loss.to(outputs[0]), *outputs[1:])
        outputs.shadow_loss = loss.detach()
        outputs.loss = outputs.loss + weight * loss.to(outputs.loss)
        return outputs

    def _loss(self, model: Any, state: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        """Return the loss of s₀ by itself."""
        if self.shadow_head is None:
            head = model.get_output_embeddings()
            logits = head(state.to(model.dtype))[:, :-1].flatten(0, 1)
            return F.cross_entropy(logits.float(), labels[:, 1:].flatten(), ignore_index=-100)
        last = -1
        if mask is not None:  # the last token of each row that is not padding
            last = ((mask != 0) * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
        logits = self.shadow_head(state[torch.arange(len(state), device=state.device), last])
        if logits.shape[1] == 1:
            return F.mse_loss(logits[:, 0], labels.to(logits).flatten())
        if labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits, labels)
        return F.cross_entropy(logits, labels.flatten())

    # -- disk ------------------------------------------------------------------------------------------------

    def _by_key(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (key on disk, tensor). PEFT writes "default" for every name of an adapter."""
        for path, block in zip(self.paths, self.blocks, strict=True):
            for name, tensor in block.state_dict().items():
                module, _, rest = name.partition(".")
                yield f"base_model.model.{path}.{module}.default.{rest}", tensor
        for module in ("shadow_backbone", "shadow_projection", "shadow_head"):
            if (part := self._modules.get(module)) is not None:
                for name, tensor in part.state_dict().items():
                    yield f"base_model.{module}.default.{name}", tensor

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        return {key: tensor.detach() for key, tensor in self._by_key()}

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for key, tensor in self._by_key():
            tensor.copy_(tensors[key])


def _enter(
    learner: Shadow, number: int, share: Callable[[int], float | Tensor], _block: Any, args: Any, kwargs: Any
) -> Any:
    """Run as pre-hook of a block: correct its input; None if the shadow is not in effect."""
    hidden = args[0] if args else kwargs["hidden_states"]
    part, state = share(len(hidden)), learner._state
    if part and state is None and torch._C._current_graph_task_id() != -1:  # in the backward pass, where s is gone
        raise TrainingError(
            "SHADOW works with model.activation_checkpointing_enable() only; a wrapper around the blocks runs their "
            "hooks again in the backward pass"
        )
    if not part or state is None:
        return None
    corrected = learner.blocks[number].corrected(hidden, state.to(hidden.device))
    return ((corrected, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": corrected})


def _leave(
    learner: Shadow, number: int, share: Callable[[int], float | Tensor], _block: Any, args: Any, output: Any
) -> None:
    """Run as hook of a block: compute the next s, unless the block is the last one."""
    first = output[0] if isinstance(output, tuple) else output
    if learner._state is not None and share(len(first)) and number + 1 < len(learner.paths):
        learner._state = learner.blocks[number].updated(first, learner._state.to(first.device))


def _decoder(model: nn.Module) -> Any:
    """Return the module that runs the blocks: LlamaModel inside of LlamaForCausalLM."""
    blocks = detect(model).blocks
    path = blocks[0].pattern.removesuffix(".*").rpartition(".")[0] if blocks else ""
    decoder = model.get_submodule(path)
    if not blocks or not isinstance(decoder, PreTrainedModel) or not _reads_embeddings(decoder):
        raise ConfigError(
            f"SHADOW found no decoder of transformers inside of {type(model).__name__}; take another method, such as "
            "LoraConfig"
        )
    return decoder


def _reads_embeddings(decoder: nn.Module) -> bool:
    return "inputs_embeds" in inspect.signature(decoder.forward).parameters and cache_name(decoder) is not None


def _targets(config: ShadowConfig, model: nn.Module) -> list[str]:
    """Return the paths of the blocks to adapt, in order."""
    _decoder(model)
    paths = detect(model).blocks[0].paths
    found = chosen_blocks(config, paths)
    if found != list(range(found[0], found[-1] + 1)):
        raise ConfigError(f"SHADOW: the blocks must follow each other; got {found}; add those between")
    return [paths[number] for number in found]


def _mirror(config: ShadowConfig, decoder: PreTrainedModel) -> PreTrainedModel:
    """Return a new decoder of the model's class, with the sizes of the configuration and random values."""
    smaller = copy.deepcopy(decoder.config)
    sizes = {option: getattr(config, option) for option in _SIZES} | {
        "shadow_num_hidden_layers": config.shadow_num_hidden_layers or 1
    }
    for option, size in sizes.items():
        if size is None:
            continue
        name = next((name for name in _SIZES[option] if hasattr(smaller, name)), None)
        if name is None:
            raise ConfigError(
                f"{option}: the configuration of {type(decoder).__name__} has none of {_SIZES[option]}; leave the "
                "option out"
            )
        setattr(smaller, name, size)
    layers = sizes["shadow_num_hidden_layers"]
    if (kinds := getattr(smaller, "layer_types", None)) is not None:
        smaller.layer_types = [*kinds, *[kinds[-1]] * layers][:layers]
    if isinstance(most := getattr(smaller, "max_window_layers", None), int):
        smaller.max_window_layers = min(most, layers)
    kind = next(kind for kind in type(decoder).__mro__ if "forward" in vars(kind))  # an adapted model has a subclass
    return kind(smaller)


def _classifier(model: nn.Module) -> nn.Module:
    """Return the classification head of a model."""
    head = next((getattr(model, name) for name in ("score", "classifier") if hasattr(model, name)), None)
    if not isinstance(head, nn.Module):
        raise ConfigError(
            f"task_type='SEQ_CLS' needs a head named score or classifier; {type(model).__name__} has none; load the "
            "base by AutoModelForSequenceClassification"
        )
    return head
