"""lm-eval's `peft=`, by the alias: the log-likelihoods are those with HF PEFT."""

from pathlib import Path

import pytest
from alias_scripts import assert_equal, results

pytest.importorskip("lm_eval", reason="needs the package lm-eval")

SCRIPT = """
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(60))])}
plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
tokenizer.save_pretrained(f"{folder}/base")
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=63, pad_token_id=0, eos_token_id=1, **sizes))
model.save_pretrained(f"{folder}/base")
model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
fill(model)
model.save_pretrained(f"{folder}/adapter")
for name, options in (("base", {}), ("adapter", {"peft": f"{folder}/adapter"})):
    harness = HFLM(pretrained=f"{folder}/base", device="cpu", dtype="float32", batch_size=2, **options)
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=("w1 w2", f" w{i}"), idx=0) for i in range(3)
    ]
    results[name] = [pair[0] for pair in harness.loglikelihood(requests, disable_tqdm=True)]
"""


@pytest.mark.slow
def test_an_adapter_is_evaluated_as_with_hf_peft(tmp_path: Path) -> None:
    ours, theirs = results(SCRIPT, tmp_path)
    assert_equal(ours, theirs)
    assert ours["adapter"] != ours["base"]
