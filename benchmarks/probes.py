"""What does a frozen backbone know of a person? Linear probes on synthetic people.

The synthetic people know what they wear. For each attribute, a logistic regression learns it
from the features of some people, and is scored on others. The people and the cameras are not
those that the presets train on. The tables show

- the balanced accuracy of each attribute: the mean over its values of the share that is
  recognized. Guessing scores one divided by the number of values, which the row gives;
- retrieval among all people, and among people in the same outfit (shirt, trousers and legwear),
  where only details tell people apart;
- the drift of features under each augmentation: the mean cosine distance between the features
  of an image and of its augmented view, divided by that between images of two people. At 0 the
  backbone does not see the augmentation; at 1 it moves an image as far as to another person.

UP-ReID's paper (Yang et al. 2022, https://arxiv.org/abs/2112.00317) claims that the consistency
term keeps what augmentation destroys (colours), and that the intrinsic term finds local details
(bags, shoes, prints). The probes are ours.

    python -m benchmarks.probes --init random models:/upreid-resnet18@champion
    python -m benchmarks.probes --init moco=study/RUN/480 upreid=study/OTHER/480
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from benchmarks.step import provenance
from upreid_ray.config.pretrain import AugmentationConfig
from upreid_ray.config.section import RANDOM
from upreid_ray.core.augment import draw_view_parameters, render_view, step_generator
from upreid_ray.core.retrieval import Labels, cosine_distances, extract_features, score_rows
from upreid_ray.data.sources import synthetic
from upreid_ray.data.sources.synthetic import Appearance
from upreid_ray.train import initialization
from upreid_ray.train.initialization import Initialization

SEED = 2022  # of the people; the presets draw theirs from others
NUM_CAMERAS = 6
IMAGES_PER_CAMERA = 2
TRAIN_SHARE = 0.6  # of the people
BATCH_SIZE = 256
ATTRIBUTES: dict[str, Callable[[Appearance], object]] = {
    "shirt, colour": lambda who: who.shirt,
    "trousers, colour": lambda who: who.trousers,
    "skin": lambda who: who.skin,
    "hair, colour": lambda who: who.hair,
    "shoes, colour": lambda who: who.shoes,
    "long hair": lambda who: who.long_hair,
    "hat": lambda who: who.hat is not None,
    "scarf": lambda who: who.scarf is not None,
    "long sleeves": lambda who: who.long_sleeves,
    "legwear": lambda who: who.legwear,
    "side stripe": lambda who: who.side_stripe is not None,
    "pattern": lambda who: who.pattern,
    "bag": lambda who: who.bag,
    "bag, side": lambda who: None if who.bag in ("none", "backpack") else who.bag_side,
}
# Each augmentation alone, always applied; the rest of the settings change nothing.
NEUTRAL = {
    "crop_area": (1.0, 1.0),
    "flip_probability": 0.0,
    "jitter_probability": 0.0,
    "grayscale_probability": 0.0,
    "blur_probability": 0.0,
    "erase_probability": 0.0,
}
AUGMENTATIONS: dict[str, dict[str, object]] = {
    "crop (half of the area)": {"crop_area": (0.5, 0.5)},
    "flip": {"flip_probability": 1.0},
    "colour jitter": {"jitter_probability": 1.0},
    "grayscale": {"grayscale_probability": 1.0},
    "blur": {"blur_probability": 1.0},
    "erasing": {"erase_probability": 1.0},
}


@dataclass(frozen=True)
class People:
    """Drawn images and who is on them.

    Attributes:
        images: ``[N, 3, H, W]``, uint8.
        labels: Persons and cameras ``[N]``.
        is_query: ``[N]``, bool; one image of each person and camera.
        appearances: Appearance of each person, by pid.
    """

    images: Tensor
    labels: Labels
    is_query: Tensor
    appearances: dict[int, Appearance]

    def values(self, name: str) -> np.ndarray:
        """Return the value ``[N]`` of an attribute as a number; -1 where it has none."""
        of = {pid: ATTRIBUTES[name](who) for pid, who in self.appearances.items()}
        kinds = sorted({value for value in of.values() if value is not None}, key=str)
        numbers = {pid: -1 if each is None else kinds.index(each) for pid, each in of.items()}
        return np.array([numbers[pid] for pid in self.labels.pids.tolist()])

    @property
    def outfits(self) -> Tensor:
        """Return the outfit ``[N]`` of the person on each image as a number."""
        of = {
            pid: (who.shirt, who.trousers, who.legwear) for pid, who in self.appearances.items()
        }
        kinds = sorted(set(of.values()))
        return torch.tensor([kinds.index(of[pid]) for pid in self.labels.pids.tolist()])


def draw_people(num_people: int, height: int, width: int) -> People:
    """Draw people who are not in any preset's data set."""
    portraits = synthetic.portraits(
        num_train_identities=0,
        num_test_identities=num_people,
        num_unlabeled_identities=0,
        num_cameras=NUM_CAMERAS,
        images_per_camera=IMAGES_PER_CAMERA,
    )
    drawn = [
        synthetic.draw(each, seed=SEED, height=height, width=width)
        for each in track(portraits, "drawing people", console=Console(stderr=True))
    ]
    return People(
        images=torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous(),
        labels=Labels(
            torch.tensor([each.identity for each in portraits]),
            torch.tensor([each.camera for each in portraits]),
        ),
        is_query=torch.tensor([each.split == "query" for each in portraits]),
        appearances={
            each.identity: Appearance.of(each.identity, seed=SEED) for each in portraits
        },
    )


def probe(features: Tensor, values: np.ndarray, is_train: np.ndarray) -> float:
    """Return the balanced accuracy of a linear probe, 0..1.

    Args:
        features: ``[N, F]``.
        values: ``[N]``, value of the attribute; images with -1 are left out.
        is_train: ``[N]``, bool; the probe learns from these and is scored on the others.
    """
    train, test = is_train & (values >= 0), ~is_train & (values >= 0)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    numbers = features.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(numbers[train], values[train])
    return float(balanced_accuracy_score(values[test], classifier.predict(numbers[test])))


def retrieval(features: Tensor, people: People, *, within_outfit: bool) -> float:
    """Return the mAP, 0..1, among all people or among those in the outfit of the query."""
    query, gallery = (
        Labels(people.labels.pids[part], people.labels.camids[part])
        for part in (people.is_query, ~people.is_query)
    )
    outfits = people.outfits
    query_outfits, gallery_outfits = outfits[people.is_query], outfits[~people.is_query]

    def rows() -> Iterator[tuple[slice, Tensor]]:
        for part, distances in cosine_distances(
            features[people.is_query], features[~people.is_query]
        ):
            others = query_outfits[part, None] != gallery_outfits
            yield part, distances.masked_fill(others & within_outfit, torch.inf)

    return score_rows(rows(), query, gallery).mean_average_precision


def drifts(init: Initialization, images: Tensor, features: Tensor) -> dict[str, float]:
    """Return the drift of each augmentation for some images and their features ``[N, F]``."""
    description, backbone = init.description, init.extractor().eval()
    ratio = description.width / description.height
    normal = {
        "mean": description.mean,
        "std": description.std,
        "crop_ratio": (ratio, ratio),
    }
    apart = 1 - (features @ features.T).fill_diagonal_(0).sum() / (
        len(features) * (len(features) - 1)
    )
    found = {}
    for name, changes in AUGMENTATIONS.items():
        config = AugmentationConfig.model_validate(NEUTRAL | normal | changes)
        parameters = draw_view_parameters(
            len(images), *images.shape[2:], config, step_generator(seed=SEED, step=0)
        )
        views = render_view(images, parameters, config)
        with torch.no_grad():
            moved = F.normalize(backbone(views), dim=1)
        found[name] = float((1 - (moved * features).sum(1)).mean() / apart)
    return found


def measure(init: Initialization, num_people: int) -> dict[str, dict[str, float]]:
    """Return the numbers of one backbone, by table and row."""
    people = draw_people(num_people, init.description.height, init.description.width)
    features = extract_features(
        init.extractor(), people.images.split(BATCH_SIZE), init.description.normalization
    )
    is_train = (people.labels.pids <= TRAIN_SHARE * num_people).numpy()
    some = torch.arange(0, len(features), max(1, len(features) // BATCH_SIZE))[:BATCH_SIZE]
    return {
        "balanced accuracy of a linear probe, %": {
            f"{name} (of {people.values(name).max() + 1})": 100
            * probe(features, people.values(name), is_train)
            for name in ATTRIBUTES
        },
        "mAP, %": {
            "among all people": 100 * retrieval(features, people, within_outfit=False),
            "among people in the same outfit": 100
            * retrieval(features, people, within_outfit=True),
        },
        "drift": drifts(init, people.images[some], features[some]),
    }


def tables(lines: list[dict[str, object]]) -> Iterator[Table]:
    """Yield one table for each kind of number, with a column for each backbone."""
    measured: list[dict[str, dict[str, float]]] = [each["measured"] for each in lines]
    for kind in measured[0]:
        table = Table(kind, *(str(each["label"]) for each in lines))
        for row in measured[0][kind]:
            table.add_row(row, *(f"{each[kind][row]:.3g}" for each in measured))
        yield table


def parse_init(text: str) -> tuple[str, str]:
    """Read ``LABEL=INIT``, or an initialization that is its own label."""
    label, equals, init = text.partition("=")
    return (label, init) if equals and not Path(text).exists() else (text, text)


def main() -> None:
    """Measure each backbone, append a line for each to a file if asked to, and print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--init",
        nargs="+",
        required=True,
        metavar="[LABEL=]INIT",
        help="backbones: registered versions, checkpoints, files of weights, or 'random'",
    )
    add("--backbone", default="resnet18", help="architecture of 'random'")
    add("--size", nargs=2, type=int, default=(64, 32), metavar=("H", "W"), help="of 'random'")
    add("--people", type=int, default=600, help="number of people")
    add("--out", type=Path, help="file of JSON lines to which each backbone adds one")
    arguments = parser.parse_args()
    lines: list[dict[str, object]] = []
    for text in arguments.init:
        label, name = parse_init(text)
        if name == RANDOM:
            init = initialization.random(arguments.backbone, seed=0)
            size = dict(zip(("height", "width"), arguments.size, strict=True))
            init = replace(init, description=init.description.model_copy(update=size))
        else:
            init = initialization.resolve(name)
        lines.append(
            {
                "label": label,
                "people": arguments.people,
                "measured": measure(init, arguments.people),
                "about": provenance(torch.device("cpu")),
            }
        )
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    console = Console()
    for table in tables(lines):
        console.print(table)
    console.print(f"{arguments.people} people; {provenance(torch.device('cpu'))}")


if __name__ == "__main__":
    main()
