"""Loader of a version that is registered in MLflow: `mlflow.pyfunc.load_model("models:/NAME@champion")`.

The model answers as the evaluation did: on the base's dequantised weights, greedily, with the project's system prompt.
"""

from pathlib import Path
from typing import Any

import torch

from flows.base.folder import load_tokenizer
from flows.base.model import load_dequantized
from flows.data.chat import render
from flows.errors import BaseModelError
from flows.evaluation.generation import generate_answers
from flows.params import Quantization
from peftcore import PeftModel

BATCH = 16
"""Prompts per forward pass."""


class AdapterModel:
    """An adapter with its base. The signature of the MLflow model has one column `prompt` and one column `answer`.

    Args:
        adapter: The adapter's folder.
        config: Values `base` (folder), `quantization` (section of params.yaml), `system_prompt`, `max_new_tokens`.

    Raises:
        BaseModelError: The base's folder is absent.
    """

    def __init__(self, adapter: Path, config: dict[str, Any]) -> None:
        base = Path(config["base"])
        if not base.is_dir():
            raise BaseModelError(
                f"{base}, the base of this adapter, is absent on this machine; run `dvc pull` in the project, and give "
                'the folder: load_model(..., model_config={"base": FOLDER})'
            )
        model = load_dequantized(base, Quantization.model_validate(config["quantization"]))
        self._model: Any = PeftModel.from_pretrained(model, adapter).eval()
        self._tokenizer = load_tokenizer(base)
        self._system, self._most = config["system_prompt"], int(config["max_new_tokens"])

    def predict(self, frame: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Return the answers to the column `prompt` of a data frame. params: none are known."""
        if params:
            raise ValueError(f"the model takes no parameters, got {', '.join(params)}; leave params out")
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        chats = [[*system, {"role": "user", "content": str(prompt)}] for prompt in frame["prompt"]]
        texts = [render(self._tokenizer, chat, generate=True) for chat in chats]
        prompts = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        with torch.no_grad():
            answers = generate_answers(self._model, self._tokenizer, prompts, self._most, BATCH)  # type: ignore[arg-type]
        return [answer.text for answer in answers.answers]


def _load_pyfunc(data_path: str, model_config: dict[str, Any]) -> AdapterModel:
    """Return the model; MLflow calls this function by its name."""
    return AdapterModel(Path(data_path), model_config)
