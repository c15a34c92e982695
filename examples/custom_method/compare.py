"""Merge RoCoFT and compare the outputs before and after, on a tiny Llama with random weights."""

import torch
from acme_rocoft import RocoftConfig
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import PeftModel, get_peft_model

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=4, **sizes)).eval()
tokens = torch.arange(32).repeat(4, 1)
for part in ("rows", "columns"):
    config = RocoftConfig(r=4, part=part, target_modules="all-linear")
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append(model(tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(f"out/{part}")
    with torch.no_grad():
        trained = model(tokens).logits
        model.merge_adapter()
        torch.testing.assert_close(model(tokens).logits, trained, rtol=1e-4, atol=1e-4)
        base = model.unload()
        again = PeftModel.from_pretrained(base, f"out/{part}").eval()
        assert torch.equal(again(tokens).logits, trained)
    base = again.unload()
    print(f"{part}: loss {losses[0].item():.3f} -> {losses[-1].item():.3f}, merged and loaded again")
