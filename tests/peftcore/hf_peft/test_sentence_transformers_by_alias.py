"""sentence-transformers' methods of adapters, training, saving and loading, by the alias: as with HF PEFT."""

from pathlib import Path

import pytest
from alias_scripts import OLDER_PEFT, assert_equal, results

pytest.importorskip("sentence_transformers", reason="needs the package sentence-transformers")

SCRIPT = (
    OLDER_PEFT
    + """
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *(f"w{i}" for i in range(60))])}
plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", model_max_length=32
)
tokenizer.save_pretrained(f"{folder}/base")
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
BertModel(BertConfig(vocab_size=62, pad_token_id=0, **sizes)).save_pretrained(f"{folder}/base")
rows = [{"anchor": f"w{i} w{i + 1}", "positive": f"w{i} w{i + 2}"} for i in range(16)]


def base():
    return SentenceTransformer(modules=[Transformer(f"{folder}/base"), Pooling(32)], device="cpu")


def with_adapter():
    model = base()
    model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
    fill(model)
    return model


def encoded(model):
    return model.encode(["w1 w2 w3", "w4 w5"]).flatten().tolist()


def train(resume=None):
    model = with_adapter()
    args = SentenceTransformerTrainingArguments(
        output_dir=f"{folder}/trained", max_steps=4, per_device_train_batch_size=4, logging_steps=1, save_steps=2,
        report_to=[], use_cpu=True, seed=0, learning_rate=1e-2, disable_tqdm=True, lr_scheduler_type="constant",
    )
    loss = MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), loss=loss)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


model = with_adapter()
results["with adapter"] = encoded(model)
model.disable_adapters()
results["disabled"] = encoded(model)
model.enable_adapters()
results["enabled"] = encoded(model)
results["active"] = model.active_adapters()
results["tensors"] = len(model.get_adapter_state_dict())
model.save_pretrained(f"{folder}/saved")
results["files"] = sorted(set(os.listdir(f"{folder}/saved")) - {"SHA256SUMS"})
loaded = SentenceTransformer(f"{folder}/saved", device="cpu")
results["loaded"] = encoded(loaded)
results["loaded is active"] = loaded.active_adapters()
other = base()
other.load_adapter(f"{folder}/saved")
results["load_adapter"] = encoded(other)
model.delete_adapter("default")
results["deleted"] = encoded(model)
results["losses"] = train()
results["losses, resumed"] = train(f"{folder}/trained/checkpoint-2")
"""
)


@pytest.mark.slow
def test_a_script_computes_as_with_hf_peft(tmp_path: Path) -> None:
    ours, theirs = results(SCRIPT, tmp_path)
    assert_equal(ours, theirs)
    assert ours["with adapter"] != ours["disabled"] == pytest.approx(ours["deleted"])
