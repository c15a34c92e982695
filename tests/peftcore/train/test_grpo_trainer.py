"""GRPO training: TRL's run step by step, losses by hand, sampling, metrics, and what AdapterTrainer promises."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from quiet_training import losses, quiet, tiny_llama, trained, without_printing
from tiny_pairs import adapted
from tiny_prompts import letters, prompts, trainer
from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM

from peftcore import ConfigError, LoraConfig, TrainingError, get_peft_model
from peftcore.train import Grpo, GrpoTrainer, RightPaddingCollator, Sampling, reference_acting

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),  # inside transformers
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL's of itself
]
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "max_steps": 1}


def records(made: Any) -> list[dict[str, Any]]:
    return [record for record in made.state.log_history if "loss" in record]


# -- TRL -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "temperature"),
    [
        ({"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False}, 1.0),
        ({"loss_type": "bnpo", "beta": 0.0, "scale_rewards": "batch"}, 1.0),
        ({"loss_type": "dr_grpo", "beta": 0.3, "scale_rewards": "none"}, 0.7),
        ({"loss_type": "grpo", "beta": 0.3, "iterations": 3, "epsilon": 0.1, "epsilon_high": 0.15}, 1.3),
    ],
    ids=["grpo", "bnpo", "dr_grpo", "iterations"],
)
def test_a_run_is_trls(tmp_path: Path, options: dict[str, Any], temperature: float) -> None:
    from trl_runs import AdapterGRPOTrainer, GRPOConfig, tokenizer

    common: dict[str, Any] = {"max_steps": 6, "optim": "sgd", "learning_rate": 1.0}
    names = {"iterations": "num_iterations"}
    mine = adapted(init_lora_weights=True)
    tiny_llama().save_pretrained(tmp_path / "base")  # TRL loads the reference by name
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", lora_alpha=8))
    model.load_state_dict(mine.state_dict())
    theirs: Any = without_printing(
        AdapterGRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [letters({}, each) for each in completions],
            args=GRPOConfig(
                **quiet(
                    tmp_path / "trl",
                    num_generations=3,
                    max_completion_length=5,
                    per_device_train_batch_size=6,
                    shuffle_dataset=False,
                    temperature=temperature,
                    bf16=False,
                    gradient_checkpointing=False,
                    **{names.get(name, name): value for name, value in options.items()},
                    **common,
                )
            ),
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in prompts(8)]),
            processing_class=tokenizer(),
        )
    )
    sampled: list[list[list[int]]] = []
    generate = theirs._generate_single_turn

    def recorded(*args: Any, **kwargs: Any) -> Any:
        ids, log_probs = generate(*args, **kwargs)
        sampled.append(ids)
        return ids, log_probs

    theirs._generate_single_turn = recorded
    theirs.train()
    ours = trainer(
        mine,
        tmp_path,
        objective=Grpo(group_size=3, **options),
        sampling=Sampling(max_new_tokens=5, temperature=temperature),
        train_sampling_strategy="sequential",
        **common,
    )
    steps = iter(sampled)
    sampler = ours.training_objective.sampler
    ours.training_objective.sampler.answers = lambda *_, **__: [sampler._answer(ids) for ids in next(steps)]  # pyright: ignore
    ours.train()
    assert next(steps, None) is None and len(sampled) == 6 // options.get("iterations", 1)
    assert len(records(ours)) == len(records(theirs)) == 6
    shared = ["loss", "grad_norm", "reward", "completions/mean_length"]
    shared += [] if options.get("scale_rewards") == "batch" else ["frac_reward_zero_std"]
    shared += ["kl"] if options["beta"] else []
    for record, trls in zip(records(ours), records(theirs), strict=True):
        for name in shared[:2] if "reward" not in trls else shared:  # TRL logs rewards where it samples
            assert record[name] == pytest.approx(trls[name], rel=2e-3, abs=2e-4), name  # TRL rounds its records
    if options.get("iterations", 1) > 1:
        assert any(record["clip_ratio/region_mean"] > 0 for record in records(ours))
    moved, trls = trained(ours.model), trained(theirs.model)
    assert moved.keys() == trls.keys()
    for name, tensor in moved.items():
        torch.testing.assert_close(tensor, trls[name], rtol=1e-3, atol=1e-6)
