"""Base of objectives whose examples are weighted one by one: preference pairs, labelled texts.

    loss = Σ_e w_e ℓ_e / Σ_e w_e

over all examples e of the accumulated batch, on all processes; in evaluation over the whole set.

Shapes: E examples of one forward pass.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftcore.errors import TrainingError
from peftcore.train.batches import WEIGHT
from peftcore.train.losses import IGNORED
from peftcore.train.objective import Objective
from peftcore.train.packing import PackedCollator, Packs


class ExampleObjective(Objective):
    """Weighted mean over examples. A subclass defines `example_losses`; its collator's batches have `weight` (E,)."""

    collator_name = "RightPaddingCollator"
    returns_outputs = False

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._metric_sums: list[dict[str, Tensor]] = []  # of the forward passes since the last training record

    def check(self) -> None:
        """Raise TrainingError for packed rows, label smoothing or a `compute_loss_func`."""
        trainer, name = self.trainer, type(self.trainer).__name__
        if isinstance(trainer.data_collator, PackedCollator) or isinstance(trainer.train_dataset, Packs):
            raise TrainingError(
                f"{name} counts examples, and packed rows have no bounds between examples; use padded batches, with "
                f"data_collator={self.collator_name}(pad_token_id)"
            )
        if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
            raise TrainingError(f"{name} defines the loss itself; remove label_smoothing_factor and compute_loss_func")

    def reset(self) -> None:
        """Forget the metrics of an earlier run."""
        self._metric_sums.clear()

    def state(self) -> dict[str, Any]:
        """Return the sums since the last training record, of each process."""
        return {"metric_sums": self.trainer.processes.of_each(self._metric_sums)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the sums since the last training record."""
        for sums in self.trainer.processes.share_of(state["metric_sums"]):
            self._metric_sums.extend(sums)

    def example_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return losses (E,), and detached metrics (E,) to log. `inputs` is a batch on the model's device."""
        raise NotImplementedError

    def example_weights(self, inputs: dict[str, Any]) -> Tensor:
        """Return the weights (E,) of a batch's examples; an example without any label weighs 0."""
        if WEIGHT not in inputs:
            raise TrainingError(
                f"the batch has no {WEIGHT!r} of its examples; give data_collator={self.collator_name}(pad_token_id)"
            )
        labelled = (inputs["labels"] != IGNORED).view(len(inputs["labels"]), -1).any(1)
        return inputs[WEIGHT] * labelled

    # -- training ----------------------------------------------------------------------------------------------

    def is_sum_over_items(self) -> bool:
        """Return True: the loss is a weighted sum over examples."""
        return True

    def loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None, return_outputs: bool
    ) -> Tensor:
        """Return the batch's share of the mean over the optimiser step, or the batch's own mean. Outputs are empty."""
        losses, metrics = self.example_losses(model, inputs)
        weights = self.example_weights(inputs).to(losses)
        total = (losses * weights).sum()
        if model.training:
            counts = (weights > 0).to(losses)
            self._metric_sums.append({name: (values * counts).sum() for name, values in metrics.items()})
            self._metric_sums[-1]["examples"] = counts.sum()
        return total / weights.sum() if num_items is None else self.share_of_mean(total, num_items)

    def batch_weight(self, batch: Any) -> Tensor:
        """Return the summed weight of a batch's examples, a scalar."""
        return self.example_weights(batch).sum()

    def unrecorded(self) -> list[Any]:
        """Return the sums of the forward passes since the last training record."""
        return self._metric_sums

    def record(self) -> dict[str, float]:
        """Return each metric's mean over the examples since the last training record whose weight is not 0."""
        if not self._metric_sums:
            return {}
        names = list(self._metric_sums[0])
        sums = torch.stack([torch.stack([each[name].float() for name in names]) for each in self._metric_sums]).sum(0)
        self._metric_sums.clear()
        sums = cast(Tensor, self.trainer.accelerator.reduce(sums, "sum"))
        totals = dict(zip(names, sums.tolist(), strict=True))
        examples = totals.pop("examples")
        return {name: total / examples for name, total in totals.items()} if examples else {}

    # -- evaluation --------------------------------------------------------------------------------------------

    def evaluates_rows(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Return True: rows are examples."""
        return True

    def row_metrics(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Return weighted `loss`, `weight` and the metrics of each example, (E,)."""
        losses, metrics = self.example_losses(model, inputs)
        weights = self.example_weights(inputs).to(losses)
        return {"loss": losses * weights, WEIGHT: weights, **metrics}

    def set_metrics(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """Return the weighted mean `loss`, and each metric's mean over the examples whose weight is not 0."""
        rows = {name: torch.cat([batch[name].double() for batch in batches]) for name in (batches or [{}])[0]}
        if not rows or not rows[WEIGHT].sum():
            raise TrainingError("the evaluation set is empty, or all its weights are 0; add rows with a weight above 0")
        weights = rows.pop(WEIGHT)
        loss = (rows.pop("loss").sum() / weights.sum()).item()
        return {"loss": loss, **{name: values[weights > 0].mean().item() for name, values in rows.items()}}
