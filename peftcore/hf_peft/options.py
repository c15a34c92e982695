"""Options of LoRA's variants as HF PEFT's configuration objects, and the enumerations of prompt methods.

Each object is a dictionary, the form that `LoraConfig` takes and saves, with its keys as attributes.
"""

import os
from enum import Enum
from typing import Literal

from peftcore.errors import ConfigError
from peftcore.methods.lora.options import Options


class EvaConfig(Options):
    """Options of `init_lora_weights="eva"`, for `LoraConfig(eva_config=...)`. arXiv:2410.07170.

    Args:
        rho: the largest rank of a layer, as a multiple of r; at least 1.
        tau: cosine similarity from which a component counts as converged; in [0, 1].
        use_label_mask: leave out tokens that have no label.
        label_mask_value: the label of tokens without a label.
        whiten: scale the components to unit variance.
        adjust_scaling_factors: adjust lora_alpha to each layer's new rank.

    Raises:
        ConfigError: rho or tau is out of its range.
    """

    def __init__(
        self,
        rho: float = 2.0,
        tau: float = 0.99,
        use_label_mask: bool = True,
        label_mask_value: int = -100,
        whiten: bool = False,
        adjust_scaling_factors: bool = True,
    ):
        if rho < 1:
            raise ConfigError(f"EvaConfig: `rho` must be >= 1.0; got {rho!r}")
        if not 0 <= tau <= 1:
            raise ConfigError(f"EvaConfig: `tau` must be between 0.0 and 1.0; got {tau!r}")
        super().__init__(
            rho=rho,
            tau=tau,
            use_label_mask=use_label_mask,
            label_mask_value=label_mask_value,
            whiten=whiten,
            adjust_scaling_factors=adjust_scaling_factors,
        )


class CordaConfig(Options):
    """Options of `init_lora_weights="corda"`, for `LoraConfig(corda_config=...)`. arXiv:2406.05223.

    All but `corda_method` are options of `preprocess_corda`; `initialize_from_data` refuses them.

    Args:
        cache_file: file of the singular vectors; read if it exists, and written as safetensors otherwise.
        covariance_file: file of the covariances, which fit any rank; likewise.
        corda_method: "ipm" (instruction-previewed) or "kpm" (knowledge-preserved).
        verbose: show a progress bar.
        use_float16_for_covariance: sum the covariances in the dtype of the layer's input, not in float32.
        prune_temporary_fields: False keeps `sample_count`, `covariance_matrix`, `corda_method` and `rank` as attributes
            of the layers.
    """

    def __init__(
        self,
        cache_file: str | None = None,
        covariance_file: str | None = None,
        corda_method: Literal["ipm", "kpm"] = "ipm",
        verbose: bool = False,
        use_float16_for_covariance: bool = False,
        prune_temporary_fields: bool = True,
    ):
        super().__init__(
            cache_file=None if cache_file is None else os.fspath(cache_file),
            covariance_file=None if covariance_file is None else os.fspath(covariance_file),
            corda_method=corda_method,
            verbose=verbose,
            use_float16_for_covariance=use_float16_for_covariance,
            prune_temporary_fields=prune_temporary_fields,
        )


class LoraGAConfig(Options):
    """Options of `init_lora_weights="lora_ga"`, for `LoraConfig(lora_ga_config=...)`. arXiv:2407.05000.

    Args:
        direction: which singular directions of the gradient start A and B.
        scale: how the start is scaled.
        stable_gamma: γ of scale "stable".
    """

    def __init__(
        self,
        direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r",
        scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable",
        stable_gamma: int = 16,
    ):
        super().__init__(direction=direction, scale=scale, stable_gamma=stable_gamma)


class LoftQConfig(Options):
    """Options of `init_lora_weights="loftq"`, for `LoraConfig(loftq_config=...)`. arXiv:2310.08659.

    Args:
        loftq_bits: bits of the quantised base, 4 or 8.
        loftq_iter: alternations between quantisation and truncated SVD (count).
    """

    def __init__(self, loftq_bits: int = 4, loftq_iter: int = 1):
        super().__init__(loftq_bits=loftq_bits, loftq_iter=loftq_iter)


class PromptTuningInit(str, Enum):
    """Starts of prompt tuning: the embeddings of a text, of sampled tokens of the vocabulary, or random numbers."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class MultitaskPromptTuningInit(str, Enum):
    """Starts of multitask prompt tuning; the last three read the prompts of trained source tasks."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


class PromptEncoderReparameterizationType(str, Enum):
    """Networks that compute the prompt of P-tuning."""

    MLP = "MLP"
    LSTM = "LSTM"
