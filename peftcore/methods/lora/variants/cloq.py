"""CLoQ: the start of QERA with orthonormal B and a damped second moment of the inputs. arXiv:2501.18475.

B = U and A = Uᵀ E / s; see `quantisation_error`. The paper first rounds the base with GPTQ's error compensation, which
`peftcore.calibrate_rounding` does. Shapes: E (o, i), U (o, r).
"""

from typing import TYPE_CHECKING

from torch import Tensor

from peftcore.methods.lora.initialisation import Factors
from peftcore.methods.lora.quantisation_error import QuantisationError, QuantisationErrorStart
from peftcore.methods.lora.variant import register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora


class Cloq(QuantisationError):
    """Start with orthonormal B."""

    title = "CLoQ"
    damping = 0.01

    def split(self, adapter: "Lora", u: Tensor, values: Tensor, projected: Tensor, moment: Tensor) -> Factors:
        return projected / adapter.scaling, u


@register_variant
class CloqStart(QuantisationErrorStart):
    """Initialisation `init_lora_weights="cloq"`, for a quantised base; needs data and the original weights."""

    names = ("cloq",)
    observer = Cloq
