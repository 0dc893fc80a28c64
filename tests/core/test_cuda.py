"""On a GPU: no step waits for it, and it computes what a CPU computes."""

import pytest
import torch
import torch._dynamo.utils
from torch.testing import assert_close

from tests.core.tiny import people, tiny
from upreid_ray.core.training import TrainState, train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NUM_STEPS = 5
SETTINGS = {
    "augmentation.jitter_probability": 0.8,
    "optimizer.lr": 1e-4,
    "training.compile": False,
}


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def state_on(device: str, settings: dict[str, object] | None = None) -> TrainState:
    config = tiny(SETTINGS | (settings or {}))
    return TrainState(config, steps_per_epoch=NUM_STEPS, device=torch.device(device))


def test_losses_and_weights_are_those_of_the_cpu():
    states = [state_on("cpu"), state_on("cuda")]

    losses = [
        [float(train_step(state, people(8, seed=step))["loss"]) for step in range(NUM_STEPS)]
        for state in states
    ]

    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    on_cpu, on_gpu = (state.model.state_dict() for state in states)
    for name, tensor in on_cpu.items():
        assert_close(on_gpu[name].cpu(), tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"training.precision": "fp32"},
        {"training.precision": "bf16"},
        {"loss.intrinsic_weight": 0, "loss.consistency_weight": 0},
        {"training.precision": "bf16", "training.compile": True},
    ],
)
def test_no_step_waits_for_the_device(settings):
    state = state_on("cuda", settings)
    train_step(state, people(8))  # libraries load, and wait for that

    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            train_step(state, people(8, seed=step))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def losses_on_gpu(settings: dict[str, object]) -> list[float]:
    state = state_on("cuda", settings)
    size = state.config.training.batch_size
    return [
        float(train_step(state, people(size, seed=step))["loss"]) for step in range(NUM_STEPS)
    ]


def test_bf16_losses_are_near_those_of_fp32():
    losses = losses_on_gpu({"training.precision": "bf16"})

    assert losses == pytest.approx(losses_on_gpu({}), rel=2e-2)


def test_compiled_losses_are_those_of_the_uncompiled_step():
    losses = losses_on_gpu({"training.compile": True})

    assert losses == pytest.approx(losses_on_gpu({}), rel=1e-3)


def test_each_kind_of_pass_is_compiled_once():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    losses_on_gpu({"training.compile": True, "training.batch_size": 16})  # of four groups

    # View and patches of query and key, the original as the key's view; views with and
    # without original.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6
