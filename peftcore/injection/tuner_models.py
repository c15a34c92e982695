"""HF PEFT's model class of each method: `LoraModel`, `IA3Model`, ...; see `TunerModel`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from peftcore.errors import AdapterNameError
from peftcore.files.tensors import PREFIX
from peftcore.injection.adapter_set import adapter_set, shared_by
from peftcore.injection.rank_allocator import Mask, RankAllocator, layers_of, masks_of, resize
from peftcore.injection.tuner_model import TunerModel
from peftcore.injection.xlora_model import XLoraModel as XLoraModel

if TYPE_CHECKING:
    from peftcore.methods.adalora import AdaLoraConfig
    from peftcore.methods.tinylora import TinyLoraConfig


class LoraModel(TunerModel):
    """View on a model with adapters, the first of which is of the method LORA."""

    peft_type = "LORA"


class AdaLoraModel(LoraModel):
    """View on a model with adapters, the first of which is of the method ADALORA."""

    peft_type = "ADALORA"

    @property
    def trainable_adapter_name(self) -> str:
        """Name of the first active AdaLoRA.

        Raises:
            AdapterNameError: no AdaLoRA is active.
        """
        adapters = adapter_set(self.model)
        for name in adapters.selection.active:
            if adapters.configs[name].peft_type == self.peft_type:
                return name
        raise AdapterNameError(f"no AdaLoRA is active; set_adapter one of {list(adapters.configs)}")

    @property
    def rankallocator(self) -> RankAllocator:
        """The allocator of the first active AdaLoRA."""
        name = self.trainable_adapter_name
        return RankAllocator(self.model, cast("AdaLoraConfig", self.peft_config[name]), name)

    def update_and_allocate(self, global_step: int) -> None:
        """Move the budget of the active AdaLoRAs, and write the masks into `rank_pattern` of their configurations.

        Call it after each optimiser step and before `zero_grad`.

        Args:
            global_step: number of the step.
        """
        super().update_and_allocate(global_step)
        adapters = adapter_set(self.model)
        for name in adapters.selection.active:
            config = adapters.configs[name]
            if config.peft_type == self.peft_type:
                masks = {f"{path}.lora_E": one.kept.tolist() for path, one in layers_of(self.model, name).items()}
                cast("AdaLoraConfig", config).rank_pattern = masks

    def resize_modules_by_rank_pattern(self, rank_pattern: Mapping[str, Mask], adapter_name: str) -> None:
        """Shrink the parameters of an AdaLoRA to the triplets that it keeps. They are new parameters then.

        An optimiser that holds the former ones must be made anew; `PeftModel.on_optimizer_step` needs no such step.

        Args:
            rank_pattern: {name of a layer's lora_E, with or without the adapter's name: mask of its triplets}, such as
                `model.peft_config["default"].rank_pattern`; other layers stay.
            adapter_name: the adapter.

        Raises:
            ConfigError: a name is not that of an adapted layer, or a mask has another length than the layer's rank.
            OptionTypeError: a mask is no list and no tensor.
            AdapterNameError: the adapter is not loaded.
        """
        layers = layers_of(self.model, adapter_name)
        for path, mask in masks_of(layers, rank_pattern, adapter_name).items():
            resize(layers[path], mask)

    def resize_state_dict_by_rank_pattern(
        self, rank_pattern: Mapping[str, Mask], state_dict: dict[str, Tensor], adapter_name: str
    ) -> dict[str, Tensor]:
        """Shrink tensors of an AdaLoRA in a state dict with HF PEFT's names to the triplets that it keeps.

        Args:
            rank_pattern: {name of a layer's lora_E, with or without the adapter's name: mask of its triplets}.
            state_dict: {name, such as "base_model.model.0.lora_E.default": tensor}; changed in place. Tensors that
                have the mask's number of triplets already stay.
            adapter_name: the adapter.

        Returns:
            The state dict.
        """
        for name, mask in rank_pattern.items():
            path = name.removesuffix(f".{adapter_name}").removesuffix(".lora_E")
            rows = torch.as_tensor(mask).flatten().bool().nonzero().flatten()
            for tensor, axis in (("lora_E", 0), ("lora_A", 0), ("lora_B", 1)):
                key = f"{PREFIX}{path}.{tensor}.{adapter_name}"
                if len(rows) != state_dict[key].shape[axis]:
                    state_dict[key] = state_dict[key].index_select(axis, rows.to(state_dict[key].device))
        return state_dict


class BOFTModel(TunerModel):
    """View on a model with adapters, the first of which is of the method BOFT."""

    peft_type = "BOFT"


class AdaptionPromptModel(TunerModel):
    """View on a model with adapters, the first of which is of the method ADAPTION_PROMPT."""

    peft_type = "ADAPTION_PROMPT"


class IA3Model(TunerModel):
    """View on a model with adapters, the first of which is of the method IA3."""

    peft_type = "IA3"


class LoHaModel(TunerModel):
    """View on a model with adapters, the first of which is of the method LOHA."""

    peft_type = "LOHA"


class LoKrModel(TunerModel):
    """View on a model with adapters, the first of which is of the method LOKR."""

    peft_type = "LOKR"


class OFTModel(TunerModel):
    """View on a model with adapters, the first of which is of the method OFT."""

    peft_type = "OFT"


class PolyModel(TunerModel):
    """View on a model with adapters, the first of which is of the method POLY."""

    peft_type = "POLY"


class LNTuningModel(TunerModel):
    """View on a model with adapters, the first of which is of the method LN_TUNING."""

    peft_type = "LN_TUNING"


class VeraModel(TunerModel):
    """View on a model with adapters, the first of which is of the method VERA."""

    peft_type = "VERA"


class FourierFTModel(TunerModel):
    """View on a model with adapters, the first of which is of the method FOURIERFT."""

    peft_type = "FOURIERFT"


class HRAModel(TunerModel):
    """View on a model with adapters, the first of which is of the method HRA."""

    peft_type = "HRA"


class VBLoRAModel(TunerModel):
    """View on a model with adapters, the first of which is of the method VBLORA."""

    peft_type = "VBLORA"

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """Return the size of what `save_pretrained` writes, as in HF PEFT.

        Args:
            adapter: the adapter.

        Returns:
            Numbers of VB-LoRA's parameters, where an index counts as a part of a float32, and of other trainable ones.
        """
        adapters = adapter_set(self.model)
        layers = adapters.of_method(adapter)
        shared = shared_by(layers)
        bank = list(shared.parameters()) if shared is not None else []
        saved = [*bank, *(tensor for layer in layers.values() for tensor in layer.checkpoint_tensors().values())]
        sizes = [one.numel() * (1 if one.is_floating_point() else one.itemsize / 4) for one in saved]
        own = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
        others = [one for one in self.model.parameters() if one.requires_grad and id(one) not in own]
        return int(sum(sizes)), sum(one.numel() for one in others)

    def print_savable_parameters(self) -> None:
        """Print the numbers of `get_nb_savable_parameters`."""
        own, others = self.get_nb_savable_parameters()
        print(
            f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} || total params to-be-saved: {own + others:,d}"
        )


class MissModel(TunerModel):
    """View on a model with adapters, the first of which is of the method MISS."""

    peft_type = "MISS"


class RandLoraModel(TunerModel):
    """View on a model with adapters, the first of which is of the method RANDLORA."""

    peft_type = "RANDLORA"


class RoadModel(TunerModel):
    """View on a model with adapters, the first of which is of the method ROAD."""

    peft_type = "ROAD"


class TrainableTokensModel(TunerModel):
    """View on a model with adapters, the first of which is of the method TRAINABLE_TOKENS."""

    peft_type = "TRAINABLE_TOKENS"


class HiraModel(TunerModel):
    """View on a model with adapters, the first of which is of the method HIRA."""

    peft_type = "HIRA"


class ShiraModel(TunerModel):
    """View on a model with adapters, the first of which is of the method SHIRA."""

    peft_type = "SHIRA"


class C3AModel(TunerModel):
    """View on a model with adapters, the first of which is of the method C3A."""

    peft_type = "C3A"


class WaveFTModel(TunerModel):
    """View on a model with adapters, the first of which is of the method WAVEFT."""

    peft_type = "WAVEFT"


class DeloraModel(TunerModel):
    """View on a model with adapters, the first of which is of the method DELORA."""

    peft_type = "DELORA"


class GraloraModel(TunerModel):
    """View on a model with adapters, the first of which is of the method GRALORA."""

    peft_type = "GRALORA"


class UniLoraModel(TunerModel):
    """View on a model with adapters, the first of which is of the method UNILORA."""

    peft_type = "UNILORA"


class PsoftModel(TunerModel):
    """View on a model with adapters, the first of which is of the method PSOFT."""

    peft_type = "PSOFT"


class SupertuningModel(TunerModel):
    """View on a model with adapters, the first of which is of the method SUPERTUNING."""

    peft_type = "SUPERTUNING"


class PeanutModel(TunerModel):
    """View on a model with adapters, the first of which is of the method PEANUT."""

    peft_type = "PEANUT"


class PveraModel(TunerModel):
    """View on a model with adapters, the first of which is of the method PVERA."""

    peft_type = "PVERA"


class GloraModel(TunerModel):
    """View on a model with adapters, the first of which is of the method GLORA."""

    peft_type = "GLORA"


class LilyModel(TunerModel):
    """View on a model with adapters, the first of which is of the method LILY."""

    peft_type = "LILY"


class FrodModel(TunerModel):
    """View on a model with adapters, the first of which is of the method FROD."""

    peft_type = "FROD"


class BeftModel(TunerModel):
    """View on a model with adapters, the first of which is of the method BEFT."""

    peft_type = "BEFT"


class TinyLoraModel(TunerModel):
    """View on a model with adapters, the first of which is of the method TINYLORA."""

    peft_type = "TINYLORA"

    def _init_tinylora_v(self, config: "TinyLoraConfig", adapter_name: str) -> None:
        """Give the vectors of an adapter uniform random values within `config.init_v_bound`."""
        shared = shared_by(adapter_set(self.model).adapters(adapter_name))
        assert shared is not None
        for vector in shared.parameters():
            nn.init.uniform_(vector, -config.init_v_bound, config.init_v_bound)


class DeftModel(TunerModel):
    """View on a model with adapters, the first of which is of the method DEFT."""

    peft_type = "DEFT"


class AdamssModel(TunerModel):
    """View on a model with adapters, the first of which is of the method ADAMSS."""

    peft_type = "ADAMSS"


class OSFModel(TunerModel):
    """View on a model with adapters, the first of which is of the method OSF."""

    peft_type = "OSF"


class ShadowModel(TunerModel):
    """View on a model with adapters, the first of which is of the method SHADOW."""

    peft_type = "SHADOW"
