"""`peft.tuners.adamss.asa_callback`: AdaMSS's choice of subspaces in transformers' Trainer."""

from typing import Any

from transformers import TrainerCallback

from peftcore.model import PeftModel

__all__ = ["AdamssAsaCallback"]


class AdamssAsaCallback(TrainerCallback):
    """Callback that calls `update_and_allocate` after each optimiser step of a plain `Trainer`.

    `AdapterTrainer` makes this call by itself and must not get the callback.
    """

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Update the active adapters of a PeftModel; other models stay as they are."""
        if isinstance(model, PeftModel):
            model.base_model.update_and_allocate(state.global_step)  # type: ignore[attr-defined]
