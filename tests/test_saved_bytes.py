"""What a training step keeps for backward, against the plain U-Net: base 64, one 256x256 image."""

import pytest
import torch
from sampling import sampled
from torch import nn

from fastunet import FastUNet
from fastunet.memory import measure_allocations, saved_for_backward
from fastunet.reference import UNet

SIZE = (1, 3, 256, 256)
MIB = 2**20


def saved(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> int:
    excluded = [*model.parameters(), *model.buffers()]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return saved_for_backward(lambda: model(x), excluded)


@pytest.mark.parametrize(
    ("bilinear", "dtype", "most"),
    [
        (True, torch.float32, 0.38),
        (False, torch.float32, 0.47),
        (True, torch.bfloat16, 0.30),
        (False, torch.bfloat16, 0.35),
    ],
    ids=str,
)
def test_share_of_the_reference(bilinear, dtype, most, record_property):
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(SIZE)
        plain, fast = (saved(kind(3, 2, bilinear), x, dtype) for kind in (UNet, FastUNet))
    record_property("MiB", f"{fast / MIB:.1f} instead of {plain / MIB:.1f}")
    print(f"{fast / MIB:.1f} MiB instead of {plain / MIB:.1f}: {fast / plain:.3f}")
    assert fast <= most * plain


@pytest.mark.parametrize("norm", ["batch", "instance", "group", "none"])
def test_only_outputs_of_convolutions(norm):
    """To the byte: each convolution's output once, the image, and vectors of its channels."""
    with torch._subclasses.FakeTensorMode():
        model = FastUNet(3, 2, bilinear=True, norm=norm, base_channels=8, depth=3)
        found = saved(model, torch.empty(2, 3, 64, 64), torch.float32)
    maps = vectors = 0
    for level, widths in enumerate(((8, 8, 8, 8), (16, 16, 16, 8), (32, 32, 32, 16), (32, 32))):
        maps += sum(widths) * 2 * (64 >> level) ** 2
        vectors += sum(widths)
    maps += 2 * 3 * 64 * 64
    rows = 2 if norm in ("instance", "group") else 1
    assert found <= 4 * (maps + 4 * rows * vectors)
    assert found >= 4 * maps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bilinear", [False, True], ids=["transposed", "bilinear"])
def test_memory_is_what_is_counted(bilinear, dtype):
    """What the allocator still holds after a forward pass is what autograd says that it keeps."""
    model = FastUNet(3, 2, bilinear, base_channels=16)
    x = torch.randn(1, 3, 128, 128)
    counted = saved(model, x, dtype)

    def forward():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model(x)

    forward()
    held = measure_allocations(forward)
    logits = held.result.untyped_storage().nbytes()
    image = 0 if dtype == torch.bfloat16 else x.untyped_storage().nbytes()  # from before the call
    assert held.live_bytes - logits == pytest.approx(counted - image, rel=0.05)


@pytest.mark.parametrize("bilinear", sampled([False, True], [True]), ids=["transposed", "bilinear"])
def test_held_at_full_size(bilinear):
    """The same shares by the allocator's own count, nothing of it fake."""
    x = torch.randn(SIZE)
    held = []
    for kind in (UNet, FastUNet):
        model = kind(3, 2, bilinear)
        held.append(measure_allocations(lambda m=model: m(x)))
    most = 0.38 if bilinear else 0.47
    assert held[1].live_bytes <= (most + 0.01) * held[0].live_bytes
    counted = saved(model, x, torch.float32)
    logits = held[1].result.untyped_storage().nbytes()
    image = x.untyped_storage().nbytes()
    assert held[1].live_bytes - logits == pytest.approx(counted - image, rel=0.05)
