"""transformers' own methods of adapters on a plain model, by the alias: as with HF PEFT."""

from pathlib import Path

import pytest
from alias_scripts import OLDER_PEFT, assert_equal, results, run

SCRIPT = (
    OLDER_PEFT
    + """
from peft import LoraConfig, PeftModel, PromptTuningConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
LlamaForCausalLM(LlamaConfig(vocab_size=63, pad_token_id=0, eos_token_id=1, **sizes)).save_pretrained(f"{folder}/base")
ids = torch.arange(12).reshape(2, 6) + 3


def base():
    return AutoModelForCausalLM.from_pretrained(f"{folder}/base")


@torch.no_grad()
def output(model):
    return model(ids).logits.sum(-1).flatten().tolist()


def error(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except ValueError as raised:
        return "ValueError"


def trainable(model):
    return sorted(p.numel() for p in model.parameters() if p.requires_grad)


model = base()
model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="second")
fill(model, "default")
fill(model, "second")
results["active"] = model.active_adapters()
results["second"] = output(model)
results["second trains"] = trainable(model)
model.set_adapter("default")
results["default"] = output(model)
results["default trains"] = trainable(model)
model.set_adapter(["default", "second"])
results["both"] = output(model)
model.disable_adapters()
results["disabled"] = output(model)
model.enable_adapters()
results["enabled"] = output(model)
results["state dict"] = sorted(model.get_adapter_state_dict("default"))
results["values"] = [v.sum().item() for _, v in sorted(model.get_adapter_state_dict("default").items())]
for name in ("second", "default"):
    model.set_adapter(name)
    model.save_pretrained(f"{folder}/{name}")
    written = {"adapter_config.json", "adapter_model.safetensors"}
    results[f"files {name}"] = sorted(written & set(os.listdir(f"{folder}/{name}")))
results["taken"] = error(model.add_adapter, LoraConfig(r=2, target_modules=["q_proj"]), "second")
prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
results["prompt"] = [error(model.add_adapter, prompt, "third"), model.active_adapters(), output(model)]
results["unknown"] = error(model.set_adapter, "third")
model.delete_adapter("second")
results["left"] = [sorted(model.peft_config), model.active_adapters()]
results["after deletion"] = output(model)
model.delete_adapter("default")
results["none"] = error(model.active_adapters)
results["plain"] = output(model)
model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
results["again"] = output(model)

model = base()
info = model.load_adapter(f"{folder}/default")
results["missing"] = sorted(info.missing_keys | info.unexpected_keys)
results["loaded"] = output(model)
results["loaded trains"] = trainable(model)
model.load_adapter(f"{folder}/second", adapter_name="second", is_trainable=True)
results["loaded second"] = output(model)
results["loaded second trains"] = trainable(model)
results["loaded active"] = model.active_adapters()
results["loaded twice"] = error(model.load_adapter, f"{folder}/second", adapter_name="second")
tensors = model.get_adapter_state_dict("second")
model = base()
model.load_adapter(
    adapter_name="tensors", peft_config=LoraConfig(r=2, target_modules=["q_proj"]), adapter_state_dict=tensors
)
results["from tensors"] = output(model)

model = AutoModelForCausalLM.from_pretrained(f"{folder}/default")
results["from the directory"] = output(model)
results["is a PeftModel"] = isinstance(model, PeftModel)
results["another name"] = AutoModelForCausalLM.from_pretrained(f"{folder}/second", adapter_name="x").active_adapters()
"""
)


@pytest.mark.slow
def test_a_script_with_a_plain_model_computes_as_with_hf_peft(tmp_path: Path) -> None:
    ours, theirs = results(SCRIPT, tmp_path)
    assert_equal(ours, theirs)
    assert ours["default"] != ours["disabled"] == ours["plain"]


TRAINER = """
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

ids = torch.arange(12).reshape(2, 6) + 3
rows = [{"input_ids": ids[i % 2], "labels": ids[i % 2]} for i in range(16)]
sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)


def train(name, resume=None):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=63, pad_token_id=0, eos_token_id=1, **sizes))
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), name)
    args = TrainingArguments(
        output_dir=f"{folder}/{name}", max_steps=4, per_device_train_batch_size=2, logging_steps=1, save_steps=2,
        eval_steps=2, eval_strategy="steps", load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True, report_to=[], use_cpu=True, seed=0, learning_rate=1e-2, disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.state.best_metric, trainer.evaluate()["eval_loss"]


for name in ("default", "named"):
    results[name] = train(name)
    results[f"{name}, resumed"] = train(name, f"{folder}/{name}/checkpoint-2")
"""


@pytest.mark.slow
def test_trainer_resumes_and_ends_with_the_best_adapter_of_a_plain_model(tmp_path: Path) -> None:
    """HF PEFT cannot do either for a plain model, so there is nothing to compare with."""
    found = run(TRAINER, tmp_path, "ours", "-m", "peftcore.as_peft")
    for name in ("default", "named"):
        losses, best, last = found[name]
        assert losses[0] > losses[-1]
        assert last == pytest.approx(best)  # the highest loss counts as best, so the best checkpoint is not the last
        assert found[f"{name}, resumed"][0] == pytest.approx(losses)
