"""transformers' own Trainer and accelerate's own loop on adapted models, without a line for them."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from huggingface_hub import HfApi, ModelCard
from quiet_training import VOCABULARY, assert_same, losses, trained
from safetensors.torch import load_file
from tiny_training import SAVING, adapted, plain, rows
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer
from transformers.trainer_pt_utils import LabelSmoother

from peftcore import LoraConfig, PeftModel, get_peft_model
from peftcore.train import AdapterTrainer, RightPaddingCollator

ADAPTER_FILES = {"README.md", "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors"}


# -- transformers ----------------------------------------------------------------------------------------------------


def test_trainer_trains_the_adapter_alone_and_saves_it_alone(tmp_path: Path) -> None:
    model = adapted()
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = trained(model)
    made = plain(model, tmp_path)  # by its default, columns that forward does not name are dropped
    made.train()
    assert all(math.isfinite(loss) for loss in losses(made))
    assert_same({name: p for name, p in model.named_parameters() if not p.requires_grad}, base)
    assert any(not torch.equal(p, before[name]) for name, p in trained(model).items())
    made.save_model(str(tmp_path / "saved"))
    assert {path.name for path in (tmp_path / "saved").iterdir()} == ADAPTER_FILES | {"training_args.bin"}
    again = PeftModel.from_pretrained(adapted().unload(), tmp_path / "saved", is_trainable=True)
    assert_same(trained(again), trained(model))


def test_label_smoothing_is_computed_from_shifted_labels(tmp_path: Path) -> None:
    model = adapted()
    made = plain(model, tmp_path, label_smoothing_factor=0.2)
    batch = RightPaddingCollator(0)(list(rows(4)))
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        found = made.compute_loss(model, dict(batch))
    labels = batch["labels"][:, 1:]
    log_probs = F.log_softmax(logits, -1)[labels != -100]
    nll = -log_probs.gather(1, labels[labels != -100][:, None]).mean()
    assert found.item() == pytest.approx((0.8 * nll + 0.2 * -log_probs.mean()).item(), rel=1e-5)
    assert isinstance(made.label_smoother, LabelSmoother)


@pytest.mark.parametrize("made_by", [Trainer, AdapterTrainer])
def test_a_4_bit_base_trains(tmp_path: Path, made_by: type[Trainer]) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).bfloat16().save_pretrained(tmp_path / "base")
    storage = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16, quantization_config=storage)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    before = trained(model)
    made = plain(model, tmp_path / "run", made_by)
    made.train()
    assert all(math.isfinite(loss) for loss in losses(made))
    assert any(not torch.equal(p, before[name]) for name, p in trained(model).items())
    made.save_model(str(tmp_path / "saved"))
    assert {path.name for path in (tmp_path / "saved").iterdir()} == ADAPTER_FILES | {"training_args.bin"}


def test_the_mixin_reads_what_trainer_has_written(tmp_path: Path) -> None:
    plain(adapted(), tmp_path, **SAVING).train()
    mixed = plain(adapted(), tmp_path, AdapterTrainer, **(SAVING | {"max_steps": 6}))
    mixed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert mixed.state.global_step == 6


def test_evaluating_changes_no_training_curve_with_the_mixin_and_does_with_trainer(tmp_path: Path) -> None:
    """Trainer's evaluation draws a random number, so that dropout's masks are others afterwards."""
    curves = {
        (made_by, evaluates): losses(trained_over_epochs(made_by, evaluates, tmp_path))
        for made_by in (Trainer, AdapterTrainer)
        for evaluates in ("no", "epoch")
    }
    alone = pytest.approx(curves[Trainer, "no"], rel=1e-6)
    assert curves[AdapterTrainer, "no"] == alone and curves[AdapterTrainer, "epoch"] == alone
    epoch = len(curves[Trainer, "no"]) // 2
    assert curves[Trainer, "epoch"][:epoch] == pytest.approx(curves[Trainer, "no"][:epoch], rel=1e-6)
    assert curves[Trainer, "epoch"][epoch:] != pytest.approx(curves[Trainer, "no"][epoch:], rel=1e-4)


def trained_over_epochs(made_by: type[Trainer], evaluates: str, folder: Path) -> Trainer:
    made = plain(
        adapted(dropout=0.2),
        folder,
        made_by,
        max_steps=-1,
        num_train_epochs=2,
        eval_strategy=evaluates,
        eval_on_start=False,
    )
    made.train()
    return made


# -- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, bytes]]:
    """A hub that keeps what is uploaded: {commit message: {path: bytes}}."""
    kept: dict[str, dict[str, bytes]] = {}

    def create_repo(self: HfApi, repo_id: str, **_: Any) -> Any:
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(
        self: HfApi,
        *,
        folder_path: Any,
        commit_message: str,
        ignore_patterns: Any = None,
        path_in_repo: str = "",
        **_: Any,
    ) -> Any:
        from huggingface_hub.utils import filter_repo_objects

        root = Path(folder_path)
        files = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        chosen = filter_repo_objects(files, ignore_patterns=ignore_patterns)
        kept[commit_message] = {f"{path_in_repo}/{name}".strip("/"): (root / name).read_bytes() for name in chosen}
        return SimpleNamespace(done=lambda: True, result=lambda: None)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return kept


@pytest.mark.filterwarnings("ignore:the base model's config.json is not found at 'someone/base'")
@pytest.mark.parametrize("made_by", [Trainer, AdapterTrainer])
def test_what_is_pushed_is_the_adapter_with_its_card(
    tmp_path: Path, hub: dict[str, dict[str, bytes]], made_by: type[Trainer]
) -> None:
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = "someone/base"
    made = plain(model, tmp_path / "run", made_by)
    made.train()
    made.push_to_hub(commit_message="done")
    pushed = hub["done"]
    assert pushed.keys() == ADAPTER_FILES | {"training_args.bin"}
    assert json.loads(pushed["adapter_config.json"])["peft_type"] == "LORA"
    card = ModelCard(pushed["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("peft", "someone/base")
    (tmp_path / "got").mkdir()
    for name in ADAPTER_FILES - {"README.md"}:
        (tmp_path / "got" / name).write_bytes(pushed[name])
    again = PeftModel.from_pretrained(adapted().unload(), tmp_path / "got", is_trainable=True)
    assert_same(trained(again), trained(model))


def test_each_checkpoint_pushes_its_adapters_once_it_counts(tmp_path: Path, hub: dict[str, dict[str, bytes]]) -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    made = plain(model, tmp_path, AdapterTrainer, **SAVING, push_to_hub=True, hub_strategy="checkpoint")
    made.train()
    for step in (1, 4):
        pushed = hub[f"Training in progress, step {step}"]
        checkpoint = tmp_path / f"checkpoint-{step}"
        for name in ("adapter_model.safetensors", "adapter_config.json", "second/adapter_model.safetensors"):
            assert pushed[name] == (checkpoint / name).read_bytes()
        assert not any(name.startswith(("checkpoint-", "optimizer", "model")) for name in pushed)
        whole = hub[f"Training in progress, step {step}, checkpoint"]
        assert {"last-checkpoint/SHA256SUMS", "last-checkpoint/optimizer.pt"} <= whole.keys()


# -- accelerate ------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerated() -> Any:
    """What makes an Accelerator; its process-wide state is as new before and after."""

    def fresh(**options: Any) -> Accelerator:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return Accelerator(cpu=True, **options)

    yield fresh
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_an_accelerate_loop_saves_its_state_and_goes_on(tmp_path: Path, accelerated: Any) -> None:
    def parts() -> tuple[Accelerator, Any, Any, Any, Any]:
        accelerator = accelerated(gradient_accumulation_steps=2)
        model = adapted(dropout=0.2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        loader = DataLoader(list(rows(16)), batch_size=2, collate_fn=RightPaddingCollator(0))
        return accelerator, *accelerator.prepare(model, optimizer, loader, schedule)

    def steps(accelerator: Accelerator, model: Any, optimizer: Any, batches: Any, schedule: Any) -> None:
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    accelerator, model, optimizer, loader, schedule = parts()
    torch.manual_seed(1)
    batches = list(loader)
    steps(accelerator, model, optimizer, batches[:4], schedule)
    accelerator.save_state(str(tmp_path / "state"))
    steps(accelerator, model, optimizer, batches[4:], schedule)
    straight = trained(accelerator.unwrap_model(model))

    accelerator, model, optimizer, _, schedule = parts()
    accelerator.load_state(str(tmp_path / "state"))
    steps(accelerator, model, optimizer, batches[4:], schedule)
    resumed = accelerator.unwrap_model(model)
    assert_same(trained(resumed), straight)
    resumed.save_pretrained(tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
