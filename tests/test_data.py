"""Data: order, split, image folders, array files, and the thread that reads ahead."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from edge_razor.bundle import Bundle
from edge_razor.data import Augmentation, BatchRing, IterableLoader, Loader, Source, open_source, shuffled, split
from edge_razor.errors import DataError, UsageError
from edge_razor.manifest import InputSpec, Manifest, OutputSpec, Preprocessing
from tests.bundles import write_linear_bundle


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return Bundle(write_linear_bundle(tmp_path_factory.mktemp("bundle") / "model.razor")).manifest


@pytest.fixture
def vision(linear: Manifest) -> Manifest:
    """A model of 3×8×12 images and three classes."""
    return dataclasses.replace(
        linear, inputs=(InputSpec("x", (3, 8, 12), (0, 2, 3, 1)),), output=OutputSpec("y", (3,), (0, 1))
    )


def picture(
    path: Path, size: tuple[int, int] = (12, 8), mode: str = "RGB", seed: int = 0, **options: Any
) -> np.ndarray:
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "CMYK": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze() if channels == 1 else pixels, mode).save(path, **options)
    return pixels


def folder(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        for i in range(count):
            picture(root / name / f"{i:03}.png", seed=i)
    return root


def read(source: Source, index: int = 0, random: int | None = None) -> tuple[np.ndarray, Any]:
    inputs, targets = (
        np.empty(source.input_shape, source.input_dtype),
        np.empty(source.target_shape, source.target_dtype),
    )
    assert source.read(index, inputs, targets, random)
    return inputs, targets.tolist()


# ---- Order and split ----


@pytest.mark.parametrize("count", [1, 2, 3, 63, 64, 65, 1000])
def test_an_epoch_has_every_sample_once_in_an_order_of_its_own(count: int) -> None:
    indices = np.arange(100, 100 + count)
    first, again, later = shuffled(indices, 7, 0), shuffled(indices, 7, 0), shuffled(indices, 7, 1)
    assert np.array_equal(first, again)
    assert np.array_equal(np.sort(first), indices)
    assert np.array_equal(np.sort(later), indices)
    if count > 10:
        assert not np.array_equal(first, later)
        assert not np.array_equal(first, shuffled(indices, 8, 0))


def test_the_order_is_fixed_for_all_time() -> None:
    assert shuffled(np.arange(8), 0, 0).tolist() == [0, 5, 3, 7, 1, 6, 2, 4]  # a checkpoint of today resumes tomorrow


@pytest.mark.parametrize(("count", "share", "held_out"), [(10, 0.1, 1), (10, 0.0, 0), (101, 0.25, 25), (3, 0.34, 1)])
def test_the_split_is_disjoint_complete_and_seeded(count: int, share: float, held_out: int) -> None:
    training, validation = split(count, share, 5)
    assert len(validation) == held_out
    assert sorted([*training, *validation]) == list(range(count))
    assert np.array_equal(split(count, share, 5)[1], validation)


@pytest.mark.parametrize(("count", "share"), [(10, 1.0), (10, -0.1), (3, 0.1), (1, 0.5001), (10, float("nan"))])
def test_a_split_with_an_empty_side_is_refused(count: int, share: float) -> None:
    with pytest.raises(UsageError, match="validation share"):
        split(count, share, 0)


# ---- Image folders ----


def test_classes_are_folders_in_name_order(tmp_path: Path, vision: Manifest) -> None:
    source = open_source(folder(tmp_path, {"b": 2, "a": 1, ".hidden": 1}), vision)
    assert source.classes == ("a", "b")
    assert [read(source, i)[1] for i in range(len(source))] == [0, 1, 1]


def test_pixels_arrive_unchanged_when_the_size_fits(tmp_path: Path, vision: Manifest) -> None:
    pixels = picture(tmp_path / "a" / "x.png")
    assert np.array_equal(read(open_source(tmp_path, vision))[0], pixels)


def test_resize_and_centre_crop_are_those_of_the_usual_recipe(tmp_path: Path, vision: Manifest) -> None:
    square = dataclasses.replace(
        vision,
        inputs=(InputSpec("x", (3, 8, 8), (0, 2, 3, 1)),),
        preprocessing=Preprocessing(10, 8, (0, 0, 0), (1, 1, 1), "bilinear"),
    )
    picture(tmp_path / "a" / "x.png", (40, 20))
    with Image.open(tmp_path / "a" / "x.png") as image:
        expected = np.asarray(image.resize((20, 10), Image.Resampling.BILINEAR).crop((6, 1, 14, 9)))
    assert np.array_equal(read(open_source(tmp_path, square))[0], expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (7, 13), (13, 7), (12, 8), (400, 300)])
def test_any_image_size_covers_the_input(tmp_path: Path, vision: Manifest, size: tuple[int, int]) -> None:
    picture(tmp_path / "a" / "x.png", size)
    assert read(open_source(tmp_path, vision, augmentation=Augmentation(True, True)), 0, 12345)[0].shape == (8, 12, 3)


@pytest.mark.parametrize(
    ("mode", "name"), [("L", "x.png"), ("RGBA", "x.png"), ("CMYK", "x.jpg"), ("RGB", "x.jpg"), ("RGB", "x.WEBP")]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_colour_mode_becomes_what_the_model_takes(
    tmp_path: Path, vision: Manifest, mode: str, name: str, channels: int
) -> None:
    manifest = dataclasses.replace(vision, inputs=(InputSpec("x", (channels, 8, 12), (0, 2, 3, 1)),))
    pixels = picture(tmp_path / "a" / name, mode=mode)
    inputs, _ = read(open_source(tmp_path, manifest))
    assert inputs.shape == (8, 12, channels)
    if name.endswith("png") and channels == 3:
        expected = np.repeat(pixels, 3, axis=2) if mode == "L" else pixels[..., :3]
        assert np.array_equal(inputs, expected)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, vision: Manifest) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.linspace(0, 65535, 96).astype(np.uint16).reshape(8, 12)).save(tmp_path / "a" / "x.png")
    inputs, _ = read(open_source(tmp_path, vision))
    assert inputs[0, 0, 0] == 0
    assert inputs[-1, -1, 0] == 255
    assert abs(int(inputs[4, 0, 0]) - 128) <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, vision: Manifest, orientation: int) -> None:
    from PIL import ImageOps

    (tmp_path / "a").mkdir()
    upright = Image.fromarray(np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3))
    turned = upright if orientation < 5 else upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned.save(tmp_path / "a" / "x.png", exif=exif)
    with Image.open(tmp_path / "a" / "x.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(read(open_source(tmp_path, vision))[0], expected)


def test_augmentation_depends_on_its_random_bits_only(tmp_path: Path, vision: Manifest) -> None:
    picture(tmp_path / "a" / "x.png", (40, 30))
    roomy = dataclasses.replace(vision, preprocessing=Preprocessing(20, 8, (0, 0, 0), (1, 1, 1), "bilinear"))
    source = open_source(tmp_path, roomy, augmentation=Augmentation(flip=True, random_crop=True))
    seen = {read(source, 0, r)[0].tobytes() for r in range(20)}
    assert len(seen) > 10
    assert np.array_equal(read(source, 0, 3)[0], read(source, 0, 3)[0])
    flip = open_source(tmp_path, vision, augmentation=Augmentation(flip=True))
    plain = read(flip)[0]
    assert {read(flip, 0, r)[0].tobytes() for r in range(20)} == {plain.tobytes(), plain[:, ::-1].tobytes()}


def test_a_large_jpeg_is_decoded_small(tmp_path: Path, vision: Manifest) -> None:
    picture(tmp_path / "a" / "x.jpg", (1600, 1200))
    assert open_source(tmp_path, vision).work_bytes <= 2 * 4 * 200 * 150


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_corrupt_image_is_named_or_skipped_and_counted(tmp_path: Path, vision: Manifest, damage: str) -> None:
    root = folder(tmp_path, {"a": 3, "b": 1})
    bad = root / "a" / "001.png"
    data = bad.read_bytes()
    bad.write_bytes({"truncated": data[: len(data) // 2], "text": b"hello", "empty": b""}[damage])

    def epoch(skip_bad: bool) -> tuple[Source, int]:
        source = open_source(root, vision, skip_bad=skip_bad)
        loader = Loader(source, np.arange(len(source)), BatchRing(source, 2))
        return source, sum(len(targets) for _, targets in loader)

    with pytest.raises(DataError, match=r"001\.png: cannot be read .* --skip-bad"):
        epoch(False)
    source, samples = epoch(True)
    assert samples == 3
    assert [Path(name).name for name in source.bad] == ["001.png"]


def test_a_batch_of_bad_images_only_is_left_out(tmp_path: Path, vision: Manifest) -> None:
    root = folder(tmp_path, {"a": 4})
    for i in (0, 1):
        file = root / "a" / f"{i:03}.png"
        file.write_bytes(file.read_bytes()[:200])
    source = open_source(root, vision, skip_bad=True)
    loader = Loader(source, np.arange(4), BatchRing(source, 2))
    for _ in range(3):  # the ring gets its buffers back
        assert [len(t) for _, t in loader] == [2]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({}, "is empty; it needs one folder"),
        ({"x.png": 1}, "lies at the top level.*there is none yet"),
        ({"x.png": 1, "a/y.png": 1}, r"x\.png lies at the top level"),
        ({"a/": 1, "b/y.png": 1}, "a: holds no images"),
        ({"train/a/y.png": 1}, "train: holds folders .* give the folder whose folders are the classes"),
        ({f"{c}/y.png": 1 for c in "abcd"}, "has 4 class folders, the model 3 classes"),
    ],
)
def test_a_mixed_up_folder_is_one_clear_error(
    tmp_path: Path, vision: Manifest, layout: dict[str, int], message: str
) -> None:
    for name in layout:
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            picture(tmp_path / name)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path, vision)


def test_folders_are_matched_to_the_bundles_classes_by_name(tmp_path: Path, vision: Manifest) -> None:
    named = dataclasses.replace(vision, classes=("dog", "cat", "bird"))
    folder(tmp_path, {"bird": 1, "cat": 1})
    source = open_source(tmp_path, named)
    assert [read(source, i)[1] for i in range(2)] == [2, 1]
    with pytest.raises(DataError, match=r"folder 'bird' is no class of the model \(dog, cat, fish\)"):
        open_source(tmp_path, dataclasses.replace(vision, classes=("dog", "cat", "fish")))


def test_a_missing_path_and_an_unknown_file_are_refused(tmp_path: Path, vision: Manifest) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_source(tmp_path / "nowhere", vision)
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(DataError, match="give a folder of class folders"):
        open_source(tmp_path / "data.csv", vision)


def test_images_for_a_model_of_vectors_are_refused(tmp_path: Path, linear: Manifest) -> None:
    with pytest.raises(DataError, match=r"input \[6\] is no grey or RGB image"):
        open_source(folder(tmp_path, {"a": 1}), linear)


# ---- Array files ----


def arrays(count: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((count, 6), dtype=np.float32), generator.integers(0, 3, count)


@pytest.mark.parametrize("form", ["npz", "compressed", "npy", "folder", "names"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_arrays_are_read_row_by_row_in_every_form(tmp_path: Path, linear: Manifest, form: str, dtype: str) -> None:
    x, y = arrays()
    x = x.astype(dtype)
    path = tmp_path / "d.npz"
    if form == "npz":
        np.savez(path, x=x, y=y)
    elif form == "compressed":
        np.savez_compressed(path, x=x, y=y)
    elif form == "names":
        np.savez(path, other=x, images=x, labels=y)
    else:
        np.save(tmp_path / "x.npy", x)
        np.save(tmp_path / "y.npy", y)
        path = tmp_path if form == "folder" else tmp_path / "x.npy"
    source = open_source(path, linear)
    assert len(source) == 5
    for i in (4, 0, 2):
        inputs, target = read(source, i)
        assert np.array_equal(inputs, x[i].astype(np.float32))
        assert target == y[i]


def test_uint8_rows_may_be_channels_first_or_last_or_lack_the_one_channel(tmp_path: Path, vision: Manifest) -> None:
    for name, shape, channels in (("a", (3, 8, 12), 3), ("b", (8, 12, 3), 3), ("c", (8, 12), 1)):
        manifest = dataclasses.replace(vision, inputs=(InputSpec("x", (channels, 8, 12), (0, 2, 3, 1)),))
        x = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", x=x, y=np.array([0, 2]))
        inputs, _ = read(open_source(tmp_path / f"{name}.npz", manifest), 1)
        assert inputs.dtype == np.uint8
        assert np.array_equal(inputs.reshape(-1), x[1].reshape(-1))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((5, 6), np.float32), np.array([0, 1, 2, 3, 1]), r"row 3 holds 3; targets must be 0 to 2"),
        (np.zeros((5, 6), np.float32), np.array([0, -1, 2, 0, 1]), r"row 1 holds -1"),
        (np.zeros((5, 6), np.float32), np.zeros(4, int), r"has 5 rows, .* 4"),
        (np.zeros((5, 7), np.float32), np.zeros(5, int), r"rows have shape \[7\], the model needs \[6\]"),
        (np.zeros((5, 6), np.int64), np.zeros(5, int), "inputs must be float32 or uint8"),
        (np.zeros((5, 6), np.float32), np.zeros(5), "class labels must be whole numbers"),
        (np.zeros((5, 6), np.float32), np.zeros((5, 2), int), r"rows have shape \[2\]"),
        (np.zeros((0, 6), np.float32), np.zeros(0, int), "holds no samples"),
        (np.asfortranarray(np.zeros((5, 6), np.float32)), np.zeros(5, int), "Fortran order"),
        (np.float32(1), np.zeros(5, int), "single number"),
        (np.zeros((5, 6), "U3"), np.zeros(5, int), "not numeric"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, linear: Manifest, x: np.ndarray, y: np.ndarray, message: str, compressed: bool
) -> None:
    (np.savez_compressed if compressed else np.savez)(tmp_path / "d.npz", x=x, y=y)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "d.npz", linear)


def test_pickled_arrays_are_never_unpickled(tmp_path: Path, linear: Manifest) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([{}], dtype=object), y=np.zeros(1, int))
    with pytest.raises(DataError, match="not numeric"):
        open_source(tmp_path / "d.npz", linear)


def test_a_compressed_array_larger_than_the_cap_is_refused_before_it_is_unpacked(
    tmp_path: Path, linear: Manifest
) -> None:
    x, y = arrays(1000)
    np.savez_compressed(tmp_path / "d.npz", x=np.zeros_like(x), y=y)
    with pytest.raises(DataError, match="more than the cap; save it with np.savez"):
        open_source(tmp_path / "d.npz", linear, memory_limit=20_000)
    np.savez(tmp_path / "d.npz", x=x, y=y)
    assert open_source(tmp_path / "d.npz", linear, memory_limit=20_000).work_bytes < 100


@pytest.mark.parametrize("compressed", [False, True])
def test_truncated_array_files_are_refused(tmp_path: Path, linear: Manifest, compressed: bool) -> None:
    x, y = arrays()
    path = tmp_path / "d.npz"
    (np.savez_compressed if compressed else np.savez)(path, x=x, y=y)
    data = path.read_bytes()
    for cut in range(0, len(data), 37):
        path.write_bytes(data[:cut])
        with pytest.raises(DataError):
            open_source(path, linear)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    whole = (tmp_path / "x.npy").read_bytes()
    for cut in (0, 5, 20, 127, len(whole) - 1):
        (tmp_path / "x.npy").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"x\.npy: is no whole array file"):
            open_source(tmp_path / "x.npy", linear)


def test_half_a_pair_is_refused(tmp_path: Path, linear: Manifest) -> None:
    np.save(tmp_path / "x.npy", arrays()[0])
    with pytest.raises(DataError, match=r"needs its targets beside it"):
        open_source(tmp_path / "x.npy", linear)
    with pytest.raises(DataError, match="the other file of the pair"):
        open_source(tmp_path, linear)
    np.savez(tmp_path / "d.npz", x=arrays()[0])
    with pytest.raises(DataError, match="needs the arrays x and y"):
        open_source(tmp_path / "d.npz", linear)


def test_nan_in_a_row_is_named_when_it_is_reached(tmp_path: Path, linear: Manifest) -> None:
    x, y = arrays()
    x[3, 2] = np.nan
    np.savez(tmp_path / "d.npz", x=x, y=y)
    source = open_source(tmp_path / "d.npz", linear)
    with pytest.raises(DataError, match="row 3 holds NaN"):
        list(Loader(source, np.arange(5), BatchRing(source, 2)))


# ---- Loader ----


@pytest.mark.parametrize(("count", "size"), [(1, 8), (7, 8), (8, 8), (9, 8), (20, 1), (13, 5)])
def test_batches_cover_the_samples_and_the_last_is_short(
    tmp_path: Path, linear: Manifest, count: int, size: int
) -> None:
    x, y = arrays(count)
    np.savez(tmp_path / "d.npz", x=x, y=y)
    source = open_source(tmp_path / "d.npz", linear)
    loader = Loader(source, np.arange(count), BatchRing(source, size), seed=3, shuffle=True)
    order = shuffled(np.arange(count), 3, 2)
    seen, done = [], []
    for batch in loader.batches(2):
        seen.append(batch.inputs.copy())
        done.append(batch.done)
    assert np.array_equal(np.concatenate(seen), x[order])
    assert done == list(range(1, len(loader) + 1))
    rest = [b.inputs.copy() for b in loader.batches(2, start=1)]
    assert all(np.array_equal(a, b) for a, b in zip(rest, seen[1:], strict=True))


def threads() -> int:
    """Of this process, also those that the threading module does not know."""
    return psutil.Process().num_threads()


def test_stopping_early_ends_the_thread_and_gives_the_buffers_back(tmp_path: Path, linear: Manifest) -> None:
    x, y = arrays(100)
    np.savez(tmp_path / "d.npz", x=x, y=y)
    source = open_source(tmp_path / "d.npz", linear)
    loader = Loader(source, np.arange(100), BatchRing(source, 2))
    before = threads()
    for _ in range(10):
        batches = loader.batches(0)
        next(batches)
        batches.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 10
    while threads() > before and time.monotonic() < deadline:  # the last moments of one that has ended
        time.sleep(0.001)
    assert threads() == before
    assert sum(len(t) for _, t in loader) == 100


def test_the_pipeline_holds_what_the_plan_is_told(tmp_path: Path, vision: Manifest) -> None:
    source = open_source(folder(tmp_path, {"a": 2}), vision)
    assert BatchRing.bytes_for(source, 8) == 4 * 8 * (8 * 12 * 3 + 4) + source.work_bytes


def test_any_iterable_of_batches_is_read_ahead_and_can_start_in_the_middle() -> None:
    batches = [(np.full(2, i), np.full(2, -i)) for i in range(5)]
    loader = IterableLoader(batches)
    assert [int(x[0]) for x, _ in loader] == [0, 1, 2, 3, 4]
    assert [(int(b.inputs[0]), b.done) for b in loader.batches(0, start=3)] == [(3, 4), (4, 5)]


def test_an_error_in_the_iterable_reaches_the_caller() -> None:
    def broken() -> Any:
        yield np.zeros(1), np.zeros(1)
        raise ZeroDivisionError("in the data")

    class Once:
        def __iter__(self) -> Any:
            return broken()

    with pytest.raises(ZeroDivisionError, match="in the data"):
        list(IterableLoader(Once()))
