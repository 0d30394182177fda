"""``python tools/cpu_roofline.py``: what a U-Net takes at least by the CPU kernels' algorithms.

For the register's width of one core: vector instructions (two a cycle) of the products and of all
transforms, if nothing ever waited; and bytes of maps, read and written once by each layer. The
greater of both for each layer, added up. Bilinear U-Nets with 3 channels in, 256x256.
"""

from typing import NamedTuple

import click
from tabulate import tabulate

LANES = 16  # of fp32
# Instructions of one application of a transform (csrc/conv_norm_act/winograd.h), by the tile's
# side; a multiplication and an addition are one.
INPUT, OUTPUT = {4: 14, 6: 26}, {4: 14, 6: 20}
GRAD = {4: 13, 6: 18}
# Pixels from which tiles are of 6, with AVX2 alone for so many bytes of their weights
# (csrc/conv_norm_act/work_size.h).
LARGE_MAP, LARGE_MAP_AVX2, LARGE_MAP_BYTES = 96 * 96, 48 * 48, 8 << 20


class Layer(NamedTuple):
    side: int
    inputs: int
    outputs: int


def layers(base: int) -> list[Layer]:
    """Of a bilinear U-Net, whose lowest level has half the channels."""
    widths = [base * min(2**level, 8) for level in range(5)]
    found, before = [], 3
    for level, width in enumerate(widths):
        found += [Layer(256 >> level, before, width), Layer(256 >> level, width, width)]
        before = width
    for level in reversed(range(4)):
        pair, out = 2 * widths[level], widths[max(level - 1, 0)]
        found += [Layer(256 >> level, pair, pair // 2), Layer(256 >> level, pair // 2, out)]
    return found


def blocks(channels: int) -> int:
    return -(-channels // LANES)


def forward(layer: Layer, tile: int, work: int = 6) -> tuple[float, float]:
    """(vector instructions, bytes) for each sample. work: what is applied to each value as it is
    read (an affine and an activation) and written (statistics, or the same)."""
    side, inputs, outputs = layer
    tiles = (-(-side // tile)) ** 2
    patch = tile + 2
    products = patch**2 * inputs * blocks(outputs)
    reading = blocks(inputs) * 2 * patch * INPUT[tile]
    writing = blocks(outputs) * (patch + tile) * OUTPUT[tile]
    values = side**2 * (blocks(inputs) + blocks(outputs)) * work / 2
    return tiles * (products + reading + writing) + values, 4.0 * side**2 * (inputs + outputs)


def weight_grad(layer: Layer, tile: int) -> tuple[float, float]:
    side, inputs, outputs = layer
    tiles = (-(-side // tile)) ** 2
    patch = tile + 2
    products = patch**2 * inputs * blocks(outputs)
    reading = blocks(inputs) * 2 * patch * INPUT[tile]
    reading += blocks(outputs) * (patch + tile) * GRAD[tile]
    values = side**2 * (blocks(inputs) + blocks(outputs)) * 3
    return tiles * (products + reading) + values, 4.0 * side**2 * (inputs + 2 * outputs)


def tile_of(layer: Layer, avx2: bool) -> int:
    few_weights = layer.inputs * layer.outputs * 64 * 4 <= LARGE_MAP_BYTES
    return 6 if layer.side**2 >= (LARGE_MAP_AVX2 if avx2 and few_weights else LARGE_MAP) else 4


@click.command()
@click.option("--gflops", default=500.0, show_default=True, help="Peak of all cores, fp32.")
@click.option("--bandwidth", default=44.0, show_default=True, help="GB/s of a copy in memory.")
@click.option("--avx2", is_flag=True, help="Tiles as AVX2 alone has them.")
def main(gflops: float, bandwidth: float, avx2: bool) -> None:
    """Least times of inference and of a training step."""

    def seconds(instructions: float, nbytes: float) -> float:
        return max(instructions * 2 * LANES / (gflops * 1e9), nbytes / (bandwidth * 1e9))

    rows = []
    for base, batch in ((64, 1), (32, 1), (16, 1), (32, 2), (16, 4)):
        inference = step = products = 0.0
        for i, layer in enumerate(layers(base)):
            tile = tile_of(layer, avx2)
            inference += seconds(*forward(layer, tile))
            products += 18 * layer.side**2 * layer.inputs * layer.outputs
            step += seconds(*forward(layer, 4))
            step += seconds(*weight_grad(layer, tile))
            if i > 0:
                turned = Layer(layer.side, layer.outputs, layer.inputs)
                instructions, nbytes = forward(turned, tile, work=8)
                # dy, y and the source's y are read, the source's gradient is written.
                step += seconds(instructions, nbytes * 2)
        rows.append(
            {
                "base": base,
                "batch": batch,
                "inference, ms": 1e3 * inference * batch,
                "directly, ms": 1e3 * products / (gflops * 1e9) * batch,
                "step, ms": 1e3 * step * batch,
            }
        )
    click.echo(tabulate(rows, headers="keys", floatfmt=".1f"))


if __name__ == "__main__":
    main()
