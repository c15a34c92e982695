"""Objectives whose examples count one by one: pairs of answers, labelled texts.

    loss = Σ_e w_e ℓ_e / Σ_e w_e

over all examples e of the accumulated batch, on all processes, and in evaluation over the whole set.

Shapes: E examples of one forward pass.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from peftcore.errors import TrainingError
from peftcore.train.losses import IGNORED
from peftcore.train.objective import ObjectiveMixin
from peftcore.train.packing import PackedCollator, Packs
from peftcore.train.weights import WEIGHT


class ExampleObjectiveMixin(ObjectiveMixin):
    """Stands before AdapterTrainerMixin: `class MyTrainer(ExampleObjectiveMixin, AdapterTrainerMixin, Trainer)`.

    A subclass gives `_example_losses`; its collator's batches have a `weight` (E,).
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.data_collator, PackedCollator) or isinstance(self.train_dataset, Packs):
            raise TrainingError(
                f"a {type(self).__name__} counts examples, and packed rows have no bounds between them; give padded "
                f"batches, such as {self._fitting_collator} makes"
            )
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise TrainingError(
                f"a {type(self).__name__} has a loss of its own; leave out label_smoothing_factor and compute_loss_func"
            )
        self._figures: list[dict[str, Tensor]] = []

    _fitting_collator = "RightPaddingCollator"

    def _example_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (E,), and figures (E,) to log, detached; inputs: on the device."""
        raise NotImplementedError

    def _weights(self, inputs: dict[str, Any]) -> Tensor:
        """Weights (E,) of the examples of a batch; one without any label counts for nothing."""
        if WEIGHT not in inputs:
            raise TrainingError(
                f"the batch has no {WEIGHT!r} of its examples; give "
                f"data_collator={self._fitting_collator}(pad_token_id)"
            )
        labelled = (inputs["labels"] != IGNORED).view(len(inputs["labels"]), -1).any(1)
        return inputs[WEIGHT] * labelled

    # -- training ----------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's share of the mean over the accumulated batch, or its own mean; there are no outputs to return."""
        losses, figures = self._example_losses(model, inputs)
        weights = self._weights(inputs).to(losses)
        total = (losses * weights).sum()
        loss = total / weights.sum() if num_items_in_batch is None else self._share(total, num_items_in_batch)
        if model.training:
            counts = (weights > 0).to(losses)
            self._figures.append({name: (figure * counts).sum() for name, figure in figures.items()})
            self._figures[-1]["examples"] = counts.sum()
            if self.accelerator.sync_gradients:
                loss = self._with_regularizer(loss, num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def _weight_of(self, batch: Any) -> Tensor:
        return self._weights(batch).sum()

    def _computes_label_only_loss(self) -> bool:
        return True

    def _evaluates_rows(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        return True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """AdapterTrainerMixin's."""
        self._figures.clear()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the figures' means over the examples since the last record that weigh anything."""
        if "loss" in logs and self._figures:
            names = list(self._figures[0])
            sums = torch.stack([torch.stack([one[name].float() for name in names]) for one in self._figures]).sum(0)
            every = cast(Tensor, self.accelerator.reduce(sums, "sum"))
            totals = dict(zip(names, every.tolist(), strict=True))
            examples = totals.pop("examples")
            if examples:
                logs.update({name: total / examples for name, total in totals.items()})
            self._figures.clear()
        super().log(logs, start_time)

    # -- evaluation --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _row_figures(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        prepared = dict(self._prepare_inputs(inputs))
        with self.compute_loss_context_manager():
            losses, figures = self._example_losses(model, prepared)
        weights = self._weights(prepared).to(losses)
        return {"loss": losses * weights, WEIGHT: weights, **figures}

    def _evaluation_metrics(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        every = {name: torch.cat([batch[name].double() for batch in batches]) for name in (batches or [{}])[0]}
        if not every or not every[WEIGHT].sum():
            raise TrainingError("the evaluation set is empty, or all its weights are 0; give it rows that count")
        weights = every.pop(WEIGHT)
        loss = (every.pop("loss").sum() / weights.sum()).item()
        return {"loss": loss, **{name: figures[weights > 0].mean().item() for name, figures in every.items()}}
