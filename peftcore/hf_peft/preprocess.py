"""HF PEFT's order of the initialisations from data: `preprocess_corda` and `preprocess_loraga` before get_peft_model.

Both run the caller's data through the plain model and leave what they find as an attribute of each target layer.
`get_peft_model` with `init_lora_weights="corda"` or "lora_ga" reads the attribute and deletes it.
`peftcore.initialize_from_data` does the same after `get_peft_model`.

Files are written as safetensors, whatever their name. A pickle, such as HF PEFT's own cache file, is never read.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from peftcore.bases import BaseWeight, base_weight
from peftcore.errors import CheckpointError, ConfigError
from peftcore.files import file_written_atomically
from peftcore.files.tensors import parsed, read_file
from peftcore.injection.targets import find_targets
from peftcore.layers.training_flags import training_flags_restored
from peftcore.layers.wrapper import unwrapped
from peftcore.methods.lora import LoraConfig
from peftcore.methods.lora.variants import corda

__all__ = ["estimate_gradients", "preprocess_corda", "preprocess_loraga"]

_PICKLE_STARTS = (b"PK", b"\x80")
"""First bytes of a file of `torch.save`: a zip archive, or a pickle of protocol 2 or later."""
_EIGEN_FIELDS = ("S_WC", "U_WC", "V_WC")


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Prepare the CorDA start of each target layer of a model, for get_peft_model.

    Sets the attribute `eigens` of each linear target. On an error the model has no such attribute.

    Args:
        model: the model that will get the adapter.
        lora_config: the adapter's configuration, with `corda_config`. Its `cache_file` and `covariance_file` are read
            if they exist, and written otherwise.
        run_model: function that runs `hooked_model` on the data, a few hundred samples; not needed if a file exists.
        hooked_model: the model that `run_model` calls; None for `model`.

    Raises:
        ConfigError: an option does not fit, no function was given, or the data do not reach a layer.
        CheckpointError: a file is a pickle, damaged, or of another model or rank.
        TargetError: no layer matches.
    """
    if lora_config.corda_config is None:
        raise ConfigError("preprocess_corda: the configuration has no corda_config; give corda_config=CordaConfig()")
    options = corda.all_options(lora_config.corda_config)
    bases = _linear_targets(model, lora_config)
    ranks = {path: lora_config.at(path)[0] for path in bases}
    eigens = _saved_eigens(options["cache_file"], bases, ranks)
    sums: dict[str, tuple[int, Tensor]] = {}
    if eigens is None:
        sums = _covariances(model, lora_config, bases, run_model, hooked_model, options)
        paths = tqdm(bases, desc="CorDA", unit="layer", disable=not options["verbose"])
        eigens = {path: _decomposed(path, bases[path], sums[path][1], ranks[path], options) for path in paths}
        if options["cache_file"] is not None:
            _write(
                options["cache_file"],
                {f"{path}.eigens.{name}": getattr(one, name) for path, one in eigens.items() for name in _EIGEN_FIELDS},
            )
    for path, base in bases.items():
        vars(base.layer)["eigens"] = eigens[path]
        if path in sums and not options["prune_temporary_fields"]:
            count, covariance = sums[path]
            vars(base.layer).update(sample_count=count, covariance_matrix=covariance)
            vars(base.layer).update(corda_method=options["corda_method"], rank=ranks[path])


@torch.no_grad()
def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], Any],
    cache_file: str | os.PathLike[str] | None = None,
) -> None:
    """Estimate the gradient of each target layer's weight, for the LoRA-GA start in get_peft_model.

    Sets the attribute `_peft_loraga_grad` of each linear target. On an error the model has no such attribute.

    Args:
        model: the model that will get the adapter.
        lora_config: the adapter's configuration, with `lora_ga_config`.
        train_step: function that runs forward and backward passes of the model on the data, without an optimiser.
        cache_file: file of the gradients, read if it exists, and written otherwise.

    Raises:
        ConfigError: an option does not fit, a layer is quantised, or no layer gets a gradient.
        CheckpointError: the file is a pickle, damaged, or of another model.
        TargetError: no layer matches.
    """
    if lora_config.lora_ga_config is None:
        raise ConfigError(
            "preprocess_loraga: the configuration has no lora_ga_config; give init_lora_weights='lora_ga' and "
            "lora_ga_config=LoraGAConfig()"
        )
    bases = _with_gradients(model, lora_config)
    if _exists(cache_file):
        tensors = _read(cache_file)
        shapes = {path: base.layer.weight.shape for path, base in bases.items()}
        gradients = {path: _checked(tensors, f"{path}._peft_loraga_grad", cache_file, shapes[path]) for path in bases}
    else:
        gradients = _gradients(model, bases, train_step)
        if cache_file is not None:
            _write(cache_file, {f"{path}._peft_loraga_grad": tensor for path, tensor in gradients.items()})
    _set_gradients(bases, gradients)


@torch.no_grad()
def estimate_gradients(model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any]) -> None:
    """Set the attribute `_peft_loraga_grad` of each linear target: `preprocess_loraga` without a file.

    Args:
        model: the model that will get the adapter.
        lora_config: the adapter's configuration, which names the targets.
        train_step: function that runs forward and backward passes of the model on the data, without an optimiser.

    Raises:
        ConfigError: a layer is quantised, or no layer gets a gradient.
        TargetError: no layer matches.
    """
    bases = _with_gradients(model, lora_config)
    _set_gradients(bases, _gradients(model, bases, train_step))


def _set_gradients(bases: Mapping[str, BaseWeight], gradients: Mapping[str, Tensor]) -> None:
    for path, gradient in gradients.items():
        vars(bases[path].layer)["_peft_loraga_grad"] = gradient.to(bases[path].device)


def _linear_targets(model: nn.Module, config: LoraConfig) -> dict[str, BaseWeight]:
    """Return {path: view on the weight} of the targets that are linear layers."""
    layers = {path: unwrapped(layer) for path, layer in find_targets(model, config).items()}
    bases = {path: base_weight(layer, path) for path, layer in layers.items()}
    linear = {path: base for path, base in bases.items() if base.kind == "linear"}
    if not linear:
        raise ConfigError(
            f"target_modules match no linear layer, only {next(iter(bases.values())).kind} ones; name linear layers, "
            "which alone have such a start"
        )
    return linear


# -- CorDA -----------------------------------------------------------------------------------------------------------


def _covariances(
    model: nn.Module,
    config: LoraConfig,
    bases: Mapping[str, BaseWeight],
    run_model: Callable[[], Any] | None,
    hooked_model: nn.Module | None,
    options: Mapping[str, Any],
) -> dict[str, tuple[int, Tensor]]:
    """Return {path: (number of calls, mean covariance of the input)}, from the file or from the data."""
    file = options["covariance_file"]
    if _exists(file):
        tensors = _read(file)
        sizes = {path: (base.in_features, base.in_features) for path, base in bases.items()}
        return {path: (0, _checked(tensors, path, file, sizes[path]).to(bases[path].device)) for path in bases}
    if run_model is None:
        raise ConfigError("preprocess_corda: give run_model, a function that runs the model on data; no file exists")
    hooked = model if hooked_model is None else hooked_model
    layers = {path: base.layer for path, base in bases.items()}
    if hooked is not model:
        layers = {path: base.layer for path, base in _linear_targets(hooked, config).items()}
    counts, sums = _summed_covariances(layers, hooked, run_model, options["use_float16_for_covariance"])
    if missed := [path for path in bases if path not in sums]:
        raise ConfigError(
            f"preprocess_corda: run_model never called the layer {missed[0]} of the model that is observed; give the "
            "model that run_model calls as hooked_model, or exclude the layer"
        )
    means = {path: (counts[path], (sums[path] / counts[path]).to(bases[path].device)) for path in bases}
    if infinite := [path for path, (_, mean) in means.items() if not torch.isfinite(mean).all()]:
        raise ConfigError(f"preprocess_corda: the inputs of {infinite[0]} are not all finite; check the data")
    if file is not None:
        _write(file, {path: mean for path, (_, mean) in means.items()})
    return means


def _summed_covariances(
    layers: Mapping[str, nn.Module], model: nn.Module, run_model: Callable[[], Any], in_input_type: bool
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Run the model; return {path: number of calls} and {path: sum of the input's covariances} of the layers.

    Args:
        layers: The layers by path.
        model: The model that `run_model` runs, in evaluation mode.
        run_model: Runs the model on data.
        in_input_type: True computes in the type of the inputs, False in float32.
    """
    counts: dict[str, int] = dict.fromkeys(layers, 0)
    sums: dict[str, Tensor] = {}

    def hook_at(path: str) -> Callable[..., None]:
        def hook(_layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            x = inputs[0].detach()
            part = corda.covariance(x if in_input_type else x.float())
            sums[path] = sums[path] + part if path in sums else part
            counts[path] += 1

        return hook

    with ExitStack() as stack:
        for path, layer in layers.items():
            stack.callback(layer.register_forward_hook(hook_at(path)).remove)
        stack.enter_context(training_flags_restored(model))
        model.eval()
        run_model()
    return counts, sums


def _decomposed(
    path: str, base: BaseWeight, covariance: Tensor, r: int, options: Mapping[str, Any]
) -> corda.CordaEigens:
    weight = base.read_unmerged().float()
    if r > (most := min(weight.shape)):
        raise ConfigError(f"preprocess_corda: r={r} at {path} exceeds the weight's {most} singular vectors; try {most}")
    return corda.eigens_of(weight, covariance.float(), r, options["corda_method"])


def _saved_eigens(
    file: str | None, bases: Mapping[str, BaseWeight], ranks: Mapping[str, int]
) -> dict[str, corda.CordaEigens] | None:
    """Return the singular vectors of a cache file; None if there is no file."""
    if not _exists(file):
        return None
    tensors, eigens = _read(file), {}
    for path, base in bases.items():
        shapes = ((ranks[path],), (base.out_features, ranks[path]), (base.in_features, ranks[path]))
        parts = (
            _checked(tensors, f"{path}.eigens.{name}", file, shape).to(base.device)
            for name, shape in zip(_EIGEN_FIELDS, shapes, strict=True)
        )
        eigens[path] = corda.CordaEigens(*parts)
    return eigens


# -- LoRA-GA ---------------------------------------------------------------------------------------------------------


@contextmanager
def _only_weights_train(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Let only these parameters get gradients, starting from none; then restore flags, gradients and modes."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    with training_flags_restored(model), torch.enable_grad():
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        model.train()
        try:
            yield
        finally:
            for parameter, requires_grad, gradient in before:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient


def _with_gradients(model: nn.Module, config: LoraConfig) -> dict[str, BaseWeight]:
    """Return `_linear_targets`; raise ConfigError if one is quantised."""
    bases = _linear_targets(model, config)
    if quantised := [path for path, base in bases.items() if base.quantized]:
        raise ConfigError(
            f"LoRA-GA: {quantised[0]} is quantised, so its weight has no gradient; load the base in 16 or 32 bits, or "
            "use initialize_from_data"
        )
    return bases


def _gradients(model: nn.Module, bases: Mapping[str, BaseWeight], train_step: Callable[[], Any]) -> dict[str, Tensor]:
    """Return {path: mean gradient of the weight, as it is stored} over the differentiated calls of the layer."""
    counts: dict[str, int] = dict.fromkeys(bases, 0)

    def hook_at(path: str) -> Callable[..., None]:
        def count(_gradient: Tensor) -> None:
            counts[path] += 1

        def hook(_layer: nn.Module, _inputs: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(count)

        return hook

    with ExitStack() as stack:
        for path, base in bases.items():
            stack.callback(base.layer.register_forward_hook(hook_at(path)).remove)
        stack.enter_context(_only_weights_train(model, [base.layer.weight for base in bases.values()]))
        train_step()
        gradients = {
            path: base.layer.weight.grad.detach() / max(1, counts[path])
            for path, base in bases.items()
            if base.layer.weight.grad is not None
        }
    if not gradients:
        raise ConfigError(
            "preprocess_loraga: no layer got a gradient; train_step must call backward on a loss of this model"
        )
    if missed := sorted(bases.keys() - gradients.keys()):
        warnings.warn(
            f"preprocess_loraga: {missed[0]} got no gradient ({len(missed)} layers in all); the adapters of these "
            "layers start as plain LoRAs",
            stacklevel=3,
        )
    return gradients


# -- files -----------------------------------------------------------------------------------------------------------


def _exists(file: str | os.PathLike[str] | None) -> bool:
    return file is not None and Path(file).exists() and Path(file).stat().st_size > 0


def _read(file: Any) -> dict[str, Tensor]:
    path = Path(file)
    content = read_file(path)
    if bytes(content[:2]).startswith(_PICKLE_STARTS):
        raise CheckpointError(
            f"{path} is a pickle, which can run code when it is loaded, so it is not read; delete it, or give another "
            "path: the file is then written as safetensors"
        )
    return parsed(content, path.parent, path.name)


def _write(file: Any, tensors: Mapping[str, Tensor]) -> None:
    with file_written_atomically(Path(file)) as fresh:
        save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, fresh)


def _checked(tensors: Mapping[str, Tensor], key: str, file: Any, shape: tuple[int, ...]) -> Tensor:
    if key not in tensors or tensors[key].shape != shape:
        seen = "is absent" if key not in tensors else f"has the shape {list(tensors[key].shape)}"
        raise CheckpointError(
            f"{file}: {key} {seen}, and {list(shape)} fits; the file is of another model, rank or configuration"
        )
    return tensors[key]
