"""The description of a registered version for people, in Markdown."""

from collections.abc import Mapping
from typing import Any

from upreid_ray.config.downstream import ClusterContrastConfig, DownstreamConfig, FinetuneConfig
from upreid_ray.config.presets import CLUSTER_CONTRAST_PRESETS, FINETUNE_PRESETS, PRESETS
from upreid_ray.config.pretrain import PretrainConfig
from upreid_ray.core.checkpoint import Position

Config = PretrainConfig | DownstreamConfig
# Settings of a run that say nothing about its backbone.
LEFT_OUT = ("run.", "scaling.", "checkpoint.", "init", "data.shards", "data.root")

# MLflow's pages break a line wherever the text does, so each paragraph is one line.
CARD = """\
# {name}

A {backbone} backbone for person re-identification: {method}. It maps an image of a person to \
features; the cosine similarity of the features of two images tells whether they show the same \
person. It expects images of {height}x{width} pixels (height x width).

{scores}

{data}

Settings that differ from the preset `{preset}`: {settings}. All of them are in `config.json`.

## Use

From encoded images, with MLflow, PyTorch and Pillow alone:

```python
import mlflow, pandas

model = mlflow.pyfunc.load_model("{{uri}}")
features = model.predict(pandas.DataFrame({{"image": [open("person.jpg", "rb").read()]}}))
```

As a PyTorch module, for normalized images `[B, 3, {height}, {width}]`:

```python
import mlflow

model = mlflow.pytorch.load_model("{{uri}}")
```

As an ordinary module that can be trained, with upreid_ray:

```python
import upreid_ray

model = upreid_ray.load_backbone("{{uri}}")
```

## Limits

{limits}
"""
LIMITS = """\
The features were learned from the training images, and may fail for other cameras, places and \
groups of people: evaluate the backbone on your own images. Images of persons are personal \
data. The terms of the training images apply to this backbone, too."""


def model_card(name: str, position: Position, tags: Mapping[str, str]) -> str:
    """Return the description of a version, with ``{uri}`` in the place of its URI.

    The position is that of the checkpoint that holds the backbone; tags are the lineage.
    """
    kind, presets, method = _method(position.config)
    preset, settings = _nearest_preset(kind.parse(position.config), presets)
    start = f" It was trained from `{tags['init']}`." if "init" in tags else ""
    images = position.description
    return CARD.format(
        name=name,
        backbone=images.backbone,
        method=f"{method}, after {position.best_step:,} steps",
        height=images.height,
        width=images.width,
        scores=_scores(position),
        data=f"Training images: `{tags.get('shards')}` (manifest `{tags.get('manifest')}`)."
        f"{start} Commit `{tags.get('mlflow.source.git.commit')}`, run `{tags.get('run')}`.",
        preset=preset,
        settings=", ".join(f"`{path}` {value}" for path, value in settings.items()) or "none",
        limits=LIMITS,
    )


def _method(tree: Mapping[str, Any]) -> tuple[type[Config], Mapping[str, Config], str]:
    """Return the class of the settings of a run, its presets, and its method in words."""
    if "loss" in tree:
        return PretrainConfig, PRESETS, "pre-trained without labels (UP-ReID)"
    if "clustering" in tree:
        words = "fine-tuned without labels (cluster contrast)"
        return ClusterContrastConfig, CLUSTER_CONTRAST_PRESETS, words
    return FinetuneConfig, FINETUNE_PRESETS, "fine-tuned with labels"


def _nearest_preset(
    config: Config, presets: Mapping[str, Config]
) -> tuple[str, dict[str, Any]]:
    """Return the preset from which the fewest settings differ, and these settings."""
    differing = {
        name: {
            path: value
            for path, value in config.flatten()
            if not path.startswith(LEFT_OUT) and value != dict(preset.flatten())[path]
        }
        for name, preset in presets.items()
    }
    nearest = min(differing, key=lambda name: len(differing[name]))
    return nearest, differing[nearest]


def _scores(position: Position) -> str:
    """Return a table of the scores before and after training, or a sentence without scores."""
    if not position.best_scores:
        return "It was not scored: there were no labelled images."
    names = list(position.best_scores)
    rows = [
        ("before training", position.scores_untrained),
        ("this version", position.best_scores),
    ]
    lines = [["retrieval, frozen", *names], ["---"] * (len(names) + 1)]
    for label, scores in rows:
        if scores:
            lines.append([label, *(f"{scores[name]:.3f}" for name in names)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
