"""Do the fast step and the plain one learn alike?

Trains on synthetic people with the step as it is on this device (bf16 where it has that,
compiled on GPUs, channels last, trimmed convolutions), and with a plain fp32 step (none of
these, no TF32), from the same weights and on the same batches. Rounding grows with each step:
the question is whether the two differ by more than two plain runs whose initial weights differ
by 1e-6.

    python -m benchmarks.agreement --steps 200 --seeds 3
"""

import argparse
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks.step import Case, provenance
from upreid_ray.core.cpu import TrimmedConv2d
from upreid_ray.core.training import TrainState, train_step
from upreid_ray.data.sources.synthetic import draw, portraits

SHORT_RUN = {
    "optimizer.lr": 0.02,
    "model.queue_size": 1024,
    "model.momentum": 0.99,
    "augmentation.jitter_probability": 0.8,
    "scaling.use_gpu": False,
}
SMALL_CHANGE = 1e-6
NUM_LAST = 50


def people(number: int, height: int, width: int) -> Tensor:
    """Draw this many synthetic people, uint8 ``[number, 3, height, width]``."""
    listed = portraits(
        num_train_identities=0,
        num_test_identities=0,
        num_unlabeled_identities=number // 4 + 1,
        num_cameras=4,
        images_per_camera=2,
    )
    drawn = [
        draw(portrait, seed=0, height=height, width=width)
        for portrait in track(
            list(islice(listed, number)), "drawing", console=Console(stderr=True)
        )
    ]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def fast(
    case: Case, seed: int, device: torch.device, num_steps: int, *, precision: str
) -> TrainState:
    """Make a state that trains as this device does by default, or in another precision."""
    config = case.config(precision, {**SHORT_RUN, "seed": seed})
    return TrainState(config, steps_per_epoch=num_steps, device=device)


def plain(case: Case, seed: int, device: torch.device, num_steps: int) -> TrainState:
    """Make a state of the same weights that trains in fp32, without anything to be fast."""
    settings = {**SHORT_RUN, "seed": seed, "training.compile": False}
    state = TrainState(case.config("fp32", settings), steps_per_epoch=num_steps, device=device)
    state.model.to(memory_format=torch.contiguous_format)
    for parameter, buffers in state.optimizer.state.items():
        buffers["momentum_buffer"] = torch.zeros_like(parameter)
    for module in state.model.modules():
        if isinstance(module, TrimmedConv2d):
            module.__class__ = nn.Conv2d
    return state


def changed(case: Case, seed: int, device: torch.device, num_steps: int) -> TrainState:
    """Make a plain state whose initial weights are a little off."""
    state = plain(case, seed, device, num_steps)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in state.model.query_encoder.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.mul_(1 + SMALL_CHANGE * noise.to(device))
    return state


def losses(state: TrainState, images: Tensor, num_steps: int, title: str) -> list[float]:
    """Train, and return the loss of each step."""
    size = state.config.training.batch_size
    order = torch.Generator().manual_seed(state.config.seed)
    terms = []
    steps: Iterable[int] = track(range(num_steps), title, console=Console(stderr=True))
    for _ in steps:
        batch = images[torch.randperm(len(images), generator=order)[:size]]
        terms.append(train_step(state, batch)["loss"])
    return torch.stack(terms).tolist()


def main() -> None:
    """Train all, and print how they differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", type=Case.parse, default=Case.parse("resnet18:64x32:32"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--images", type=int, default=2048, help="people drawn")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    options = parser.parse_args()
    case, device, num_steps = options.case, options.device, options.steps
    torch.backends.cudnn.allow_tf32 = False
    kinds: dict[str, Callable[[Case, int, torch.device, int], TrainState]] = {
        "plain": plain,
        "plain, weights changed by 1e-6": changed,
        f"fast, {options.precision}": partial(fast, precision=options.precision),
    }
    images = people(options.images, case.height, case.width)
    console = Console(width=110)
    table = Table(
        "",
        "loss of the first step",
        f"mean loss of the last {NUM_LAST}",
        "largest difference to plain, first 5 steps",
        f"difference of the means of the last {NUM_LAST}",
        title=f"{case}, {num_steps} steps",
    )
    for seed in range(options.seeds):
        curves = {
            kind: losses(make(case, seed, device, num_steps), images, num_steps, kind)
            for kind, make in kinds.items()
        }
        last = statistics.mean(curves["plain"][-NUM_LAST:])
        for kind, curve in curves.items():
            early = max(abs(a - b) for a, b in zip(curve[:5], curves["plain"][:5], strict=True))
            mean = statistics.mean(curve[-NUM_LAST:])
            table.add_row(
                f"seed {seed}, {kind}",
                f"{curve[0]:.4f}",
                f"{mean:.4f}",
                f"{early:.1e}",
                f"{mean - last:+.4f}",
            )
    console.print(table)
    console.print(provenance(device))


if __name__ == "__main__":
    main()
