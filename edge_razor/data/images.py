"""Folders of class folders of images, decoded with Pillow into uint8 NHWC; the runtime normalizes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from edge_razor.data.order import mix
from edge_razor.data.source import Augmentation, Source
from edge_razor.errors import DataError
from edge_razor.manifest import Manifest

__all__ = ["EXTENSIONS", "ImageFolder"]

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
)
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# EXIF orientation → what turns the image upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


class ImageFolder(Source):
    """`root/<class>/<image>`; classes by name order, or as the bundle (or an earlier run) names them.

    Images are resized so that the shorter side is the bundle's `resize`, then cropped to the model's input. Without
    preprocessing in the bundle they are resized just enough to cover the input. Grey, palette, alpha, 16-bit and CMYK
    images become RGB (or grey, for a model with one channel); EXIF rotation is applied.
    """

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        classes: tuple[str, ...] | None,
        augmentation: Augmentation,
        skip_bad: bool,
    ) -> None:
        """Lists the files and reads every header, which finds most damaged files and the size of the largest image.

        Raises:
            DataError: see `open_source`.
        """
        super().__init__()
        self.root = root
        self.skip_bad = skip_bad
        self.augmentation = augmentation
        self.input_shape = manifest.inputs[0].runtime_shape
        self.input_dtype = np.dtype(np.uint8)
        self.target_shape, self.target_dtype = (), np.dtype(np.int32)
        if manifest.class_count is None or manifest.target_shape != ():
            raise DataError(f"{root}: an image folder gives class labels, but the model's loss is {manifest.loss}")
        if len(self.input_shape) != 3 or self.input_shape[2] not in (1, 3):
            raise DataError(f"{root}: the model's input {list(manifest.inputs[0].shape)} is no grey or RGB image")
        height, width, channels = self.input_shape
        self.mode = "RGB" if channels == 3 else "L"
        shorter, preprocessing = min(height, width), manifest.preprocessing
        self.interpolation = _RESAMPLING[preprocessing.interpolation if preprocessing else "bilinear"]
        self.resize = round(preprocessing.resize * shorter / preprocessing.crop) if preprocessing else shorter
        if augmentation.random_crop and self.resize == shorter:
            self.resize = round(shorter * 256 / 224)  # the usual room to choose a crop from
        folders = _class_folders(root)
        self.classes = _match_classes(root, folders, classes, manifest.class_count)
        self.files: list[Path] = []
        labels: list[int] = []
        for folder in folders:
            files = _images(folder)
            self.files += files
            labels += [self.classes.index(folder.name)] * len(files)
        self.labels = np.array(labels, dtype=np.int32)
        self._check_headers()

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, inputs: np.ndarray, targets: np.ndarray, random: int | None) -> bool:
        """See `Source.read`; `inputs` is uint8 [H, W, C]."""
        file = self.files[index]
        try:
            with _opened(file) as image:
                inputs[:] = self._decode(image, random)
        except Exception as error:  # Pillow lets through what damaged bytes raise in it: IndexError, struct.error …
            self._leave_out(file, error)
            return False
        targets[...] = self.labels[index]
        return True

    def _decode(self, image: Image.Image, random: int | None) -> np.ndarray:
        """The image as uint8 [H, W, C]."""
        image.draft(None, (self.resize, self.resize))  # JPEG: decode at 1/2, 1/4, 1/8 if that is still large enough
        upright = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
        picture = _to_mode(image, self.mode)
        if upright is not None:
            picture = picture.transpose(upright)
        height, width, channels = self.input_shape
        picture = picture.resize(_covering(picture.size, self.resize, (width, height)), self.interpolation)
        spare_x, spare_y = picture.width - width, picture.height - height
        left, top = round(spare_x / 2), round(spare_y / 2)
        flip = False
        if random is not None:
            if self.augmentation.random_crop:
                left, top = mix(random, 1) % (spare_x + 1), mix(random, 2) % (spare_y + 1)
            flip = self.augmentation.flip and mix(random, 3) % 2 == 1
        pixels = np.asarray(picture.crop((left, top, left + width, top + height))).reshape(height, width, channels)
        return pixels[:, ::-1] if flip else pixels

    def _leave_out(self, file: Path, error: Exception) -> None:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image that Pillow knows"
        if not self.skip_bad:
            raise DataError(f"{file}: cannot be read ({reason}); remove it, or pass --skip-bad") from error
        self.bad[str(file)] = reason

    def _check_headers(self) -> None:
        largest, good = 0, []
        for index, file in enumerate(self.files):
            try:
                with _opened(file) as image:
                    image.draft(None, (self.resize, self.resize))
                    largest = max(largest, image.width * image.height)
                good.append(index)
            except Exception as error:
                self._leave_out(file, error)
        self.files = [self.files[i] for i in good]
        self.labels = self.labels[good]
        if not self.files:
            raise DataError(f"{self.root}: holds no readable image")
        # Pillow keeps 4 bytes a pixel for colour; the decoded image and its converted or turned copy live together.
        self.work_bytes = 2 * 4 * largest


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """The image without Pillow's warnings of odd metadata and large sizes; what matters is whether it decodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file) as image:
            yield image


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip instead of scale
        image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def _covering(size: tuple[int, int], shorter: int, least: tuple[int, int]) -> tuple[int, int]:
    """(width, height) with the shorter side `shorter` and the same proportions, at least `least` each way."""
    width, height = size
    scale = shorter / min(width, height)
    scaled = (shorter, int(height * scale)) if width <= height else (int(width * scale), shorter)
    if scaled[0] >= least[0] and scaled[1] >= least[1]:
        return scaled
    scale = max(least[0] / width, least[1] / height)
    return max(least[0], round(width * scale)), max(least[1], round(height * scale))


def _class_folders(root: Path) -> list[Path]:
    entries = sorted(e for e in root.iterdir() if not e.name.startswith("."))
    folders = [e for e in entries if e.is_dir()]
    loose = [e for e in entries if e.suffix.lower() in EXTENSIONS and e.is_file()]
    if not folders and not loose:
        raise DataError(f"{root}: is empty; it needs one folder of images for each class")
    if loose:
        raise DataError(
            f"{root}: {loose[0].name} lies at the top level; put every image into the folder of its class"
            + ("" if folders else " (there is none yet)")
        )
    return folders


def _images(folder: Path) -> list[Path]:
    entries = sorted(e for e in folder.iterdir() if not e.name.startswith("."))
    images = [e for e in entries if e.suffix.lower() in EXTENSIONS and e.is_file()]
    inner = [e for e in entries if e.is_dir()]
    if inner:
        raise DataError(
            f"{folder}: holds folders ({inner[0].name}), but class folders hold images only; "
            "give the folder whose folders are the classes"
        )
    if not images:
        raise DataError(f"{folder}: holds no images; remove the folder or fill it")
    return images


def _match_classes(root: Path, folders: list[Path], classes: tuple[str, ...] | None, count: int) -> tuple[str, ...]:
    """Class names by index."""
    found = tuple(f.name for f in folders)
    if classes is None:
        if len(found) > count:
            raise DataError(f"{root}: has {len(found)} class folders, the model {count} classes; export it for more")
        return found
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise DataError(
            f"{root}: folder {unknown[0]!r} is no class of the model ({', '.join(classes[:8])}"
            + (", …)" if len(classes) > 8 else ")")
        )
    return classes
