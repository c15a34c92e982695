"""Facts of dropout in an adapter that hold for every method."""

from torch import Tensor, nn
from torch.testing import assert_close


def assert_dropout_keeps_the_mean(net: nn.Module, x: Tensor) -> None:
    """Assert that dropout acts in training mode only, and that the mean of its outputs is the output without it.

    x: (1, i); the standard error of the mean of 20,000 rows bounds the difference.
    """
    expected = net.eval()(x)
    assert net(x).equal(expected)
    draws = net.train()(x.expand(20000, -1))
    assert draws.std(0).min() > 0
    assert_close(draws.mean(0, keepdim=True), expected, rtol=0, atol=4 * draws.std().item() / 20000**0.5)
