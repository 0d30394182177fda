"""Images and masks in files: every format, whole and by windows; every damage in one sentence."""

import io
import random as chance
import struct

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fastunet.files import whole_file
from fastunet.images import (
    ImageFile,
    contrast,
    overlay,
    read_image,
    read_mask,
    write_bands,
    write_mask,
)

RNG = np.random.default_rng(0)


def integers(*shape, dtype=np.uint8):
    info = np.iinfo(dtype)
    return RNG.integers(info.min, info.max, shape, dtype, endpoint=True)


def scaled(array):
    """[C, H, W] as it should be read."""
    if array.dtype.kind not in "iu":
        return torch.from_numpy(array.astype(np.float32))
    info = np.iinfo(array.dtype)
    values = (array.astype(np.float64) - info.min) / (int(info.max) - info.min)
    return torch.from_numpy(values.astype(np.float32))


def assert_reads(path, expected):
    """Whole, and by windows of every kind."""
    expected = scaled(expected)
    found = read_image(path)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    channels, height, width = expected.shape
    with ImageFile(path) as image:
        assert image.shape == (channels, height, width)
        for _ in range(8):
            top, left = chance.randrange(height), chance.randrange(width)
            bottom, right = chance.randint(top, height + 3), chance.randint(left, width + 3)
            window = image[:, top:bottom, left:right]
            torch.testing.assert_close(
                window, expected[:, top:bottom, left:right], rtol=0, atol=1e-7
            )


SIZES = [(1, 1), (1, 7), (7, 1), (37, 53), (300, 260)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_png(tmp_path, size, dtype):
    array = integers(*size, dtype=dtype)
    Image.fromarray(array).save(tmp_path / "a.png")
    assert_reads(tmp_path / "a.png", array[None])


@pytest.mark.parametrize("size", SIZES)
def test_rgb_png_and_jpeg(tmp_path, size):
    array = integers(*size, 3)
    Image.fromarray(array).save(tmp_path / "a.PNG")
    assert_reads(tmp_path / "a.PNG", array.transpose(2, 0, 1))
    Image.fromarray(array).save(tmp_path / "a.jpg")
    decoded = np.asarray(Image.open(tmp_path / "a.jpg"))
    assert_reads(tmp_path / "a.jpg", decoded.transpose(2, 0, 1))


def test_modes_of_png(tmp_path):
    """Alpha is left out, a palette becomes RGB (of a mask its indices), bits are 0 and 1."""
    path = tmp_path / "a.png"
    array = integers(20, 30, 4)
    Image.fromarray(array).save(path)
    assert_reads(path, array[..., :3].transpose(2, 0, 1))
    Image.fromarray(array[..., :2], "LA").save(path)
    assert_reads(path, array[None, ..., 0])
    bits = array[..., 0] > 99
    Image.fromarray(bits).save(path)
    assert_reads(path, bits[None])
    assert torch.equal(read_mask(path), torch.from_numpy(bits).long())
    indices = Image.fromarray(array[..., 0] % 4, "P")
    indices.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 9, 9, 9])
    indices.save(path)
    assert_reads(path, np.asarray(indices.convert("RGB")).transpose(2, 0, 1))
    assert torch.equal(read_mask(path), torch.from_numpy(array[..., 0] % 4).long())


def test_gif(tmp_path):
    """An image is RGB, of greys too; a mask the palette's indices; one frame, not several."""
    path = tmp_path / "a.gif"
    array = integers(20, 30)
    for grey in (array, np.arange(256, dtype=np.uint8).reshape(16, 16)):
        Image.fromarray(grey).save(path)
        assert_reads(path, np.stack([grey] * 3))
    indices = Image.fromarray(array % 2, "P")
    indices.putpalette([9, 9, 9, 255, 0, 0])
    indices.save(path)
    assert_reads(path, np.asarray(indices.convert("RGB")).transpose(2, 0, 1))
    assert torch.equal(read_mask(path), torch.from_numpy(array % 2).long())
    indices.save(path, save_all=True, append_images=[Image.fromarray(array)])
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match=r"a.gif' cannot be read: it must be one frame, got 2"):
            read(path)


def test_exif_orientation_is_applied(tmp_path):
    array = integers(16, 32, 3)
    picture = Image.fromarray(array)
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save(tmp_path / "a.png", exif=exif)
    assert_reads(tmp_path / "a.png", np.rot90(array, -1).transpose(2, 0, 1))


@pytest.mark.parametrize(
    "dtype", ["?", "u1", "<u2", ">u2", "i1", "i2", "f2", "f4", "f8"], ids=lambda d: d.strip("?")
)
@pytest.mark.parametrize("order", "CF")
def test_npy(tmp_path, dtype, order):
    path = tmp_path / "a.npy"
    array = (RNG.normal(0, 60, (5, 37, 53))).astype(dtype)
    for shape, expected in (
        (array[0], array[:1]),
        (array, array),
        (array.transpose(1, 2, 0), array),
        (array[:, :1, :1], array[:, :1, :1].transpose(2, 0, 1)),  # [5, 1, 1]: [H, W, C]
        (array[:, :7, :5], array[:, :7, :5]),  # [5, 7, 5]: [C, H, W]
    ):
        np.save(path, np.asarray(shape, order=order))
        assert_reads(path, expected.astype(expected.dtype.newbyteorder("=")))


TIFFS = {
    "mapped": {},
    "big-endian": {"byteorder": ">"},
    "strips": {"rowsperstrip": 7, "compression": "zlib"},
    "one strip": {"compression": "lzw", "predictor": True},
    "tiles": {"tile": (32, 16)},
    "compressed tiles": {"tile": (16, 48), "compression": "zlib"},
    "bigtiff": {"bigtiff": True, "tile": (32, 32), "compression": "zstd"},
}


@pytest.mark.parametrize("options", TIFFS.values(), ids=TIFFS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_tiff(tmp_path, options, dtype):
    path = tmp_path / "a.tif"
    array = (RNG.normal(0, 50, (5, 100, 70))).astype(dtype)
    if dtype == np.float32 and options.get("predictor"):
        options = options | {"predictor": 3}
    for written, expected, more in (
        (array[0], array[:1], {}),
        (array, array, {}),  # a page for each channel, unmarked
        (array.transpose(1, 2, 0), array, {}),  # [H, W, C], unmarked
        (array, array, {"planarconfig": "separate", "photometric": "minisblack"}),
        (array.transpose(1, 2, 0), array, {"planarconfig": "contig", "photometric": "minisblack"}),
        (array[:3].transpose(1, 2, 0), array[:3], {"photometric": "rgb"}),
        (array[:2], array[:2], {"metadata": {"axes": "CYX"}}),
    ):
        tifffile.imwrite(path, written, **options, **more)
        assert_reads(path, expected)


def test_more_of_tiff(tmp_path):
    path = tmp_path / "a.tiff"
    array = integers(3, 100, 70)
    tifffile.imwrite(path, array.transpose(1, 2, 0), tile=(32, 32), compression="jpeg")
    assert_reads(path, tifffile.imread(path).transpose(2, 0, 1))
    tifffile.imwrite(path, array, imagej=True)
    assert_reads(path, array)
    with tifffile.TiffWriter(path) as writer:  # a pyramid, of which the first level counts
        writer.write(array[0], tile=(32, 32), subifds=1)
        writer.write(array[0, ::2, ::2], tile=(32, 32), subfiletype=1)
    assert_reads(path, array[:1])
    Image.fromarray(array[0] > 99).save(path)
    assert_reads(path, array[:1] > 99)
    colours = integers(3, 256, dtype=np.uint16)
    for options in ({}, {"tile": (32, 32), "compression": "zlib"}):
        tifffile.imwrite(path, array[0], photometric="palette", colormap=colours, **options)
        assert_reads(path, colours[:, array[0]])
        assert torch.equal(read_mask(path), torch.from_numpy(array[0]).long())


def test_a_window_reads_a_window(tmp_path):
    """Neither the rest of the file nor a tile twice."""
    path = tmp_path / "a.tif"
    array = integers(512, 512)
    tifffile.imwrite(path, array, tile=(64, 64), compression="zlib")
    with ImageFile(path) as image:
        decode, decoded = image.source.page.decode, []
        image.source.page.decode = lambda data, index, **kw: (
            decoded.append(index) or decode(data, index, **kw)
        )
        for left in range(0, 512, 32):
            image[:, 100:180, left : left + 48]
        assert sorted(decoded) == [*range(8, 24)]
        image[:, 130:200, :]
        assert sorted(decoded) == [*range(8, 32)]
        assert len(image.source.kept) == 16


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff"])
@pytest.mark.parametrize("size", [*SIZES, (256, 512)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_masks_come_back(tmp_path, suffix, size, dtype):
    most = {torch.bool: 1, torch.uint8: 255, torch.int64: 65535}[dtype]
    mask = torch.randint(0, most + 1, size).to(dtype)
    path = tmp_path / f"a.{suffix}"
    write_mask(path, mask)
    found = read_mask(path)
    assert found.dtype == torch.int64
    assert torch.equal(found, mask.long())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("heights", [[600], [1] * 600, [255, 2, 343], [256, 256, 88]])
def test_bands_make_up_the_image(tmp_path, heights):
    array = integers(3, 600, 300)
    bands = np.split(array, np.cumsum(heights)[:-1], axis=1)
    for suffix in ("tif", "png"):
        write_bands(tmp_path / f"a.{suffix}", iter(bands), array.shape, array.dtype)
        assert_reads(tmp_path / f"a.{suffix}", array)


def test_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.tif"
    write_mask(path, torch.ones(5, 5, dtype=torch.uint8))
    before = path.read_bytes()

    def bands():
        yield integers(1, 300, 300)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_bands(path, bands(), (1, 600, 300), np.dtype(np.uint8))
    with pytest.raises(ValueError, match="the bands must have 600 rows in all, got 300"):
        write_bands(path, [integers(1, 300, 300)], (1, 600, 300), np.dtype(np.uint8))

    def interrupted():
        with whole_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


def test_overlay():
    image = torch.linspace(0, 1, 40 * 50).reshape(1, 40, 50)
    mask = torch.zeros(40, 50, dtype=torch.int64)
    mask[:, 20:30], mask[:, 30:] = 1, 9
    shown = overlay(image, mask, opacity=1, limits=(0, 1))
    assert shown.shape == (3, 40, 50)
    assert shown.dtype == torch.uint8
    grey = (image * 255).round().to(torch.uint8).expand(3, -1, -1)
    assert torch.equal(shown[:, :, :20], grey[:, :, :20])
    assert shown[:, 0, 20].tolist() == [0xE6, 0x9F, 0]
    assert shown[:, 0, 30].tolist() == [0x56, 0xB4, 0xE9]  # of class 2: colours repeat after 7
    assert torch.equal(overlay(image, mask, 0, (0, 1)), grey)
    rgb = torch.rand(5, 40, 50)
    assert torch.equal(overlay(rgb, mask, 0, (0, 1)), (rgb[:3] * 255).round().to(torch.uint8))
    low, high = contrast(image * 30 - 7)
    assert -7 <= low < -6.9
    assert 22.9 < high <= 23
    assert overlay(torch.full((1, 4, 4), 0.5), torch.zeros(4, 4).long()).shape == (3, 4, 4)
    with pytest.raises(ValueError, match=r"must be \[C, H, W\] and \[H, W\], got \[1, 40, 50\]"):
        overlay(image, mask[1:])


def png(array, name="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, name, **options)
    return buffer.getvalue()


def tiff(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


GREY = integers(64, 64)
WRONG = {
    "empty.png": (b"", "cannot be read: the file is empty"),
    "text.png": (b"no picture", "cannot be read: cannot identify image file"),
    "truncated.png": (png(GREY)[:2000], "cannot be read: image file is truncated"),
    "truncated.jpg": (png(GREY, "JPEG")[:900], "cannot be read: image file is truncated"),
    "truncated.gif": (png(GREY, "GIF")[:2000], "cannot be read: image file is truncated"),
    "text.tif": (b"no picture", "cannot be read: not a TIFF file"),
    "truncated.tif": (tiff(GREY)[:2000], "cannot be read: "),
    "tiles.tif": (tiff(GREY, tile=(16, 16))[:2000], "cannot be read: it is truncated"),
    "stack.tif": (
        tiff(integers(2, 9, 8, 8), metadata={"axes": "CZYX"}),
        "cannot be read: it must be one image of channels, got {'C': 2, 'Z': 9, 'Y': 8, 'X': 8}",
    ),
    "text.npy": (b"no picture", "cannot be read: "),
    "truncated.npy": (npy(GREY)[:2000], "cannot be read: mmap length is greater than file size"),
    "no-pixels.npy": (npy(GREY[:0]), "must have pixels, got [1, 0, 64]"),
    "vector.npy": (
        npy(GREY[0]),
        "cannot be read: its shape must be [H, W], [C, H, W] or [H, W, C], got [64]",
    ),
    "four.npy": (npy(integers(2, 3, 4, 5)), "its shape must be"),
    "objects.npy": (npy(np.array([[{}]])), "cannot be read: "),
    "int64.npy": (
        npy(GREY.astype(np.int64)),
        "must be of 8- or 16-bit integers or of floating-point numbers, got int64",
    ),
    "complex.npy": (npy(GREY.astype(complex)), "or of floating-point numbers, got complex128"),
    "nan.npy": (npy(np.array([[1.0, np.nan]])), "must have finite float32 values, got NaN"),
    "huge.npy": (npy(np.array([[1.0, 1e300]])), "must have finite float32 values, got NaN or"),
    "inf.tif": (tiff(np.full((8, 8), np.inf, np.float32)), "must have finite float32 values"),
    "a.bmp": (b"BM", "cannot be read: its name must end in .png, .jpg, .jpeg, .gif, .tif, .tiff"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_said_of_a_wrong_image(tmp_path, name):
    content, message = WRONG[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_image(path)
    assert str(error.value).startswith(f"image '{path}' ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_said_of_a_wrong_mask(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(FileNotFoundError, match=r"image '.*a.png' is not a file"):
        read_image(path)
    with pytest.raises(FileNotFoundError, match=r"mask '.*' is not a file"):
        read_mask(tmp_path)
    path.write_bytes(png(integers(5, 5, 3)))
    with pytest.raises(ValueError, match=r"mask '.*a.png' must have one channel, got 3"):
        read_mask(path)
    np.save(tmp_path / "a.npy", np.ones((5, 5)))
    with pytest.raises(ValueError, match=r"mask '.*a.npy' must be of integers, got float64"):
        read_mask(tmp_path / "a.npy")
    mask = torch.ones(5, 5, dtype=torch.int64)
    for wrong, message in (
        (mask.float(), r"a mask must be \[H, W\] of integers, got \[5, 5\] float32"),
        (mask[None], r"of integers, got \[1, 5, 5\] int64"),
        (mask[:0], r"of integers, got \[0, 5\] int64"),
        (mask * 65536, r"a mask's values must be in 0..65535, got 65536"),
        (-mask, r"a mask's values must be in 0..65535, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            write_mask(tmp_path / "b.png", wrong)
    with pytest.raises(ValueError, match=r"name must end in .png, .tif or .tiff, got '.*b.jpg'"):
        write_mask(tmp_path / "b.jpg", mask)
    with pytest.raises(FileNotFoundError):
        write_mask(tmp_path / "none" / "b.png", mask)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "a.png"]


def damaged(rng, content):
    """Bytes cut off, overwritten, or put in."""
    content = bytearray(content)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(content[: rng.randrange(len(content))])
    if kind == 1:
        return rng.randbytes(rng.randrange(400))
    reach = len(content) if kind == 2 else min(len(content), 300)  # all, or the header
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(reach)
        width = rng.choice((1, 2, 4))
        value = rng.choice((rng.randbytes(width), bytes(width), b"\xff" * width))
        content[place : place + width] = value
    return bytes(content)


VALID = {
    ".png": [png(GREY), png(integers(20, 30, 3)), png(integers(9, 9, dtype=np.uint16))],
    ".jpg": [png(GREY, "JPEG"), png(integers(20, 30, 3), "JPEG", quality=90)],
    ".gif": [png(GREY, "GIF"), png(integers(20, 30, 3), "GIF")],
    ".tif": [
        tiff(GREY),
        tiff(GREY, tile=(16, 16), compression="zlib"),
        tiff(integers(20, 30, 3), rowsperstrip=6, compression="lzw"),
        tiff(integers(40, 40, 3), tile=(16, 16), compression="jpeg"),
        tiff(integers(4, 20, 30, dtype=np.uint16), photometric="minisblack"),
    ],
    ".npy": [npy(GREY), npy(np.float32(integers(3, 9, 9)))],
}


@pytest.mark.filterwarnings("ignore")  # the decoders' own
@pytest.mark.parametrize("suffix", VALID)
def test_damaged_files_are_read_or_refused(tmp_path, suffix):
    """300 each: a ValueError of one sentence with the path, or an image that can be one."""
    rng = chance.Random(suffix)
    outcomes = set()
    for number in range(300):
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(damaged(rng, rng.choice(VALID[suffix])))
        for read, what in ((read_image, "image"), (read_mask, "mask")):
            found = outcome(read, path)
            outcomes.add(type(found))
            if isinstance(found, str):
                assert found.startswith(f"{what} '{path}' ")
                assert "\n" not in found
            else:
                assert found.numel() > 0
                assert found.dtype == (torch.float32 if what == "image" else torch.int64)
    assert outcomes == {str, torch.Tensor}


def outcome(read, path):
    try:
        return read(path)
    except ValueError as error:
        return str(error)


def test_a_header_cannot_ask_for_any_memory(tmp_path):
    """A width of 2**30 in a file of some hundred bytes."""
    content = bytearray(tiff(integers(16, 16), compression="zlib", byteorder="<"))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        places = [file.pages[0].tags[tag].valueoffset for tag in ("ImageWidth", "ImageLength")]
    for place in places:
        changed = bytearray(content)
        changed[place - 6 : place + 4] = struct.pack("<HII", 4, 1, 2**30)
        path = tmp_path / "a.tif"
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"cannot be read: (\d+ bytes cannot hold|it must)"):
            read_image(path)
