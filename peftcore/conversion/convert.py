"""An adapter of a model as a plain LoRA: a second adapter of that model, or a directory."""

from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file
from torch import Tensor, nn

from peftcore._util.tensors import PREFIX, WEIGHTS_NAME
from peftcore.config import CONFIG_NAME
from peftcore.conversion.lora import lora_config, lora_tensors
from peftcore.conversion.low_rank_form import Conversion, low_rank_forms
from peftcore.files import directory_written_atomically, write_manifest
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.inject import commit_injection
from peftcore.injection.preparation import prepare_injection
from peftcore.methods.lora import LoraConfig
from peftcore.storage.adapter_state import AdapterState, adapter_state_of
from peftcore.storage.embedding_rows import embeddings_to_save


class _PlainLora(NamedTuple):
    """A LoRA that is in no model yet."""

    config: LoraConfig
    tensors: dict[str, Tensor]
    report: Conversion


def convert_to_lora(
    model: nn.Module,
    adapter_name: str,
    new_name: str,
    rank: int | None = None,
    tolerance: float | None = None,
    is_trainable: bool = False,
) -> Conversion:
    """Give a model a plain LoRA that computes what another of its adapters does; says how nearly.

    rank: of each layer at most. tolerance: relative error of each layer's change, for the least rank that meets it.
    With neither, only methods that are low-rank themselves convert (LoRA, rsLoRA, AdaLoRA, VeRA), and exactly.
    Modules that the adapter trains whole and its trained biases are copied too. `set_adapter(new_name)` makes it act.
    Raises ConfigError or MergeError for what no LoRA can stand for; the model is then as it was.
    """
    plain = _plain_lora(model, adapter_name, rank, tolerance)
    injection = prepare_injection(model, plain.config, new_name, fresh=False)
    state = AdapterState(injection.adapters, injection.biases, injection.copies, None)
    state.read(state.with_our_keys(plain.tensors))
    commit_injection(model, injection, is_trainable)
    return plain.report


def save_as_lora(
    model: nn.Module,
    directory: str | Path,
    adapter_name: str = "default",
    rank: int | None = None,
    tolerance: float | None = None,
) -> Conversion:
    """Write a model's adapter as a directory of plain LoRA; the adapter itself stays as it is.

    Options and errors are those of `convert_to_lora`. Biases that the adapter trains are written too. What was at
    `directory` is replaced, and stays on an error.
    """
    plain = _plain_lora(model, adapter_name, rank, tolerance)
    rows = embeddings_to_save(model, adapter_state_of(adapter_set(model), adapter_name), adapter_name, "auto")
    base = plain.config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    plain.config.base_model_name_or_path = base
    write_lora(plain.config, rows | plain.tensors, Path(directory))
    return plain.report


def write_lora(config: LoraConfig, tensors: dict[str, Tensor], directory: Path) -> None:
    """Write PEFT's directory with its manifest; what was there is replaced."""
    with directory_written_atomically(directory) as fresh:
        # a tensor may be a view or shared with another: cloned, so that safetensors gets plain memory of its own
        plain = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
        save_file(plain, fresh / WEIGHTS_NAME, metadata={"format": "pt"})
        (fresh / CONFIG_NAME).write_text(config.to_json())
        write_manifest(fresh)


def _plain_lora(model: nn.Module, name: str, rank: int | None, tolerance: float | None) -> _PlainLora:
    adapters = adapter_set(model)
    layers, report = low_rank_forms(model, name, rank, tolerance)
    bases = {path: adapter.base for path, adapter in adapters.adapters(name).items()}
    tensors = lora_tensors(layers, {path: (base.kind, base.kernel) for path, base in bases.items()})
    for path, module in adapters.copies(name).items():
        tensors |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in module.state_dict().items()}
    for path, own in adapters.biases(name).items():
        inside = "base_layer." if path in layers and layers[path].rank else ""
        tensors[PREFIX + (path if own.base.kind == "parameter" else f"{path}.{inside}bias")] = own.bias.detach()
    return _PlainLora(lora_config(adapters.configs[name], layers), tensors, report)
