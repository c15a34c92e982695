"""Write base/: a T5 of 900 thousand parameters that has learned to copy names of installed Python code.

It stands for the encoder-decoder of your own, such as T5 or BART from the hub. Training takes a few minutes.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from names import names
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=1200, help="optimiser steps")
options = parser.parse_args()
torch.manual_seed(0)
# half of the names with their words apart, so that it has seen spaces
texts = [name if number % 2 else words for number, (name, words) in enumerate(names())]

letters = Tokenizer(models.BPE(unk_token="<unk>"))
letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
letters.decoder = decoders.ByteLevel()
tokens = ["<pad>", "</s>", "<unk>"]
alphabet = pre_tokenizers.ByteLevel.alphabet()
learner = trainers.BpeTrainer(vocab_size=300, special_tokens=tokens, initial_alphabet=alphabet)
letters.train_from_iterator(texts, learner)
letters.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
ends: dict[str, Any] = {
    "decoder_start_token_id": tokenizer.pad_token_id,
    "pad_token_id": tokenizer.pad_token_id,
    "eos_token_id": tokenizer.eos_token_id,
}
model = T5ForConditionalGeneration(
    T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        **ends,
    )
)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, options.steps)
bar = tqdm(range(options.steps), desc="copying")
for _ in bar:
    chosen = [texts[index] for index in torch.randint(len(texts), (32,)).tolist()]
    batch = tokenizer(chosen, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    bar.set_postfix(loss=f"{loss.item():.3f}")
folder = Path(__file__).parent / "base"
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
print(f"{folder}: {model.num_parameters():,} parameters")
