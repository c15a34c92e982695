"""Reduction of a LoRA's intruder dimensions, which make a model forget (arXiv:2410.21228).

An intruder dimension is one of the first singular vectors of W + ΔW that is similar to no singular vector of W: with
W = Σ σᵢuᵢvᵢᵀ and W + ΔW = Σ σ'ⱼu'ⱼv'ⱼᵀ, vector j < k is one if maxᵢ |u'ⱼ·uᵢ| < ε. The reduced LoRA has the change
ΔW + (λ − 1) Σ σ'ⱼu'ⱼv'ⱼᵀ over the intruders j, approximated by its best change of the same rank.

W is (o, i), o outputs and i inputs times kernel size; so vectors u have one element per output, as in the paper.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from peftcore.adapter import Adapter, FactorNames
from peftcore.conversion.layer_factors import exact_factors
from peftcore.conversion.lora import lora_tensors
from peftcore.errors import ConfigError, ConversionError
from peftcore.injection.activation import set_adapter
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.inject import commit_injection
from peftcore.injection.preparation import Creation, prepare_injection
from peftcore.kernels.factors import Factors, padded, svd_of_dense
from peftcore.merging.convertible import check_convertible
from peftcore.methods.lora import Lora
from peftcore.storage.adapter_state import AdapterState, adapter_state_of


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: nn.Module,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Add a LoRA that is another one with smaller intruder dimensions, and make it the active adapter.

    It has the configuration of the other one, which stays as it is. A model with it forgets less, and solves the task
    of the adapter a little worse; `mitigation_lambda` chooses between the two.

    Args:
        peft_model: a model with adapters.
        old_adapter_name: a plain LoRA or rsLoRA that adapts linear layers, embeddings or convolutions.
        new_adapter_name: name of the new adapter.
        top_k: how many of the largest singular values of W + ΔW are examined (count, k).
        threshold_epsilon: a singular vector is an intruder below this similarity (0 to 1, ε).
        mitigation_lambda: share of an intruder that is left (λ); 1 leaves all of it.
        logging_sink: gets a line for each layer; None: no lines.

    Raises:
        ConversionError: the adapter is no plain LoRA.
        AdapterNameError, ConfigError, MergeError: an argument is not valid, or the adapter is merged now. The model is
            unchanged.
    """
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ConfigError(f"top_k must be a number of singular vectors, at least 1; got {top_k!r}; try 10")
    check_convertible(peft_model, old_adapter_name)
    adapters = adapter_set(peft_model)
    layers = adapters.adapters(old_adapter_name)
    _check_plain(layers, old_adapter_name)
    config: Any = copy.deepcopy(adapters.configs[old_adapter_name])
    config.inference_mode, config.init_lora_weights = False, True
    injection = prepare_injection(peft_model, config, new_adapter_name, Creation(initialise=False))
    reduced: dict[str, Factors] = {}
    for path, adapter in layers.items():
        injection.adapters[path].to(next(adapter.parameters()).dtype)
        count, factors = _reduced(adapter, top_k, threshold_epsilon, mitigation_lambda)
        if count:
            reduced[path] = factors
        if logging_sink is not None:
            logging_sink(f"{path}: {f'Intruders: {count}' if count else 'No intruders'}")
    tensors = adapter_state_of(adapters, old_adapter_name).tensors()
    tensors |= lora_tensors(reduced, {path: (layers[path].base.kind, layers[path].base.kernel) for path in reduced})
    AdapterState(injection.adapters, injection.biases, injection.copies, None).read(tensors)
    commit_injection(peft_model, injection, trainable=True)
    if logging_sink is not None:
        logging_sink(f"Enabling new adapter {new_adapter_name}")
    set_adapter(peft_model, new_adapter_name)


def _check_plain(layers: Mapping[str, Adapter], name: str) -> None:
    for path, adapter in layers.items():
        is_plain = isinstance(adapter, Lora) and adapter.groups == 1
        if not is_plain or adapter.factor_names() != FactorNames("lora_A_weight", "lora_B_weight"):
            raise ConversionError(
                f"reduce_intruder_dimension takes a plain LoRA; {name!r} is not one at {path}. Convert it first, by "
                f"add_as_lora(model, {name!r}, new_name) or with rank=..."
            )


def _reduced(adapter: Adapter, top_k: int, epsilon: float, share: float) -> tuple[int, Factors]:
    """Return the number of intruders of a layer, and its factors with the share of them that is left."""
    factors = exact_factors(adapter)
    assert factors is not None
    weight = adapter.base.read_unmerged().detach().flatten(1)
    dtype = torch.promote_types(weight.dtype, torch.float32)  # no SVD computes in 16 bits
    weight, change = weight.to(dtype), factors._replace(a=factors.a.to(dtype), b=factors.b.to(dtype)).dense()
    vectors, values, others = torch.linalg.svd(weight + change[0], full_matrices=False)
    base_vectors, _, _ = torch.linalg.svd(weight, full_matrices=False)
    similarity = (vectors[:, :top_k].mT @ base_vectors).abs().amax(1)
    found = (similarity < epsilon).nonzero().flatten()
    if not len(found):
        return 0, factors
    intruders = (vectors[:, found] * values[found]) @ others[found]
    reduced = (change + (share - 1) * intruders) / factors.scaling
    best = padded(svd_of_dense(reduced, factors.rank).balanced(), factors.rank)
    return len(found), Factors(best.a.to(factors.a.dtype), best.b.to(factors.b.dtype), factors.scaling)
