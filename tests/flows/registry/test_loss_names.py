"""Names of test losses in words."""

import pytest

from flows.registry.loss_names import loss_in_words
from peftcore.train import BradleyTerry, Contrastive, Dpo, Kto, Orpo, SimPo


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (Dpo(beta=0.3, loss="ipo", length_normalized=True), "DPO, beta 0.3, ipo loss, "),
        (Orpo(), "ORPO, beta 0.1"),
        (SimPo(gamma=0.5), "SimPO, beta 2, gamma 0.5, likelihood weight 0"),
        (Kto(undesirable_weight=0.5), "KTO, beta 0.1, kto loss, desirable weight 1, undesirable weight 0.5"),
        (BradleyTerry(0.01), "Bradley-Terry loss, center rewards coefficient 0.01"),
        (Contrastive(), "contrastive loss, scale 20, mask false negatives"),
    ],
)
def test_a_loss_object_has_a_name_and_options(loss: object, words: str) -> None:
    shown = loss_in_words(repr(loss))
    assert shown.startswith(words)
    assert not set("()=_'") & set(shown)


def test_options_that_make_losses_differ_are_shown() -> None:
    losses = [Dpo(), Dpo(beta=0.2), Dpo(loss="hinge"), Dpo(label_smoothing=0.1), Dpo(length_normalized=True)]
    assert len({loss_in_words(repr(loss)) for loss in losses}) == len(losses)


@pytest.mark.parametrize("words", ["cross entropy of tokens", "cross entropy (per row)", "Other(beta=1)"])
def test_a_description_in_words_is_unchanged(words: str) -> None:
    assert loss_in_words(words) == words
