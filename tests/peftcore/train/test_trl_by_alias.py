"""TRL's own scripts with `peft_config=`, unchanged, on peftcore through the alias: the losses of HF PEFT."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """\
import json
import sys
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder = sys.argv[1]
words = [f"w{i}" for i in range(60)]
vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
LlamaForCausalLM(LlamaConfig(vocab_size=63, pad_token_id=0, eos_token_id=1, **sizes)).save_pretrained(f"{folder}/base")
tokenizer.save_pretrained(f"{folder}/base")
def text(i, count, step=7):
    return " ".join(words[(step * i + j) % 60] for j in range(count))


def reward(completions, **_):
    return [float(len(set(text.split()))) for text in completions]


texts = [{"text": text(i, 12)} for i in range(32)]
pairs = [{"prompt": "w1 w2", "chosen": text(i, 5), "rejected": text(i, 5, 5)} for i in range(16)]
labelled = [{"prompt": "w1 w2", "completion": text(i, 5), "label": i % 2 == 0} for i in range(16)]
prompts = [{"prompt": text(i, 3)} for i in range(16)]
sampling = {"num_generations": 2, "max_completion_length": 6}
cases = {
    "SFT": (texts, "CAUSAL_LM", {}, {}),
    "DPO": (pairs, "CAUSAL_LM", {}, {}),
    "KTO": (labelled, "CAUSAL_LM", {}, {}),
    "Reward": (pairs, "SEQ_CLS", {}, {}),
    "GRPO": (prompts, "CAUSAL_LM", {**sampling, "beta": 0.1}, {"reward_funcs": reward}),
    "RLOO": (prompts, "CAUSAL_LM", sampling, {"reward_funcs": reward}),
}
losses = {}
for name, (rows, task, options, more) in cases.items():
    args = getattr(trl, f"{name}Config")(
        output_dir=f"{folder}/{name}", max_steps=3, per_device_train_batch_size=4, logging_steps=1, report_to=[],
        use_cpu=True, save_strategy="no", seed=0, bf16=False, learning_rate=1e-3, **options,
    )
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type=task)
    made = getattr(trl, f"{name}Trainer")(
        model=f"{folder}/base", args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=lora, **more,
    )
    made.train()
    made.save_model(f"{folder}/{name}-adapter")
    kept = ("loss", "grad_norm", "kl", "reward", "rewards/margins")
    losses[name] = [
        [entry[key] for key in kept if key in entry] for entry in made.state.log_history if "loss" in entry
    ]
print(json.dumps(losses))
"""


def losses(folder: Path, *before: str) -> dict[str, Any]:
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *before, str(script), str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_trl_script_trains_as_with_hf_peft(tmp_path: Path) -> None:
    ours = losses(tmp_path / "ours", "-m", "peftcore.as_peft")
    theirs = losses(tmp_path / "theirs")
    assert list(ours) == list(theirs) == ["SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO"]
    for name in theirs:
        for step, (own, expected) in enumerate(zip(ours[name], theirs[name], strict=True)):
            assert own == pytest.approx(expected, rel=1e-4, abs=1e-5), (name, step)
        files = {file.name for file in (tmp_path / "theirs" / f"{name}-adapter").iterdir()}
        assert files <= {file.name for file in (tmp_path / "ours" / f"{name}-adapter").iterdir()}
