"""Built-in scorer by a reward model: a registered version of this repository, or an adapter's folder with its base.

The prompt of a row is text with the tokens of the project's own chat template. So the reward model needs the same
tokenizer and chat template; a base of the same family with another size has them.
"""

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from flows.base.calibrated import calibrated_identity, calibration_record, check_adapter
from flows.base.folder import check_base, load_tokenizer
from flows.base.identity import is_base
from flows.base.model import load_for_evaluation
from flows.base.source import obtain
from flows.data.chat import end_token
from flows.errors import ParamsError, PipelineError, RepositoryError, StageError
from flows.evaluation.scorers.texts import Score
from flows.params import Params, Quantization, load_params
from flows.params.file import suggest
from flows.params.scorers import REGISTERED
from flows.paths import Paths
from flows.runtime.git import Git
from flows.runtime.project import files_at, project_roots
from flows.training.objectives import REWARD
from peftcore import PeftModel
from peftcore.errors import PeftError
from peftcore.files import MANIFEST, sha256
from peftcore.train import RewardModel, check_reward_adapter

RECORD = "registry/version.json"
"""Path of the lineage record in a version's own commit."""


class LazyReward:
    """A callable `(prompt, answer, row) -> float` that loads its reward model for the first answer.

    Args:
        root: The repository.
        model: A registered version, NAME@vX.Y.Z, or the folder of an adapter.
        base: Base of an adapter's folder, `hub:NAME` or `path:FOLDER`. None: the base of this project.
    """

    def __init__(self, root: Path, model: str, base: str | None = None) -> None:
        self.root, self.name, self.base = root, model, base

    def __call__(self, prompt: str, answer: str, row: Mapping[str, Any] | None = None) -> float:
        """Return the reward of an answer; see `RewardModel`."""
        return self.model(prompt, answer, row)

    @cached_property
    def model(self) -> RewardModel:
        """The reward model. Raises StageError if it is not one, or if its tokenizer is not this project's."""
        try:
            with ExitStack() as stack:
                match = re.fullmatch(REGISTERED, self.name)
                if match is not None:
                    return self._registered(stack, match["name"], match["version"])
                return self._from_folder(stack, Path(self.name))
        except (PeftError, PipelineError) as error:
            raise StageError(f"the reward model {self.name}: {error}") from error

    def _registered(self, stack: ExitStack, name: str, number: str) -> RewardModel:
        root = _project_root(self.root, name)
        commit, record = _version(root, name, number)
        if (objective := record["params"]["train"].get("objective", "sft")) != REWARD:
            raise StageError(f"its train.objective is {objective}; give a version with train.objective reward")

        def taken(*outputs: str) -> Paths:
            return Paths(stack.enter_context(files_at(root, commit, list(outputs))))

        adapter = taken("artifacts/adapter").adapter
        for file, digest in record["adapter"]["files"].items():
            if not (adapter / file).is_file() or sha256(adapter / file) != digest:
                raise StageError(
                    f"{file} differs from the registered file; `dvc push` it again from a machine that has it"
                )
        base = next((folder for each in (self.root, root) if is_base(folder := Paths(each).base, record)), None)
        base = taken("artifacts/base").base if base is None else base
        is_calibrated = record.get("calibrated_base") is not None
        weights = taken("artifacts/calibrated").calibrated if is_calibrated else base
        return self._loaded(adapter, weights, base, Params.from_record(record["params"]).quantization)

    def _from_folder(self, stack: ExitStack, adapter: Path) -> RewardModel:
        if not (adapter / "adapter_config.json").is_file():
            raise StageError(f"there is no {adapter / 'adapter_config.json'}; give the folder of an adapter")
        if self.base is None:
            base = Paths(self.root).base
            check_base(base)
        else:
            scratch = Path(stack.enter_context(TemporaryDirectory(prefix="peftcore-reward-")))
            checkpoint = obtain(self.base, self.root, scratch)
            if checkpoint.gguf is not None:
                raise StageError(f"its base {self.base} is a GGUF file; give a transformers folder")
            base = checkpoint.folder
        return self._loaded(adapter, base, base, Quantization(storage="none"))

    def _loaded(self, adapter: Path, weights: Path, base: Path, quantization: Quantization) -> RewardModel:
        check_reward_adapter(adapter)
        has_tokenizer = (adapter / "tokenizer_config.json").is_file()  # an adapter with added tokens has its own
        tokenizer = load_tokenizer(adapter if has_tokenizer else base)
        self._check_tokenizer(tokenizer)
        if calibration_record(weights) is not None:
            check_adapter(adapter, calibrated_identity(weights))
        model: Any = PeftModel.from_pretrained(load_for_evaluation(weights, quantization, [REWARD]), adapter)
        return RewardModel(model, tokenizer, end_token(tokenizer))

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise StageError if the tokenizer would read this project's prompts in another way."""
        own = Paths(self.root).base
        if not (own / MANIFEST).exists():
            return  # a re-evaluation without the base here: the evaluation has made this check
        ours = load_tokenizer(own)
        if (unequal := len(ours.get_vocab().items() ^ tokenizer.get_vocab().items())) != 0:
            raise StageError(
                f"its tokenizer differs from that of this project's base in {unequal} entries, so it would read other "
                "tokens; give a reward model whose base is of the same family"
            )
        if ours.chat_template != tokenizer.chat_template:
            raise StageError(
                "its chat template differs from that of this project's base, so it was not trained on such prompts; "
                "train it with the same data.chat_template"
            )


def reward(*, model: str, base: str | None = None, root: Path) -> Score:
    """Return a scorer: the reward of the answer to the prompt. The model is loaded for the first answer.

    Args:
        model: A registered version, NAME@vX.Y.Z, or the folder of an adapter.
        base: Base of an adapter's folder, `hub:NAME` or `path:FOLDER`. None: the base of this project.
        root: The repository.
    """
    function = LazyReward(root, model, base)
    return lambda prompt, answer, reference, row: function(prompt, answer, row)


def _version(root: Path, name: str, number: str) -> tuple[str, dict[str, Any]]:
    """Return the commit and the record of a registered version. Raises StageError if there is none."""
    git, tag = Git(root), f"{name}@{number}"
    known = {each.name: each.commit for each in git.tags(f"{name}@*")}
    if tag not in known:
        fits = suggest(tag, list(known), "give one of ") if known else f"no version of {name} is registered here"
        raise StageError(f"there is no such version; {fits}")
    try:
        record = json.loads(git.show(known[tag], RECORD))
        assert record["params"]["train"] is not None and record["adapter"]["files"] is not None
    except (RepositoryError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise StageError(
            f"{tag} has no readable {RECORD}, so it was not registered by `peftcore run`: {error}"
        ) from error
    return known[tag], record


def _project_root(root: Path, name: str) -> Path:
    """Return the folder of the project that has this name now; `root` if no other project has it."""
    for folder in project_roots(root):
        try:
            if load_params(Paths(folder).params).project.name == name:
                return folder
        except ParamsError:
            continue  # of another project, whose version may not be the one that is looked for
    return root
