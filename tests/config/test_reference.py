"""The reference of all settings is the one that their definitions make."""

import re

import pytest

from docs.make_settings import FAMILIES, FILE, page
from upreid_ray.config.section import Section

described = [
    (path, field.description)
    for _, _, config, _ in FAMILIES
    for _, _, settings in type(config).describe()
    for path, field in settings.items()
]


def test_the_reference_is_not_stale():
    assert FILE.read_text() == page(), "write it again with `make docs`"


def test_the_reference_has_every_setting():
    text = page()

    assert [
        path for path, _ in described if path != "finetune" and f"`--{path}`" not in text
    ] == []


def test_the_reference_shows_what_a_preset_changes():
    assert "| `--training.batch_size` | `64` | `64` | `2560` |" in page()


@pytest.mark.parametrize(("path", "description"), sorted(set(described)))
def test_a_description_stands_alone(path, description):
    assert re.match(r"(?!Of )[A-Z].*\.$", description, re.DOTALL), path


@pytest.mark.parametrize("config", dict.fromkeys(type(config) for _, _, config, _ in FAMILIES))
def test_a_section_is_described_in_a_sentence(config: type[Section]):
    for section, description, _ in config.describe():
        assert re.match(r"(?!Of )[A-Z].*\.$", description, re.DOTALL), section
