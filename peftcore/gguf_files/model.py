"""The model of a GGUF file, with the quantised linear layers in the file's own blocks; loading and saving.

An adapter that is trained on it is trained on exactly the weights that llama.cpp serves. The file is mapped, and one
tensor after another is brought to the model's names and order of rows. Packed rows are reordered as rows of blocks, so
they are never unpacked, and the model is never in memory in 16 bits as a whole.

As transformers does for bitsandbytes, embeddings, output head, norms and biases are dense, in the dtype of the model.
"""

import shutil
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert

from peftcore.bases.gguf import GgufLinear
from peftcore.bases.gguf_blocks import FORMATS, BlockFormat
from peftcore.errors import ExportError, GgufError
from peftcore.files import file_written_atomically
from peftcore.gguf_files.header import GgufHeader, GgufTensor, read_gguf_header, write_without_vocabulary
from peftcore.gguf_files.layout import HEAD, GgufLayout, layout_of_metadata
from peftcore.gguf_files.rope import FREQUENCIES, rope_parameters

ARCHITECTURES = ("llama", "phi3", "qwen2", "qwen3")
"""Values of `general.architecture` that can be loaded; "llama" includes Mistral and SmolLM."""
_PLAIN = {0: ("F32", torch.float32), 1: ("F16", torch.float16), 30: ("BF16", torch.bfloat16)}
"""{number of a type that is not quantised: (name, dtype)}"""
_PACKED = {one.number: one for one in FORMATS.values()}


def load_gguf_base(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    model_class: Any = AutoModelForCausalLM,
    config: Any = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Load the model of a GGUF file, keeping the quantised weights of its linear layers packed.

    Load the tokenizer by `AutoTokenizer.from_pretrained(folder, gguf_file=name)`. `model.dequantize(dtype)` gives plain
    layers. The parameters of a new head (`model_class=AutoModelForSequenceClassification`) are initialised at random.

    Args:
        path: The file, of one of `ARCHITECTURES`.
        dtype: Dtype of the activations, and of all weights that are not packed.
        model_class: An Auto class of transformers.
        config: The model's configuration, in place of the one that the file's metadata describe.
        device: Where the model is put.

    Returns:
        The model, in evaluation mode. `save_gguf_base` saves it. `save_pretrained` needs a dequantised model.

    Raises:
        GgufError: The file is no GGUF file, damaged, or of an architecture or a type that is not supported.
    """
    header = read_gguf_header(path)
    for name, tensor in header.tensors.items():
        _check_tensor(header, name, tensor)
    layout = _layout(header)
    config = _config(header) if config is None else config
    with torch.device("meta"):
        model = model_class.from_config(config, dtype=dtype)
    _Loader(header, layout, model, dtype, torch.device(device)).load()
    if any(isinstance(module, GgufLinear) for module in model.modules()):
        storage: Any = SimpleNamespace(quant_method="gguf")
        model.hf_quantizer = _GgufStorage(storage)
    return model.eval()


def save_gguf_base(model: nn.Module, source: str | Path, path: str | Path) -> None:
    """Write a copy of a GGUF file with the packed weights of a model that was loaded from it, such as calibrated ones.

    All other tensors and the metadata are those of the file.

    Args:
        model: A model of `load_gguf_base`, without adapters.
        source: The file that the model was loaded from.
        path: The file to write; it may be `source`. On an error, an existing file stays.

    Raises:
        GgufError: The model has no packed layers, or the file is damaged or that of another model.
    """
    header = read_gguf_header(source)
    for name, tensor in header.tensors.items():
        _check_tensor(header, name, tensor)
    layout, layers = _layout(header), dict(_gguf_layers(model))
    if not layers:
        raise GgufError(
            f"save_gguf_base: this {type(model).__name__} has no packed layers; give a model of load_gguf_base that is "
            "not dequantised"
        )
    with file_written_atomically(Path(path)) as new:
        shutil.copyfile(source, new)
        with new.open("r+b") as file:
            for owner, layer in layers.items():
                name = str(layout.names.get_name(f"{owner}.weight", (".weight",)))
                tensor, block = header.tensors.get(name), layer.format
                shape = (layer.out_features, layer.in_features)
                if tensor is None or (tensor.shape, tensor.kind) != (shape, block.number):
                    raise GgufError(
                        f"{source} has no {block.name} tensor {list(shape)} for {owner}; give the file that the model "
                        "was loaded from, and the model without adapters"
                    )
                rows = layout.to_file(name.rpartition(".")[0], block.rows(layer.weight.detach()))
                file.seek(tensor.offset)
                file.write(rows.cpu().contiguous().numpy().tobytes())


def _layout(header: GgufHeader) -> GgufLayout:
    architecture = header.metadata.get("general.architecture")
    blocks = header.metadata.get(f"{architecture}.block_count")
    if isinstance(blocks, int) and blocks > len(header.tensors):
        raise GgufError(
            f"{header.path} is damaged: it claims {blocks:,} blocks, and has {len(header.tensors):,} tensors; get the "
            "file again"
        )
    try:
        return layout_of_metadata(header.metadata.get, header.tensors)
    except ExportError as error:
        raise GgufError(f"{header.path}: {error}") from error


def _check_tensor(header: GgufHeader, name: str, tensor: GgufTensor) -> None:
    """Raise GgufError if a tensor's type is unknown, or its values are not wholly in the file."""
    if tensor.kind not in _PACKED and tensor.kind not in _PLAIN:
        known = ", ".join([plain for plain, _ in _PLAIN.values()] + list(FORMATS))
        raise GgufError(
            f"{header.path}: {name} is of type {_type_name(tensor.kind)}; supported: {known}. Quantise the model to "
            "one of these with llama-quantize"
        )
    if not tensor.shape or min(tensor.shape) < 1:
        raise GgufError(f"{header.path} is damaged: {name} has the shape {list(tensor.shape)}; get the file again")
    if tensor.kind in _PACKED and tensor.shape[-1] % _PACKED[tensor.kind].weights:
        block = _PACKED[tensor.kind]
        raise GgufError(
            f"{header.path} is damaged: rows of {name} have {tensor.shape[-1]:,} weights, and a block of {block.name} "
            f"has {block.weights}; get the file again"
        )
    if tensor.offset + _size(tensor) > header.size:
        raise GgufError(
            f"{header.path} is truncated or damaged: {name} ends at byte {tensor.offset + _size(tensor):,}, and the "
            f"file has {header.size:,}; get the file again"
        )


def _type_name(kind: int) -> str:
    import gguf

    known = {one.value: one.name for one in gguf.GGMLQuantizationType}
    return known.get(kind, f"number {kind}")


def _size(tensor: GgufTensor) -> int:
    """Return the bytes of a tensor's values."""
    block = _PACKED.get(tensor.kind)
    if block is None:
        return prod(tensor.shape) * _PLAIN[tensor.kind][1].itemsize
    return prod(tensor.shape) // block.weights * block.size


def _config(header: GgufHeader) -> Any:
    """Return the configuration that the metadata describe."""
    architecture = header.metadata["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise GgufError(
            f"{header.path}: a {architecture!r} file cannot be loaded with packed weights; supported: "
            f"{', '.join(ARCHITECTURES)}; AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE) dequantises it"
        )
    with tempfile.TemporaryDirectory() as folder:
        write_without_vocabulary(header, Path(folder) / header.path.name)
        try:
            config: Any = AutoConfig.from_pretrained(
                folder, gguf_file=header.path.name, local_files_only=True, trust_remote_code=False
            )
        except (KeyError, ValueError, TypeError, OSError, AttributeError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise GgufError(
                f"{header.path}: its metadata describes no model that transformers knows ({reason}); convert the model "
                "again with a current llama.cpp"
            ) from error
    # transformers takes these from the defaults of the configuration's class
    config.pad_token_id = header.metadata.get("tokenizer.ggml.padding_token_id")
    if (head := header.metadata.get(f"{architecture}.attention.key_length")) and hasattr(config, "head_dim"):
        config.head_dim = head
    if architecture == "phi3":
        config.sliding_window = header.metadata.get("phi3.attention.sliding_window")
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = header.tensors.get(FREQUENCIES)
    factors = None if frequencies is None else _read(header, frequencies).float()
    config.rope_parameters = rope_parameters(header.metadata, config.rope_parameters, size, factors, str(header.path))
    return config


def _read(header: GgufHeader, tensor: GgufTensor) -> Tensor:
    """Return a copy of a tensor's values; of a packed one the bytes of its rows."""
    data = np.memmap(header.path, dtype=np.uint8, mode="r")
    values = torch.from_numpy(np.array(data[tensor.offset : tensor.offset + _size(tensor)]))
    if tensor.kind in _PLAIN:
        return values.view(_PLAIN[tensor.kind][1]).view(tensor.shape)
    return values.view(*tensor.shape[:-1], -1)


class _Loader:
    """Puts the tensors of one file into a model on the meta device.

    Raises:
        GgufError: The file's tensors are not those that its metadata need; nothing has been allocated.
    """

    def __init__(
        self, header: GgufHeader, layout: GgufLayout, model: Any, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.header, self.model, self.dtype, self.device = header, model, dtype, device
        self.layout = layout
        self.dense = {f"{path}.weight" for path in get_keys_to_not_convert(model)}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        names = {path: str(layout.names.get_name(path, (".weight", ".bias"))) for path in parameters}
        self.names = {path: name for path, name in names.items() if name in header.tensors}
        """{path of a parameter: name of its tensor}"""
        self.missing = [path for path in names if path not in self.names and path not in model.all_tied_weights_keys]
        self._check_complete()
        for path, name in self.names.items():
            shape, expected = header.tensors[name].shape, tuple(parameters[path].shape)
            if shape != expected:
                raise GgufError(
                    f"{header.path} is damaged: {name} is {list(shape)}, and its metadata need {list(expected)}; get "
                    "the file again"
                )

    def _check_complete(self) -> None:
        has_head = self.model.get_output_embeddings() is not None
        body = f"{self.model.base_model_prefix}."
        lacks = [path for path in self.missing if has_head or path.startswith(body)]
        if lacks:
            raise GgufError(f"{self.header.path} lacks {', '.join(lacks[:5])}; get the file again")
        known = {*self.names.values(), FREQUENCIES, *([] if has_head else [f"{HEAD}.weight"])}
        if unused := [name for name in self.header.tensors if name not in known]:
            raise GgufError(
                f"{self.header.path} holds {', '.join(unused[:5])}, which {type(self.model).__name__} does not have; "
                "its model is not supported; AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE) dequantises "
                "it"
            )

    @torch.no_grad()
    def load(self) -> None:
        """Give the model its buffers, such as rotary frequencies, and its parameters."""
        for module in self.model.modules():
            on_meta = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
            for name in on_meta:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=self.device)
            if on_meta:
                self.model._init_weights(module)  # its parameters are still on the meta device, where this has no cost
        for path, name in self.names.items():
            self._put(path, name)
        self.model.tie_weights()
        for owner in {path.rpartition(".")[0] for path in self.missing}:  # the head of another task
            module = self.model.get_submodule(owner)
            module.to_empty(device=self.device)
            self.model._init_weights(module)

    def _put(self, path: str, name: str) -> None:
        """Give the model the parameter at a path."""
        owner, _, leaf = path.rpartition(".")
        module, tensor = self.model.get_submodule(owner), self.header.tensors[name]
        rows = self.layout.from_file(name.rpartition(".")[0], _read(self.header, tensor))
        block = _PACKED.get(tensor.kind)
        if block is not None and leaf == "weight" and type(module) is nn.Linear and path not in self.dense:
            self.model.set_submodule(owner, self._packed(module, block, rows), strict=True)
            return
        values = rows.float() if block is None else block.dequantize(block.pack(rows))
        on_meta: Any = module._parameters[leaf]
        module._parameters[leaf] = nn.Parameter(values.to(self.device, on_meta.dtype).contiguous())

    def _packed(self, module: nn.Linear, block: BlockFormat, rows: Tensor) -> GgufLinear:
        layer = GgufLinear(module.in_features, module.out_features, block.name, False, self.dtype, "meta")
        layer.weight = nn.Parameter(block.pack(rows).to(self.device), requires_grad=False)
        layer.bias = module.bias  # of the same object: it may be loaded already, or is loaded later
        return layer


class _GgufStorage(HfQuantizer):
    """Tells transformers that the model is quantised: it can be trained with adapters and dequantised, not saved."""

    def is_serializable(self) -> Any:
        return False

    @property
    def is_trainable(self) -> Any:
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        assert dtype is not None
        for path, layer in list(_gguf_layers(model)):
            model.set_submodule(path, _plain(layer, dtype), strict=True)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        return model


def _gguf_layers(model: nn.Module) -> Iterator[tuple[str, GgufLinear]]:
    for path, module in model.named_modules():
        if isinstance(module, GgufLinear):
            yield path, module


def _plain(layer: GgufLinear, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype)
    plain.weight = nn.Parameter(layer.dequantized(dtype).contiguous(), requires_grad=False)
    plain.bias = layer.bias
    return plain.train(layer.training)
