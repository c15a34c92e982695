"""A transformers folder as a GGUF model: metadata, tensor names and tokenizer, for Llama-like model families.

Metadata keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A model that the keys cannot describe is
refused before any weight is read: other activations, partial or YaRN rotary embeddings, quantised weights, unknown
tokenizers.
"""

from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from peftcore.errors import ExportError
from peftcore.export.gguf_tokenizer import Tokenizer
from peftcore.export.safetensors_stream import mapped_tensors
from peftcore.gguf_files.layout import HEAD, layout_of
from peftcore.gguf_files.rope import FREQUENCIES, llama3_factors

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` whose folders can be exported as a GGUF model."""
_INSTEAD = "give the base's own GGUF file (--gguf), or merge and use llama.cpp's convert_hf_to_gguf.py"
_NOT_WEIGHTS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")
"""Key endings of buffers in folders of old transformers versions."""


class ModelFolder:
    """A transformers folder to export as a GGUF model; only `tensors` reads weights.

    Raises:
        ExportError: the model is not supported.
    """

    def __init__(self, folder: Path):
        from transformers import AutoConfig

        if not (folder / "config.json").is_file():
            raise ExportError(f"{folder} holds no config.json; give the transformers folder of the base")
        self._folder = folder
        self.config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        if self.config.model_type not in FAMILIES:
            raise ExportError(
                f"{folder}: a {self.config.model_type!r} model cannot be exported as GGUF from its folder; supported: "
                f"{', '.join(FAMILIES)}. Instead, {_INSTEAD}"
            )
        self.layout = layout_of(self.config)
        self._check()
        self._rope: dict[str, Any] = dict(self.config.rope_parameters)
        self._tokenizer = Tokenizer(folder, self.config.vocab_size)

    def _check(self) -> None:
        config, rope = self.config, self.config.rope_parameters
        options: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "hidden_act": (config.hidden_act, ("silu", "swish")),
            "quantization_config": (getattr(config, "quantization_config", None), (None,)),
            "rope_type": (rope.get("rope_type", "default"), ("default", "linear", "llama3")),
            "partial_rotary_factor": (rope.get("partial_rotary_factor", 1), (1,)),
        }
        for name, (value, supported) in options.items():
            if value not in supported:
                raise ExportError(f"{self._folder}: {name}={value!r:.100} is not supported by this export; {_INSTEAD}")

    @property
    def _head_size(self) -> int:
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def _context(self) -> int:
        """Context length (tokens), at most the sliding window: llama.cpp attends to the whole context."""
        config = self.config
        windowed = getattr(config, "use_sliding_window", True)
        window = getattr(config, "sliding_window", None) if windowed else None
        return min(config.max_position_embeddings, window or config.max_position_embeddings)

    def write_keys(self, writer: gguf.GGUFWriter) -> None:
        """Write the model's metadata and its tokenizer."""
        config = self.config
        writer.add_name(self._folder.resolve().name)
        writer.add_context_length(self._context)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(self.layout.query_heads)
        writer.add_head_count_kv(self.layout.key_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(float(self._rope["rope_theta"]))
        writer.add_rope_dimension_count(self._head_size)
        writer.add_key_length(self._head_size)
        writer.add_value_length(self._head_size)
        writer.add_vocab_size(config.vocab_size)
        if self._rope.get("rope_type") == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(self._rope["factor"]))
        self._tokenizer.write_keys(writer)

    def tensors(self) -> dict[str, Tensor]:
        """Return {GGUF name: memory-mapped weight}."""
        tensors = {}
        for key, tensor in mapped_tensors(self._folder).items():
            if key.endswith(_NOT_WEIGHTS):
                continue
            name = self.layout.names.get_name(key, (".weight", ".bias"))
            if name is None:
                raise ExportError(
                    f"{self._folder}: {key} has no GGUF name in a {self.layout.architecture} model; {_INSTEAD}"
                )
            if not (self.layout.tied and name == f"{HEAD}.weight"):
                tensors[name] = tensor
        if self._rope.get("rope_type") == "llama3":
            tensors[FREQUENCIES] = llama3_factors(self._rope, self._head_size)
        return tensors
