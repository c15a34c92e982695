"""`XLoraModel`: the view on a model with an X-LoRA, with HF PEFT's methods for its weights."""

from torch import Tensor

from peftcore.errors import AdapterNameError
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.tuner_model import TunerModel
from peftcore.methods.xlora import Mixture


class XLoraModel(TunerModel):
    """View on a model with adapters, the first of which is of the method XLORA.

    Its methods act on the active X-LoRA, or on the first one if none is active. A `PeftModel` has them, too. Shapes: b
    rows, t tokens, l adapted layers, n LoRAs.
    """

    peft_type = "XLORA"

    def set_topk_lora(self, value: int | None) -> None:
        """Set the number of LoRAs that act for a token and layer, also in the configuration.

        Args:
            value: from 1 to n; None: all LoRAs.

        Raises:
            ConfigError: the value does not fit.
        """
        config = self._mixture.config
        config.check_top_k(value)
        config.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """Set the factor of the output of every LoRA, also in the configuration."""
        self._mixture.config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        """Return the factor of the output of every LoRA."""
        return self._mixture.config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Set every weight of the first pass, also in the configuration; None: 1/n."""
        config = self._mixture.config
        config.scaling_pass_value = 1 / len(config.adapters or {}) if value is None else value

    def get_latest_scalings(self) -> Tensor | None:
        """Return the classifier's weights (b, t, l, n) of the latest call, without gradients; None before a call."""
        return self._mixture.latest

    def enable_scalings_logging(self) -> None:
        """Log the classifier's weights of every call from now on."""
        self._mixture.logs = True

    def disable_scalings_logging(self) -> None:
        """Stop logging; the log stays."""
        self._mixture.logs = False

    def clear_scalings_log(self) -> None:
        """Clear the log."""
        self._mixture.log.clear()

    def get_scalings_log(self) -> list[Tensor]:
        """Return the logged weights (b, t, l, n) of each call, without gradients, in a new list."""
        return list(self._mixture.log)

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """Return {t: (positions in the log, logged weights (b, t, l, n))}."""
        buckets: dict[int, tuple[list[int], list[Tensor]]] = {}
        for position, scalings in enumerate(self._mixture.log):
            positions, tensors = buckets.setdefault(scalings.shape[1], ([], []))
            positions.append(position)
            tensors.append(scalings)
        return buckets

    @property
    def _mixture(self) -> Mixture:
        adapters = adapter_set(self.model)
        for name in (*adapters.selection.active, *adapters.configs):
            if isinstance(shared := adapters.shared(name), Mixture):
                return shared
        raise AdapterNameError("the model has no X-LoRA; add one with get_peft_model(model, XLoraConfig(...))")
