"""A Lightning module that trains a `peft` model, by the alias: as with HF PEFT."""

from pathlib import Path

import pytest
from alias_scripts import assert_equal, results

pytest.importorskip("pytorch_lightning", reason="needs the package pytorch-lightning")

SCRIPT = """
import pytorch_lightning as pl
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
ids = torch.arange(12).reshape(2, 6) + 3
loader = torch.utils.data.DataLoader(ids.repeat(8, 1), batch_size=4)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(vocab_size=63, **sizes))
        self.model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
        fill(self.model)
        self.losses = []

    def training_step(self, batch, _):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def trainer(epochs):
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder,
    )


module, made = Module(), trainer(1)
made.fit(module, loader)
results["losses"] = module.losses
made.save_checkpoint(f"{folder}/saved.ckpt")
loaded = Module.load_from_checkpoint(f"{folder}/saved.ckpt", weights_only=False)
results["loaded"] = loaded.model(ids).logits[0, -1].tolist()
results["trained"] = module.model(ids).logits[0, -1].tolist()
longer = Module()
trainer(2).fit(longer, loader, ckpt_path=f"{folder}/saved.ckpt")
results["second epoch"] = longer.losses
"""


@pytest.mark.slow
def test_a_script_trains_and_resumes_as_with_hf_peft(tmp_path: Path) -> None:
    ours, theirs = results(SCRIPT, tmp_path)
    assert_equal(ours, theirs)
    assert ours["loaded"] == pytest.approx(ours["trained"])
    assert ours["second epoch"][-1] < ours["losses"][-1]
