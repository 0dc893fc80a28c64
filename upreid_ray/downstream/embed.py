"""Features of all images of a source: Ray Data computes them, and the driver writes them.

Dimensions: n images of a block, F features.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from upreid_ray.config.downstream import EmbedConfig
from upreid_ray.config.errors import InputError, first_line
from upreid_ray.data.shards.progress import image_progress
from upreid_ray.data.stream.decode import Columns
from upreid_ray.data.stream.ray_data import BLOCK_BYTES, TASK_CPUS
from upreid_ray.downstream.embed_images import NULL, SourceImages
from upreid_ray.downstream.extractor import extract_blocks
from upreid_ray.downstream.feature_set import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    REFUSED_FILE,
    FeatureManifest,
    FeatureSet,
    Part,
    write_part,
    written_part,
)
from upreid_ray.storage import Location
from upreid_ray.train.initialization import Initialization, for_images, resolve

BLOCK_IMAGES = 256
PART_BLOCKS = 32
# A dataset knows all of its blocks from the start, and starts the actors anew.
DATASET_PARTS = 64


@dataclass(frozen=True)
class EmbedResult:
    """Result of the computation of features.

    Attributes:
        init: Origin of the backbone; a version in place of an alias.
        num_images: Number of images that have features.
        num_refused: Number of images without features, which ``refused.jsonl`` lists.
        images_per_second: Speed without the start of the actors; 0 if nothing was left to do.
        result_dir: Folder or URI of the features.
    """

    init: str
    num_images: int
    num_refused: int
    images_per_second: float
    result_dir: str


def embed(init: str, source: str, out: str, config: EmbedConfig) -> EmbedResult:
    """Compute the features of all images of a source on the connected Ray cluster.

    A complete set is left as it is. Files that a killed call with the same arguments finished
    are kept. Memory does not grow with the number of images, except for the list of a source
    that is not a set of shards.

    Args:
        init: Backbone, as in `upreid_ray.train.initialization.resolve`.
        source: Shards, or any source that `prepare` reads.
        out: Folder or URI for the features, made if it does not exist.
        config: Settings.

    Raises:
        InputError: An argument cannot be used, the folder holds other features, or no image
            can be used.
    """
    start = for_images(resolve(init), config.images)
    images = SourceImages.open(source)
    backbone = backbone_digest(start, config.tta)
    fixed = config.model_dump(mode="json", exclude={"scaling"})
    made_from = _digest(FORMAT_VERSION, backbone, images.digest, fixed)
    if FeatureSet.exists(out):
        manifest = FeatureSet.open(out).manifest
        if manifest.made_from != made_from:
            raise InputError(f"--out {out}: holds other features; choose an empty folder")
        return _result(manifest, 0.0, out)
    folder = Location(out)
    try:
        folder.make_folder()
        size = (start.description.height, start.description.width)
        writer = _Writer(folder, made_from, images, size, config)
        with image_progress("computing features", images.num_images) as advance:
            speed = writer.write_all(start, advance)
        manifest = writer.finish(start, backbone)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({first_line(error)})") from error
    return _result(manifest, speed, out)


def backbone_digest(init: Initialization, tta: str) -> str:
    """Return a digest of all that decides the features of an image."""
    digest = hashlib.sha256(f"{init.description.model_dump_json()} {tta}".encode())
    for tensors in (init.weights, init.neck):
        for name, tensor in sorted(tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


class _Writer:
    """The files of a set of features; each holds some blocks."""

    def __init__(
        self,
        folder: Location,
        made_from: str,
        images: SourceImages,
        size: tuple[int, int],
        config: EmbedConfig,
    ) -> None:
        self._folder, self._made_from = folder, made_from
        self._images, self._config = images, config
        self._size = size
        # Ray Data would cut a larger block of decoded images.
        self._block_images = max(1, min(BLOCK_IMAGES, BLOCK_BYTES // (3 * math.prod(size))))
        self._num_blocks = -(-images.num_images // self._block_images)
        self._num_parts = -(-self._num_blocks // PART_BLOCKS)
        self._parts: dict[int, Part] = {}
        self._refused: dict[int, list[dict[str, str]]] = {}

    def write_all(self, init: Initialization, advance: Callable[[int], None]) -> float:
        """Write the files that are missing; return the speed in images/s."""
        missing = []
        for number in range(self._num_parts):
            found = written_part(self._file(number), self._made_from)
            if found is None:
                missing.append(number)
            else:
                self._parts[number], self._refused[number] = found
                advance(found[0].num_images + len(found[1]))
        done, first, started = 0, 0, time.perf_counter()
        for begin in range(0, len(missing), DATASET_PARTS):
            waiting: list[Columns] = []
            for number, block, is_last in self._compute(
                init, missing[begin : begin + DATASET_PARTS]
            ):
                if not done:
                    first, started = len(block["key"]), time.perf_counter()
                done += len(block["key"])
                waiting.append(block)
                advance(len(block["key"]))
                if is_last:
                    self._write(number, waiting)
                    waiting = []
        # The first block waits for the start of the actors.
        return (done - first) / (time.perf_counter() - started) if done > first else 0.0

    def finish(self, init: Initialization, backbone: str) -> FeatureManifest:
        """Write the refused images and the manifest.

        Raises:
            InputError: No image has features.
        """
        parts = [self._parts[number] for number in sorted(self._parts)]
        refused = [each for number in sorted(self._refused) for each in self._refused[number]]
        if not any(part.num_images for part in parts):
            # Kept, they would refuse the same images once these are mended, too.
            for number in self._parts:
                self._file(number).delete_file()
            # A damaged shard has no keys.
            first = ": ".join(filter(None, (refused[0]["key"], refused[0]["reason"])))
            raise InputError(
                f"{self._images.name}: none of {self._images.num_images} images can be used; "
                f"{first}"
            )
        if refused:
            lines = "".join(json.dumps(each) + "\n" for each in refused)
            (self._folder / REFUSED_FILE).write_whole(lines.encode())
        manifest = FeatureManifest(
            version=FORMAT_VERSION,
            made_from=self._made_from,
            init=init.uri,
            backbone=backbone,
            num_features=_num_features(init),
            source=self._images.name,
            num_refused=len(refused),
            parts=tuple(parts),
            settings=self._config.model_dump(mode="json"),
        )
        (self._folder / MANIFEST_FILE).write_whole(manifest.model_dump_json(indent=1).encode())
        return manifest

    def _compute(
        self, init: Initialization, parts: Sequence[int]
    ) -> Iterator[tuple[int, Columns, bool]]:
        """Yield the part of each block, its columns, and whether it is the part's last one."""
        numbers = [
            (part, block)
            for part in parts
            for block in range(
                part * PART_BLOCKS, min((part + 1) * PART_BLOCKS, self._num_blocks)
            )
        ]
        blocks = [
            self._images.block(block * self._block_images, (block + 1) * self._block_images)
            for _, block in numbers
        ]
        config, read = self._config, self._images.reader(*self._size)

        def read_one(block: pa.Table) -> Columns:
            return read(block)

        dataset = ray.data.from_arrow(blocks).map_batches(
            read_one, batch_size=None, batch_format="pyarrow", num_cpus=TASK_CPUS
        )
        arriving = extract_blocks(
            dataset,
            len(blocks),
            init,
            config.scaling,
            in_order=True,
            flip=config.tta == "flip",
            precision=config.precision,
        )
        for (part, number), block in zip(numbers, arriving, strict=True):
            due = number * self._block_images
            if block["place"][0] != due:
                raise RuntimeError(f"Ray Data delivered image {block['place'][0]} before {due}")
            is_last = number + 1 in (self._num_blocks, (part + 1) * PART_BLOCKS)
            yield part, block, is_last

    def _write(self, number: int, blocks: list[Columns]) -> None:
        """Write the blocks of a part."""
        columns = {name: np.concatenate([each[name] for each in blocks]) for name in blocks[0]}
        wrong = columns["error"] != ""
        refused = [
            {"key": key, "reason": reason}
            for key, reason in zip(columns["key"][wrong], columns["error"][wrong], strict=True)
        ]
        kept = {name: values[~wrong] for name, values in columns.items()}
        feature = kept["features"].astype(self._config.number_type)
        table = pa.table(
            {
                "key": pa.array(kept["key"].tolist(), pa.string()),
                **{
                    name: pa.array(kept[name], pa.int64(), mask=kept[name] == NULL).cast(
                        pa.int32()
                    )
                    for name in ("pid", "camid")
                },
                "split": pa.array(kept["split"].tolist(), pa.string()),
                "width": pa.array(kept["width"], pa.int32()),
                "height": pa.array(kept["height"], pa.int32()),
                "feature": pa.FixedSizeListArray.from_arrays(
                    pa.array(feature.ravel()), feature.shape[1]
                ),
                "place": pa.array(kept["place"], pa.int64()),
            }
        )
        write_part(self._file(number), table, self._made_from, refused)
        name = self._file(number).name
        self._parts[number] = Part(name=name, num_images=len(table))
        self._refused[number] = refused

    def _file(self, number: int) -> Location:
        return self._folder / f"features-{number:05d}-of-{self._num_parts:05d}.parquet"


def _num_features(init: Initialization) -> int:
    """Return the number of features, F, of the backbone."""
    images = init.description
    with torch.no_grad():
        features = init.extractor().eval()(torch.zeros(1, 3, images.height, images.width))
    return int(features.shape[1])


def _digest(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _result(manifest: FeatureManifest, speed: float, out: str) -> EmbedResult:
    return EmbedResult(manifest.init, manifest.num_images, manifest.num_refused, speed, out)
