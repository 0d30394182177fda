"""The least time that a U-Net can take on a GPU, counted from its FLOPs and the bytes it moves.

Four ways of running the same network (BatchNorm, ReLU) are counted, each as the kernels that it
launches:

* ``eager``: PyTorch, one kernel per operation, channels_last.
* ``compile``: ``torch.compile``. What is done value by value is one kernel, convolutions are not
  part of it.
* ``around``: FastUNet with cuDNN's convolutions. What is pending is done by one pass that makes the
  convolution's input; in backward, a pass makes that input again while it makes the gradient of
  what it is made of.
* ``fused``: FastUNet. A convolution reads raw outputs of convolutions and does on load what is
  pending; statistics, masks and the sums of BatchNorm's backward are formed on store.

The bound is the sum over all kernels of max(FLOPs / peak, bytes / bandwidth). A kernel reads and
writes each of its maps once: no cache keeps anything between kernels, halos are free. Weights count
once per kernel; vectors of channels, casts, the loss and the optimizer not at all. All maps and
weights are of one dtype. No GPU is needed.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes
MODELS = {
    "eager": "eager",
    "compile": "torch.compile",
    "around": "around cuDNN",
    "fused": "fused",
}
PHASES = ("forward", "backward", "inference")
Size = tuple[int, int]  # height, width

# The kernels of each kind of layer, as "name: what it reads -> what it writes"; inference where it
# differs from forward. A kernel whose name has `conv`, `dgrad` or `wgrad` does the layer's
# multiply-adds, once per word.
#
#   x  the input as one plain map         y  the convolution's output       z  after norm and ReLU
#   s  the input as fused stores it: before pooling, upsampling and concatenation
#   a  the part of s with a ReLU pending and no upsampling: its mask is applied on store
#   o  the gradient that the other reader of s (the skip connection) has left: added on store
#   p  pooled    i, j  indices (int64), offsets (int8) of its winners
#   u  upsampled    v  padded to the skip's size    k  the skip    c  concatenated    l  logits
#   w  weights    dx  gradient of x, and so on    dt  gradient before the ReLU
#   q  z if a convolution reads it; otherwise nothing, as compile forms it again from y
#
# So one 3x3 layer with Cin = Cout moves, in 16 bit, per pixel and channel: forward 14 B (eager),
# 10 (compile), 10 (around), 4 (fused); backward 24, 22, 22, 16.
#
# Sources. eager, ATen: max_pool2d always forms indices (Pooling.cpp), a convolution by cuDNN adds
# its bias in another kernel (Convolution.cpp), constant_pad_nd copies even where it pads by nothing
# (PadNd.cpp), cat's backward is two views. compile, TorchInductor: a convolution is a call of
# cuDNN, its input exists in memory and is saved; work value by value fuses, also with a reduction,
# and is repeated in backward rather than saved (seen in what torch 2.13 saves); max-pooling keeps
# int8 offsets. around, csrc/resample: a source that is upsampled is made
# again by a pass of its own, whose second reading of the smaller map is not counted. fused,
# docs/design.md: all that a tile of a convolution can do on load and on store
# is done there; the gradient of a bilinear upsampling, whose sums reach across tiles, is not.
KERNELS: dict[str, dict[str, dict[str, str]]] = {
    "conv": {
        "eager": {
            "forward": "conv: x w -> y; statistics: y ->; normalize: y -> z; relu: z -> z",
            "backward": "relu: dz z -> dt; reduce: dt y ->; apply: dt y -> dy;"
            "dgrad: dy w -> dx; wgrad: x dy -> dw",
            "inference": "conv: x w -> y; normalize: y -> z; relu: z -> z",
        },
        "compile": {
            "forward": "conv: x w -> y; statistics: y ->; normalize relu: y -> z",
            "backward": "relu reduce: dz y q ->; relu apply: dz y q -> dy;"
            "dgrad: dy w -> dx; wgrad: x dy -> dw",
            "inference": "conv: x w -> y; normalize relu: y -> z",
        },
        "around": {
            "forward": "resample: s -> x; conv: x w -> y; statistics: y ->",
            "backward": "apply: dt y -> dy; dgrad: dy w -> dx; resample: dx s -> ds x;"
            "wgrad: x dy -> dw",
            "inference": "resample: s -> x; conv: x w -> y",
        },
        "fused": {
            "forward": "conv statistics: s w -> y",
            "backward": "apply: dt y -> dy; dgrad relu reduce: dy w a o -> ds; wgrad: s dy -> dw",
            "inference": "conv normalize relu: s w -> z",
        },
    },
    "pool": {
        "eager": {
            "forward": "max-pool: z -> p i",
            "backward": "max-pool: dp i -> dz; add skip: dz dz -> dz",
        },
        "compile": {
            "forward": "max-pool: z -> p j",
            "backward": "max-pool add skip: dp j dz -> dz",
            "inference": "max-pool: z -> p",
        },
        "around": {"forward": "", "backward": "add skip: dz dz -> dz"},
        "fused": {"forward": "", "backward": ""},
    },
    "transposed": {
        "eager": {
            "forward": "conv: x w -> u; bias: u -> u; pad: u -> v; cat: k v -> c",
            "backward": "pad: dv -> du; bias: du ->; dgrad: du w -> dx; wgrad: x du -> dw",
        },
        "compile": {
            "forward": "conv: x w -> u; bias pad cat: k u -> c",
            "backward": "pad bias: dv -> du; dgrad: du w -> dx; wgrad: x du -> dw",
        },
        "around": {
            "forward": "resample: x -> x; conv: x w -> u; bias: u -> u",
            "backward": "bias: du ->; dgrad: du w -> dx; resample: dx x -> dx x; wgrad: x du -> dw",
        },
        "fused": {
            "forward": "conv bias: x w -> u",
            "backward": "dgrad relu reduce: du w x -> dx; wgrad bias: x du -> dw",
        },
    },
    "bilinear": {
        "eager": {
            "forward": "upsample: x -> u; pad: u -> v; cat: k v -> c",
            "backward": "pad: dv -> du; upsample: du -> dx",
        },
        "compile": {
            "forward": "upsample pad cat: k x -> c",
            "backward": "pad upsample: dv -> dx",
        },
        "around": {"forward": "", "backward": ""},
        "fused": {"forward": "", "backward": "upsample relu reduce: dv x -> dx"},
    },
    "head": {
        "eager": {
            "forward": "conv: x w -> l; bias: l -> l",
            "backward": "bias: dl ->; dgrad: dl w -> dx; wgrad: x dl -> dw",
        },
        "compile": {
            "forward": "conv: x w -> l",
            "backward": "dgrad: dl w -> dx; wgrad: x dl -> dw",
        },
        "around": {
            "forward": "resample: x -> x; conv: x w -> l; bias: l -> l",
            "backward": "bias: dl ->; dgrad: dl w -> dx; resample: dx x -> dx x; wgrad: x dl -> dw",
        },
        "fused": {
            "forward": "conv bias: x w -> l",
            "backward": "dgrad wgrad relu reduce bias: dl w x -> dx dw",
        },
    },
}

# The maps that each layer keeps for backward, by the same letters; `image` is the network's input.
SAVED: dict[str, dict[str, str]] = {
    "conv": {"eager": "image y z", "compile": "image y q", "around": "image y", "fused": "image y"},
    "pool": {"eager": "p i", "compile": "p j", "around": "", "fused": ""},
    "transposed": {"eager": "c", "compile": "c", "around": "u", "fused": "u"},
    "bilinear": {"eager": "c", "compile": "c", "around": "", "fused": ""},
    "head": {"eager": "", "compile": "", "around": "", "fused": ""},
}

# Dense tensor-core TFLOP/s in 16 bit (fp32 accumulation) and in TF32, TB/s. From NVIDIA's data
# sheets "H200 Tensor Core GPU", "H100 Tensor Core GPU", "A100 80GB", "L4" (their figures with
# sparsity halved) and the white paper "NVIDIA Ada GPU architecture" (appendix A).
GPUS = {
    "H200": (989.5, 494.5, 4.8),
    "H100-SXM": (989.5, 494.5, 3.35),
    "A100-SXM": (312.0, 156.0, 2.039),
    "RTX-4090": (165.2, 82.6, 1.008),
    "L4": (121.0, 60.0, 0.3),
}


class Kernel(NamedTuple):
    """One kernel of one layer: its words (see KERNELS), its FLOPs and the bytes that it moves."""

    name: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Ceilings:
    """What a GPU can do at most: FLOP/s of dense tensor-core products, bytes/s of its memory."""

    flops: float
    bandwidth: float
    gpu: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("tflops", self.flops), ("bandwidth", self.bandwidth)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value / 1e12:g}")

    @staticmethod
    def of(
        gpu: str | None, dtype: str, tflops: float | None = None, bandwidth: float | None = None
    ) -> "Ceilings":
        """The published peaks of one of GPUS (``H200`` if None and nothing is measured), or what
        was measured instead, in TFLOP/s and TB/s. In float32, PyTorch's default: TF32.

        Raises:
            ValueError: for a ceiling that is not positive and finite, or one without the other.
        """
        if tflops is None or bandwidth is None:
            if gpu is None and not (tflops is None and bandwidth is None):
                raise ValueError("tflops and bandwidth must be given together, or with a gpu")
            gpu = gpu or "H200"
            half, tf32, published = GPUS[gpu]
            if tflops is None:
                tflops = tf32 if dtype == "float32" else half
            if bandwidth is None:
                bandwidth = published
        return Ceilings(1e12 * tflops, 1e12 * bandwidth, gpu)

    def seconds(self, kernel: Kernel) -> float:
        return max(kernel.flops / self.flops, kernel.bytes / self.bandwidth)


@dataclass(frozen=True)
class Layer:
    """One layer: [cin, ...] -> [cout, height, width] per image.

    kind: of KERNELS. reads: how its input comes: ``plain``, ``affine + act``, ``max-pool`` (of
    such a map) or ``skip + upsampled``. flops: of forward, two per multiply-add, as
    ``torch.utils.flop_counter`` counts; dgrad and wgrad take as many each. maps: bytes of each
    letter, whole batch.
    """

    name: str
    kind: str
    reads: str
    cin: int
    cout: int
    height: int
    width: int
    flops: int
    maps: dict[str, int] = field(repr=False)
    dgrad: bool = True

    def kernels(self, model: str, phase: str) -> Iterator[Kernel]:
        kernels = KERNELS[self.kind][model]
        for text in filter(None, kernels.get(phase, kernels["forward"]).split(";")):
            name, maps = text.strip().split(":")
            words = name.split()
            if "dgrad" in words and not self.dgrad:
                continue
            if words == ["resample"] and self.reads == "plain":
                continue  # the image, which is not differentiated either
            products = sum(word in ("conv", "dgrad", "wgrad") for word in words)
            nbytes = sum(self.bytes_of(letter) for letter in maps.split() if letter != "->")
            yield Kernel(name, products * self.flops, nbytes)

    def bytes_of(self, letter: str) -> int:
        """Of a map; of its gradient, unless that is stored in another size."""
        return self.maps[letter] if letter in self.maps else self.maps[letter.removeprefix("d")]

    def saved(self, model: str) -> int:
        """Bytes kept for backward."""
        return sum(self.bytes_of(letter) for letter in SAVED[self.kind][model].split())


@dataclass(frozen=True)
class Network:
    """A U-Net, by the names of ``fastunet.FastUNet``'s arguments, and its input's shape and dtype.

    Raises:
        ValueError: for a number that is not positive, an unknown dtype, an image below 2**depth.
    """

    n_channels: int = 3
    n_classes: int = 2
    bilinear: bool = False
    base_channels: int = 64
    depth: int = 4
    batch: int = 1
    height: int = 512
    width: int = 512
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name not in ("bilinear", "dtype") and value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value}")
        if self.dtype not in ITEMSIZE:
            raise ValueError(f"dtype must be one of {', '.join(ITEMSIZE)}, got {self.dtype!r}")
        if min(self.height, self.width).bit_length() <= self.depth:  # below 2**depth
            least = f"2**depth = {2**self.depth}" if self.depth < 64 else f"2**{self.depth}"
            raise ValueError(
                f"height and width must be at least {least}, got {self.height}x{self.width}"
            )

    def layers(self) -> list[Layer]:
        """In the order of forward; shapes as ``fastunet.reference.UNet`` makes them."""
        widths = [self.base_channels << level for level in range(self.depth + 1)]
        sizes = [(self.height >> level, self.width >> level) for level in range(self.depth + 1)]
        halved = 2 if self.bilinear else 1
        found: list[Layer] = []

        channels = self.n_channels
        for level, size in enumerate(sizes):
            deepest = level == self.depth
            cout = widths[level] // (halved if deepest else 1)
            if level == 0:
                found.append(self.first_conv(cout))
            else:
                found += self.pool_conv(f"down{level}", channels, cout, sizes[level - 1], size)
            name = f"down{level}" if level else "inc"
            # above the deepest level a max-pool and a concatenation read it
            conv_next = deepest and not self.bilinear
            found.append(self.conv(f"{name}.conv2", cout, cout, size, conv_next=conv_next))
            channels = cout

        for level in reversed(range(self.depth)):
            size, skip = sizes[level], widths[level]
            cout = skip // (halved if level else 1)
            middle = skip if self.bilinear else cout
            name = f"up{self.depth - level}"
            found += self.up_conv(name, channels, skip, middle, sizes[level + 1], size)
            conv_next = level == 0 or not self.bilinear
            found.append(self.conv(f"{name}.conv2", middle, cout, size, conv_next=conv_next))
            channels = cout

        found.append(self.head(channels))
        return found

    def conv(
        self,
        name: str,
        cin: int,
        cout: int,
        size: Size,
        reads: str = "affine + act",
        *,
        conv_next: bool = True,
        **sources: int,
    ) -> Layer:
        """A 3x3 convolution with its norm and ReLU.

        conv_next: whether a convolution reads its result. sources: bytes of the letters that are
        not as where it reads one layer's output of ``size``, which nothing else reads.
        """
        x, y = self.map(cin, size), self.map(cout, size)
        maps = {"x": x, "s": x, "a": x, "o": 0, "image": 0, "y": y, "z": y, "t": y}
        maps |= {"q": y if conv_next else 0, "w": 9 * cin * cout * self.itemsize, **sources}
        flops = 18 * cin * cout * self.pixels(size)
        return Layer(name, "conv", reads, cin, cout, *size, flops, maps, "image" not in sources)

    def first_conv(self, cout: int) -> Layer:
        size = self.height, self.width
        image = self.map(self.n_channels, size)
        return self.conv("inc.conv1", self.n_channels, cout, size, "plain", image=image)

    def pool_conv(self, name: str, cin: int, cout: int, above: Size, size: Size) -> list[Layer]:
        """The max-pool and the first convolution of a level of the encoder."""
        full, pooled, values = self.map(cin, above), self.map(cin, size), cin * self.pixels(size)
        pool = {"z": full, "p": pooled, "i": 8 * values, "j": values}
        return [
            Layer(f"{name}.pool", "pool", "affine + act", cin, cin, *size, 0, pool),
            self.conv(f"{name}.conv1", cin, cout, size, "max-pool", s=full, a=full, o=full),
        ]

    def up_conv(
        self, name: str, cin: int, skip: int, cout: int, low: Size, size: Size
    ) -> list[Layer]:
        """The upsampling, with padding and concatenation, and the convolution that reads them.

        The upsampled half has as many channels as the skip.
        """
        x, k, u = self.map(cin, low), self.map(skip, size), 4 * self.map(skip, low)
        up = {"x": x, "u": u, "v": k, "k": k, "c": 2 * k}
        if self.bilinear:
            kind, weights, s, ds = "bilinear", 0, k + x, 2 * k
        else:
            kind, weights, s, ds = "transposed", 4 * cin * skip, k + u, k + u
        up["w"] = weights * self.itemsize
        flops = 2 * weights * self.pixels(low)
        reads = f"skip + {kind}"
        return [
            Layer(f"{name}.up", kind, "affine + act", cin, skip, *size, flops, up),
            self.conv(f"{name}.conv1", 2 * skip, cout, size, reads, s=s, a=k, ds=ds),
        ]

    def head(self, cin: int) -> Layer:
        size, weights = (self.height, self.width), cin * self.n_classes
        maps = {"x": self.map(cin, size), "l": self.map(self.n_classes, size)}
        maps["w"] = weights * self.itemsize
        flops = 2 * weights * self.pixels(size)
        return Layer("outc", "head", "affine + act", cin, self.n_classes, *size, flops, maps)

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    def pixels(self, size: Size) -> int:
        """Of the whole batch."""
        return self.batch * size[0] * size[1]

    def map(self, channels: int, size: Size) -> int:
        """Bytes of a map."""
        return channels * self.pixels(size) * self.itemsize


def report(network: Network, ceilings: Ceilings) -> dict[str, Any]:
    """FLOPs, bytes and the least seconds of a training step and of inference; per layer too.

    Figures are of the whole batch, those per image say so.
    """
    layers = network.layers()
    forward = sum(layer.flops for layer in layers)
    step = sum(layer.flops * (3 if layer.dgrad else 2) for layer in layers)
    rows = [layer_report(layer, ceilings) for layer in layers]
    models: dict[str, Any] = {}
    for model in MODELS:
        found: dict[str, Any] = {}
        for phase in PHASES:
            kernels = [kernel for row in rows for kernel in row["models"][model][phase]]
            found[f"{phase}_bytes"] = sum(kernel["bytes"] for kernel in kernels)
            found[f"{phase}_seconds"] = sum(kernel["seconds"] for kernel in kernels)
        found["training_seconds"] = found["forward_seconds"] + found["backward_seconds"]
        for phase in ("training", "inference"):
            found[f"{phase}_images_per_second"] = network.batch / found[f"{phase}_seconds"]
        found["saved_bytes"] = sum(layer.saved(model) for layer in layers)
        models[model] = found
    return {
        "network": asdict(network),
        "ceilings": asdict(ceilings),
        "flops": {"forward": forward, "step": step},
        "flops_alone": {
            "training_seconds": step / ceilings.flops,
            "inference_seconds": forward / ceilings.flops,
            "training_images_per_second": network.batch * ceilings.flops / step,
            "inference_images_per_second": network.batch * ceilings.flops / forward,
        },
        "models": models,
        "layers": rows,
    }


def layer_report(layer: Layer, ceilings: Ceilings) -> dict[str, Any]:
    def kernels(model: str, phase: str) -> list[dict[str, Any]]:
        return [
            {**kernel._asdict(), "seconds": ceilings.seconds(kernel)}
            for kernel in layer.kernels(model, phase)
        ]

    shape = ("name", "kind", "reads", "cin", "cout", "height", "width")
    flops = {"forward": layer.flops, "dgrad": layer.dgrad * layer.flops, "wgrad": layer.flops}
    models = {m: {phase: kernels(m, phase) for phase in PHASES} for m in MODELS}
    return {**{name: getattr(layer, name) for name in shape}, "flops": flops, "models": models}


def render(found: dict[str, Any]) -> str:
    """The report as text."""
    net, ceilings, models = found["network"], found["ceilings"], found["models"]
    batch, alone = net["batch"], found["flops_alone"]
    kind = "bilinear" if net["bilinear"] else "transposed"
    tflops, bandwidth = ceilings["flops"] / 1e12, ceilings["bandwidth"] / 1e12
    forward, step = (found["flops"][name] / 1e9 for name in ("forward", "step"))

    def row(title: str, name: str, scale: float, digits: int) -> list[str]:
        columns = [*models.values(), alone]
        return [title, *(f"{c[name] * scale:.{digits}f}" if name in c else "" for c in columns)]

    per_image = 1e-6 / batch
    totals = [
        ["", *MODELS.values(), "FLOPs alone"],
        row("training, images/s", "training_images_per_second", 1, 0),
        row("training, ms per step", "training_seconds", 1e3, 3),
        row("inference, images/s", "inference_images_per_second", 1, 0),
        row("inference, ms", "inference_seconds", 1e3, 3),
        row("forward, MB moved per image", "forward_bytes", per_image, 0),
        row("backward, MB moved per image", "backward_bytes", per_image, 0),
        row("inference, MB moved per image", "inference_bytes", per_image, 0),
        row("saved for backward, MB per image", "saved_bytes", per_image, 0),
    ]
    layers = [["layer", "reads", "channels", "output", "GFLOP", *(f"{m}, µs" for m in MODELS)]]
    for layer in found["layers"]:
        times = [
            1e6 * sum(kernel["seconds"] for phase in PHASES[:2] for kernel in kernels[phase])
            for kernels in layer["models"].values()
        ]
        layers.append(
            [
                layer["name"],
                layer["reads"],
                f"{layer['cin']} -> {layer['cout']}",
                f"{layer['height']}x{layer['width']}",
                f"{layer['flops']['forward'] / 1e9:.2f}",
                *(f"{time:.1f}" for time in times),
            ]
        )
    return "\n".join(
        [
            f"U-Net {net['n_channels']} -> {net['n_classes']}, base {net['base_channels']}, "
            f"depth {net['depth']}, {kind}, batch {batch}, {net['height']}x{net['width']}, "
            f"{net['dtype']}",
            f"{ceilings['gpu'] or 'GPU'}: {tflops:g} TFLOP/s, {bandwidth:g} TB/s",
            f"{forward / batch:.1f} GFLOP per image forward, {step / batch:.1f} in a training step",
            "",
            *table(totals, 1),
            "",
            "By layer, GFLOP of forward and time of a training step, whole batch:",
            "",
            *table(layers, 4),
            "",
            "Bounds, not measurements: every kernel at the peak or at full bandwidth.",
        ]
    )


def table(rows: list[list[str]], left: int) -> Iterator[str]:
    """Aligned lines; the first ``left`` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
