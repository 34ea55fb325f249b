# SPDX-License-Identifier: Apache-2.0
"""Images of every kind become the original tiles, or are refused by name."""

import base64
import functools
import http.server
import io
import json
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch.nn import functional as F

from encdec_slm.configuration_encdec_vlm import grid_shape
from encdec_slm.image_processing_encdec_vlm import MAX_IMAGE_PIXELS, EncDecVLMImageProcessor, load_image


GOLDEN = Path(__file__).parent / "golden"
TILING = json.loads((GOLDEN / "tiling_golden.json").read_text(encoding="utf-8"))
CASES = [(name, case) for name in ("shipped", "tiny") for case in TILING[name]["cases"]]
PROCESSORS = {"shipped": EncDecVLMImageProcessor(), "tiny": EncDecVLMImageProcessor(size=28, patch_size=7)}
RED, WHITE = (255, 0, 0), (255, 255, 255)


@pytest.fixture
def processor():
    """Tiles of 28 pixels in 4 x 4 patches."""
    return EncDecVLMImageProcessor(size=28, patch_size=7)


@pytest.fixture
def picture():
    """A picture of 23 x 17 pixels in which every pixel differs."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (17, 23, 3), dtype=np.uint8))


def as_file(image, file_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def flat_color(processor, image):
    """The one color, in 8 bits, that all of `image` came out as."""
    pixels = processor(image, do_normalize=False, do_rescale=False, return_tensors="pt").pixel_values
    color = pixels[0, :, 0, 0]
    assert (pixels[0] == color[:, None, None]).all()
    return tuple(color.tolist())


def false_bitmap():
    """A BMP file whose header claims 999 rows instead of 9."""
    file = as_file(Image.new("L", (9, 9)), "BMP")
    return file[:22] + struct.pack("<I", 999) + file[26:]


def png(width, height):
    """A PNG file whose header claims `width` x `height` grey pixels, of which it has none."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def features_by_definition(width, height, pinpoints_wh, tile, side, max_num_tiles=3):
    """How many features a model makes, found by cutting and resizing a tensor."""

    def fit(pinpoint):
        scale = min(pinpoint[0] / width, pinpoint[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - pinpoint[0] * pinpoint[1]

    best = max(pinpoints_wh, key=fit)
    grid = torch.zeros(1, 1, best[1] // tile * side, best[0] // tile * side)
    rows, columns = grid.shape[2:]
    if width / height > columns / rows:
        padding = (rows - int(height * (columns / width))) // 2
        grid = grid[:, :, padding : rows - padding]
    else:
        padding = (columns - int(width * (rows / height))) // 2
        grid = grid[:, :, :, padding : columns - padding]
    rows, columns = grid.shape[2:]
    times = (rows * columns / (max_num_tiles * side**2)) ** 0.5
    if times > 1.1:
        grid = F.interpolate(grid, [int(rows // times), int(columns // times)], mode="bilinear")
    return side**2 + F.pad(grid, (0, 1)).numel()


@pytest.mark.parametrize("name", ["landscape", "portrait", "small"])
def test_pixel_values_are_the_original_ones(processor, name):
    tensors = load_file(GOLDEN / "vision_tiny.cases.safetensors")
    pixels = tensors[f"image.{name}.uint8_hwc"]
    output = processor(Image.fromarray(pixels.numpy()), return_tensors="pt")
    torch.testing.assert_close(output.pixel_values, tensors[f"image.{name}.pixel_values"], rtol=0, atol=1e-6)
    assert output.image_sizes.tolist() == [list(pixels.shape[:2])]
    assert output.image_sizes.dtype == torch.int64


@pytest.mark.parametrize(("name", "case"), CASES)
def test_tokens_and_tiles_are_the_original_ones(name, case):
    width, height = case["size_wh"]
    assert PROCESSORS[name].num_image_tokens(height, width) == case["image_tokens"]
    assert PROCESSORS[name].get_number_of_image_patches(height, width) == case["n_tiles_with_base"]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_grid_holds_the_image_where_the_original_put_it(name, case):
    processor, (columns, rows) = PROCESSORS[name], case["grid_wh"]
    white = Image.new("RGB", tuple(case["size_wh"]), WHITE)
    tiles = processor(white, do_normalize=False, do_rescale=False).pixel_values
    assert (tiles[0] == 255).all()
    tile = tiles.shape[-1]
    grid = tiles[1:, 0].reshape(rows, columns, tile, tile).swapaxes(1, 2).reshape(rows * tile, columns * tile)
    (left, top), (width, height) = case["paste_xy"], case["resized_wh"]
    assert (grid[top : top + height, left : left + width] == 255).all()
    assert grid.sum() == 255 * width * height


def test_tokens_of_500_random_sizes_are_the_features():
    generator = np.random.default_rng(1)
    for index in range(500):
        # Every aspect ratio as often as its inverse, from one pixel to thousands.
        width, height = (int(side) for side in np.exp(generator.uniform(0, np.log(9000), 2)))
        for name, processor in PROCESSORS.items():
            golden = TILING[name]
            expected = features_by_definition(
                width, height, golden["pinpoints"], golden["tile"], golden["patches_per_side"]
            )
            assert processor.num_image_tokens(height, width) == expected, (index, name, width, height)


def test_a_model_without_newlines_has_a_token_less_per_row(processor):
    plain = EncDecVLMImageProcessor(size=28, patch_size=7, image_newline=False)
    assert processor.num_image_tokens(45, 60) - plain.num_image_tokens(45, 60) == 6
    wide = EncDecVLMImageProcessor(size=28, patch_size=7, max_num_tiles=6)
    assert wide.num_image_tokens(45, 60) == 16 + 8 * 11


def test_no_image_leaves_its_grid(processor):
    for size in [(1, 1), (1, 2000), (2000, 1), (8000, 50), (29, 28)]:
        output = processor(Image.new("RGB", size), return_tensors="pt")
        rows, columns = grid_shape((size[1], size[0]), processor.image_grid_pinpoints, 28)
        assert output.pixel_values.shape == (1 + rows * columns, 3, 28, 28)
        assert output.pixel_values.isfinite().all()
    assert processor.get_number_of_image_patches(1, 1) == 2


def test_images_stand_one_after_another_without_padding(processor, picture):
    small = Image.new("RGB", (5, 5), RED)
    both = processor([[picture], [small]], return_tensors="pt")
    one, other = (processor(image, return_tensors="pt") for image in (picture, small))
    assert torch.equal(both.pixel_values, torch.cat([one.pixel_values, other.pixel_values]))
    assert both.image_sizes.tolist() == [[17, 23], [5, 5]]


@pytest.fixture
def url_of(tmp_path):
    """Serve `tmp_path` on localhost; returns a function from a file name to its URL."""
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield lambda name: f"http://127.0.0.1:{server.server_port}/{name}"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_a_url_is_read_like_a_file(processor, tmp_path, url_of):
    Image.new("RGBA", (6, 4), (*RED, 0)).save(tmp_path / "transparent.png")
    assert flat_color(processor, url_of("transparent.png")) == WHITE
    with pytest.raises(ValueError, match=r"Image 0 .*missing.png.* 404"):
        processor(url_of("missing.png"))


def test_every_kind_of_input_gives_the_same(processor, picture, tmp_path):
    path = tmp_path / "picture.png"
    picture.save(path)
    array, file = np.asarray(picture), path.read_bytes()
    encoded = base64.b64encode(file).decode()
    kinds = {
        **{"path": path, "string": str(path), "bytes": file, "bytearray": bytearray(file), "base64": encoded},
        **{"data URL": f"data:image/png;base64,{encoded}", "lazy": Image.open(io.BytesIO(file))},
        **{"HWC": array, "CHW": array.transpose(2, 0, 1), "batch": array[None], "float": array / 255},
        **{"float32": (array / 255).astype(np.float32), "int64": array.astype(np.int64)},
        **{"tensor": torch.tensor(array).permute(2, 0, 1), "16 bits": array.astype(np.uint16) << 8},
        **{"unit tensor": torch.tensor(array / 255, requires_grad=True), "list": [picture], "tuple": (picture,)},
        **{"undecoded cell": {"bytes": file, "path": None}, "cell of a path": {"bytes": None, "path": str(path)}},
    }
    expected = processor(picture, return_tensors="pt")
    for kind, image in kinds.items():
        if not isinstance(image, (list, tuple)) and kind != "batch":
            assert np.array_equal(load_image(image), array), kind
        output = processor(image, return_tensors="pt")
        assert output.image_sizes.tolist() == [[17, 23]], kind
        assert torch.equal(output.pixel_values, expected.pixel_values), kind


def test_ambiguous_arrays_follow_the_habits_of_their_library(processor):
    array = np.zeros((3, 9, 3), dtype=np.uint8)
    assert processor(array).image_sizes.tolist() == [[3, 9]]
    assert processor(torch.tensor(array)).image_sizes.tolist() == [[9, 3]]
    assert processor(array, input_data_format="channels_first").image_sizes.tolist() == [[9, 3]]
    assert processor(np.zeros((1, 1, 3), dtype=np.uint8)).image_sizes.tolist() == [[1, 1]]
    assert processor(np.zeros((3, 5), dtype=np.uint8)).image_sizes.tolist() == [[3, 5]]
    assert processor(np.zeros((4, 6, 1), dtype=np.uint8)).image_sizes.tolist() == [[4, 6]]
    assert processor(torch.zeros(1, 4, 3)).image_sizes.tolist() == [[4, 3]]


def palette_image(**options):
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 255, *RED])
    return Image.open(io.BytesIO(as_file(image, **options)))


def deep(values, file_format="PNG", **options):
    return Image.open(io.BytesIO(as_file(Image.fromarray(values), file_format, **options)))


GREYS = {
    "one bit": (Image.new("1", (6, 4), 1), 255),
    "grey": (Image.new("L", (6, 4), 77), 77),
    "16-bit PNG": (deep(np.full((4, 6), 77 * 257, dtype=np.uint16)), 77),
    "16-bit TIFF": (deep(np.full((4, 6), 77 * 256, dtype=np.uint16), "TIFF"), 77),
    "16-bit big-endian": (Image.frombytes("I;16B", (6, 4), bytes([77, 0] * 24)), 77),
    "dark 16-bit big-endian": (Image.frombytes("I;16B", (6, 4), bytes([0, 200] * 24)), 0),
    "dark 16-bit": (deep(np.full((4, 6), 200, dtype=np.uint16)), 0),
    "16 of 32 bits": (Image.fromarray(np.full((4, 6), 77 * 256, dtype=np.int32)), 77),
    "8 of 32 bits": (Image.new("I", (6, 4), 77), 77),
    "31 of 32 bits": (Image.fromarray(np.full((4, 6), 77 << 23, dtype=np.int32)), 77),
    "32-bit array": (np.full((4, 6), 200 << 24, dtype=np.uint32), 200),
    "floats of 8 bits": (Image.new("L", (6, 4), 77).convert("F"), 77),
    "floats of a unit": (Image.new("F", (6, 4), 77 / 255), 77),
    "floats between two levels": (np.full((4, 6), 76.7 / 255), 77),
    "booleans": (np.ones((4, 6), dtype=bool), 255),
    "transparent 16-bit": (deep(np.full((4, 6), 77 * 257, dtype=np.uint16), transparency=77 * 257), 255),
    "transparent grey": (Image.new("LA", (6, 4), (77, 0)), 255),
    "transparent palette": (Image.new("RGBA", (6, 4), (9, 9, 9, 0)).quantize(4), 255),
    "LAB grey": (Image.new("LAB", (6, 4), (84, 128, 128)), 77),
    "premultiplied grey": (Image.new("LA", (6, 4), (77, 255)).convert("La"), 77),
    "half transparent black": (Image.new("RGBA", (6, 4), (0, 0, 0, 128)), 127),
    "half transparent array": (np.full((4, 6, 4), [0, 0, 0, 128], dtype=np.uint8), 127),
    "CMYK grey": (Image.new("CMYK", (6, 4), (0, 0, 0, 178)), 77),
    "CMYK JPEG": (Image.open(io.BytesIO(as_file(Image.new("CMYK", (6, 4), (0, 0, 0, 178)), "JPEG"))), 77),
}
REDS = {
    "palette": palette_image(),
    "animation": palette_image(file_format="GIF"),
    "CMYK": Image.new("CMYK", (6, 4), (0, 255, 255, 0)),
    "RGBA": Image.new("RGBA", (6, 4), (*RED, 255)),
    "RGBX": Image.new("RGBX", (6, 4), RED),
    "premultiplied": Image.new("RGBA", (6, 4), (*RED, 255)).convert("RGBa"),
    "HSV": Image.new("RGB", (6, 4), RED).convert("HSV"),
    "WEBP": Image.open(io.BytesIO(as_file(Image.new("RGB", (6, 4), RED), "WEBP", lossless=True))),
}


@pytest.mark.parametrize("name", GREYS)
def test_grey_and_deep_images_keep_their_brightness(processor, name):
    image, level = GREYS[name]
    assert flat_color(processor, image) == (level,) * 3


@pytest.mark.parametrize("name", REDS)
def test_color_modes_keep_their_color(processor, name):
    assert flat_color(processor, REDS[name]) == RED


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_transparent_entries_of_a_palette_are_white(processor, transparency):
    assert flat_color(processor, palette_image(transparency=transparency)) == WHITE


def test_a_transparent_color_of_an_rgb_file_is_white(processor):
    file = as_file(Image.new("RGB", (6, 4), RED), transparency=RED)
    assert flat_color(processor, file) == WHITE


def test_resizing_happens_in_colors_and_not_in_palette_indices(processor, picture):
    indexed = picture.quantize(16)
    expected = processor(indexed.convert("RGB")).pixel_values
    np.testing.assert_array_equal(processor(indexed).pixel_values, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(processor, picture, orientation, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    file = as_file(picture, file_format, exif=exif, **options)
    steps = {
        **{1: [], 2: [ImageOps.mirror], 3: [ImageOps.mirror, ImageOps.flip], 4: [ImageOps.flip]},
        **{5: ["turn", ImageOps.mirror], 6: ["turn"], 7: ["turn", ImageOps.flip]},
        8: ["turn", ImageOps.mirror, ImageOps.flip],
    }
    upright = picture
    for step in steps[orientation]:
        upright = upright.transpose(Image.Transpose.ROTATE_270) if step == "turn" else step(upright)
    expected = processor(upright)
    for image in (file, Image.open(io.BytesIO(file)), processor.fetch_images(file)):
        output = processor(image)
        assert output.image_sizes.tolist() == [[upright.height, upright.width]]
        np.testing.assert_array_equal(output.pixel_values, expected.pixel_values)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01", b"Exif\0\0nothing", b"\xff" * 9])
def test_damaged_metadata_are_no_reason_to_refuse_an_image(processor, picture, exif):
    expected = processor(as_file(picture, "JPEG"))
    for image in (as_file(picture, "JPEG", exif=exif), Image.open(io.BytesIO(as_file(picture, "JPEG", exif=exif)))):
        np.testing.assert_array_equal(processor(image).pixel_values, expected.pixel_values)


def test_the_callers_image_is_left_as_it_is(processor):
    image = Image.new("LA", (6, 4), (77, 9))
    before = image.copy()
    processor(image)
    assert image == before


ARRAY = np.zeros((4, 6, 3))
# With what the message must contain: the cause of Pillow, a number, a shape.
REFUSED = {
    "a truncated file": (as_file(Image.effect_noise((64, 64), 90), "JPEG")[:700], "truncated"),
    "a false header": (false_bitmap(), "truncated"),
    "a changed header": (as_file(Image.new("L", (9, 9)))[:20] + b"\x00\x00\x00\xff" + b"\x00" * 99, "cannot be read"),
    "text": (b"an essay on pictures", "format"),
    "no bytes": (b"", "format"),
    "a bomb": (png(30000, 30000), "89,478,485"),
    "a smaller bomb": (png(12000, 12000), "89,478,485"),
    "an image of no height": (Image.new("RGB", (5, 0)), "5 x 0"),
    "an array of no width": (np.zeros((4, 0, 3)), "0 x 4"),
    "floats above one": (ARRAY + 1.5, "1.5 to 1.5"),
    "floats below zero": (torch.full((3, 4, 6), -0.5), "-0.5"),
    "not a number": (ARRAY * np.nan, "nan"),
    "negative integers": (np.full((4, 6), -1), "-1"),
    "large integers": (np.full((4, 6), 2**40), "4294967295"),
    "deep floats": (Image.new("F", (6, 4), 300.0), "300.0"),
    "five colors": (np.zeros((5, 6, 5), dtype=np.uint8), r"\(5, 6, 5\)"),
    "one axis": (np.zeros(4), r"\(4,\)"),
    "a missing file": ("no/such/file.png", "no/such/file.png"),
    "a path without a name": ("", "path"),
    "base64 of text": ("aGVsbG8=", "format"),
    "a folder": (str(GOLDEN), "golden"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_images_are_refused_by_their_position(processor, picture, name):
    image, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"^Image 1 .*{message}"):
        processor([picture, image])
    with pytest.raises(ValueError, match=f"^The image .*{message}"):
        load_image(image)


@pytest.mark.parametrize(
    ("image", "kind"), [(None, "NoneType"), (7, "int"), (np.array([["a"]]), "<U1"), ({"bytes": None}, "NoneType")]
)
def test_objects_of_other_types_are_refused_by_their_position(processor, picture, image, kind):
    with pytest.raises(TypeError, match=f"^Image 2 .*{kind}"):
        processor([[picture, picture], [image]])


def test_a_text_file_named_png_is_refused_by_its_path(processor, tmp_path):
    path = tmp_path / "essay.png"
    path.write_text("an essay on pictures", encoding="utf-8")
    with pytest.raises(ValueError, match=r"Image 0 \('.*essay.png'\)"):
        processor(path)


@pytest.mark.parametrize("images", [[], [[], []], ()])
def test_no_images_are_refused(processor, images):
    with pytest.raises(ValueError, match="images"):
        processor(images)


def test_the_limit_counts_pixels_that_a_file_claims(processor, monkeypatch):
    assert MAX_IMAGE_PIXELS == 89_478_485
    monkeypatch.setattr("encdec_slm.image_processing_encdec_vlm.MAX_IMAGE_PIXELS", 24)
    processor(Image.new("RGB", (6, 4)))
    for image in (Image.new("RGB", (5, 5)), np.zeros((5, 5, 3)), as_file(Image.new("RGB", (5, 5)))):
        with pytest.raises(ValueError, match=r"Image 0 .*5 x 5.* 24 "):
            processor(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": {"height": 28, "width": 14}}, "`size`"),
        ({"size": {"shortest_edge": 28}}, "`size`"),
        ({"size": 28, "patch_size": 29}, "`patch_size` 29"),
        ({"size": 32, "image_grid_pinpoints": [[32, 48]]}, "`image_grid_pinpoints`.*48.*32"),
        ({"size": 32, "image_grid_pinpoints": []}, "`image_grid_pinpoints`"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EncDecVLMImageProcessor(**{"patch_size": 8, **options})


def test_sizes_are_the_models_and_not_of_one_call(processor, picture):
    with pytest.raises(ValueError, match=r"`max_num_tiles` is 9.* 3"):
        processor(picture, max_num_tiles=9)
    processor(picture, size={"height": 28, "width": 28}, max_num_tiles=3)


def test_saving_keeps_every_size_and_no_idle_switch(tmp_path):
    options = {"size": {"height": 28, "width": 28}, "patch_size": 7, "max_num_tiles": 5, "image_newline": False}
    processor = EncDecVLMImageProcessor(image_grid_pinpoints=[[28, 28], [28, 84]], **options)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert saved.items() >= {**options, "image_grid_pinpoints": [[28, 28], [28, 84]]}.items()
    assert not {"crop_size", "do_center_crop", "do_pad", "do_resize", "do_convert_rgb"} & set(saved)
    assert EncDecVLMImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()


def test_the_defaults_are_the_original_ones():
    processor = EncDecVLMImageProcessor()
    assert processor.image_grid_pinpoints == [[336, 336], [672, 672], [672, 1008], [1008, 672]]
    assert (dict(processor.size), processor.patch_size) == ({"height": 336, "width": 336}, 14)
    assert processor.backend == "pil"
