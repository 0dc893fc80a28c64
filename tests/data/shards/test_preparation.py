"""Records become a whole, repeatable set of Parquet shards."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data.pictures import decode, encode, noise, picture
from upreid_ray.config.errors import InputError
from upreid_ray.data.shards import preparation
from upreid_ray.data.shards.audit import audit
from upreid_ray.data.shards.images import ImageRules
from upreid_ray.data.shards.manifest import Manifest
from upreid_ray.data.shards.page import write_page
from upreid_ray.data.shards.preparation import ShardWriter, cut_into_shards, write_shards
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.sources.layouts import folder_records
from upreid_ray.storage import Location

NUM_IMAGES = 24


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    """Cut shards and row groups so small that a few images make several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "SMALL_SHARD_IMAGES", 4)
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
    on_progress: Callable[[int], object] = bool,
    **rules: object,
) -> Manifest:
    return write_shards(
        folder_records(str(source)),
        str(out),
        source=str(source),
        seed=seed,
        rules=ImageRules(**rules),
        on_progress=on_progress,
    ).manifest


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
    labels = ("key", "image", "pid", "camid", "split")
    stored = [{name: row[name] for name in labels} for row in stored]

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

    files = {name: each for name, each in contents(out).items() if name.endswith(".parquet")}
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

    assert ShardSet.open(str(out)).manifest == manifest


@pytest.mark.ray
def test_refused_images_are_listed_with_their_reasons(prepared):
    out, manifest, _ = prepared

    listed = [
        (each.key, each.kind, each.reason.partition(":")[0])
        for each in ShardSet.open(str(out)).refused()
    ]

    assert listed == [
        ("bounding_box_test/0901_c1s1_000000_00.jpg", "empty", "the file is empty"),
        ("bounding_box_train/0900_c1s1_000000_00.jpg", "undecodable", "does not decode"),
    ]
    assert manifest.num_refused == {"empty": 1, "undecodable": 1}


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
    del files["manifest.json"], files["refused.jsonl"], files[missing]
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

    assert (manifest.counts(), sum(manifest.num_refused.values())) in [
        ({"unlabeled": 2}, 0),
        ({"unlabeled": 1}, 1),
    ]


@pytest.mark.parametrize("out", ["file", "file/out"])
def test_a_folder_that_cannot_be_made_is_refused_in_one_line(source, tmp_path, out):
    (tmp_path / "file").write_bytes(b"in the way")

    with pytest.raises(InputError, match=rf"^{tmp_path / out}: [^\n]+$"):
        write(source, tmp_path / out)


# What is asked of the images.


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    """Make a labelled set with equal, similar, small and lying images in train and gallery."""
    root = tmp_path_factory.mktemp("film")
    rng = np.random.default_rng(0)
    for index in range(12):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 4, 3), np.uint8))
        first = coarse.resize((64, 128), Image.Resampling.BICUBIC)
        for part in ("bounding_box_train", "bounding_box_test"):
            kinds = {
                "00": encode(first, "PNG"),
                "01": encode(first, "PNG", compress_level=1),
                "02": encode(first, "JPEG", quality=50),
                "03": encode(coarse, "PNG"),
                "04": encode(first.resize((128, 64)), "PNG"),
            }
            for kind, content in kinds.items():
                path = root / part / f"{index:04d}_c1s1_{kind}.png"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
    return root


ASKED = {"min_width": 16, "min_aspect": 1.0, "duplicates": "near"}


@pytest.fixture(scope="module")
def filtered(ray_cluster, film, tmp_path_factory) -> tuple[Path, Manifest]:
    """Write the film under rules once."""
    out = tmp_path_factory.mktemp("filtered")
    return out, write(film, out, **ASKED)


@pytest.mark.ray
def test_rules_hold_for_training_images_and_what_breaks_them_is_counted_by_kind(filtered):
    _, manifest = filtered

    assert manifest.counts() == {"gallery": 60, "train": 12}
    assert manifest.num_refused == {"duplicate": 24, "small": 12, "shape": 12}


@pytest.mark.ray
def test_duplicates_are_listed_with_an_image_that_stayed(filtered):
    out, manifest = filtered
    kept = {str(row["key"]) for row in rows(out, manifest)}

    reasons = [
        one.reason for one in ShardSet.open(str(out)).refused() if one.kind == "duplicate"
    ]

    assert {reason.removeprefix("is a duplicate of ") for reason in reasons} <= kept


@pytest.mark.ray
def test_only_equal_pixels_are_exact_duplicates(ray_cluster, film, tmp_path):
    manifest = write(film, tmp_path, duplicates="exact")

    assert manifest.num_refused == {"duplicate": 12}


@pytest.mark.ray
def test_a_preparation_killed_while_it_removes_duplicates_is_completed(
    filtered, film, tmp_path
):
    out, manifest = filtered
    records, rules = folder_records(str(film)), ImageRules(**ASKED)
    writer = ShardWriter(Location(str(tmp_path)), manifest.made_from, rules, records.read, 1)
    parts = list(cut_into_shards(records.table, seed=0))
    for part in parts:
        writer.write(part)
    done = parts[-1].column("name")[0].as_py()
    (tmp_path / done).write_bytes((out / done).read_bytes())

    completed = write(film, tmp_path, **ASKED)

    assert (completed, contents(tmp_path)) == (manifest, contents(out))


# What the tasks of a preparation do, in a process that can be killed without a cluster.
WRITE = """
import sys
from upreid_ray.data.shards import preparation
from upreid_ray.data.shards.images import ImageRules
from upreid_ray.data.sources.layouts import folder_records
from upreid_ray.storage import Location

source, out, plan = sys.argv[1:]
preparation.SMALL_SHARD_IMAGES = 4
records = folder_records(source)
rules = ImageRules(min_width=16, min_aspect=1.0, duplicates="near")
writer = preparation.ShardWriter(Location(out), plan, rules, records.read, 1)
for part in preparation.cut_into_shards(records.table, seed=0):
    writer.write(part)
"""


@pytest.mark.ray
def test_a_preparation_killed_again_and_again_ends_like_one_that_was_not(
    filtered, film, tmp_path
):
    out, manifest = filtered

    for num_files in (1, 4, 9):
        words = [sys.executable, "-c", WRITE, str(film), str(tmp_path), manifest.made_from]
        with subprocess.Popen(words) as process:
            while process.poll() is None and len(list(tmp_path.iterdir())) < num_files:
                time.sleep(0.001)
            process.kill()
        assert not (tmp_path / "manifest.json").exists()
    completed = write(film, tmp_path, **ASKED)

    assert process.returncode == -signal.SIGKILL
    assert (completed, contents(tmp_path)) == (manifest, contents(out))


@pytest.mark.ray
def test_the_colours_of_a_set_are_those_of_its_training_images(filtered):
    out, manifest = filtered

    assert_colours(manifest, [row for row in rows(out, manifest) if row["split"] == "train"])


@pytest.mark.ray
def test_colours_are_those_of_all_images_where_no_training_image_is_left(
    ray_cluster, source, tmp_path
):
    manifest = write(source, tmp_path, min_height=1000)

    assert manifest.counts().keys() == {"gallery"}
    assert_colours(manifest, rows(tmp_path, manifest))


def assert_colours(manifest: Manifest, images: list[dict[str, object]]) -> None:
    pixels = [
        np.asarray(decode(row["image"]).convert("RGB")).reshape(-1, 3) / 255 for row in images
    ]
    mean = np.mean([each.mean(0) for each in pixels], axis=0)
    square = np.mean([(each**2).mean(0) for each in pixels], axis=0)
    np.testing.assert_allclose(manifest.mean, mean, atol=1e-4)
    np.testing.assert_allclose(manifest.std, np.sqrt(square - mean**2), atol=1e-4)


@pytest.mark.ray
def test_sizes_of_images_are_columns_of_the_shards(filtered):
    out, manifest = filtered

    sizes = [(row["width"], row["height"]) for row in rows(out, manifest)]

    assert sizes == [decode(row["image"]).size for row in rows(out, manifest)]


@pytest.mark.ray
def test_a_page_shows_images_of_the_set_and_of_what_was_refused(filtered, film):
    out, manifest = filtered

    write_page(ShardSet.open(str(out)), folder_records(str(film)), seed=0)

    page = (out / "samples.html").read_text()
    (out / "samples.html").unlink()
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings == [
        "Random images",
        *(f"Refused: {kind}" for kind in manifest.num_refused),
    ]
    refused = page.split("<h2>Refused", 1)[1]
    assert (refused.count("<img"), "no picture" in page) == (16 + 12 + 12, False)


# Sets that were damaged later.


@pytest.mark.ray
@pytest.mark.parametrize("decoding", [False, True])
def test_a_whole_set_passes_the_audit(prepared, decoding):
    out, manifest, _ = prepared
    progress: list[int] = []

    damaged = audit(
        ShardSet(Location(str(out)), manifest), decode=decoding, on_progress=progress.append
    )

    assert (damaged, sum(progress)) == ({}, NUM_IMAGES)


@pytest.mark.ray
def test_the_audit_names_what_is_wrong_with_each_damaged_shard(prepared, tmp_path):
    out, manifest, _ = prepared
    files = contents(out)
    changed, cut, missing = (shard.name for shard in manifest.shards[:3])
    files[changed] = files[changed][:200] + b"?" + files[changed][201:]
    files[cut] = files[cut][:-9]
    del files[missing]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)

    damaged = audit(ShardSet(Location(str(tmp_path)), manifest), decode=False, on_progress=bool)

    assert damaged[changed] == "has another sha256 than when it was written"
    assert re.fullmatch(r"has \d+ bytes instead of \d+", damaged[cut])
    assert "No such file" in damaged[missing]
    assert len(damaged) == 3


# Which images go into one shard, without writing any.


def table_of(num_images: int, num_units: int | None = None, num_bytes: int = 1) -> pa.Table:
    columns = {
        "key": [f"{i:04d}" for i in range(num_images)],
        "split": ["unlabeled"] * num_images,
        "num_bytes": [num_bytes] * num_images,
    }
    if num_units is not None:
        columns["unit"] = [i * num_units // num_images for i in range(num_images)]
    return pa.table(columns)


@pytest.mark.parametrize("num_units", [None, 2, 7, 40])
def test_a_plan_holds_each_record_once_in_shards_of_bounded_size(num_units):
    table = table_of(40, num_units, num_bytes=2**20)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "SHARD_BYTES", 8 * 2**20)
        parts = list(cut_into_shards(table, seed=0))

    keys = [key for part in parts for key in part.column("key").to_pylist()]
    assert sorted(keys) == table.column("key").to_pylist()
    assert max(len(part) for part in parts) <= max(8, 40 // (num_units or 40) * 2)


def test_a_unit_stays_in_one_shard_and_its_images_do_not_stay_together():
    table = table_of(400, 20)

    parts = list(cut_into_shards(table, seed=0))

    units = [part.column("unit").to_pylist() for part in parts]
    assert sum(len(set(each)) for each in units) == 20
    assert all(np.mean(np.diff(each) == 0) < 0.7 for each in units)
