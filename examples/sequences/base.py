"""Write base/: a byte-level T5 of 900 thousand parameters that has learned to copy names of installed Python code.

It stands for the encoder-decoder of your own, such as T5 or BART from the hub. Training takes two minutes on two cores.
"""

import argparse
from pathlib import Path

import torch
from names import names
from tqdm import tqdm
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=600, help="optimiser steps")
options = parser.parse_args()
torch.manual_seed(0)
tokenizer = ByT5Tokenizer(extra_ids=0)
model = T5ForConditionalGeneration(
    T5Config(
        vocab_size=320,
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, options.steps)
# half of the names with their words apart, so that it has seen spaces
texts = [name if number % 2 else words for number, (name, words) in enumerate(names())]
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
