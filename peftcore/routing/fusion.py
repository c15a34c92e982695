"""AdapterFusion (arXiv:2005.00247) over low-rank adapters: trained attention that weighs adapters for every token.

At each layer the output is f(x) + Σ softmax(q·kᵢ / √w)ᵢ Δᵢ. The query q = Q x comes from the token's input x, and the
keys kᵢ = K Δᵢ from the adapters' outputs Δᵢ = s BᵢAᵢ x. The values are the Δᵢ themselves, so the result is always a
weighted mean of them; the paper multiplies them by a matrix that is regularised towards the identity. K starts at zero,
where all adapters have the same weight, as with `Average`.

Shapes: w width of queries and keys, i in_features, o out_features, m members.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.composition.algebra import Gate
from peftcore.errors import CheckpointError, RoutingError
from peftcore.files import write_atomically
from peftcore.injection.adapter_set import adapter_set


class Fusion(nn.Module):
    """Attention over adapters of a model.

    Train its parameters with `with model.route(fusion.gate):` around the forward pass; adapters and base stay frozen.
    The fusion's parameters are not part of the model.

    Args:
        model: a model with adapters.
        members: names of two or more adapters of low-rank methods.
        width: size of queries and keys.

    Raises:
        AdapterNameError: a member does not exist.
        RoutingError: an argument is not valid, or a member is not low-rank.
    """

    def __init__(self, model: nn.Module, members: Sequence[str], width: int = 16):
        super().__init__()
        adapters = adapter_set(model)
        adapters.require(*members)
        if len(members) < 2 or width < 1:
            raise RoutingError(f"Fusion: give two adapters or more and a width of at least 1; got {members}, {width}")
        self.members, self.width = tuple(members), width
        self.gate = Gate(self.members, self)
        """The gate for `model.route`; `Gate.renamed` gives one for other adapter names."""
        self.queries, self.keys = nn.ParameterDict(), nn.ParameterDict()
        for path, site in adapters.layers.items():
            present, base = [site.adapters[name] for name in members if name in site.adapters], site.base
            if not present:
                continue
            if other := next((a for a in present if a.low_rank() is None or base.kind != "linear"), None):
                raise _not_low_rank(other, path)
            wide = torch.promote_types(base.dtype, torch.float32)
            query = torch.empty(width, base.in_features, dtype=wide, device=base.device)
            nn.init.normal_(query, std=1 / math.sqrt(base.in_features))
            self.queries[_key(path)] = nn.Parameter(query)
            self.keys[_key(path)] = nn.Parameter(query.new_zeros(width, base.out_features))

    def forward(self, path: str, adapters: Mapping[str, Any], x: Tensor) -> Tensor:
        """Return the weights (..., m) of the members at one layer for x (..., i); m counts those that the layer has."""
        if _key(path) not in self.queries:
            raise RoutingError(f"this fusion has no parameters for {path}; make a fusion of the current model")
        query, key = self.queries[_key(path)], self.keys[_key(path)]
        x_wide = x.to(query.dtype)
        keys = []
        for adapter in adapters.values():
            branch = adapter.low_rank()
            if branch is None:
                raise _not_low_rank(adapter, path)
            k = key if branch.gain is None else key * branch.gain.to(key.dtype)
            k_b = k @ branch.b.to(key.dtype)  # (w, r), so that no Δᵢ of the output's size is formed
            keys.append(branch.scaling * F.linear(F.linear(x_wide, branch.a.to(key.dtype)), k_b))
        scores = (F.linear(x_wide, query).unsqueeze(-2) * torch.stack(keys, -2)).sum(-1)
        return F.softmax(scores / math.sqrt(self.width), -1).to(x.dtype)

    def save(self, path: str | Path) -> None:
        """Write the parameters to one safetensors file, atomically."""
        metadata = {"members": json.dumps(self.members), "width": str(self.width)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(Path(path), save(tensors, metadata=metadata))

    @classmethod
    def load(cls, model: nn.Module, path: str | Path) -> "Fusion":
        """Read a file that `save` wrote, for a model with the same adapters.

        Raises:
            AdapterNameError: the model lacks a member.
            CheckpointError: the file is damaged, or was made for other layers or another base.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            members, width = json.loads(metadata["members"]), int(metadata["width"])
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise CheckpointError(
                f"{path} is not a complete file of Fusion.save ({error}); take another copy"
            ) from error
        fusion = cls(model, members, width)
        expected = fusion.state_dict()
        if wrong := sorted(expected.keys() ^ tensors.keys()):
            raise CheckpointError(
                f"{path} was made for other layers: {wrong[0]} ({len(wrong)} in all); load the adapters that it was "
                "made for, or train a new Fusion"
            )
        if wrong := [name for name in expected if expected[name].shape != tensors[name].shape]:
            raise CheckpointError(
                f"{path} was made for another base: {wrong[0]} is {list(tensors[wrong[0]].shape)}, and here "
                f"{list(expected[wrong[0]].shape)}; load that base"
            )
        fusion.load_state_dict(tensors)
        return fusion


def _key(path: str) -> str:
    """Return a layer's name in a ParameterDict, which allows no dots."""
    return path.replace(".", "/")


def _not_low_rank(adapter: Any, path: str) -> RoutingError:
    return RoutingError(f"Fusion needs low-rank adapters; {type(adapter).__name__} at {path} is not low-rank")
