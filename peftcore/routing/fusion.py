"""AdapterFusion (arXiv:2005.00247) over low-rank adapters: attention that is trained to weigh them for every token.

At each layer a token's input x asks, every adapter's change Δᵢ = s BᵢAᵢ x answers, and f(x) + Σ softmax(q·kᵢ / √w)ᵢ Δᵢ
comes out, with q = Q x and kᵢ = K Δᵢ. Values are the changes themselves (in the paper a matrix that starts as the
identity and is held near it), so that a fusion of adapters never says what none of them does. K starts at zero: all
weigh the same, as `Average` does.

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
    """Attention over some adapters of a model. Train its parameters with `with model.route(fusion.gate):` around the
    forward; the adapters and the base stay frozen. Nothing of it is part of the model."""

    def __init__(self, model: nn.Module, members: Sequence[str], width: int = 16):
        """members: adapters by name, of methods with two factors; width: of queries and keys (count).

        Raises AdapterNameError, RoutingError.
        """
        super().__init__()
        adapters = adapter_set(model)
        adapters.require(*members)
        if len(members) < 2 or width < 1:
            raise RoutingError(f"Fusion: give two adapters or more and a width of at least 1; got {members}, {width}")
        self.members, self.width = tuple(members), width
        self.gate = Gate(self.members, self)
        """What to route by; names may be any that `Gate.renamed` gives."""
        self.queries, self.keys = nn.ParameterDict(), nn.ParameterDict()
        for path, site in adapters.layers.items():
            own = [site.adapters[name] for name in members if name in site.adapters]
            if not own:
                continue
            if unfit := next((a for a in own if a.low_rank() is None or site.base.kind != "linear"), None):
                raise RoutingError(f"Fusion needs adapters of two factors; {type(unfit).__name__} at {path} has none")
            wide = torch.promote_types(site.base.dtype, torch.float32)
            query = torch.empty(width, site.base.in_features, dtype=wide, device=site.base.device)
            nn.init.normal_(query, std=1 / math.sqrt(site.base.in_features))
            self.queries[_key(path)] = nn.Parameter(query)
            self.keys[_key(path)] = nn.Parameter(query.new_zeros(width, site.base.out_features))

    def forward(self, path: str, adapters: Mapping[str, Any], x: Tensor) -> Tensor:
        """(..., m) for x (..., i): the weights at one layer of those members that it has."""
        if _key(path) not in self.queries:
            raise RoutingError(f"this fusion was made without {path}; make it for the model as it is now")
        query, key = self.queries[_key(path)], self.keys[_key(path)]
        asked = x.to(query.dtype)
        answers = []
        for adapter in adapters.values():
            factors = adapter.low_rank()
            if factors is None:
                raise RoutingError(f"Fusion needs adapters of two factors; {type(adapter).__name__} at {path} has none")
            b = key @ factors.b.to(key.dtype)  # (w, r): K B, so that no Δ of the output's size is formed
            b = b if factors.gain is None else (key * factors.gain.to(key.dtype)) @ factors.b.to(key.dtype)
            answers.append(factors.scaling * F.linear(F.linear(asked, factors.a.to(key.dtype)), b))
        scores = (F.linear(asked, query).unsqueeze(-2) * torch.stack(answers, -2)).sum(-1)
        return F.softmax(scores / math.sqrt(self.width), -1).to(x.dtype)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; whole or not at all."""
        about = {"members": json.dumps(self.members), "width": str(self.width)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(Path(path), save(tensors, metadata=about))

    @classmethod
    def load(cls, model: nn.Module, path: str | Path) -> "Fusion":
        """What `save` wrote, for a model with these adapters. Raises AdapterNameError, CheckpointError."""
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            members, width = json.loads(about["members"]), int(about["width"])
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise CheckpointError(f"{path} is no fusion that was saved whole ({error}); take another copy") from error
        made = cls(model, members, width)
        own = made.state_dict()
        if wrong := [n for n in own.keys() | tensors.keys() if n not in own or n not in tensors]:
            raise CheckpointError(f"{path} was made for other layers: {sorted(wrong)[0]} ({len(wrong)} in all)")
        if wrong := [name for name in own if own[name].shape != tensors[name].shape]:
            raise CheckpointError(f"{path} was made for another base: {wrong[0]} is {list(tensors[wrong[0]].shape)}")
        made.load_state_dict(tensors)
        return made


def _key(path: str) -> str:
    return path.replace(".", "/")
