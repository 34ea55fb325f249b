# SPDX-License-Identifier: Apache-2.0
"""Images for the vision-text family: whatever a user has becomes RGB, is cut into tiles, and is counted in tokens."""

import base64
import io
import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from transformers import BatchFeature, LlavaNextImageProcessorPil
from transformers.image_utils import ChannelDimension, load_image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorKwargs

from .configuration_encdec_vlm import DEFAULT_PINPOINTS, EncDecVLMConfig, grid_shape, num_image_tokens


# Above this Pillow itself suspects a decompression bomb; 268 MB as RGB.
MAX_IMAGE_PIXELS = 89_478_485
# What the model's config says too, and token counts rest on.
GEOMETRY = ("size", "image_grid_pinpoints", "patch_size", "max_num_tiles", "image_newline")
# What turns an image upright, by its EXIF orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class EncDecVLMImageProcessorKwargs(LlavaNextImageProcessorKwargs, total=False):
    r"""
    patch_size (`int`):
        Side of a patch of the vision tower, in pixels.
    max_num_tiles (`int`):
        See [`EncDecVLMConfig`].
    image_newline (`bool`):
        See [`EncDecVLMConfig`].
    """

    patch_size: int
    max_num_tiles: int
    image_newline: bool


class EncDecVLMImageProcessor(LlavaNextImageProcessorPil):
    r"""Cuts images into normalised tiles with Pillow and numpy alone.

    Choosing the grid, resizing, centring on black and cutting are those of
    [`~transformers.LlavaNextImageProcessorPil`] to the letter. Unlike there, all tiles of all images stand in one
    tensor without padding, and the model finds out from `image_sizes` which are whose.

    An image may be a PIL image, a path, the bytes of a file (plain or base64), an `http(s)` URL (which transformers'
    `load_image` fetches, without transparency), an array or tensor of one (2 or 3 axes) or many (4), or a list of
    these. Arrays hold integers that fit in 8, 16 or 32 bits, or floats from 0 to 1; 1, 3 or 4 colours
    are on the last axis or else the first (for tensors the other way round). Of an animation the current frame counts.
    EXIF orientation is applied, transparency is laid over white, and deep images are scaled to 8 bits.
    Nothing is larger than its grid: a small image is enlarged to the smallest resolution and never beyond it, and a
    side that would shrink to nothing keeps one pixel.

    Args:
        size (`dict[str, int]`, *optional*, defaults to `{"height": 336, "width": 336}`): Of a tile, in pixels.
        patch_size (`int`, *optional*, defaults to 14): Side of a patch of the vision tower, in pixels.
        image_grid_pinpoints (`list[list[int]]`, *optional*): As in [`EncDecVLMConfig`], (height, width) in pixels.
        max_num_tiles (`int`, *optional*, defaults to 3): As in [`EncDecVLMConfig`].
        image_newline (`bool`, *optional*, defaults to `True`): As in [`EncDecVLMConfig`].
        resample (`PIL.Image.Resampling`, *optional*, defaults to `BICUBIC`): Filter of every resizing.
        do_rescale (`bool`, *optional*, defaults to `True`): Whether to multiply by `rescale_factor`.
        rescale_factor (`float`, *optional*, defaults to 1/255): Takes 8-bit values to the range 0 to 1.
        do_normalize (`bool`, *optional*, defaults to `True`): Whether to apply `image_mean` and `image_std`, CLIP's.

    Raises:
        ValueError: Sizes do not fit together, or an image is damaged, empty, out of range or has more than
            `MAX_IMAGE_PIXELS` (89,478,485) pixels; the message says which one, counted from 0.
        TypeError: An image is none of the kinds above.
    """

    model_input_names = ["pixel_values", "image_sizes"]
    valid_kwargs = EncDecVLMImageProcessorKwargs

    default_to_square = True
    size = {"height": 336, "width": 336}
    patch_size = 14
    max_num_tiles = 3
    image_newline = True
    image_grid_pinpoints = None
    # Steps of the base class that tiles of exactly one size do not need.
    do_resize = do_center_crop = crop_size = do_pad = do_convert_rgb = None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.image_grid_pinpoints is None:
            tile = self.size.height or 0
            self.image_grid_pinpoints = [[tile * side // 336 for side in pinpoint] for pinpoint in DEFAULT_PINPOINTS]
        self._validate_geometry()

    @classmethod
    def from_config(cls, config: EncDecVLMConfig, **kwargs) -> "EncDecVLMImageProcessor":
        """The image processor of a model: tiles, patches and grids as its config has them.

        Args:
            config ([`EncDecVLMConfig`]): Of the model.
            kwargs: What else differs from the defaults, such as `image_mean`.
        """
        tile = config.tile_size
        geometry = {name: getattr(config, name) for name in ("image_grid_pinpoints", "max_num_tiles", "image_newline")}
        return cls(size={"height": tile, "width": tile}, patch_size=config.patch_size, **geometry, **kwargs)

    def _validate_geometry(self):
        tile = self.size.height
        if not tile or tile != self.size.width or not 1 <= self.patch_size <= tile:
            raise ValueError(
                f"`size` is {dict(self.size)} and `patch_size` {self.patch_size}, but a tile must be a square "
                '{"height": n, "width": n} with at least one patch. Set both as in the vision tower.'
            )
        pinpoints = self.image_grid_pinpoints
        if not pinpoints or any(len(pair) != 2 or min(pair) < 1 or any(s % tile for s in pair) for pair in pinpoints):
            raise ValueError(
                f"`image_grid_pinpoints` is {pinpoints}, but must have at least one (height, width) in pixels, both "
                f"multiples of a tile's side ({tile})."
            )

    def num_image_tokens(self, height: int, width: int) -> int:
        """Tokens that stand for an image of `height` x `width` pixels, as many as the model makes features."""
        tile = self.size.height
        return num_image_tokens(
            (height, width),
            self.image_grid_pinpoints,
            tile,
            tile // self.patch_size,
            self.max_num_tiles,
            self.image_newline,
        )

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Tiles that an image of `height` x `width` pixels is cut into, the downscaled one included."""
        rows, columns = grid_shape((height, width), self.image_grid_pinpoints, self.size.height)
        return 1 + rows * columns

    def fetch_images(self, image_url_or_urls: Any, input_data_format: str | None = None) -> Any:
        """RGB images of 8 bits, upright, in the lists that they were given in."""
        return load_images(image_url_or_urls, input_data_format)

    def preprocess(self, images: Any, *args, **kwargs) -> BatchFeature:
        """Tiles and sizes of images.

        Args:
            images: One image, or images in lists, of the kinds in [`EncDecVLMImageProcessor`].
            return_tensors (`str`, *optional*): `"pt"` for tensors; `None` means numpy arrays.
            input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`, for arrays of which the
                shape does not tell.

        Returns:
            [`~transformers.BatchFeature`]: `pixel_values` of shape `(num_tiles, 3, tile, tile)`, float32: image by
            image the downscaled tile, then the grid row by row; `image_sizes` of shape `(num_images, 2)`, int64:
            height and width of each image as it stands upright, in pixels.
        """
        for name in GEOMETRY:
            own = getattr(self, name)
            if kwargs.get(name) is not None and kwargs[name] != own:
                raise ValueError(
                    f"`{name}` was given as {kwargs[name]}, but here it is {dict(own) if name == 'size' else own}, as "
                    "in the model: images of one call cannot have another. Build another image processor (and model)."
                )
        return super().preprocess(images, *args, **kwargs)

    def _prepare_image_like_inputs(self, images, *args, input_data_format=None, **kwargs):
        flat = list(flatten_images(self.fetch_images(images, input_data_format)))
        if not flat:
            raise ValueError("`images` is empty, but needs at least one image. Leave it out for text alone.")
        return [np.moveaxis(np.asarray(image), -1, 0) for image in flat]  # (3, height, width)

    def _preprocess(
        self,
        images,
        resample,
        do_rescale,
        rescale_factor,
        do_normalize,
        image_mean,
        image_std,
        return_tensors=None,
        **kwargs,
    ):
        tile, tiles = self.size.height, []
        for image in images:
            tiles += self.get_image_patches(image, self.image_grid_pinpoints, (tile, tile), tile, resample)
        if do_rescale:
            tiles = [self.rescale(pixels, rescale_factor) for pixels in tiles]
        if do_normalize:
            tiles = [self.normalize(pixels, image_mean, image_std) for pixels in tiles]
        sizes = np.array([image.shape[-2:] for image in images], dtype=np.int64)
        return BatchFeature({"pixel_values": np.stack(tiles), "image_sizes": sizes}, tensor_type=return_tensors)


class _Unusable(ValueError):
    """Why an image cannot be used; says what to do about it."""


class _WrongKind(TypeError):
    """Likewise, of what is no image at all."""


def flatten_images(images: Any) -> Iterator[Image.Image]:
    """The images of nested lists, in order."""
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from flatten_images(image)
    else:
        yield images


def load_images(images: Any, input_data_format: str | None = None) -> Any:
    """RGB images of 8 bits, upright, in the lists that they were given in.

    Args: as in [`EncDecVLMImageProcessor.preprocess`].

    Raises: as in [`EncDecVLMImageProcessor`].
    """
    return _load(images, itertools.count(), input_data_format)


def _load(images: Any, positions: Iterator[int], input_data_format: str | None) -> Any:
    if isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4):
        return [_load(image, positions, input_data_format) for image in images]
    name = f"Image {next(positions)}"
    if isinstance(images, (str, os.PathLike)):
        name += f" ({os.fspath(images)[-80:]!r})"  # its end tells more than its beginning
    try:
        return _load_one(images, input_data_format)
    except _WrongKind as error:
        raise TypeError(f"{name} {error}") from error
    except _Unusable as error:
        raise ValueError(f"{name} {error}") from error
    # Pillow's plugins raise anything from OSError to struct.error over a damaged file.
    except Exception as error:
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "it is of no known format" if is_unknown else str(error).rstrip(". ") or type(error).__name__
        raise ValueError(
            f"{name} cannot be read: {reason}. Give a whole file of a format that Pillow reads, a PIL image, or an "
            "array."
        ) from error


def _load_one(image: Any, input_data_format: str | None) -> Image.Image:
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _to_rgb(_from_array(image, input_data_format))
    if isinstance(image, Image.Image):
        return _to_rgb(image)
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return _to_rgb(load_image(image))
    if not isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview)):
        raise _WrongKind(
            f"is of type {type(image).__name__}, but must be a PIL image, a path, bytes of a file, or an array. "
            "Leave out what is no image."
        )
    try:
        with Image.open(_file_of(image)) as opened:
            return _to_rgb(opened)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _Unusable(f"is refused by Pillow: {error} {_too_large()}") from error


def _file_of(source: Any) -> Any:
    """What Pillow opens: the path of a file, or the bytes that `source` has, written out or in base64."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if not isinstance(source, str) or os.path.exists(source):
        return source
    encoded = source.partition(",")[2] if source.startswith("data:image/") else source
    try:
        decoded = base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError:
        decoded = b""
    if not decoded:
        raise _Unusable("is no file that exists, nor an image in base64. Correct the path.")
    return io.BytesIO(decoded)


def _to_rgb(image: Image.Image) -> Image.Image:
    """`image` upright, in RGB of 8 bits, over white; itself where it is so already."""
    _check_size(*image.size)
    image.load()
    if (turn := UPRIGHT.get(_orientation(image))) is not None:
        image = image.transpose(turn)
        # Its metadata still say that it lies on its side; whoever loads it again would turn it again.
        image.info = {name: value for name, value in image.info.items() if name == "transparency"}
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_eight_bits(_unit_range(np.asarray(image))))
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if _is_transparent(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    # Its metadata may be damaged where the image is not, and Pillow raises whatever it stumbles over there.
    except Exception:
        return None


def _is_transparent(image: Image.Image) -> bool:
    has_alpha = image.mode.endswith("A") or (image.mode == "P" and image.palette.mode.endswith("A"))
    return has_alpha or "transparency" in image.info


def _check_size(width: int, height: int):
    if min(width, height) < 1:
        raise _Unusable(f"is {width} x {height} pixels, but needs at least one each way. Leave it out.")
    if width * height > MAX_IMAGE_PIXELS:
        raise _Unusable(f"is {width} x {height} pixels. {_too_large()}")


def _too_large() -> str:
    return f"At most {MAX_IMAGE_PIXELS:,} pixels are decoded, since a small file may claim any size: scale it down."


def _from_array(array: Any, input_data_format: str | None) -> Image.Image:
    is_tensor = isinstance(array, torch.Tensor)
    if is_tensor:
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    if array.ndim not in (2, 3):
        raise _Unusable(f"has shape {array.shape}, but needs (height, width), with or without an axis of colours.")
    if array.ndim == 3:
        array = np.moveaxis(array, _colour_axis(array.shape, is_tensor, input_data_format), -1)  # (H, W, colours)
    _check_size(array.shape[1], array.shape[0])
    pixels = np.ascontiguousarray(_eight_bits(array))
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def _colour_axis(shape: tuple[int, ...], is_tensor: bool, input_data_format: str | None) -> int:
    """The axis of 1, 3 or 4 colours; where both could be, numpy's habit is the last and torch's the first."""
    if input_data_format is not None:
        axes = (0,) if ChannelDimension(input_data_format) == ChannelDimension.FIRST else (2,)
    else:
        axes = (0, 2) if is_tensor else (2, 0)
    for axis in axes:
        if shape[axis] in (1, 3, 4):
            return axis
    raise _Unusable(
        f"has shape {shape}, where no axis{'' if input_data_format is None else f' of {input_data_format}'} has 1, 3 "
        "or 4 colours. Give (height, width, colours) or (colours, height, width)."
    )


def _unit_range(values: np.ndarray) -> np.ndarray:
    """`values` of a deep PIL image; floats from 0 to 255, which Pillow makes of 8 bits, become 0 to 1."""
    if values.dtype.kind == "f" and values.min() >= 0 and 1 < values.max() <= 255:
        return values / 255
    return values


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """`values` as uint8: the high byte of deeper integers, as Pillow takes it of 16-bit colours."""
    kind = values.dtype.kind
    if kind not in "buif":
        raise _WrongKind(
            f"is an array of {values.dtype}. Give one of integers such as uint8, or of floats from 0 to 1."
        )
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return values.astype(np.uint8) * 255
    smallest, largest = values.min(), values.max()
    if kind == "f":
        if not (smallest >= 0 and largest <= 1):
            raise _Unusable(
                f"has floats from {smallest} to {largest}, but they must be from 0 to 1. Divide by the largest value "
                "possible, or give the 8-bit integers."
            )
        return np.round(values * 255.0).astype(np.uint8)
    if smallest < 0 or largest > 2**32 - 1:
        raise _Unusable(
            f"has integers from {smallest} to {largest}, but they must be from 0 to 4294967295. Shift them."
        )
    return (values >> _shift(values.dtype, int(largest))).astype(np.uint8)


def _shift(dtype: np.dtype, largest: int) -> int:
    """Bits to drop. The type tells 16 bits; wider types hold 8, 16, 31 or 32, whichever the largest value needs."""
    if dtype.kind == "u" and dtype.itemsize == 2:  # in either byte order
        return 8
    return next(bits - 8 for bits in (8, 16, 31, 32) if largest < 2**bits)


EncDecVLMImageProcessor.register_for_auto_class()

__all__ = ["EncDecVLMImageProcessor"]
