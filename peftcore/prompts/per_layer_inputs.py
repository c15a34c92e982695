"""Per-layer embeddings of Gemma 3n and Gemma 4: every layer gets a vector for each token id, beside the hidden states.

The models look the ids up in `input_ids`. A call with embeddings in place of ids needs the looked-up vectors in the
argument `per_layer_inputs`; Gemma 3n leaves the vectors out of a call without it, and Gemma 4 fails.
"""

from typing import Any

import torch
from torch import Tensor, nn

from peftcore.prompts.placement import Placement

_PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id")
"""Fields of a configuration with the ids that images and sound replace; the models look up padding in their place."""


def per_layer_inputs(model: Any, input_ids: Tensor, place: Placement) -> Tensor | None:
    """Return the vectors of the text's tokens and of padding at the virtual tokens, as at images and sound.

    Args:
        model: The model.
        input_ids: Ids of the text (B, T).
        place: Placement of the virtual tokens.

    Returns:
        (B, N, layers, width); None for a model without per-layer embeddings.
    """
    decoder: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model
    lookup = getattr(decoder, "get_per_layer_inputs", None)
    if lookup is None or not getattr(decoder.config, "hidden_size_per_layer_input", None):
        return None
    padding = getattr(decoder.config, "pad_token_id", None) or 0
    placeholders = [getattr(model.config, name, None) for name in _PLACEHOLDERS]
    placeholders = [token for token in placeholders if isinstance(token, int)]
    is_placeholder = torch.isin(input_ids, torch.tensor(placeholders, device=input_ids.device, dtype=input_ids.dtype))
    return lookup(place.shift(input_ids.masked_fill(is_placeholder, padding), padding))
