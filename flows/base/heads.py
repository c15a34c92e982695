"""Heads of a base: the one that the base was published with, and the one that an objective trains.

| base | published head | objectives |
|---|---|---|
| decoder, such as Llama | next token | all but seq2seq |
| encoder, such as BERT | masked token, or none | classification, token_classification, embedding, reranker |
| classifier or trained reranker | classes, or one output | reranker, and those of its decoder or encoder |
| encoder-decoder, such as T5 | next token of the decoder | seq2seq, classification, token_classification |
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from flows.errors import BaseModelError

_CLASSES: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": AutoModel,
}
"""{task: transformers' class of the models with its head}"""
_TASK_OF_KIND = {
    "classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "seq2seq": "SEQ_2_SEQ_LM",
    "retrieval": "FEATURE_EXTRACTION",
}
"""{data.kind: task}; the task of all other kinds is CAUSAL_LM."""
_CAUSAL = ("ForCausalLM", "LMHeadModel")
"""Ends of the names of classes that predict the next token."""


def head_class(task: str | None, labels: Sequence[str] | None) -> Any:
    """Return transformers' class for a task.

    Args:
        task: A task of `peftcore.TaskType`. None: a language model without labels, a model without a head with no
            names, and a sequence classifier with names.
        labels: Names of the head's outputs, or None.
    """
    if task is None and labels is None:
        task = "CAUSAL_LM"
    elif task is None:
        task = "SEQ_CLS" if labels else "FEATURE_EXTRACTION"
    return _CLASSES[task]


def published_class(config: Any) -> Any:
    """Return transformers' class that loads every weight of a base, and no others."""
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    if name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        return AutoModelForSequenceClassification
    if is_encoder_decoder(config):
        return AutoModelForSeq2SeqLM
    if not is_encoder(config):
        return AutoModelForCausalLM
    has_head = any(name.endswith("ForMaskedLM") for name in getattr(config, "architectures", None) or ())
    return AutoModelForMaskedLM if has_head else AutoModel


def answers_chats(folder: Path) -> bool:
    """Return True if a folder holds a causal language model; also if its config.json cannot be read."""
    if not (folder / "config.json").is_file():
        return True
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError):  # not JSON, or of an unknown type
        return True
    return published_class(config) is AutoModelForCausalLM


def ranks_passages(config: Any) -> bool:
    """Return True if a base is a trained reranker: a sequence classifier with one output."""
    return published_class(config) is AutoModelForSequenceClassification and config.num_labels == 1


def without_pooler(config: Any) -> dict[str, Any]:
    """Return the options by which AutoModel leaves out a pooling layer, which embeddings do not use."""
    model: Any = MODEL_MAPPING[type(config)]
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model).parameters else {}


def is_encoder(config: Any) -> bool:
    """Return True if a configuration is that of an encoder, such as BERT, without a head for the next token."""
    names = getattr(config, "architectures", None) or ()
    return (
        getattr(config, "model_type", None) in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not is_encoder_decoder(config)
        and not getattr(config, "is_decoder", False)
        and not any(name.endswith(_CAUSAL) for name in names)
    )


def is_encoder_decoder(config: Any) -> bool:
    """Return True if a configuration is that of an encoder-decoder, such as T5."""
    return bool(getattr(config, "is_encoder_decoder", False))


def check_base_of_kind(folder: Path, kind: str) -> None:
    """Check that a base can be trained on rows of a `data.kind`. The arguments and errors are those of `check_head`."""
    check_head(folder, _TASK_OF_KIND.get(kind, "CAUSAL_LM"))


def check_head(folder: Path, task: str) -> None:
    """Check that a base can have the head of a task.

    Args:
        folder: The base's folder.
        task: A task of `peftcore.TaskType`.

    Raises:
        BaseModelError: The base is of another kind, or transformers has no model with this head for it.
    """
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"{folder / 'config.json'} cannot be read ({error}); run the fetch stage again") from error
    name = next(iter(getattr(config, "architectures", None) or ()), type(config).__name__)
    if task == "SEQ_2_SEQ_LM" and not is_encoder_decoder(config):
        raise BaseModelError(
            f"train.objective seq2seq needs an encoder-decoder such as T5 or BART, and base.source is a {name}; give "
            "such a base, or data.kind: chat and train.objective: sft"
        )
    if task == "CAUSAL_LM" and (is_encoder(config) or is_encoder_decoder(config)):
        fitting = "seq2seq" if is_encoder_decoder(config) else "classification, token_classification or embedding"
        raise BaseModelError(
            f"this train.objective needs a decoder such as Llama or GPT-2, and base.source is a {name}; give such a "
            f"base, or train.objective: {fitting}"
        )
    if type(config) not in _CLASSES[task]._model_mapping:
        raise BaseModelError(
            f"transformers has no {_CLASSES[task].__name__.removeprefix('Auto')} for base.source, a {name}; "
            "give another base or another train.objective"
        )
