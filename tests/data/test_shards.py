"""Images are checked, and records become a whole, repeatable set of Parquet shards."""

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from upreid_ray.config import InputError
from upreid_ray.data import shards
from upreid_ray.data.layouts import folder_records
from upreid_ray.data.shards import Manifest, read_manifest, usable_image, write_shards

ORIENTATION = 0x0112
NUM_IMAGES = 24


def picture(
    mode: str = "RGB", size: tuple[int, int] = (8, 16), *, left: int = 40, right: int = 200
) -> Image.Image:
    """Return a picture whose left and right halves are flat."""
    width, height = size
    levels = np.full((height, width), left, np.uint8)
    levels[:, width // 2 :] = right
    return Image.fromarray(levels).convert(mode)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(encoded: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(encoded))
    image.load()
    return image


def noise(width: int = 32, height: int = 64) -> bytes:
    """Return a JPEG that does not compress well."""
    rng = np.random.default_rng(0)
    return encode(Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)), "JPEG")


def sixteen_bit() -> bytes:
    """Return a PNG of 16 bits a pixel in middle grey."""
    return encode(Image.fromarray(np.full((16, 8), 0x8000, np.uint16)), "PNG")


def turned() -> bytes:
    """Return a JPEG that is stored lying on its side: upright, its top is dark."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned by 90 degrees clockwise
    return encode(picture(size=(16, 8)), "JPEG", exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_usable_jpeg_and_png_are_kept_byte_for_byte(mode, kind):
    encoded = encode(picture(mode), kind)

    assert usable_image(encoded, max_height=16) == encoded


@pytest.mark.parametrize(
    "encoded",
    [
        encode(picture("CMYK"), "JPEG"),
        sixteen_bit(),
        encode(picture("P"), "PNG"),
        encode(picture("RGBA"), "PNG"),
        encode(picture("LA"), "PNG"),
        encode(picture(), "BMP"),
        encode(picture(), "WEBP"),
        encode(picture("P"), "GIF"),
        turned(),
    ],
    ids=["cmyk", "16 bit", "palette", "rgba", "la", "bmp", "webp", "gif", "turned"],
)
def test_other_images_become_rgb_jpeg(encoded):
    image = decode(usable_image(encoded, max_height=None))

    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (8, 16))


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_a_re_encoded_image_looks_the_same(mode):
    encoded = encode(picture(mode, (16, 32)), "PNG")

    image = decode(usable_image(encoded, max_height=None))

    np.testing.assert_allclose(image, decode(encoded).convert("RGB"), atol=3)


def test_sixteen_bits_are_scaled_to_eight():
    image = decode(usable_image(sixteen_bit(), max_height=None))

    np.testing.assert_allclose(image, np.full((16, 8, 3), 0x80), atol=2)


def test_a_turned_image_is_upright_afterwards():
    pixels = np.asarray(decode(usable_image(turned(), max_height=None)).convert("L"))

    top, bottom = pixels[:6].mean(), pixels[-6:].mean()
    assert (round(top, -1), round(bottom, -1)) == (40, 200)


def test_the_orientation_of_a_turned_image_is_gone_afterwards():
    image = decode(usable_image(turned(), max_height=None))

    assert image.getexif().get(ORIENTATION, 1) == 1


def test_a_high_image_is_shrunk_and_keeps_its_ratio():
    encoded = encode(picture(size=(30, 90)), "PNG")

    assert decode(usable_image(encoded, max_height=60)).size == (20, 60)


def test_a_turned_image_is_measured_upright():
    assert decode(usable_image(turned(), max_height=12)).size == (6, 12)


def test_a_thin_image_keeps_one_column_when_it_is_shrunk():
    encoded = encode(picture(size=(2, 900)), "PNG")

    assert decode(usable_image(encoded, max_height=60)).size == (1, 60)


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "the file is empty"),
        (noise()[:600], "does not decode: "),
        (noise()[:2], "does not decode: "),
        (encode(picture(size=(64, 64)), "PNG")[:-40], "does not decode: "),
        (b"<html>\n<body>Not Found</body>\n</html>", "does not decode: "),
        (
            encode(picture("P"), "GIF", save_all=True, append_images=[picture("P", left=90)]),
            "has 2 frames",
        ),
    ],
    ids=["empty", "truncated jpeg", "start of a jpeg", "truncated png", "text", "animated"],
)
def test_what_is_no_whole_image_is_refused_in_one_line(encoded, reason):
    with pytest.raises(ValueError, match=rf"^{reason}[^\n]*$"):
        usable_image(encoded, max_height=None)


@pytest.mark.parametrize("limit", [100, 60], ids=["warned about", "refused by Pillow"])
def test_a_decompression_bomb_is_refused_in_one_line(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)

    with pytest.raises(ValueError, match=r"^does not decode: [^\n]+bomb[^\n]*$"):
        usable_image(encode(picture(), "PNG"), max_height=None)


def test_a_folder_without_manifest_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match=rf"^{tmp_path}: no manifest\.json; [^\n]+$"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{}", "[1, 2", '{"version": 1}'])
def test_a_broken_manifest_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)

    with pytest.raises(InputError, match=rf"^{tmp_path}/manifest\.json: [^\n]+$"):
        read_manifest(str(tmp_path))


def test_an_unknown_scheme_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"^nowhere://bucket/x: [^\n]+$"):
        read_manifest("nowhere://bucket/x")


# From here on records become shards.


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    """Cut shards and row groups so small that a few images make several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SMALL_SHARD_IMAGES", 4)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Make a folder in Market-1501's layout, with labels, and two files that are broken."""
    root = tmp_path_factory.mktemp("source")
    for index in range(NUM_IMAGES):
        folder = "bounding_box_train" if index < NUM_IMAGES * 3 // 4 else "bounding_box_test"
        path = root / folder / f"{index:04d}_c{1 + index % 3}s1_{index:06d}_00.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(picture(left=index), "PNG"))
    (root / "bounding_box_train/0900_c1s1_000000_00.jpg").write_bytes(noise()[:500])
    (root / "bounding_box_test/0901_c1s1_000000_00.jpg").write_bytes(b"")
    return root


def write(
    source: Path | str,
    out: Path,
    *,
    seed: int = 0,
    max_height: int | None = None,
    on_progress: Callable[[int], object] = bool,
) -> Manifest:
    return write_shards(
        folder_records(str(source)),
        str(out),
        source=str(source),
        seed=seed,
        max_height=max_height,
        on_progress=on_progress,
    )


@pytest.fixture(scope="module")
def prepared(ray_cluster, source, tmp_path_factory) -> tuple[Path, Manifest, list[int]]:
    """Write the source as shards once."""
    out = tmp_path_factory.mktemp("prepared")
    progress: list[int] = []
    return out, write(source, out, on_progress=progress.append), progress


def rows(out: Path, manifest: Manifest) -> list[dict[str, object]]:
    return [row for shard in manifest.shards for row in rows_of(out / shard.name)]


def rows_of(file: Path) -> list[dict[str, object]]:
    return pq.ParquetFile(file).read().to_pylist()


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.mark.ray
def test_shards_hold_the_bytes_and_labels_of_every_usable_image_once(prepared, source):
    out, manifest, _ = prepared

    stored = sorted(rows(out, manifest), key=lambda row: str(row["key"]))

    splits = {"bounding_box_train": "train", "bounding_box_test": "gallery"}
    paths = sorted(
        path.relative_to(source) for path in source.rglob("*.png") if path.stat().st_size
    )
    assert stored == [
        {
            "key": path.as_posix(),
            "image": (source / path).read_bytes(),
            "pid": int(path.name[:4]),
            "camid": int(path.name[6]),
            "split": splits[path.parts[0]],
        }
        for path in paths
    ]


@pytest.mark.ray
def test_a_shard_holds_one_split(prepared):
    out, manifest, _ = prepared

    held = [{row["split"] for row in rows_of(out / each.name)} for each in manifest.shards]

    assert held == [{shard.split} for shard in manifest.shards]


@pytest.mark.ray
def test_unlabeled_images_have_no_person_and_no_camera(ray_cluster, tmp_path):
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops/a.png").write_bytes(encode(picture(), "PNG"))

    manifest = write(tmp_path / "crops", tmp_path / "out")

    (row,) = rows(tmp_path / "out", manifest)
    assert (row["pid"], row["camid"], row["split"]) == (None, None, "unlabeled")


@pytest.mark.ray
def test_the_manifest_tells_the_truth_about_each_file(prepared):
    out, manifest, _ = prepared

    described = [
        (each.name, each.num_images, each.num_bytes, each.sha256) for each in manifest.shards
    ]

    files = {name: content for name, content in contents(out).items() if name[-5:] != ".json"}
    assert described == [
        (
            name,
            len(rows_of(out / name)),
            len(content),
            hashlib.sha256(content).hexdigest(),
        )
        for name, content in files.items()
    ]


@pytest.mark.ray
def test_the_manifest_counts_the_usable_images_of_each_split(prepared):
    _, manifest, _ = prepared

    assert manifest.counts() == {"train": NUM_IMAGES * 3 // 4, "gallery": NUM_IMAGES // 4}


@pytest.mark.ray
def test_the_manifest_on_disk_is_the_one_returned(prepared):
    out, manifest, _ = prepared

    assert read_manifest(str(out)) == manifest


@pytest.mark.ray
def test_refused_images_are_listed_with_their_reasons(prepared):
    _, manifest, _ = prepared

    listed = [(each.key, each.reason.partition(":")[0]) for each in manifest.refused]

    assert listed == [
        ("bounding_box_test/0901_c1s1_000000_00.jpg", "the file is empty"),
        ("bounding_box_train/0900_c1s1_000000_00.jpg", "does not decode"),
    ]


@pytest.mark.ray
def test_progress_adds_up_to_the_number_of_records(prepared, source):
    _, _, progress = prepared

    assert sum(progress) == len(folder_records(str(source)))


@pytest.mark.ray
def test_progress_of_a_set_that_is_whole_adds_up_too(prepared, source):
    out, _, _ = prepared
    progress: list[int] = []

    write(source, out, on_progress=progress.append)

    assert sum(progress) == len(folder_records(str(source)))


@pytest.mark.ray
def test_images_of_a_split_are_shuffled(prepared):
    out, manifest, _ = prepared

    keys = [str(row["key"]) for row in rows(out, manifest) if row["split"] == "train"]

    assert keys != sorted(keys)


@pytest.mark.ray
def test_the_same_seed_writes_the_same_files(prepared, source, tmp_path):
    out, _, _ = prepared

    write(source, tmp_path / "again")

    assert contents(tmp_path / "again") == contents(out)


@pytest.mark.ray
def test_another_seed_writes_another_order(prepared, source, tmp_path):
    out, manifest, _ = prepared

    other = write(source, tmp_path, seed=1)

    keys = [
        [row["key"] for row in rows(*each)] for each in ((out, manifest), (tmp_path, other))
    ]
    assert (sorted(keys[0]) == sorted(keys[1]), keys[0] == keys[1]) == (True, False)


@pytest.mark.ray
def test_the_digest_depends_only_on_the_splits_asked_for(prepared):
    _, manifest, _ = prepared
    train = [shard for shard in manifest.shards if shard.split == "train"]
    without_gallery = manifest.model_copy(update={"shards": tuple(train)})

    digests = manifest.digest(["train"]), manifest.digest()

    assert digests == (without_gallery.digest(), manifest.digest(["train", "gallery"]))


@pytest.mark.ray
def test_writing_a_whole_set_again_touches_no_file(prepared, source):
    out, manifest, _ = prepared
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}

    again = write(source, out)

    after = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert (again, after) == (manifest, before)


@dataclass
class Killed:
    """What a killed preparation leaves: some shards, half a file and a file that is cut."""

    out: Path
    kept: Path
    kept_since: int


@pytest.fixture
def killed(prepared, tmp_path) -> Killed:
    out, manifest, _ = prepared
    files = contents(out)
    missing, cut, half, kept = (shard.name for shard in manifest.shards[:4])
    del files["manifest.json"], files[missing]
    files[cut] = files[cut][: len(files[cut]) // 2]
    files[f"{half}.part"] = files.pop(half)[:100]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    os.utime(tmp_path / kept, ns=(1, 1))
    return Killed(tmp_path, tmp_path / kept, 1)


@pytest.mark.ray
def test_a_killed_preparation_is_completed_to_the_same_files(prepared, killed, source):
    out, manifest, _ = prepared

    completed = write(source, killed.out)

    assert (completed, contents(killed.out)) == (manifest, contents(out))


@pytest.mark.ray
def test_finished_shards_of_a_killed_preparation_are_kept(killed, source):
    write(source, killed.out)

    assert killed.kept.stat().st_mtime_ns == killed.kept_since


@pytest.mark.ray
def test_shards_of_another_set_are_written_anew_when_a_preparation_continues(
    prepared, killed, source
):
    write(source, killed.out, seed=5)

    keys = [row["key"] for row in rows_of(killed.kept)]
    assert keys != [row["key"] for row in rows_of(prepared[0] / killed.kept.name)]


@pytest.mark.ray
@pytest.mark.parametrize("changed", [{"seed": 3}, {"max_height": 8}])
def test_another_set_in_the_folder_is_refused(prepared, source, changed):
    out, _, _ = prepared

    with pytest.raises(InputError, match=rf"^--out {out}: holds another set of shards[^\n]+$"):
        write(source, out, **changed)


@pytest.mark.ray
def test_a_set_without_a_usable_image_is_refused(ray_cluster, tmp_path):
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops/a.jpg").write_bytes(b"no image")
    (tmp_path / "crops/b.jpg").write_bytes(b"")

    with pytest.raises(InputError, match=r"^[^\n]*crops: none of 2 images can be used[^\n]+$"):
        write(tmp_path / "crops", tmp_path / "out")

    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.ray
def test_a_file_name_that_is_no_text_does_not_stop_the_others(ray_cluster, tmp_path):
    crops = tmp_path / "crops"
    crops.mkdir()
    (crops / "a.png").write_bytes(encode(picture(), "PNG"))
    Path(os.fsdecode(os.fsencode(crops) + b"/caf\xe9.png")).write_bytes(
        encode(picture(), "PNG")
    )

    manifest = write(crops, tmp_path / "out")

    assert (manifest.counts(), len(manifest.refused)) in [
        ({"unlabeled": 2}, 0),
        ({"unlabeled": 1}, 1),
    ]


@pytest.mark.parametrize("out", ["file", "file/out"])
def test_a_folder_that_cannot_be_made_is_refused_in_one_line(source, tmp_path, out):
    (tmp_path / "file").write_bytes(b"in the way")

    with pytest.raises(InputError, match=rf"^--out {tmp_path / out}: [^\n]+$"):
        write(source, tmp_path / out)
