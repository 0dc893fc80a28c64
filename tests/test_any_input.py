"""Whatever a user names is read or refused: a path, a list, an archive, a file of weights.

Files and names are drawn; the only error allowed is `InputError`, with a message of one line.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from upreid_ray.config.errors import InputError
from upreid_ray.config.presets import PRESETS
from upreid_ray.core.backbone import build_backbone
from upreid_ray.core.checkpoint import read_exported
from upreid_ray.core.weight_files import read_backbone
from upreid_ray.data.shards.shard_set import ShardSet
from upreid_ray.data.sources.source import source_records
from upreid_ray.train.continuation import find_start

cheap = settings(max_examples=40)


@contextmanager
def refused_in_one_line() -> Iterator[None]:
    """Let only one error through: the refusal of what the user gave."""
    message = "refused"
    try:
        yield
    except InputError as error:
        message = str(error)
    assert message.strip()
    assert "\n" not in message


# What file systems allow: any byte but two, which Python decodes with surrogates.
NAMES = st.one_of(
    st.sampled_from(["query", "train", "bounding_box_train", "Gallery", "images", " ", "a#b"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), max_size=12),
    st.binary(min_size=1, max_size=8).map(
        lambda name: (
            name.replace(b"/", b"_").replace(b"\0", b"_").decode(errors="surrogateescape")
        )
    ),
).filter(lambda name: name not in ("", ".", ".."))
FILES = st.one_of(
    NAMES,
    st.sampled_from(
        [
            *(
                "0001_c1s1_000001_00.jpg",
                "-1_c1s1_000001_00.jpg",
                "0001.jpg",
                "._0001_c1s1.jpg",
            ),
            *("data.mdb", "keys.pkl", "a.tar", "b.parquet", "list_query.txt", "Thumbs.db"),
        ]
    ),
)
CONTENTS = st.one_of(st.just(b""), st.binary(max_size=64), st.just(b"\xff\xd8\xff\xe0"))


@given(
    tree=st.dictionaries(
        st.tuples(st.lists(NAMES, max_size=3), FILES).map(lambda each: (*each[0], each[1])),
        CONTENTS,
        max_size=5,
    )
)
@example(tree={("query", "\n", ".JPG"): b""})
@cheap
def test_any_folder_is_read_or_refused(tree):
    with TemporaryDirectory() as root:
        for parts, content in tree.items():
            path = Path(root, *parts)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            except OSError:  # a file where a folder is wanted, or a name that is too long
                continue

        with refused_in_one_line():
            source_records(root, {})


LINES = st.one_of(
    FILES,
    st.sampled_from(
        ["a/b.jpg 3", "C:\\x\\y.jpg", "s3://bucket/a.jpg", "foo://x", "/", "//", "file:///etc"]
    ),
)


@given(
    content=st.one_of(
        st.binary(max_size=80),
        st.lists(LINES, max_size=6).map(
            lambda lines: "\n".join(lines).encode(errors="surrogateescape")
        ),
        st.lists(st.text(max_size=8), max_size=4).map(
            lambda lines: "\r\n".join(lines).encode("utf-16")
        ),
        st.one_of(
            st.lists(st.text(max_size=8)), st.integers(), st.dictionaries(st.text(), st.none())
        ).map(pickle.dumps),
    ),
    suffix=st.sampled_from([".txt", ".pkl", ".lst", ".tar", ".parquet", ".mdb", ".zip", ""]),
)
@cheap
def test_any_list_and_any_archive_is_read_or_refused(content, suffix):
    with TemporaryDirectory() as root:
        file = Path(root, f"file{suffix}")
        file.write_bytes(content)

        with refused_in_one_line():
            source_records(str(file), {})


@given(path=st.one_of(st.text(max_size=12), LINES))
@cheap
def test_any_path_is_accepted_or_refused_where_settings_are_parsed(path):
    for setting in (
        "data.shards",
        "model.pretrained",
        "model.continue_from",
        "run.storage_path",
    ):
        with refused_in_one_line():
            PRESETS["demo"].override({setting: path})


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return build_backbone("resnet18").state_dict()


KEYS = st.sampled_from(
    [
        *("state_dict", "model", "teacher", "student", "net", "network", "weights", "epoch"),
        *("module.", "backbone.", "encoder_q.", "encoder_k.", "module.base_encoder.", "0.", ""),
        *("momentum_encoder", "online_network", "optimizer", "args", "model_state_dict"),
    ]
)
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.integers(),
        st.text(max_size=4),
        st.sampled_from(["WHOLE", "HALF", "OTHER", "SCALAR"]),
    ),
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=3), st.lists(inner, max_size=2)
    ),
    max_leaves=5,
)


def fill(value: object, tensors: dict[str, torch.Tensor]) -> object:
    """Put weights in the place of the words that stand for them."""
    if isinstance(value, dict):
        filled = {key: fill(inner, tensors) for key, inner in value.items()}
        # A key that ends in a dot is the prefix of the names of what it holds.
        return {
            f"{key}{name}": tensor
            for key, inner in filled.items()
            for name, tensor in (
                inner.items()
                if key.endswith(".") and isinstance(inner, dict)
                else [("", inner)]
            )
        }
    if isinstance(value, list):
        return [fill(inner, tensors) for inner in value]
    half = dict(list(tensors.items())[::2])
    stands_for = {
        "WHOLE": tensors,
        "HALF": half,
        "OTHER": {"conv1.weight": torch.zeros(2), "layer1.0.conv1.weight": torch.zeros(())},
        "SCALAR": np.float32(0.5),
    }
    return stands_for.get(value, value) if isinstance(value, str) else value


@given(value=VALUES, prefix=st.sampled_from(["", "", "#encoder_k", "#", "#nothing"]))
@settings(max_examples=25)
def test_any_container_of_weights_is_read_or_refused(tensors, value, prefix):
    with TemporaryDirectory() as root:
        file = Path(root, "weights.pth")
        torch.save(fill(value, tensors), file)

        with refused_in_one_line():
            read_backbone(f"{file}{prefix}")


@given(
    content=st.binary(max_size=80), name=st.sampled_from(["w.pth", "w.safetensors", "w.pkl"])
)
@cheap
def test_any_bytes_are_refused_as_weights(content, name):
    with TemporaryDirectory() as root:
        file = Path(root, name)
        file.write_bytes(content)

        with pytest.raises(InputError) as refused:
            read_backbone(file)
    assert "\n" not in str(refused.value)


JSON = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"{}", b"[]", b"null", b'{"version": 2}', b'{"step": 1}', b'{"a": NaN}']),
)


@given(content=JSON)
@cheap
def test_any_description_beside_shards_or_weights_is_read_or_refused(content):
    with TemporaryDirectory() as root:
        for name in ("manifest.json", "backbone.json", "state.json", "sha256.json"):
            Path(root, name).write_bytes(content)
        config = PRESETS["demo"].override({"model.continue_from": root})

        for read in (
            lambda: ShardSet.open(root),
            lambda: read_exported(Path(root)),
            lambda: find_start(config),
        ):
            with refused_in_one_line():
                read()
