"""Tiny models with random weights, in a cache folder of the hub, in place of those that HF PEFT's tests download.

    python -m benchmarks.hf_peft_models CACHE_FOLDER

With HF_HUB_CACHE=CACHE_FOLDER and HF_HUB_OFFLINE=1, `from_pretrained(id)` finds them. They have the architecture that
the id names, but neither the weights nor the words of the original. With HF_DATASETS_CACHE=CACHE_FOLDER/datasets,
`load_dataset(id)` finds small data sets.
"""

# torch and transformers are imported where they are used: the parent process asks only what is missing
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

REVISION = "0" * 40
WORDS = 1000
"""Size of the vocabulary."""
_SIZES = {"vocab_size": WORDS, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_WIDE = _SIZES | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_UNPADDED = _WIDE | {"pad_token_id": 0, "bos_token_id": 1}
"""For models without position embeddings: tests fill texts with token 1, and the embedding of padding is zero."""
_GROUPED = _UNPADDED | {"num_key_value_heads": 2, "head_dim": 8}
_OPT = _SIZES | {
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
}
_OPT_125M = {"num_hidden_layers": 12, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128}
"""Sizes that bitsandbytes' blocks of 64 fit."""
_GPT2 = _SIZES | {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512}
_T5 = _SIZES | {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_BART = _SIZES | {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4,
    "decoder_start_token_id": 2,
}
_EXPERTS = _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "Bart": _BART,
    "Bert": _WIDE,
    "Bloom": _SIZES | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Deberta": _WIDE,
    "DebertaV2": _WIDE,
    "GPT2": _GPT2,
    "GPTJ": _GPT2 | {"rotary_dim": 4},
    "GPTNeoX": _WIDE,
    "Gemma3": _GROUPED,
    "Gemma4": _GROUPED
    | {
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": WORDS,
        "sliding_window": 16,
    },
    "GptOss": _EXPERTS | {"sliding_window": 16},
    "Llama": _GROUPED,
    "Llama4": _EXPERTS | {"intermediate_size_mlp": 64},
    "Mistral": _GROUPED,
    "OPT": _OPT,
    "Qwen2": _UNPADDED | {"num_key_value_heads": 2},
    "Qwen3": _GROUPED,
    "Roberta": _WIDE,
    "T5": _T5,
}
"""{start of a class's name: options of its configuration}."""
PEFT, TRL, HF = "peft-internal-testing", "trl-internal-testing", "hf-internal-testing"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{PEFT}/tiny-random-OPTForCausalLM": ("OPTForCausalLM", {}),
    f"{PEFT}/opt-125m": ("OPTForCausalLM", _OPT_125M),
    f"{PEFT}/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", {}),
    f"{TRL}/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", {}),
    f"{HF}/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", {}),
    f"{TRL}/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", {}),
    f"{TRL}/tiny-Llama4ForCausalLM": ("Llama4ForCausalLM", {}),
    f"{TRL}/tiny-GptOssForCausalLM": ("GptOssForCausalLM", {}),
    f"{TRL}/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", {}),
    f"{HF}/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", {}),
    f"{PEFT}/tiny-random-gemma4-E2B": ("Gemma4ForCausalLM", {}),
    f"{HF}/tiny-random-MistralForCausalLM": ("MistralForCausalLM", {}),
    f"{HF}/tiny-random-gpt2": ("GPT2LMHeadModel", {}),
    f"{PEFT}/tiny-random-gpt2": ("GPT2LMHeadModel", {}),
    f"{PEFT}/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", {}),
    "gpt2": ("GPT2LMHeadModel", {"n_layer": 12}),
    f"{PEFT}/tiny-random-BloomForCausalLM": ("BloomForCausalLM", {}),
    f"{PEFT}/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", {}),
    f"{PEFT}/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {}),
    f"{PEFT}/tiny-dummy-qwen2": ("Qwen2ForCausalLM", {}),
    f"{PEFT}/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", {}),
    f"{PEFT}/tiny-random-t5": ("T5ForConditionalGeneration", {}),
    f"{PEFT}/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", {}),
    f"{PEFT}/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", {}),
    f"{PEFT}/tiny-random-BertModel": ("BertModel", {}),
    f"{PEFT}/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", {}),
    "bert-base-uncased": ("BertForMaskedLM", {"num_hidden_layers": 12}),
    f"{PEFT}/tiny-random-RobertaModel": ("RobertaModel", {}),
    f"{PEFT}/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", {}),
    f"{PEFT}/tiny-random-DebertaModel": ("DebertaModel", {}),
    f"{PEFT}/tiny-random-DebertaV2Model": ("DebertaV2Model", {}),
}
"""{id on the hub: (class, options)}."""

DATA: dict[str, list[dict[str, Any]]] = {
    "ybelkada/english_quotes_copy": [
        {"quote": f"the model number {count} learns a few words", "author": "nobody", "tags": ["model"]}
        for count in range(40)
    ],
}
"""{id of a data set on the hub: rows of its split "train"}."""


def missing(cache: Path) -> list[str]:
    """Return the ids of the models and data sets that the cache folder lacks."""
    models = [name for name in MODELS if not (_folder(cache, name) / "refs" / "main").exists()]
    return models + [name for name in DATA if not _data_folder(cache, name).exists()]


def _data_folder(cache: Path, name: str) -> Path:
    return cache / "datasets" / name.replace("/", "___")


def _folder(cache: Path, name: str) -> Path:
    return cache / f"models--{name.replace('/', '--')}"


def build(cache: Path) -> None:
    """Write the models that the cache folder lacks."""
    tokenizer = make_tokenizer()
    for name in missing(cache):
        if name in DATA:
            write_data(_data_folder(cache, name), DATA[name])
            continue
        class_name, options = MODELS[name]
        snapshot, main = _folder(cache, name) / "snapshots" / REVISION, _folder(cache, name) / "refs" / "main"
        make_model(class_name, options).save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)
        main.parent.mkdir(parents=True, exist_ok=True)
        main.write_text(REVISION, encoding="utf-8")


def make_model(class_name: str, options: dict[str, Any]) -> Any:
    import torch
    import transformers

    family = max((start for start in OPTIONS if class_name.startswith(start)), key=len)
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**{**OPTIONS[family], **options})).eval()


def write_data(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write a data set as `load_dataset` leaves it in its cache."""
    from datasets import Dataset, load_dataset

    with tempfile.TemporaryDirectory() as temporary:
        source = f"{temporary}/rows.parquet"
        Dataset.from_list(rows).to_parquet(source)
        load_dataset("parquet", data_files=source, cache_dir=temporary)
        (cached,) = {file.parent for file in Path(temporary, "parquet").rglob("dataset_info.json")}
        target = folder / "default" / "0.0.0" / cached.name
        target.parent.mkdir(parents=True)
        shutil.move(cached, target)
        for file in target.glob("parquet-*.arrow"):
            file.rename(target / file.name.replace("parquet", folder.name.partition("___")[2], 1))


def make_tokenizer() -> Any:
    """Return a tokenizer of bytes and their most frequent pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS - 100, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
