"""Rows that count for more or less in the causal loss.

    loss = Σ_b w_b Σ_t ℓ_bt / Σ_b w_b n_b

over all rows b of the accumulated batch, on all processes. Without weights nothing here is computed, and the loss is
the plain mean over tokens.

Shapes: B rows, T positions, n supervised tokens of the batch.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import Trainer

from peftcore.train.losses import supervised_positions

WEIGHT = "weight"
"""The column, and the key of a batch, that holds the weights."""

_Base = Trainer if TYPE_CHECKING else object


def token_weights(weight: Tensor, mask: Tensor) -> Tensor:
    """Weights (n,) of the true positions of `mask` (B, T); weight: (B, 1), or (1, T) where rows are packed."""
    return weight.expand(mask.shape)[mask]


class RowWeightsMixin(_Base):
    """Lets a Trainer keep the weights' column, and count items in their measure."""

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if WEIGHT not in columns:
            self._signature_columns = [*columns, WEIGHT]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Trainer's count of supervised tokens; their summed weights where the batches have weights."""
        if not any(WEIGHT in batch for batch in batch_samples):
            return super()._get_num_items_in_batch(batch_samples, device)
        total = torch.stack([self._weight_of(batch).to(device) for batch in batch_samples]).sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = cast(Tensor, self.accelerator.gather(total)).sum()
        return total / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())

    def _weight_of(self, batch: Any) -> Tensor:
        """What one forward pass's batch weighs in all, a scalar."""
        return token_weights(batch[WEIGHT], supervised_positions(batch["labels"])).sum()
