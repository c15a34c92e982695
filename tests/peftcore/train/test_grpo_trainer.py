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


# -- the loss ------------------------------------------------------------------------------------------------------


def loss_by_hand(model: Any, batches: list[dict[str, torch.Tensor]], grpo: Grpo, limit: int) -> torch.Tensor:
    """Loss of an optimiser step, from all logits and one answer after the other."""
    terms, lengths = [], []
    for batch in batches:
        for ids, mask, labels, advantage in zip(
            *(batch[name] for name in ("input_ids", "attention_mask", "labels", "advantages")), strict=True
        ):
            row, targets = ids[mask.bool()][None], labels[mask.bool()][1:]
            answer = targets != -100

            def log_probs(row: Any = row, targets: Any = targets, answer: Any = answer) -> torch.Tensor:
                logits = model(row).logits[0, :-1].double().log_softmax(-1)
                return logits.gather(1, targets.clamp(min=0)[:, None])[:, 0][answer]

            policy = log_probs()
            with reference_acting(model):
                reference = log_probs()
            ratios = (policy - policy.detach()).exp()
            kl = ((reference - policy).exp() - (reference - policy) - 1) * ratios
            terms.append((-ratios * advantage.double() + grpo.beta * kl).sum())
            lengths.append(len(policy))
    counts = torch.tensor(lengths)
    if grpo.loss_type == "bnpo":
        return torch.stack(terms).sum() / counts.sum()
    return (torch.stack(terms) / (limit if grpo.loss_type == "dr_grpo" else counts)).mean()


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "bnpo"])
def test_a_step_is_the_mean_over_all_accumulated_answers(tmp_path: Path, loss_type: Any) -> None:
    grpo, model = Grpo(group_size=3, beta=0.2, loss_type=loss_type), adapted().double()
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    made = trainer(model, tmp_path, objective=grpo, **SGD, **options)
    sampled, steps = made.training_objective.sampled, []
    made.training_objective.sampled = lambda batches: steps.append(sampled(batches)) or steps[-1]
    plain = adapted().double()
    plain.load_state_dict(model.state_dict())
    made.train()
    assert [len(batch["advantages"]) for batch in steps[0]] == [6, 6]
    loss = loss_by_hand(plain, steps[0], grpo, limit=5)
    loss.backward()
    assert made.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(trained(model)[name], parameter.detach() - parameter.grad, rtol=1e-5, atol=1e-8)


def test_parts_of_a_batch_have_the_gradients_of_the_whole(tmp_path: Path) -> None:
    results = []
    for rows_at_once in (None, 2):
        model = adapted().double()
        made = trainer(model, tmp_path, objective=Grpo(group_size=3, beta=0.2, iterations=2), **SGD | {"max_steps": 2})
        made._start_run, start = (lambda: None), made._start_run  # keep the splitter that is set below
        start()
        made.splitter.rows_at_once = rows_at_once
        made.train()
        results.append(trained(model))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-9, atol=1e-12)


def test_the_scale_of_a_batch_is_that_of_all_accumulated_rewards(tmp_path: Path) -> None:
    made = trainer(
        adapted(),
        tmp_path,
        objective=Grpo(group_size=3, scale_rewards="batch"),
        gradient_accumulation_steps=2,
        reward_weights={"letters": 2.0},
    )
    batches = [made.data_collator(prompts(2, first)) for first in (0, 2)]
    results = made.training_objective.sampled(batches)
    rewards = torch.cat([batch["metric:reward"] for batch in results]).double()
    assert rewards.equal(2 * torch.cat([batch["metric:rewards/letters/mean"] for batch in results]).double())
    groups = rewards.view(4, 3)
    expected = (groups - groups.mean(1, keepdim=True)) / (rewards.std() + 1e-4)
    found = torch.cat([batch["advantages"] for batch in results]).view(4, 3).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# -- rewards -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_raises_the_reward(tmp_path: Path) -> None:
    model: Any = adapted(init_lora_weights=True)
    model.get_output_embeddings().weight.data.mul_(20)  # else the frozen head keeps all tokens about equally likely
    made = trainer(
        model,
        tmp_path,
        objective=Grpo(group_size=8),
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
    )
    before = made.evaluate()
    made.train()
    after = made.evaluate()
    assert after["eval_loss"] == -after["eval_reward"]
    first, last = (sum(r["reward"] for r in part) / 5 for part in (records(made)[:5], records(made)[-5:]))
    assert last > first + 1 and after["eval_reward"] > before["eval_reward"] + 1


def test_a_reward_gets_the_row_and_the_text_of_the_answer(tmp_path: Path) -> None:
    seen: list[tuple[str, str, str]] = []

    def reward(row: Any, answer: str) -> float:
        seen.append((row["id"], row["prompt"], answer))
        return 1.0

    made = trainer(adapted(), tmp_path, rewards={"any": reward}, max_steps=1)
    made.train()
    assert len(seen) == 6 and len({name for name, _, _ in seen}) == 2
    assert all(not set(answer) & set("<>") for _, _, answer in seen)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            float("nan"),
            r"the reward letters returned nan on row row\d with the answer .*it must return a finite number",
        ),
        ("good", r"the reward letters returned 'good' on row row\d"),
        (None, r"the reward letters failed on row row\d with the answer .*ZeroDivisionError"),
    ],
)
def test_a_reward_that_fails_stops_the_run(tmp_path: Path, value: Any, message: str) -> None:
    made = trainer(adapted(), tmp_path, rewards={"letters": lambda row, answer: 1 / 0 if value is None else value})
    with pytest.raises(TrainingError, match=message):
        made.train()


@pytest.mark.slow
def test_groups_without_spread_are_counted_and_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    model = adapted()
    before = trained(model)
    made = trainer(model, tmp_path, rewards={"same": lambda row, answer: 0.5}, objective=Grpo(group_size=3), **options)
    with caplog.at_level(logging.WARNING):
        made.train()
    warnings = [record.getMessage() for record in caplog.records if "equal rewards" in record.getMessage()]
    assert [message[:30] for message in warnings] == [
        "step 2: all 4 groups since the",
        "step 4: all 4 groups since the",
    ]
    assert all(record["frac_reward_zero_std"] == 1 and record["reward_std"] == 0 for record in records(made))
    assert all(tensor.equal(before[name]) for name, tensor in trained(model).items())
    caplog.clear()
    mixed = trainer(adapted(), tmp_path, objective=Grpo(group_size=3), **options)
    with caplog.at_level(logging.WARNING):
        mixed.train()
    assert not [record for record in caplog.records if "equal rewards" in record.getMessage()]
    assert min(record["frac_reward_zero_std"] for record in records(mixed)) < 1


# -- what AdapterTrainer promises ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, iterations: int) -> None:
    options: dict[str, Any] = {
        "objective": Grpo(group_size=3, beta=0.1, iterations=iterations),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 6,
        "logging_steps": 2,
        "train_sampling_strategy": "group_by_length",
    }
    straight, resumed = (trainer(adapted(lora_dropout=0.2), tmp_path / name, **options) for name in ("a", "b"))
    straight.train()
    torch.rand(7)  # another process has drawn other numbers
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert records(straight) == records(resumed)
    for name, tensor in trained(straight.model).items():
        assert torch.equal(tensor, trained(resumed.model)[name]), name
    assert len(set(losses(straight))) == 3


def test_a_run_resumes_with_more_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = trainer(adapted(), tmp_path, objective=Grpo(group_size=2, iterations=2)).training_objective
    monkeypatch.setattr(type(objective.trainer.accelerator), "num_processes", 2)
    monkeypatch.setattr(type(objective.trainer.accelerator), "process_index", 1)
    sums: list[Any] = [[{"reward": torch.tensor(1.0)}]]
    objective.load_state({"metric_sums": sums, "groups": [0, 0], "rows_at_once": None, "reused": [[{}]]})
    assert objective.unrecorded() == [] and objective._reused == []  # so this process samples new answers


def test_sampling_leaves_random_states_and_training_flags(tmp_path: Path) -> None:
    model = adapted(lora_dropout=0.5)
    made = trainer(model, tmp_path)
    model.train()
    flags = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    first, second = (made.training_objective.sampled([made.data_collator(prompts(4))])[0] for _ in range(2))
    assert first["input_ids"].equal(second["input_ids"]) and torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == flags
    made.state.global_step = 1
    assert not made.training_objective.sampled([made.data_collator(prompts(4))])[0]["input_ids"].equal(
        first["input_ids"]
    )


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no reward is given"):
        trainer(adapted(), tmp_path, rewards={})
    with pytest.raises(ConfigError, match=r"the reward 'leters', which does not exist; did you mean letters\?"):
        trainer(adapted(), tmp_path, reward_weights={"leters": 1.0})
    with pytest.raises(TrainingError, match=r"give data_collator=PromptCollator\(\)"):
        trainer(adapted(), tmp_path, data_collator=RightPaddingCollator(0))
    with pytest.raises(TrainingError, match="2 iterations need the rows of a whole optimiser step, which are 16"):
        trainer(adapted(), tmp_path, objective=Grpo(group_size=3, iterations=2), per_device_train_batch_size=16).train()
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    model = get_peft_model(bert, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(TrainingError, match="sampled answers need a causal language model"):
        trainer(model, tmp_path)


def test_rows_may_be_a_list(tmp_path: Path) -> None:
    made = trainer(adapted(), tmp_path)
    listed = GrpoTrainer(
        model=adapted(),
        args=made.args,
        train_dataset=prompts(4),  # type: ignore[arg-type]
        rewards={"letters": letters},
        tokenizer=made.training_objective.tokenizer,
        objective=Grpo(group_size=2),
        sampling=Sampling(max_new_tokens=3),
    )
    without_printing(listed).train()
    assert len(records(listed)) == 3
