"""A convolution's weight turned around, for the input's gradient."""

from torch import Tensor


def turn_weight(weight: Tensor) -> Tensor:
    """[O, I, kh, kw] -> [I, O, kh, kw] with the taps in reverse order."""
    return weight.flip((2, 3)).transpose(0, 1)
