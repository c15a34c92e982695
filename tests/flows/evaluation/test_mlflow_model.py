"""The model that MLflow loads answers as the evaluation did."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.errors import BaseModelError
from flows.evaluation.mlflow_model import _load_pyfunc


def config_of(trained: Any, params: Any) -> dict[str, Any]:
    return {
        "base": str(trained.base),
        "quantization": params.quantization.model_dump(),
        "system_prompt": params.data.system_prompt,
        "max_new_tokens": 8,
    }


def test_its_answers_are_those_of_the_evaluation(trained: Any, tiny_params: Any) -> None:
    from flows.stages import evaluate

    params = tiny_params(evaluate={"max_new_tokens": 8})
    evaluate.run(params, trained)
    samples = json.loads(trained.samples.read_text())
    prompts = [sample["prompt"] for sample in samples]
    model = _load_pyfunc(str(trained.adapter), config_of(trained, params))
    assert model.predict({"prompt": prompts}) == [sample["adapter"] for sample in samples]
    with pytest.raises(ValueError, match="takes no parameters, got temperature"):
        model.predict({"prompt": prompts}, {"temperature": 1.0})


def test_an_absent_base_is_named_with_what_to_do(trained: Any, tiny_params: Any, tmp_path: Path) -> None:
    config = {**config_of(trained, tiny_params()), "base": str(tmp_path / "absent")}
    with pytest.raises(BaseModelError, match=r"absent, the base of this adapter.*dvc pull"):
        _load_pyfunc(str(trained.adapter), config)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_mlflow_loads_it_by_the_alias_of_the_stage(
    trained: Any, tiny_params: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not part of the environment")
    pandas = pytest.importorskip("pandas", reason="a part of mlflow")
    from flows.runtime.tracking import Tracker, mirror_promotion
    from flows.runtime.tracking.mlflow_run import MlflowRun

    uri = f"sqlite:///{tmp_path}/registry.db"
    monkeypatch.chdir(tmp_path)
    tracker = Tracker("docs", "offline", {}, tmp_path, backends=["mlflow"], mlflow_uri=uri)
    tracking = {"backends": ["mlflow"], "mlflow_uri": uri, "mode": "offline"}
    params = tiny_params(evaluate={"max_new_tokens": 8}, tracking=tracking)
    record = {
        "name": "docs",
        "version": "v0.1.0",
        "wandb_run_id": None,
        "tracking_runs": tracker.run_ids,
        "params": params.model_dump(mode="json"),
        "adapter": {"content": "ab" * 32},
    }
    tracker.register(record, "c0ffee", trained.adapter)
    assert isinstance(tracker._runs["mlflow"], MlflowRun)
    mirror_promotion(params, tmp_path, record, lambda: pytest.fail("nothing is uploaded"))
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model("models:/docs@champion")
    prompts = ["How much is 3 and 1?", "How much is 40 and 1?"]
    direct = _load_pyfunc(str(trained.adapter), config_of(trained, params))
    assert list(model.predict(pandas.DataFrame({"prompt": prompts}))) == direct.predict({"prompt": prompts})
