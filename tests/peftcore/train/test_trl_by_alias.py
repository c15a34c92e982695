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
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

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
texts = [{"text": " ".join(words[(7 * i + j) % 60] for j in range(12))} for i in range(32)]
pairs = [
    {
        "prompt": "w1 w2",
        "chosen": " ".join(words[(7 * i + j) % 60] for j in range(5)),
        "rejected": " ".join(words[(5 * i + j) % 60] for j in range(5)),
    }
    for i in range(16)
]
losses = {}
for name, trainer, config, rows in (("sft", SFTTrainer, SFTConfig, texts), ("dpo", DPOTrainer, DPOConfig, pairs)):
    args = config(
        output_dir=f"{folder}/{name}", max_steps=3, per_device_train_batch_size=4, logging_steps=1, report_to=[],
        use_cpu=True, save_strategy="no", seed=0, bf16=False,
    )
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    made = trainer(
        model=f"{folder}/base", args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=lora,
    )
    made.train()
    made.save_model(f"{folder}/{name}-adapter")
    losses[name] = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
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
    for name in ("sft", "dpo"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6)
        files = {file.name for file in (tmp_path / "theirs" / f"{name}-adapter").iterdir()}
        assert files <= {file.name for file in (tmp_path / "ours" / f"{name}-adapter").iterdir()}
