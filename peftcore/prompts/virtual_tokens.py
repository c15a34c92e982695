"""Virtual tokens: learned embeddings before the embeddings of the text, in the input of the model's own forward.

The first call of a text, with an empty cache or none, receives the prompt. Later calls find the prompt in the cache,
and only their mask and positions are extended. In encoder-decoder models the prompt stands before the encoder's text.
"""

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore._util.per_thread import PerThread
from peftcore.config import TaskType
from peftcore.errors import ConfigError
from peftcore.prompts.cache import cache_of, has_states, is_empty, lacks_prompt, make_room
from peftcore.prompts.learner import PromptLearner, accepts, is_causal, is_encoder_decoder, model_sizes
from peftcore.prompts.per_layer_inputs import per_layer_inputs
from peftcore.prompts.placement import Placement, check_not_packed, mask_of, placement, text_positions, tokens_of

IGNORED = -100
"""Label of tokens without loss."""


class VirtualTokens(PromptLearner):
    """A prompt of n virtual tokens. Shapes: B rows, T text tokens, N = n + T, d embedding width."""

    defines_loss = True  # the last virtual token predicts the text's first token
    prompts_decoder: bool = False
    """True if the second n tokens of an encoder-decoder model stand before the decoder's text."""
    _read_padding_only = PerThread(False)
    """True if the last first call had a row without text: an empty text, or the first chunk of a padded one."""

    def __init__(self, config: Any, model: nn.Module):
        super().__init__(config, model)
        name, task = type(model).__name__, config.task_type
        self.count: int = config.num_virtual_tokens
        self.width: int = config.token_dim
        self.total: int = self.count * config.num_transformer_submodules
        self.is_causal = is_causal(model)
        self.classifies_rows = task == TaskType.SEQ_CLS or "SequenceClassification" in name
        self.accepts_positions = accepts(model, "position_ids")

    @classmethod
    def completed(cls, config: Any, model: nn.Module) -> Any:
        try:
            width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        except (AttributeError, NotImplementedError) as error:
            raise ConfigError(
                f"{type(model).__name__} has no token embeddings (get_input_embeddings), which {config.method} needs"
            ) from error
        if config.token_dim not in (None, width):
            raise ConfigError(
                f"token_dim={config.token_dim}, but the model's embeddings have width {width}; leave it out"
            )
        _warn_of_sizes(config, model)
        return dataclasses.replace(config, token_dim=width, **model_sizes(config, model))

    def prompts(self, inputs: dict[str, Any], rows: int) -> Tensor:
        """Return the virtual tokens (B, total, d) for the rows of a call.

        Args:
            inputs: The call's arguments by name.
            rows: B.
        """
        return self.encoded().expand(rows, -1, -1)

    def for_rows(self, model: nn.Module, rows: int, inputs: dict[str, Any]) -> Tensor:
        self.check_arguments(inputs)
        return self.prompts(inputs, rows)

    def filler_count(self, rows: int, decoder: bool = False) -> Tensor | None:
        """Return the number of masked filler tokens in each row (B, 1); None if no row has any.

        A mixed batch extends shorter prompts by filler tokens; see `peftcore.prompts.mixed`.
        """
        return None

    def place(self, mask: Tensor | None, rows: int, all_pads_first: bool = False, decoder: bool = False) -> Placement:
        """Return the placement for a call; see `peftcore.prompts.placement.placement`.

        Args:
            mask: The mask of padding (B, T), or None.
            rows: B.
            all_pads_first: Also move right padding to the front.
            decoder: The call is to the decoder of an encoder-decoder model.
        """
        return placement(mask, self.count, all_pads_first, self.filler_count(rows, decoder))

    def first_positions(self, mask: Tensor, place: Placement) -> Tensor:
        """Return the positions (B, N) of a first call without position_ids, for its extended mask (B, N)."""
        return text_positions(mask)

    # -- decoders and encoders -------------------------------------------------------------------------------

    def before_forward(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        if is_encoder_decoder(model):
            self._before_encoder_decoder(model, inputs)
            return
        cache, mask = cache_of(model, inputs), mask_of(inputs, "attention_mask")
        if is_empty(cache) and not has_states(inputs, cache):
            check_not_packed(inputs)
            self._read_first(model, inputs, mask, cache)
            return
        if mask is not None and lacks_prompt(mask, cache, new := tokens_of(inputs).shape[1]):
            if self._read_padding_only and bool((mask[:, : mask.shape[1] - new + 1] == 0).all(1).any()):
                raise ConfigError(
                    "the first call of a row had padding only and the next one goes on with padding, so the prompt is "
                    "not directly before the text; make prefill_chunk_size larger than the padding"
                )
            inputs["attention_mask"] = self.place(mask, len(mask)).extend(mask, 1)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] + self.place(None, len(tokens_of(inputs))).count_by_row

    def _read_first(self, model: Any, inputs: dict[str, Any], mask: Tensor | None, cache: Any) -> None:
        text = tokens_of(inputs)
        place = self.place(mask, len(text), all_pads_first=self.classifies_rows and self.is_causal)
        self._read_padding_only = cache is not None and place.pads is not None and bool(place.pads.all(1).any())
        length = tokens_of(inputs).shape[1]
        self._insert(inputs, model, place, slice(None, self.count))
        if mask is not None:
            inputs["attention_mask"] = place.extend(mask, 1)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = place.extend_positions(inputs["position_ids"])
        elif self.accepts_positions and self.is_causal and (place.pads is not None or place.filler_count is not None):
            inputs["position_ids"] = self.first_positions(inputs["attention_mask"], place)
        for key in ("token_type_ids", "mm_token_type_ids"):
            if inputs.get(key) is not None:
                inputs[key] = place.extend(inputs[key], 0)
        self._shift_targets(inputs, place, length)
        make_room(cache, self.count, self.count + length)

    def _insert(self, inputs: dict[str, Any], reader: Any, place: Placement, part: slice, prefix: str = "") -> None:
        """Insert some of the virtual tokens into the input embeddings of `reader`, the model, encoder or decoder."""
        embedded = inputs.get(f"{prefix}inputs_embeds")
        if embedded is None:
            embedded = reader.get_input_embeddings()(inputs[f"{prefix}input_ids"])
        prompts = self.prompts(inputs, len(embedded))[:, part]
        ids = inputs.pop(f"{prefix}input_ids", None)
        if ids is not None and (vectors := per_layer_inputs(reader, ids, place)) is not None:
            inputs["per_layer_inputs"] = vectors
        inputs[f"{prefix}inputs_embeds"] = place.insert(prompts, embedded)

    def _shift_targets(self, inputs: dict[str, Any], place: Placement, length: int) -> None:
        """Shift labels, span positions and `logits_to_keep` by the prompt: text token t is now token n + t."""
        labels = inputs.get("labels")
        if labels is not None and labels.shape[1:] == (length,) and not labels.is_floating_point():
            inputs["labels"] = labels if self.classifies_rows else place.shift(labels, IGNORED)
        shift = place.count_by_row if place.filler_behind else self.count
        for key in ("start_positions", "end_positions"):
            if inputs.get(key) is not None:
                inputs[key] = inputs[key] + (shift if isinstance(shift, int) else shift[:, 0])
        keep = inputs.get("logits_to_keep")
        if isinstance(keep, Tensor):
            inputs["logits_to_keep"] = F.pad(keep, (self.count, 0)) if keep.dim() == 2 else keep + self.count

    # -- encoder-decoders ------------------------------------------------------------------------------------

    def before_encoder(self, encoder: nn.Module, inputs: dict[str, Any]) -> None:
        length = tokens_of(inputs).shape[1]
        mask, filler_count = mask_of(inputs, "attention_mask"), self.filler_count(len(tokens_of(inputs)))
        if mask is None and filler_count is not None:
            mask = torch.ones(tokens_of(inputs).shape[:2], dtype=torch.long, device=tokens_of(inputs).device)
        if mask is not None and mask.shape[1] == self.count + length:  # extended by the model's forward already
            place = self.place(mask, len(mask))
            place = dataclasses.replace(place, pads=None if place.pads is None else place.pads[:, :length])
        else:
            place = self.place(mask, len(tokens_of(inputs)))
            if mask is not None:
                inputs["attention_mask"] = place.extend(mask, 1)
        self._insert(inputs, encoder, place, slice(None, self.count))

    def _before_encoder_decoder(self, model: Any, inputs: dict[str, Any]) -> None:
        mask, read = mask_of(inputs, "attention_mask"), inputs.get("encoder_outputs")
        rows = len(tokens_of(inputs) if read is None else read[0])
        if mask is not None and (read is None or mask.shape[1] < read[0].shape[1]):
            inputs["attention_mask"] = self.place(mask, rows).extend(mask, 1)
        if not self.prompts_decoder or self.total == self.count:
            return
        cache, mask = cache_of(model, inputs), mask_of(inputs, "decoder_attention_mask")
        if not is_empty(cache):
            if mask is not None and lacks_prompt(mask, cache, tokens_of(inputs, "decoder_").shape[1]):
                inputs["decoder_attention_mask"] = self.place(mask, len(mask), decoder=True).extend(mask, 1)
            if inputs.get("decoder_position_ids") is not None:
                shift = self.place(None, len(tokens_of(inputs, "decoder_")), decoder=True).count_by_row
                inputs["decoder_position_ids"] = inputs["decoder_position_ids"] + shift
            return
        tokens = [inputs.get(key) for key in ("decoder_input_ids", "decoder_inputs_embeds")]
        if all(each is None for each in tokens) and inputs.get("labels") is not None:
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
        text = tokens_of(inputs, "decoder_")
        length, place = text.shape[1], self.place(mask, len(text), decoder=True)
        self._insert(inputs, model.get_decoder(), place, slice(self.count, None), "decoder_")
        if mask is not None:
            inputs["decoder_attention_mask"] = place.extend(mask, 1)
        if inputs.get("labels") is not None and not self.classifies_rows:
            inputs["labels"] = place.shift(inputs["labels"], IGNORED)
        make_room(cache, self.count, self.count + length)


def _warn_of_sizes(config: Any, model: nn.Module) -> None:
    """Warn of numbers of layers and heads that are not the model's; a prompt at the embeddings does not use them."""
    sizes = model_sizes(dataclasses.replace(config, num_layers=None, num_attention_heads=None), model)
    for name in ("num_layers", "num_attention_heads"):
        value = getattr(config, name)
        if value is not None and name in sizes and value != sizes[name]:
            warnings.warn(
                f"{name}={value} has no effect on {config.method}, whose prompt is at the embeddings; leave it out",
                stacklevel=2,
            )
