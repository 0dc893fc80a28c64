"""Write the reference of all settings, docs/settings.md, from their definitions."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from upreid_ray.config.downstream import (
    ClusterContrastConfig,
    CompareConfig,
    EmbedConfig,
    EvaluateConfig,
    FinetuneConfig,
)
from upreid_ray.config.presets import CLUSTER_CONTRAST_PRESETS, FINETUNE_PRESETS, PRESETS
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.config.section import Section, value_form
from upreid_ray.config.sweep import SearchConfig

FILE = Path(__file__).with_name("settings.md")
HEAD = """\
# Settings

`make docs` writes this page from the definitions in `upreid_ray/config`.

A setting has the same name everywhere: `--optimizer.lr 0.1` on the command line (or
`--optimizer.lr=0.1`; dashes may stand for underscores), `optimizer.lr` in a sweep, in
`config.override({"optimizer.lr": 0.1})` and among the parameters in MLflow. `none` stands for
no value, `true` and `false` for switches, and commas separate the members of a tuple. A
relative path starts at the working folder of the user.

The defaults are those without a preset. What each preset changes is below the settings of its
job.
"""
FAMILIES: tuple[tuple[str, str, Section, Mapping[str, Section]], ...] = (
    (
        "Pre-training",
        "Flags of `pretrain`, and of `sweep` for all its trials.",
        PretrainConfig(),
        PRESETS,
    ),
    (
        "Fine-tuning with labels",
        "Flags of `finetune`, and of `compare` for all its runs.",
        FinetuneConfig(),
        FINETUNE_PRESETS,
    ),
    (
        "Fine-tuning without labels",
        "Flags of `finetune --method cluster-contrast`, and of `compare` with that method.",
        ClusterContrastConfig(),
        CLUSTER_CONTRAST_PRESETS,
    ),
    ("Evaluation", "Flags of `evaluate`.", EvaluateConfig(), {}),
    ("Features", "Flags of `embed`, beside `--out`.", EmbedConfig(), {}),
    (
        "Comparison",
        "Flags of `compare`, beside those of the fine-tuning that it runs.",
        CompareConfig(init=("random",)),
        {},
    ),
    (
        "Sweep",
        "Flags of `sweep`, beside those of the pre-training that it runs.",
        SearchConfig(),
        {},
    ),
)


def page() -> str:
    """Return the text of the reference."""
    return HEAD + "".join(
        "".join([f"\n## {title}\n\n{text}\n", *_tables(config), *_changes(config, presets)])
        for title, text, config, presets in FAMILIES
    )


def _tables(config: Section) -> Iterator[str]:
    """Yield a table of settings for each section."""
    defaults = dict(config.flatten())
    for section, description, settings in type(config).describe():
        if isinstance(config, CompareConfig) and section.startswith("finetune"):
            continue
        rows = [
            f"| `--{path}` | {_code(value_form(field.annotation))} "
            f"| {_code(_text(defaults[path])) if path in defaults else 'required'} "
            f"| {' '.join((field.description or '').split())} |\n"
            for path, field in settings.items()
            if path != "finetune"
        ]
        heading = f"### {section}\n\n{description}\n\n" if section else ""
        if rows:
            yield f"\n{heading}| flag | values | default | meaning |\n|{' --- |' * 4}\n"
            yield from rows


def _changes(config: Section, presets: Mapping[str, Section]) -> Iterator[str]:
    """Yield a table of the settings that presets change."""
    values = {name: dict(preset.flatten()) for name, preset in presets.items()}
    rows = [
        f"| `--{path}` | {' | '.join(_code(_text(each[path])) for each in values.values())} |\n"
        for path, default in config.flatten()
        if any(each[path] != default for each in values.values())
    ]
    if rows:
        yield f"\n### Presets\n\n| flag | {' | '.join(f'`{name}`' for name in values)} |\n"
        yield f"| --- |{' --- |' * len(values)}\n"
        yield from rows


def _text(value: object) -> str:
    """Return a value as it is typed."""
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


if __name__ == "__main__":
    FILE.write_text(page())
