"""accelerate's `prepare`, `save_state` and `load_state` with `peft` models, by the alias: as with HF PEFT."""

from pathlib import Path

import pytest
from alias_scripts import assert_equal, results

SCRIPT = """
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
rows = (torch.arange(12).reshape(2, 6) + 3).repeat(8, 1)


def train(load=None, save=None):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=63, **sizes))
    model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    fill(model)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    if load is not None:
        accelerator.load_state(load)
    losses = []
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    if save is not None:
        accelerator.save_state(save)
        results["state files"] = sorted(os.listdir(save))
        results["is a PEFT model"] = is_peft_model(model)
        accelerator.unwrap_model(model).save_pretrained(
            f"{save}-adapter", is_main_process=accelerator.is_main_process, save_function=accelerator.save,
            state_dict=accelerator.get_state_dict(model),
        )
        results["adapter files"] = sorted(set(os.listdir(f"{save}-adapter")) - {"SHA256SUMS"})
    return losses


results["losses"] = train(save=f"{folder}/state")
results["losses from the saved state"] = train(load=f"{folder}/state")
"""


@pytest.mark.slow
def test_a_script_trains_and_goes_on_as_with_hf_peft(tmp_path: Path) -> None:
    ours, theirs = results(SCRIPT, tmp_path)
    assert_equal(ours, theirs)
    assert ours["losses from the saved state"][0] < ours["losses"][0]
