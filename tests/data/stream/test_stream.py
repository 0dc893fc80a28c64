"""Shards become batches whose order depends on the seed alone.

The images here are flat, and their colours are their numbers, so that a batch says what is in
it. Their Parquet files are written as they are: what does not decode can be in them.
"""

import hashlib
import io
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from upreid_ray.config.errors import InputError, RunFailed
from upreid_ray.config.presets import PRESETS
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.data.shards import manifest
from upreid_ray.data.shards.manifest import Manifest, Shard
from upreid_ray.data.shards.row_groups import MAX_OPEN_SHARDS
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.stream import ray_data, training
from upreid_ray.data.stream.damage import (
    check_undecodable,
    count_undecodable,
    without_undecodable,
)
from upreid_ray.data.stream.decode import Columns, decode_images
from upreid_ray.data.stream.labelled import LabelledImages
from upreid_ray.data.stream.ray_data import read_stream, stream_blocks
from upreid_ray.data.stream.training import TrainingImages
from upreid_ray.storage import Location

BROKEN = b"\x89PNG no image"
folders = count()


def flat(number: int) -> bytes:
    """Return a PNG whose colour is the number."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 8), (number % 251, number // 251, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def numbers(images: np.ndarray) -> list[int]:
    """Return the numbers of flat images ``[n, 3, H, W]``; check that they are flat."""
    colours = images[:, :, 0, 0].astype(int)
    assert (images == images[:, :, :1, :1]).all()
    return (colours[:, 0] + 251 * colours[:, 1]).tolist()


def write_set(
    folder: Path, splits: dict[str, list[bytes]], *, row_group: int = 4, num_shards: int = 2
) -> ShardSet:
    """Write images as shards; pid and camid are the image's number in its split and 1."""
    described = []
    for split, images in splits.items():
        for part, members in enumerate(np.array_split(np.arange(len(images)), num_shards)):
            rows = [
                {
                    "key": f"{split}/{i}",
                    "image": images[i],
                    "pid": None if split == "unlabeled" else i,
                    "camid": None if split == "unlabeled" else 1,
                    "split": split,
                }
                for i in members.tolist()
            ]
            name = f"{split}-{part}.parquet"
            folder.mkdir(parents=True, exist_ok=True)
            table = pa.Table.from_pylist(rows, schema=manifest.SCHEMA)
            pq.write_table(
                table,
                folder / name,
                row_group_size=row_group,
                compression="none",
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
            )
            content = (folder / name).read_bytes()
            described.append(
                Shard(
                    name=name,
                    split=split,
                    num_images=len(rows),
                    num_bytes=len(content),
                    sha256=hashlib.sha256(content).hexdigest(),
                )
            )
    held = Manifest(
        version=manifest.FORMAT_VERSION,
        source="test",
        made_from="",
        row_group_images=row_group,
        shards=tuple(described),
    )
    return ShardSet(Location(str(folder)), held)


def config(
    *, batch: int = 8, group: int = 4, seed: int = 0, undecodable: float = 0.01
) -> PretrainConfig:
    return PRESETS["demo"].override(
        {
            "seed": seed,
            "data.height": 32,
            "data.width": 32,
            "data.max_undecodable": undecodable,
            "training.batch_size": batch,
            "training.group_size": group,
            "loss.intrinsic_weight": 0,
        }
    )


def training_images(
    folder: Path, images: list[bytes], settings: PretrainConfig
) -> TrainingImages:
    """Write images as the unlabeled and train splits of a new set and open it."""
    folder = folder / f"set{next(folders)}"
    half = len(images) // 2
    splits = {"train": images[:half], "unlabeled": images[half:], "query": [flat(0)] * 3}
    return TrainingImages(write_set(folder, splits), settings)


def batches(
    images: TrainingImages, start: int, stop: int, *, rank: int = 0, num_workers: int = 1
) -> list[np.ndarray]:
    """Return one worker's batches of these steps."""
    rounds = list(images.rounds(start, stop))
    blocks = [block for each in rounds for block in each.by_worker(num_workers)[rank]]
    mine = map(images.read, blocks)
    columns = images.batches(rounds, mine, rank=rank, num_workers=num_workers)
    return [each["image"] for each in islice(columns, stop - start)]


def undecodable(images: TrainingImages, **worker: int) -> Counter[str]:
    """Count the images of one worker's batches of an epoch that do not decode, by shard."""
    rounds = list(images.rounds(0, images.steps_per_epoch))
    num_workers, rank = worker.get("num_workers", 1), worker.get("rank", 0)
    blocks = [block for each in rounds for block in each.by_worker(num_workers)[rank]]
    columns = images.batches(rounds, map(images.read, blocks), **worker)
    counts = (count_undecodable(each, images.row_groups) for each in columns)
    return sum(counts, Counter())


def order(images: TrainingImages, start: int, stop: int, **worker: int) -> list[list[int]]:
    """Return the numbers of the images of each step."""
    return [numbers(batch) for batch in batches(images, start, stop, **worker)]


def epoch(images: TrainingImages, number: int) -> list[int]:
    """Return the numbers of the images of one epoch in their order."""
    steps = images.steps_per_epoch
    return list(chain(*order(images, number * steps, (number + 1) * steps)))


@pytest.fixture(autouse=True)
def blocks_of_a_few_images(monkeypatch):
    """Let a block be of a few groups, so that small sets have several rounds."""
    monkeypatch.setattr(training, "MIN_BLOCK_IMAGES", 10)
    monkeypatch.setattr(training, "MAX_BLOCK_IMAGES", 10)


small = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
shapes = st.fixed_dictionaries(
    {
        "group": st.integers(2, 7),
        "num_groups": st.integers(1, 4),
        "steps": st.integers(1, 9),
        "left_over": st.integers(0, 7),
    }
)


def shaped(folder: Path, shape: dict[str, int], *, seed: int = 0) -> TrainingImages:
    """Make a set of as many images as the shape says."""
    batch = shape["group"] * shape["num_groups"]
    num_images = max(batch * shape["steps"] + shape["left_over"] % batch, 4)
    described = config(batch=batch, group=shape["group"], seed=seed)
    return training_images(folder, [flat(i) for i in range(num_images)], described)


SIZE = {"height": config().data.height, "width": config().data.width}


def test_images_count_and_steps_are_those_of_the_training_splits(tmp_path):
    images = training_images(tmp_path, [flat(i) for i in range(43)], config())

    assert (images.num_images, images.steps_per_epoch) == (43, 5)


@pytest.mark.parametrize("number", [0, 1, 7])
def test_an_epoch_of_whole_batches_holds_every_image_once(tmp_path, number):
    images = training_images(tmp_path, [flat(i) for i in range(80)], config())

    assert sorted(epoch(images, number)) == list(range(80))


@small
@given(shape=shapes)
def test_no_image_comes_twice_in_an_epoch(tmp_path, shape):
    images = shaped(tmp_path, shape)

    seen = Counter(epoch(images, 0))

    assert (set(seen.values()), len(seen)) == (
        {1},
        images.steps_per_epoch * shape["group"] * shape["num_groups"],
    )


def test_which_images_are_left_over_differs_between_epochs(tmp_path):
    images = training_images(tmp_path, [flat(i) for i in range(45)], config())

    used = {frozenset(epoch(images, number)) for number in range(4)}

    assert len(used) > 1


def test_epochs_have_different_orders(tmp_path):
    images = training_images(tmp_path, [flat(i) for i in range(40)], config())

    orders = {tuple(epoch(images, number)) for number in range(4)}

    assert len(orders) == 4


def test_the_same_seed_gives_the_same_order(tmp_path):
    first, second = (
        training_images(tmp_path, [flat(i) for i in range(40)], config(seed=5))
        for _ in range(2)
    )

    assert order(first, 0, 8) == order(second, 0, 8)


def test_another_seed_gives_another_order(tmp_path):
    first, second = (
        training_images(tmp_path, [flat(i) for i in range(40)], config(seed=seed))
        for seed in (5, 6)
    )

    assert epoch(first, 0) != epoch(second, 0)


def test_neighbours_on_disk_are_spread_over_an_epoch(tmp_path):
    images = training_images(tmp_path, [flat(i) for i in range(200)], config())

    seen = epoch(images, 0)

    steps = np.diff(seen)
    assert np.mean(steps == 1) < 0.1


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_the_order_does_not_depend_on_the_number_of_workers(tmp_path, num_workers):
    described = config(batch=16, group=4)
    images = training_images(tmp_path, [flat(i) for i in range(70)], described)

    by_rank = [order(images, 0, 8, rank=r, num_workers=num_workers) for r in range(num_workers)]

    joined = [list(chain(*parts)) for parts in zip(*by_rank, strict=True)]
    assert joined == order(images, 0, 8)


@small
@given(shape=shapes, num_epochs=st.integers(1, 2), data=st.data())
def test_starting_at_a_step_continues_the_order(tmp_path, shape, num_epochs, data):
    images = shaped(tmp_path, shape)
    stop = images.steps_per_epoch * num_epochs
    start = data.draw(st.integers(0, stop))

    continued = order(images, start, stop)

    assert continued == order(images, 0, stop)[start:]


@small
@given(shape=shapes, data=st.data())
def test_rounds_hold_each_step_once(tmp_path, shape, data):
    images = shaped(tmp_path, shape)
    stop = 2 * images.steps_per_epoch
    start = data.draw(st.integers(0, stop - 1))

    rounds = list(images.rounds(start, stop))

    steps = [each.first_step + i for each in rounds for i in range(each.num_steps)]
    assert steps[: stop - start] == list(range(start, stop))


@pytest.mark.parametrize("step", [0, 1, 4])
def test_the_keys_of_a_step_are_those_of_its_images(tmp_path, step):
    images = training_images(tmp_path, [flat(i) for i in range(20)], config())
    this = next(images.rounds(step, step + 1))
    decoded = (images.read(block) for block in this.blocks)
    batch = next(images.batches([this], decoded, num_workers=1))

    named = [split_number(key) for key in images.keys(step)]

    assert named == numbers(batch["image"])


def split_number(key: str) -> int:
    """Return the number of an image of `training_images` from its key."""
    split, _, place = key.partition("/")
    return int(place) + (10 if split == "unlabeled" else 0)


def test_a_batch_is_uint8_of_the_size_asked_for(tmp_path):
    images = training_images(tmp_path, [flat(i) for i in range(20)], config())

    (batch,) = batches(images, 0, 1)

    assert (batch.dtype, batch.shape) == (np.uint8, (8, 3, 32, 32))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_images_come_with_three_equal_channels(tmp_path, kind):
    buffer = io.BytesIO()
    Image.new("L", (64, 128), 90).save(buffer, kind)
    images = training_images(tmp_path, [buffer.getvalue()] * 20, config())

    (batch,) = batches(images, 0, 1)

    np.testing.assert_allclose(batch, 90, atol=1)


def test_images_are_resized_and_not_cropped(tmp_path):
    buffer = io.BytesIO()
    pixels = np.zeros((100, 60, 3), np.uint8)
    pixels[50:] = 200
    Image.fromarray(pixels).save(buffer, "PNG")
    images = training_images(tmp_path, [buffer.getvalue()] * 20, config())

    (batch,) = batches(images, 0, 1)

    assert (batch[:, :, :14].max(), batch[:, :, 18:].min()) == (0, 200)


def test_images_that_do_not_decode_leave_the_others_in_their_places(tmp_path):
    whole = [flat(i) for i in range(80)]
    broken = [BROKEN if i % 9 == 0 else image for i, image in enumerate(whole)]

    expected = epoch(training_images(tmp_path, whole, config()), 0)
    seen = epoch(training_images(tmp_path, broken, config(undecodable=1)), 0)

    differing = {was for was, now in zip(expected, seen, strict=True) if was != now}
    assert differing <= set(range(0, 80, 9))


def test_an_image_that_does_not_decode_is_replaced_by_one_that_does(tmp_path):
    whole = [flat(i) for i in range(1, 81)]
    broken = [BROKEN if i % 2 == 0 else image for i, image in enumerate(whole)]
    images = training_images(tmp_path, broken, config(undecodable=1))

    channels = np.concatenate(batches(images, 0, images.steps_per_epoch))[:, 2]

    assert set(channels.ravel().tolist()) == {7}


@small
@given(seed=st.integers(0, 1000), start=st.integers(0, 9))
def test_a_continued_order_replaces_the_same_images(tmp_path, seed, start):
    broken = [BROKEN if i % 3 == 0 else flat(i) for i in range(80)]
    images = training_images(tmp_path, broken, config(seed=seed, undecodable=1))

    continued = order(images, start, 10)

    assert continued == order(images, 0, 10)[start:]


@example(kind="JPEG", place=0.20474824924787252, damage=b"\x10\x00\xab", cut=False)  # a bomb
@given(
    kind=st.sampled_from(["JPEG", "PNG"]),
    place=st.floats(0, 1, exclude_max=True),
    damage=st.binary(min_size=1, max_size=24),
    cut=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_damaged_images_never_stop_the_reading(kind, place, damage, cut):
    buffer = io.BytesIO()
    levels = np.arange(16 * 32 * 3, dtype=np.uint8).reshape(32, 16, 3)
    Image.fromarray(levels).save(buffer, kind)
    whole = buffer.getvalue()
    at = int(place * len(whole))
    damaged = whole[:at] + damage + (b"" if cut else whole[at + len(damage) :])

    columns = decode_images(pa.chunked_array([[whole, damaged]]), 32, 32)

    assert columns["decoded"][0]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_each_image_of_an_epoch_that_does_not_decode_is_counted_once(tmp_path, num_workers):
    broken = [BROKEN if i % 4 == 0 else flat(i) for i in range(80)]
    images = training_images(tmp_path, broken, config())

    counts = [
        undecodable(images, rank=rank, num_workers=num_workers) for rank in range(num_workers)
    ]

    assert sum(counts, Counter()).total() == 20


def test_too_many_images_that_do_not_decode_fail_the_run_and_their_shard_is_named():
    counts = Counter({"set/a.parquet": 3, "set/b.parquet": 5})

    with pytest.raises(RunFailed, match=r"^8 of 80 images do not [^\n]+ 5 of them in set/b\."):
        check_undecodable(counts, 80, 0.09)


def test_as_many_images_as_allowed_may_fail_to_decode():
    assert check_undecodable(Counter({"a": 8}), 80, 0.1).startswith("8 of 80 images")
    assert check_undecodable(Counter(), 80, 0.1) == ""


def test_a_run_fails_where_no_image_decodes_whatever_the_limit():
    with pytest.raises(RunFailed, match="80 of 80 images do not decode"):
        check_undecodable(Counter({"a": 80}), 80, 1.0)


def damage(folder: Path, kind: str, split: str = "unlabeled") -> str:
    """Damage one of the two shards of a split; return its name."""
    file = folder / f"{split}-1.parquet"
    content = file.read_bytes()
    if kind == "missing":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "another":
        file.write_bytes((folder / f"{split}-0.parquet").read_bytes() + b"PAR1")
    else:
        # In the pixels of the last image of the shard.
        at = content.rindex(b"IEND") - 20
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    return file.name


DAMAGES = ["missing", "cut", "another", "one bit"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_images_of_a_damaged_shard_leave_the_others_in_their_places(tmp_path, kind):
    whole = training_images(tmp_path, [flat(i) for i in range(80)], config())
    expected = epoch(whole, 0)
    images = training_images(tmp_path, [flat(i) for i in range(80)], config(undecodable=1))

    damage(sorted(tmp_path.iterdir())[-1], kind)

    seen = epoch(images, 0)
    changed = {was for was, now in zip(expected, seen, strict=True) if was != now}
    assert changed <= set(range(60, 80))
    assert len(changed) >= (4 if kind == "one bit" else 19)


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_images_of_a_damaged_shard_are_counted_for_it(tmp_path, kind):
    images = training_images(tmp_path, [flat(i) for i in range(80)], config())
    folder = sorted(tmp_path.iterdir())[-1]

    name = damage(folder, kind)

    (shard,) = undecodable(images)
    assert shard == str(folder / name)


def test_images_of_which_none_decodes_are_all_counted(tmp_path):
    images = training_images(tmp_path, [BROKEN] * 80, config())

    assert undecodable(images).total() == 80


@pytest.mark.parametrize("kind", DAMAGES)
def test_labelled_images_of_a_damaged_shard_are_counted_for_it(tmp_path, kind, caplog):
    shards = write_set(tmp_path, {"query": [flat(i) for i in range(9)]})
    labelled = LabelledImages(shards, **SIZE)

    damage(tmp_path, kind, "query")
    block = labelled.read(0)

    counts = count_undecodable(block, labelled.row_groups)
    assert set(counts) == {str(tmp_path / "query-1.parquet")}
    left = without_undecodable(block, labelled.row_groups, 0.9)
    assert left["pid"].tolist() == numbers(left["image"])
    assert f"left out: {counts.total()} of 9 images do not decode" in caplog.text


@small
@given(shape=shapes, data=st.data())
def test_a_run_resumed_with_other_workers_in_an_epoch_sees_each_image_once(
    tmp_path, shape, data
):
    images = shaped(tmp_path, shape)
    stop = images.steps_per_epoch
    start = data.draw(st.integers(0, stop))
    counts = [n for n in range(1, shape["num_groups"] + 1) if shape["num_groups"] % n == 0]
    before, after = data.draw(st.sampled_from(counts)), data.draw(st.sampled_from(counts))

    seen = [
        number
        for first, last, num_workers in ((0, start, before), (start, stop, after))
        for rank in range(num_workers)
        for step in order(images, first, last, rank=rank, num_workers=num_workers)
        for number in step
    ]

    assert sorted(seen) == sorted(epoch(images, 0))
    assert len(set(seen)) == len(seen)


def test_an_epoch_opens_a_bounded_number_of_files(tmp_path):
    folder = tmp_path / "set"
    shards = write_set(folder, {"unlabeled": [flat(i) for i in range(300)]}, num_shards=100)
    images = TrainingImages(shards, config())

    before = len(list(Path("/proc/self/fd").iterdir()))
    seen = epoch(images, 0)
    opened = len(list(Path("/proc/self/fd").iterdir())) - before

    assert (len(seen), opened <= MAX_OPEN_SHARDS) == (296, True)


def test_fewer_images_than_a_batch_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"^--training\.batch_size 8: exceeds the 7 [^\n]+$"):
        training_images(tmp_path, [flat(i) for i in range(7)], config())


def test_labelled_images_come_in_the_order_of_the_manifest_with_their_labels(tmp_path):
    splits = {
        "gallery": [flat(i) for i in range(13)],
        "query": [flat(100 + i) for i in range(9)],
        "train": [flat(200 + i) for i in range(9)],
    }
    labelled = LabelledImages(write_set(tmp_path, splits), **SIZE)

    blocks = [labelled.read(number) for number in range(labelled.num_blocks)]

    seen = [
        row
        for block in blocks
        for row in zip(
            numbers(block["image"]),
            block["pid"].tolist(),
            block["camid"].tolist(),
            block["is_query"].tolist(),
            strict=True,
        )
    ]
    gallery = [(i, i, 1, False) for i in range(13)]
    assert seen == gallery + [(100 + i, i, 1, True) for i in range(9)]


def test_labelled_images_that_do_not_decode_are_left_out(tmp_path):
    splits = {"query": [flat(0), BROKEN, flat(2)], "gallery": [flat(3), flat(4), flat(5)]}
    labelled = LabelledImages(write_set(tmp_path, splits), **SIZE)

    block = without_undecodable(labelled.read(0), labelled.row_groups, 0.2)

    labels = list(zip(numbers(block["image"]), block["pid"].tolist(), strict=True))
    assert labels == [(0, 0), (2, 2), (3, 0), (4, 1), (5, 2)]


def test_threads_that_read_one_shard_get_what_one_thread_gets(tmp_path):
    # While they shared a file, this ended the process with a segmentation fault.
    shards = write_set(tmp_path, {"query": [flat(i) for i in range(256)]}, num_shards=1)
    groups = shards.row_groups(("query",))

    def keys(start: int) -> list[str]:
        ranges = groups.ranges(start, start + 32)
        return groups.read(ranges, ["key", "image"]).column("key").to_pylist()

    starts = list(range(0, 256, 32)) * 250
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(keys, starts))

    assert seen == [[f"query/{i}" for i in range(start, start + 32)] for start in starts]


@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_ray_delivers_what_reading_gives_and_in_its_order(ray_cluster, tmp_path, num_workers):
    images = training_images(tmp_path, [flat(i) for i in range(70)], config(batch=16, group=4))
    rounds = [each.by_worker(num_workers) for each in images.rounds(2, 8)]

    iterators = stream_blocks(images.read, rounds)

    def delivered(rank: int) -> list[list[int]]:
        columns = read_stream(iterators[rank], rank=rank, num_workers=num_workers)
        return [numbers(each["image"]) for each in columns]

    with ThreadPoolExecutor(num_workers) as pool:
        by_rank = list(pool.map(delivered, range(num_workers)))
    expected = [
        [numbers(images.read(block)["image"]) for each in rounds for block in each[rank]]
        for rank in range(num_workers)
    ]
    assert by_rank == expected


@pytest.mark.ray
def test_a_stream_in_another_order_than_due_is_noticed(ray_cluster, tmp_path):
    images = training_images(tmp_path, [flat(i) for i in range(70)], config(batch=16))

    (iterator,) = stream_blocks(
        images.read, [each.by_worker(1) for each in images.rounds(0, 4)]
    )

    with pytest.raises(RuntimeError, match="delivered block 0 where block 1 was due"):
        list(read_stream(iterator, rank=1, num_workers=2))


@pytest.mark.ray
def test_a_long_wait_for_images_is_told(ray_cluster, tmp_path, monkeypatch, caplog):
    images = training_images(tmp_path, [flat(i) for i in range(70)], config(batch=16))

    def read_slowly(block: training.Block) -> Columns:
        time.sleep(1)
        return images.read(block)

    (iterator,) = stream_blocks(
        read_slowly, [each.by_worker(1) for each in images.rounds(0, 4)]
    )
    monkeypatch.setattr(ray_data, "LONG_WAIT_SECONDS", 0.2)

    list(read_stream(iterator, rank=0, num_workers=1))

    assert "no images for 0.2 s" in caplog.text


@pytest.mark.ray
def test_long_work_on_images_is_no_wait(ray_cluster, tmp_path, monkeypatch, caplog):
    images = training_images(tmp_path, [flat(i) for i in range(70)], config(batch=16))
    rounds = [each.by_worker(1) for each in images.rounds(0, 8)]
    (iterator,) = stream_blocks(images.read, rounds)

    blocks = read_stream(iterator, rank=0, num_workers=1)
    next(blocks)  # starts Ray Data, which takes seconds
    monkeypatch.setattr(ray_data, "LONG_WAIT_SECONDS", 2.0)
    next(blocks)
    time.sleep(3)
    told = caplog.text
    list(blocks)  # ends Ray Data

    assert "no images" not in told
