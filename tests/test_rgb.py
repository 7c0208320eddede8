"""rgb: what a picture's numbers mean is decided in one place, for every mode and format; photographs stand upright
beside their masks."""
import io
import re
import struct
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms
from segmenting_fixtures import opened, small
from test_masks import folder as mask_folder
from training_fixtures import one_thread, tiny, write_folder  # noqa: F401

import vitlab
from vitlab.data import Shuffled, open_data
from vitlab.data.folder import read_image
from vitlab.data.masks import open_scenes
from vitlab.data.rgb import grey, rgb
from vitlab.runtime.config import RunConfig
from vitlab.runtime.files import InputError
from vitlab.workbench.explore.choosing import decode
from vitlab.workbench.pictures import as_input, sample_pictures
from vitlab.workbench.segmenting import predict

HEIGHT, WIDTH = 11, 13


def levels(low: int = 45, high: int = 255) -> np.ndarray:
    """(11, 13) uint8, every level from low to high about equally often."""
    return np.linspace(low, high, HEIGHT * WIDTH).round().astype(np.uint8).reshape(HEIGHT, WIDTH)


def saved(image: Image.Image, format: str, **options) -> Image.Image:
    """The image from a file of that format."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return read_image(io.BytesIO(buffer.getvalue()))


def of_values(values: np.ndarray, format: str = "TIFF") -> Image.Image:
    return saved(Image.fromarray(values), format)


def pgm(values: np.ndarray, largest: int) -> Image.Image:
    header = f"P5 {WIDTH} {HEIGHT} {largest}\n".encode()
    return read_image(io.BytesIO(header + values.astype(">u2").tobytes()))


def tiff_12(values: np.ndarray) -> Image.Image:
    """A TIFF of one row of 12-bit values, an even number of them."""
    a, b = values[0::2].astype(int), values[1::2].astype(int)
    data = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], axis=1).astype(np.uint8).tobytes()
    tags = {256: len(values), 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(data)}
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag,
                                                        value in tags.items())
    padding = bytes(len(data) % 2)
    return read_image(io.BytesIO(b"II*\0" + struct.pack("<I", 8 + len(data) + len(padding)) + data + padding + directory
                                 + bytes(4)))


WIDE = {"16 bits": lambda v: of_values(v.astype(np.uint16) * 257, "PNG"),
        "16 bits, TIFF of the other byte order": lambda v: of_values((v.astype(np.uint16) * 257).astype(">u2")),
        "16 bits, the upper byte alone": lambda v: of_values(v.astype(np.uint16) * 256, "PNG"),
        "12 bits in 16": lambda v: of_values((v * (4095 / 255)).round().astype(np.uint16), "PNG"),
        "8 bits in 16": lambda v: of_values(v.astype(np.uint16), "PNG"),
        "12-bit PGM": lambda v: pgm((v * (4095 / 255)).round(), 4095),
        "JPEG 2000 of 16 bits": lambda v: of_values(v.astype(np.uint16) * 257, "JPEG2000"),
        "32-bit integers": lambda v: of_values((v * ((2**31 - 1) / 255)).round().astype(np.int32)),
        "32-bit integers that hold 16": lambda v: of_values(v.astype(np.int32) * 257),
        "floats to 1": lambda v: of_values(v.astype(np.float32) / 255),
        "floats to 255": lambda v: of_values(v.astype(np.float32)),
        "floats that overshoot": lambda v: of_values(v.astype(np.float32) / 250)}


@pytest.mark.parametrize("kind", WIDE)
def test_grey_of_any_depth_is_the_picture_that_it_is_in_8_bits(kind):
    """Black to white, mean 150."""
    wanted = levels()
    image = WIDE[kind](wanted)
    factor = 255 / 250 if "overshoot" in kind else 1
    found = np.asarray(rgb(image)).astype(int)
    assert found.shape == (HEIGHT, WIDTH, 3) and (found == found[..., :1]).all()
    # one level: values are rounded once in the file and once here
    assert np.abs(found[..., 0] - (wanted * factor).clip(0, 255)).max() <= 1
    assert abs(found.mean() - wanted.mean() * factor) < 1.5


def test_unsigned_integers_of_32_bits_are_not_read_as_negative():
    values = np.linspace(0, 2**32 - 1, HEIGHT * WIDTH).astype(np.uint32).reshape(HEIGHT, WIDTH)
    image = of_values(values.view(np.int32))
    image.tag_v2[339] = 1                                   # SampleFormat: unsigned, the default
    image.tag_v2[258] = (32,)
    assert np.abs(np.asarray(rgb(image))[..., 0] - values / (2**32 - 1) * 255).max() < 1


def test_a_dark_picture_keeps_its_darkness_where_the_file_says_its_full_scale():
    dark = np.arange(0, 200, 2)                             # of 4,095: by the values alone it might be one of 8 bits
    image = tiff_12(dark)
    assert np.array_equal(np.asarray(rgb(image))[0, :, 0], (dark * 255 / 4095).round())
    values = np.resize(dark, (HEIGHT, WIDTH))
    found = np.asarray(rgb(pgm(values, 65535)))[..., 0]
    assert np.array_equal(found, (values * 255 / 65535).round())


def test_where_0_is_white_a_picture_is_turned_round():
    image = of_values(np.full((HEIGHT, WIDTH), 65535, dtype=np.uint16))
    image.load()
    image.tag_v2[262] = 0
    assert np.asarray(rgb(image)).max() == 0


def test_digits_as_16_bit_grey_png_are_the_digits(tmp_path):
    images = open_data("digits").split("train", 7)
    for i in range(len(images)):
        image, _ = images.image(i)
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257).save(path)
        assert np.array_equal(np.asarray(rgb(read_image(path))), np.asarray(image))


@pytest.mark.parametrize("values",
                         [np.full((3, 5), np.nan), np.array([[0.5, np.inf]]), np.linspace(-1, 1, 15).reshape(3, 5)])
def test_floats_that_are_no_picture_are_broken_images_and_named(tmp_path, values):
    write_folder(tmp_path, {"val": 1})
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "val" / "ant" / "bad.tif")
    batches = open_data(tmp_path).batches("val", tiny(), workers=0)
    with pytest.warns(UserWarning, match="bad.tif: can't be read as an image"):
        assert sum(len(y) for _, y in batches) == 3


# ---------------------------------------------------------------- colours and what is transparent

def clear_half(hidden: int, seen: int = 140) -> Image.Image:
    """RGBA: the left 5 columns opaque, the others clear over a colour that nobody sees."""
    pixels = np.full((HEIGHT, WIDTH, 4), seen, dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[:, 5:] = (hidden, hidden, hidden, 0)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("hidden", [0, 70, 255])
@pytest.mark.parametrize("kind",
                         ["RGBA", "LA", "premultiplied", "palette", "grey with a clear level", "16-bit grey with a "
                                                                                               "clear level"])
def test_what_is_transparent_is_white_whatever_lies_under_it(kind, hidden):
    image = clear_half(hidden)
    level = np.asarray(image)[..., 0]
    image = {"RGBA": lambda: saved(image, "PNG"), "LA": lambda: saved(image.convert("LA"), "PNG"),
             "premultiplied": lambda: image.convert("RGBa"),
             "palette": lambda: saved(Image.fromarray(level).convert("P"), "PNG", transparency=hidden),
             "grey with a clear level": lambda: saved(Image.fromarray(level), "PNG", transparency=hidden),
             "16-bit grey with a clear level": lambda: saved(Image.fromarray(level.astype(np.uint16) * 257), "PNG",
                                                             transparency=hidden * 257)}[kind]()
    if "16-bit" in kind and hidden == 255:
        level = np.where(level == 140, 140, 255)
    found = np.asarray(rgb(image))
    assert (found[:, :5] == 140).all() and (found[:, 5:] == 255).all()


def test_what_is_half_transparent_is_half_white():
    # 0.2 of it, 0.8 of white
    assert rgb(Image.new("RGBA", (3, 5), (51, 0, 255, 51))).getpixel((0, 0)) == (214, 204, 255)


@pytest.mark.parametrize("kind", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB", "GIF"])
def test_modes_that_pillow_knows_the_colours_of_are_converted_by_it(kind):
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    colour = Image.fromarray(pixels)
    if kind == "LAB":
        to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        image = ImageCms.applyTransform(colour, to_lab)
    else:
        image = saved(colour, "GIF") if kind == "GIF" else colour.convert(kind)
    assert np.array_equal(np.asarray(rgb(image)), np.asarray(image.convert("RGB")))


# ---------------------------------------------------------------- the right way up

def photograph() -> np.ndarray:
    """(11, 13, 3) upright, no two pixels alike."""
    return np.random.default_rng(1).permutation(HEIGHT * WIDTH * 3).reshape(HEIGHT, WIDTH, 3).astype(np.uint8)


def stored(shown: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels that a camera stores for the picture `shown`, from the EXIF standard: where row 0 and column 0 of the
    file are seen."""
    rows_first, down, right = {1: (True, 1, 1), 2: (True, 1, -1), 3: (True, -1, -1), 4: (True, -1, 1), 5: (False, 1, 1),
                               6: (False, 1, -1), 7: (False, -1, -1), 8: (False, -1, 1)}[orientation]
    # row 0 is the visual top (down 1) or bottom, column 0 the left (right 1) or right side; or, from 5 on, the other
    # way about
    pixels = shown[::down, ::right]
    return np.ascontiguousarray(pixels if rows_first else np.swapaxes(pixels, 0, 1))


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def write(path: Path, pixels: np.ndarray, orientation: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({} if orientation is None else {"exif": exif_of(orientation)}))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_upright_by_its_exif_orientation_and_is_not_turned_twice(format, orientation):
    options = {"exif": exif_of(orientation)} | ({"lossless": True} if format == "WEBP" else {})
    given = saved(Image.fromarray(stored(photograph(), orientation)), format, **options)
    given.load()
    before = dict(given.info)
    once = rgb(given)
    assert given.info == before
    assert np.array_equal(np.asarray(once), photograph())
    assert np.array_equal(np.asarray(rgb(once)), photograph())


def test_wide_grey_stands_upright_too():
    shown = photograph()[..., 0].astype(np.uint16) * 257
    image = saved(Image.fromarray(stored(shown, 6)), "PNG", exif=exif_of(6))
    assert np.array_equal(np.asarray(rgb(image))[..., 0], photograph()[..., 0])


@pytest.mark.parametrize("exif",
                         [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\xff\xff", exif_of(0).tobytes(),
                          exif_of(99).tobytes()])
def test_exif_that_says_nothing_leaves_the_picture_as_it_is(exif):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # Pillow says that it is damaged
        assert np.array_equal(np.asarray(rgb(saved(Image.fromarray(photograph()), "PNG", exif=exif))), photograph())


def test_a_folder_gives_its_photographs_upright(tmp_path):
    write(tmp_path / "photo.png", stored(photograph(), 6), 6)
    image, _ = open_data(tmp_path).split("train").image(0)
    assert np.array_equal(np.asarray(image), photograph())


@pytest.mark.parametrize("drawn", ["as shown", "as stored", "with a tag of its own"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_photograph_and_its_mask_are_the_same_way_up(tmp_path, orientation, drawn):
    """The mask is 1 where the photograph's red is above the middle."""
    shown = photograph()
    truth = (shown[..., 0] > 127).astype(np.uint8)
    mask_folder(tmp_path, [0])
    (tmp_path / "train" / "images" / "a.jpg").unlink()
    write(tmp_path / "train" / "images" / "a.png", stored(shown, orientation), orientation)
    mask = truth if drawn == "as shown" else stored(truth, orientation)
    write(tmp_path / "train" / "masks" / "a.png", mask, orientation if "tag" in drawn else None)
    image, found = open_scenes(tmp_path).split("train").scene(0)
    assert np.array_equal(np.asarray(image), shown) and np.array_equal(found, truth)
    torch.from_numpy(found)                                 # writable, as transforms need it


@pytest.mark.parametrize("own", [None, 6])
def test_the_mask_of_a_square_photograph_is_as_it_is_shown_unless_it_has_a_tag(tmp_path, own):
    shown = photograph()[:, :HEIGHT]
    truth = (shown[..., 0] > 127).astype(np.uint8)
    mask_folder(tmp_path, [0])
    (tmp_path / "train" / "images" / "a.jpg").unlink()
    write(tmp_path / "train" / "images" / "a.png", stored(shown, 6), 6)
    write(tmp_path / "train" / "masks" / "a.png", truth if own is None else stored(truth, 6), own)
    image, found = open_scenes(tmp_path).split("train").scene(0)
    assert np.array_equal(np.asarray(image), shown) and np.array_equal(found, truth)


@pytest.mark.parametrize("drawn", ["as shown", "as stored"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_the_mask_of_a_photograph_of_one_size_either_way_is_as_those_whose_size_tells(tmp_path, orientation, drawn):
    mask_folder(tmp_path, [0])
    for old in (tmp_path / "train" / "images").iterdir():
        old.unlink()
    for name, shown, turned in (("a", photograph()[:, :HEIGHT], orientation), ("b", photograph(), 8)):
        truth = (shown[..., 0] > 127).astype(np.uint8)
        write(tmp_path / "train" / "images" / f"{name}.png", stored(shown, turned), turned)
        write(tmp_path / "train" / "masks" / f"{name}.png", truth if drawn == "as shown" else stored(truth, turned))
    for i, shown in enumerate((photograph()[:, :HEIGHT], photograph())):
        image, found = open_scenes(tmp_path).split("train").scene(i)
        assert np.array_equal(np.asarray(image), shown) and np.array_equal(found, shown[..., 0] > 127)


def test_a_hugging_face_data_set_and_a_tar_give_their_photographs_upright(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed (pip install "
                                                      "vitlab[streams])")
    write(tmp_path / "train" / "a" / "photo.png", stored(photograph(), 6), 6)
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(tmp_path / "train", arcname=".")
    rows = {"image": [{"bytes": (tmp_path / "train" / "a" / "photo.png").read_bytes(), "path": None}]}
    datasets.Dataset.from_dict(rows,
                               features=datasets.Features({"image": datasets.Image()})).save_to_disk(tmp_path / "hf")
    for place in (tmp_path / "train.tar", f"hfds/{tmp_path}/hf"):
        assert np.array_equal(np.asarray(open_data(place).split("train").image(0)[0]), photograph())


def test_a_mask_of_neither_size_is_refused_by_name(tmp_path):
    mask_folder(tmp_path, [0])
    (tmp_path / "train" / "images" / "a.jpg").unlink()
    write(tmp_path / "train" / "images" / "a.png", stored(photograph(), 6), 6)
    write(tmp_path / "train" / "masks" / "a.png", np.zeros((HEIGHT, WIDTH + 1), dtype=np.uint8))
    with pytest.raises(InputError, match=r"a.png: is 11 x 14, its image .*a.png is 11 x 13"):
        open_scenes(tmp_path).split("train").scene(0)


# ---------------------------------------------------------------- one place, and none passed over

@pytest.mark.parametrize("suffix", [".bmp", ".gif", ".tif", ".webp", ".PPM"])
def test_a_folder_passes_over_no_image_for_its_suffix_and_over_hidden_files(tmp_path, suffix):
    write_folder(tmp_path, {"val": 1})
    Image.new("RGB", (32, 32), (77,) * 3).save(tmp_path / "val" / "bee" / f"more{suffix}")
    (tmp_path / "val" / "bee" / "._0.png").write_bytes(b"what another system leaves beside a file")
    data = open_data(tmp_path)
    assert len(data.split("val")) == 4
    (x, y), = data.batches("val", tiny(), workers=0)
    assert y.tolist() == [0, 1, 1, 2] and abs(float(x[2].mean() * 0.5 + 0.5) * 255 - 77) < 0.5


def test_nothing_else_in_the_package_makes_rgb_of_a_file():
    root = Path(vitlab.__file__).parent
    found = {str(path.relative_to(root)) for path in root.rglob("*.py")
             if re.search(r'convert\("RGB"\)|exif_transpose', path.read_text())}
    assert found == {"data/rgb.py", "data/digits.py"}       # the digits are arrays


def test_predictions_and_explorers_see_the_pictures_that_a_folder_gives(tmp_path):
    """A photograph on its side and one of 16 bits, beside the same as plain PNGs."""
    shown = np.random.default_rng(2).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    level = np.linspace(0, 90, 24 * 40).reshape(24, 40).astype(np.uint8)
    write(tmp_path / "photos" / "side.png", stored(shown, 8), 8)
    write(tmp_path / "photos" / "wide.png", level.astype(np.uint16) * 257)
    write(tmp_path / "plain" / "side.png", shown)
    write(tmp_path / "plain" / "wide.png", level)
    for name in ("photos", "plain"):
        predict(opened(small()), tmp_path / name, tmp_path / f"{name} out", config=RunConfig(device="cpu", quiet=True))
    for name in ("side.png", "side_classes.png", "wide.png", "wide_classes.png"):
        assert np.array_equal(*(np.asarray(Image.open(tmp_path / f"{folder} out" / name))
                                for folder in ("photos", "plain")))
    assert Image.open(tmp_path / "photos out" / "side.png").size == (40, 24)
    shape = vitlab.shape_of(tiny())
    for name in ("side.png", "wide.png"):
        assert np.array_equal(*(decode(name, (tmp_path / folder / name).read_bytes(), shape)
                                for folder in ("photos", "plain")))


def test_a_stream_gives_the_pictures_that_the_folder_gives(tmp_path):
    pytest.importorskip("webdataset", reason="webdataset is not installed (pip install vitlab[streams])")
    files, shards = [tmp_path / "folder" / f"{i}.png" for i in range(3)], tmp_path / "shards"
    write(files[0], levels(0, 90).astype(np.uint16) * 257)
    write(files[1], stored(photograph(), 6), 6)
    write(files[2], np.asarray(clear_half(0)))
    shards.mkdir()
    with tarfile.open(shards / "s-0.tar", "w") as tar:
        for i, file in enumerate(files):
            for suffix, content in (("png", file.read_bytes()), ("cls", b"0")):
                entry = tarfile.TarInfo(f"{i}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    (shards / "_info.json").write_text('{"splits": {"validation": {"name": "validation", "num_samples": 3, '
                                       '"filenames": ["s-0.tar"], '
                                       '"shard_lengths": [3]}}}')
    (streamed, _), = open_data(f"wds/{shards}").batches("held_out", tiny(), batch_size=3, workers=0)
    (wanted, _), = open_data(tmp_path / "folder").batches("train", tiny(), batch_size=3, workers=0)
    torch.testing.assert_close(streamed, wanted, rtol=0, atol=0)


# ---------------------------------------------------------------- models of other channels

def test_a_model_of_one_channel_takes_grey_images_with_the_mean_of_the_means(tmp_path):
    model = tiny(in_chans=1)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.6)}
    shown = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    write(tmp_path / "a.png", shown)
    (x, _), = open_data(tmp_path).batches("train", model, workers=0)
    luma = (shown @ [0.299, 0.587, 0.114]).round()                                  # ITU-R 601
    assert x.shape == (1, 1, 32, 32)
    # a level of rounding
    assert np.abs((x[0, 0].numpy() * 0.3 + 0.5) * 255 - luma).max() <= 1.01
    assert grey(Image.fromarray(shown)).mode == "L"
    batches = open_data(tmp_path).batches("train", model, workers=0, training=Shuffled(augment={
        "color_jitter": 0.4, "re_prob": 1.0, "auto_augment": "rand-m9-mstd0.5-inc1"}))
    assert next(iter(batches))[0].shape == (1, 1, 32, 32)
    assert as_input(sample_pictures(open_data(tmp_path), vitlab.shape_of(model))["data"], model).shape == (1, 1, 32, 32)


def test_a_model_of_other_channels_is_refused_before_an_image_is_read():
    with pytest.raises(InputError, match=r"images of 4 channels; 3 \(colour\) or 1 \(grey\)"):
        open_data("digits").batches("train", tiny(num_classes=10, in_chans=4), workers=0)
