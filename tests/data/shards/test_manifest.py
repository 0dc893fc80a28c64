"""Manifests are read, or refused in one line."""

import pytest

from upreid_ray.config.errors import InputError
from upreid_ray.data.shards.manifest import read_manifest


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
