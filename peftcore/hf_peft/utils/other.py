"""`peft.utils.other`."""

from peftcore.hf_peft.utils import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    cast_mixed_precision_params,
    infer_device,
    prepare_model_for_kbit_training,
)

__all__ = [
    "CONFIG_NAME",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "cast_mixed_precision_params",
    "infer_device",
    "prepare_model_for_kbit_training",
]
