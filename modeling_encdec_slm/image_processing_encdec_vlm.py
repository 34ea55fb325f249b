# SPDX-License-Identifier: Apache-2.0
"""Images of the vision-text models: load them as RGB, cut them into tiles, count their tokens."""

import base64
import io
import itertools
import os
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from transformers import BatchFeature, LlavaNextImageProcessorPil
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorKwargs

from .configuration_encdec_vlm import DEFAULT_PINPOINTS, EncDecVLMConfig, grid_shape, num_image_tokens


# Pillow's own limit, above which it suspects a decompression bomb; 268 MB as RGB.
MAX_IMAGE_PIXELS = 89_478_485
# Fields that must equal those of the model's config: token counts depend on them.
GEOMETRY = ("size", "image_grid_pinpoints", "patch_size", "max_num_tiles", "image_newline")
# Turns an image upright, by its EXIF orientation.
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
    r"""Cut images into normalized tiles, with Pillow and numpy alone.

    The grid, resizing, centering on black and cutting are those of [`~transformers.LlavaNextImageProcessorPil`].
    Unlike there, the tiles of all images are in one tensor without padding; the model reads from `image_sizes` which
    tiles belong to which image. A small image is enlarged to the smallest resolution, never beyond it, and a side
    that would shrink to nothing keeps one pixel.

    Images are read by [`load_images`], which lists the accepted types.

    Args:
        size (`dict[str, int]`, *optional*, defaults to `{"height": 336, "width": 336}`): Size of a tile, in pixels.
        patch_size (`int`, *optional*, defaults to 14): Side of a patch of the vision tower, in pixels.
        image_grid_pinpoints (`list[list[int]]`, *optional*): As in [`EncDecVLMConfig`], (height, width) in pixels.
        max_num_tiles (`int`, *optional*, defaults to 3): As in [`EncDecVLMConfig`].
        image_newline (`bool`, *optional*, defaults to `True`): As in [`EncDecVLMConfig`].
        resample (`PIL.Image.Resampling`, *optional*, defaults to `BICUBIC`): Filter used for resizing.
        do_rescale (`bool`, *optional*, defaults to `True`): Whether to multiply pixels by `rescale_factor`.
        rescale_factor (`float`, *optional*, defaults to 1/255): Maps 8-bit values to the range 0 to 1.
        do_normalize (`bool`, *optional*, defaults to `True`): Whether to apply `image_mean` and `image_std`, by
            default those of CLIP.

    Raises:
        ValueError: `size`, `patch_size` and `image_grid_pinpoints` contradict each other.
    """

    model_input_names = ["pixel_values", "image_sizes"]
    valid_kwargs = EncDecVLMImageProcessorKwargs

    default_to_square = True
    size = {"height": 336, "width": 336}
    patch_size = 14
    max_num_tiles = 3
    image_newline = True
    image_grid_pinpoints = None
    # Steps of the base class that are not needed, since every tile has the same size.
    do_resize = do_center_crop = crop_size = do_pad = do_convert_rgb = None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.image_grid_pinpoints is None:
            tile = self.size.height or 0
            self.image_grid_pinpoints = [[tile * side // 336 for side in pinpoint] for pinpoint in DEFAULT_PINPOINTS]
        self._validate_geometry()

    @classmethod
    def from_config(cls, config: EncDecVLMConfig, **kwargs) -> "EncDecVLMImageProcessor":
        """Build the image processor of a model, with the tiles, patches and grids of its config.

        Args:
            config ([`EncDecVLMConfig`]): Config of the model.
            kwargs: Other arguments of the image processor, such as `image_mean`.
        """
        tile = config.tile_size
        geometry = {name: getattr(config, name) for name in ("image_grid_pinpoints", "max_num_tiles", "image_newline")}
        return cls(size={"height": tile, "width": tile}, patch_size=config.patch_size, **geometry, **kwargs)

    def _validate_geometry(self):
        tile = self.size.height
        if not tile or tile != self.size.width or not 1 <= self.patch_size <= tile:
            raise ValueError(
                f"`size` is {dict(self.size)} and `patch_size` {self.patch_size}, but a tile must be a square "
                '{"height": n, "width": n} with at least one patch. Set both to those of the vision tower.'
            )
        pinpoints = self.image_grid_pinpoints
        if not pinpoints or any(len(pair) != 2 or min(pair) < 1 or any(s % tile for s in pair) for pair in pinpoints):
            raise ValueError(
                f"`image_grid_pinpoints` is {pinpoints}, but must have at least one (height, width) in pixels, both "
                f"multiples of a tile's side ({tile})."
            )

    def num_image_tokens(self, height: int, width: int) -> int:
        """Return how many tokens an image of `height` x `width` pixels takes: one per feature."""
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
        """Return how many tiles an image of `height` x `width` pixels is cut into, the downscaled one included."""
        rows, columns = grid_shape((height, width), self.image_grid_pinpoints, self.size.height)
        return 1 + rows * columns

    def fetch_images(
        self, image_url_or_urls: Any, input_data_format: str | None = None, timeout: float | None = None
    ) -> Any:
        """Load images as RGB, in the same nested lists. Args: as in [`load_images`]."""
        return load_images(image_url_or_urls, input_data_format, timeout)

    def preprocess(self, images: Any, *args, **kwargs) -> BatchFeature:
        """Cut images into tiles.

        Args:
            images: One image, or images in (nested) lists, of the types that [`load_images`] accepts.
            return_tensors (`str`, *optional*): `"pt"` for tensors; `None` for numpy arrays.
            input_data_format (`str`, *optional*): As in [`load_images`].

        Returns:
            [`~transformers.BatchFeature`]: `pixel_values` of shape `(num_tiles, 3, tile, tile)`, float32: for each
            image the downscaled tile, then its grid row by row; `image_sizes` of shape `(num_images, 2)`, int64:
            height and width of each upright image, in pixels.

        Raises:
            ValueError: There is no image, or an argument differs from the geometry of the model.
        """
        for name in GEOMETRY:
            own = getattr(self, name)
            if kwargs.get(name) is not None and kwargs[name] != own:
                raise ValueError(
                    f"`{name}` is {kwargs[name]}, but the model of this image processor has "
                    f"{dict(own) if name == 'size' else own}. Leave it out, or build another image processor."
                )
        return super().preprocess(images, *args, **kwargs)

    def _prepare_image_like_inputs(self, images, *args, input_data_format=None, **kwargs):
        flat = list(flatten_images(self.fetch_images(images, input_data_format)))
        if not flat:
            raise ValueError("`images` is empty, but at least one image is required. Leave it out for text alone.")
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


def load_image(image: Any, input_data_format: str | None = None, timeout: float | None = None) -> Image.Image:
    """Load one image as RGB. Args and errors: as in [`load_images`], but no lists."""
    return _load_named(image, "The image", input_data_format, timeout)


def load_images(images: Any, input_data_format: str | None = None, timeout: float | None = None) -> Any:
    """Load images as upright RGB images of 8 bits, in the nested lists in which they were given.

    The one way from an image file to pixels: EXIF orientation is applied, transparency becomes white, and images of
    more than 8 bits are scaled. Of an animation the current frame is read.

    Args:
        images: An image or nested lists of images. An image is a PIL image, a path, the bytes of a file (plain or
            base64), an `http(s)` URL, a dict with `bytes` or `path` (an undecoded cell of `datasets`), or an array or
            tensor of one (2 or 3 axes) or many images (4 axes). Arrays hold integers that fit in 8, 16 or 32 bits, or
            floats from 0 to 1; their 1, 3 or 4 colors are on the last axis or else the first, for tensors the other
            way round.
        input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`, for arrays whose shape is
            ambiguous.
        timeout (`float`, *optional*): Seconds to wait for a URL. `None` waits without a limit.

    Raises:
        ValueError: An image is damaged, empty, out of range or has more than 89,478,485 pixels. The message names it
            by its position, from 0.
        TypeError: An image is of no type listed above.
    """
    return _load_nested(images, itertools.count(), input_data_format, timeout)


def flatten_images(images: Any) -> Iterator[Image.Image]:
    """Yield the images of nested lists, in order."""
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from flatten_images(image)
    else:
        yield images


class _Unusable(ValueError):
    """Why an image cannot be used, and what to do about it; the caller puts its name in front."""


class _WrongKind(TypeError):
    """The same for an object that is not an image."""


def _load_nested(images, positions, input_data_format, timeout):
    if isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4):
        return [_load_nested(image, positions, input_data_format, timeout) for image in images]
    return _load_named(images, f"Image {next(positions)}", input_data_format, timeout)


def _load_named(image, name, input_data_format, timeout):
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, (str, os.PathLike)):
        name += f" ({os.fspath(image)[-80:]!r})"  # the end of a path says most
    try:
        return _load(image, input_data_format, timeout)
    except _WrongKind as error:
        raise TypeError(f"{name} {error}") from error
    except _Unusable as error:
        raise ValueError(f"{name} {error}") from error
    # Pillow's plugins raise anything from OSError to struct.error for a damaged file.
    except Exception as error:
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "its format is unknown" if is_unknown else str(error).rstrip(". ") or type(error).__name__
        raise ValueError(
            f"{name} cannot be read: {reason}. Give a complete file of a format that Pillow reads, a PIL image, or an "
            "array."
        ) from error


def _load(image, input_data_format, timeout):
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _to_rgb(_from_array(image, input_data_format))
    if isinstance(image, Image.Image):
        return _to_rgb(image)
    if not isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview)):
        raise _WrongKind(
            f"is of type {type(image).__name__}, but must be a PIL image, a path, a URL, the bytes of a file, or an "
            "array. Leave out what is not an image."
        )
    try:
        with Image.open(_open_file(image, timeout)) as opened:
            return _to_rgb(opened)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _Unusable(f"is refused by Pillow: {error} {_too_large()}") from error


def _open_file(source, timeout):
    """Return what Pillow opens: a path, or a buffer with the bytes of a file (given, from a URL, or from base64)."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        request = urllib.request.Request(source, headers={"User-Agent": "encdec-slm"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return io.BytesIO(response.read())
    if not isinstance(source, str) or os.path.exists(source):
        return source
    encoded = source.partition(",")[2] if source.startswith("data:image/") else source
    try:
        decoded = base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError:
        decoded = b""
    if not decoded:
        raise _Unusable("is neither an existing file nor an image in base64. Correct the path.")
    return io.BytesIO(decoded)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to upright 8-bit RGB on white; `image` itself if it is that already."""
    _check_size(*image.size)
    image.load()
    if (turn := UPRIGHT.get(_orientation(image))) is not None:
        image = image.transpose(turn)
        # The metadata still have the old orientation: whoever loads the result again would turn it again.
        image.info = {name: value for name, value in image.info.items() if name == "transparency"}
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scale_to_eight_bits(image)
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if _is_transparent(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image):
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    # Metadata may be damaged although the image is not; Pillow then raises various errors.
    except Exception:
        return None


def _scale_to_eight_bits(image):
    values = np.asarray(image)
    pixels = values
    if values.dtype.kind == "f" and values.min() >= 0 and 1 < values.max() <= 255:
        pixels = values / 255  # Pillow converts 8-bit images to floats from 0 to 255
    pixels = _eight_bits(pixels)
    if (transparent := image.info.get("transparency")) is not None:
        pixels = np.where(values == transparent, np.uint8(255), pixels)
    return Image.fromarray(pixels)


def _is_transparent(image):
    has_alpha = image.mode.endswith("A") or (image.mode == "P" and image.palette.mode.endswith("A"))
    return has_alpha or "transparency" in image.info


def _check_size(width, height):
    if min(width, height) < 1:
        raise _Unusable(f"is {width} x {height} pixels, but needs at least one each way. Leave it out.")
    if width * height > MAX_IMAGE_PIXELS:
        raise _Unusable(f"is {width} x {height} pixels. {_too_large()}")


def _too_large():
    return f"At most {MAX_IMAGE_PIXELS:,} pixels are decoded, since a small file may claim any size. Scale it down."


def _from_array(array, input_data_format):
    is_tensor = isinstance(array, torch.Tensor)
    if is_tensor:
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    if array.ndim not in (2, 3):
        raise _Unusable(f"has shape {array.shape}, but needs (height, width), with or without an axis of colors.")
    if array.ndim == 3:
        array = np.moveaxis(array, _color_axis(array.shape, is_tensor, input_data_format), -1)  # (H, W, colors)
    _check_size(array.shape[1], array.shape[0])
    pixels = np.ascontiguousarray(_eight_bits(array))
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def _color_axis(shape, is_tensor, input_data_format):
    """Return the axis of 1, 3 or 4 colors; if both could be, the last one for numpy and the first one for torch."""
    if input_data_format is not None:
        axes = (0,) if ChannelDimension(input_data_format) == ChannelDimension.FIRST else (2,)
    else:
        axes = (0, 2) if is_tensor else (2, 0)
    for axis in axes:
        if shape[axis] in (1, 3, 4):
            return axis
    raise _Unusable(
        f"has shape {shape}, where no axis{'' if input_data_format is None else f' of {input_data_format}'} has 1, 3 "
        "or 4 colors. Give (height, width, colors) or (colors, height, width)."
    )


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Convert to uint8, keeping the high byte of wider integers, as Pillow does with 16-bit colors."""
    kind = values.dtype.kind
    if kind not in "buif":
        raise _WrongKind(f"is an array of {values.dtype}. Give integers such as uint8, or floats from 0 to 1.")
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return values.astype(np.uint8) * 255
    smallest, largest = values.min(), values.max()
    if kind == "f":
        if not (smallest >= 0 and largest <= 1):
            raise _Unusable(
                f"has floats from {smallest} to {largest}, but they must be from 0 to 1. Divide by the largest "
                "possible value, or give the 8-bit integers."
            )
        return np.round(values * 255.0).astype(np.uint8)
    if smallest < 0 or largest > 2**32 - 1:
        raise _Unusable(
            f"has integers from {smallest} to {largest}, but they must be from 0 to 4294967295. Shift them."
        )
    return (values >> _num_dropped_bits(values.dtype, int(largest))).astype(np.uint8)


def _num_dropped_bits(dtype, largest):
    """16-bit types drop 8 bits. Wider types hold 8, 16, 31 or 32 bits, whichever the largest value needs."""
    if dtype.kind == "u" and dtype.itemsize == 2:  # in either byte order
        return 8
    return next(bits - 8 for bits in (8, 16, 31, 32) if largest < 2**bits)


EncDecVLMImageProcessor.register_for_auto_class()

__all__ = ["EncDecVLMImageProcessor", "load_image", "load_images"]
