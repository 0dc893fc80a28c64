"""The three losses equal their documented formulas, and keep what these formulas keep."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests import reference
from upreid_ray.core.losses import global_consistency, info_nce, intrinsic_contrastive

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 6)
GRIDS = [
    (4, 2, "symmetry"),
    (2, 1, "symmetry"),
    (3, 3, "symmetry"),
    (4, 2, "none"),
    (2, 1, "none"),
    (3, 3, "none"),
    (1, 4, "none"),
]
any_grid = pytest.mark.parametrize(("rows", "columns", "mining"), GRIDS)


def units(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Make random unit-length embeddings of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)
        for shape in shapes
    ]


def rotation(seed: int, dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square).Q


def permutation(seed: int, size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def nce(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    return info_nce(query, key, queue, temperature=0.1)


def consistency(augmented: Tensor, original: Tensor, queue: Tensor) -> Tensor:
    return global_consistency(
        augmented, original, queue, temperature=0.1, target_temperature=0.04
    )


def intrinsic(
    query: Tensor, key: Tensor, rows: int = 3, columns: int = 2, mining: str = "symmetry"
) -> Tensor:
    return intrinsic_contrastive(
        query, key, rows=rows, columns=columns, temperature=0.2, mining=mining
    )


def mirrored(patches: Tensor, rows: int, columns: int) -> Tensor:
    return patches.unflatten(1, (rows, columns)).flip(2).flatten(1, 2)


@given(batch=SIZES, num_keys=SIZES, dim=SIZES, seed=SEEDS)
def test_info_nce_is_its_formula(batch, num_keys, dim, seed):
    query, key, queue = units(seed, (batch, dim), (batch, dim), (num_keys, dim))

    loss = info_nce(query, key, queue, temperature=0.1)

    expected = reference.info_nce(query.tolist(), key.tolist(), queue.tolist(), 0.1)
    assert_close(loss.item(), expected)


@given(batch=SIZES, num_keys=SIZES, dim=SIZES, seed=SEEDS)
def test_global_consistency_is_its_formula(batch, num_keys, dim, seed):
    augmented, original, queue = units(seed, (batch, dim), (batch, dim), (num_keys, dim))

    loss = global_consistency(
        augmented, original, queue, temperature=0.1, target_temperature=0.04
    )

    expected = reference.global_consistency(
        augmented.tolist(), original.tolist(), queue.tolist(), 0.1, 0.04
    )
    assert_close(loss.item(), expected)


@any_grid
@pytest.mark.parametrize("seed", range(5))
def test_intrinsic_contrastive_is_its_formula(rows, columns, mining, seed):
    query, key = units(seed, (3, rows * columns, 5), (3, rows * columns, 5))

    loss = intrinsic(query, key, rows, columns, mining)

    expected = reference.intrinsic_contrastive(
        query.tolist(), key.tolist(), rows, columns, 0.2, mining
    )
    assert_close(loss.item(), expected)


@pytest.mark.parametrize("num_keys", [1, 7, 32])
def test_info_nce_of_equal_embeddings_is_the_log_of_the_choices(num_keys):
    embedding = units(0, (1, 5))[0]

    loss = nce(embedding.expand(4, 5), embedding.expand(4, 5), embedding.expand(num_keys, 5))

    assert_close(loss.item(), math.log(1 + num_keys))


@any_grid
def test_intrinsic_contrastive_of_equal_embeddings_is_the_log_of_the_choices(
    rows, columns, mining
):
    embedding = units(0, (1, 1, 5))[0].expand(2, rows * columns, 5)

    loss = intrinsic(embedding, embedding, rows, columns, mining)

    num_positives = columns if mining == "symmetry" else 1
    assert_close(loss.item(), math.log(1 + rows * columns - num_positives))


def test_global_consistency_of_equal_distributions_is_zero():
    view, queue = units(0, (4, 5), (7, 5))

    loss = global_consistency(view, view, queue, temperature=0.1, target_temperature=0.1)

    assert_close(loss.item(), 0.0)


@given(seed=SEEDS)
def test_global_consistency_is_never_negative(seed):
    augmented, original, queue = units(seed, (4, 5), (4, 5), (7, 5))

    assert consistency(augmented, original, queue) > 0


@pytest.mark.parametrize("loss", [nce, consistency])
@given(batch=SIZES, num_keys=SIZES, seed=SEEDS)
def test_losses_over_the_queue_ignore_its_order(loss, batch, num_keys, seed):
    query, key, queue = units(seed, (batch, 5), (batch, 5), (num_keys, 5))

    assert_close(loss(query, key, queue[permutation(seed, num_keys)]), loss(query, key, queue))


@pytest.mark.parametrize("loss", [nce, consistency])
@given(batch=SIZES, seed=SEEDS)
def test_losses_over_the_queue_ignore_the_order_of_the_batch(loss, batch, seed):
    query, key, queue = units(seed, (batch, 5), (batch, 5), (4, 5))
    order = permutation(seed, batch)

    assert_close(loss(query[order], key[order], queue), loss(query, key, queue))


@pytest.mark.parametrize("loss", [nce, consistency])
@given(dim=SIZES, seed=SEEDS)
def test_losses_over_the_queue_ignore_a_rotation_of_the_space(loss, dim, seed):
    embeddings = units(seed, (3, dim), (3, dim), (4, dim))
    turn = rotation(seed, dim)

    assert_close(loss(*(e @ turn for e in embeddings)), loss(*embeddings))


def test_info_nce_depends_on_which_key_belongs_to_which_query():
    query, key, queue = units(0, (4, 5), (4, 5), (7, 5))

    assert abs(nce(query, key.roll(1, 0), queue) - nce(query, key, queue)) > 0.01


@pytest.mark.parametrize("mining", ["symmetry", "none"])
@given(batch=SIZES, seed=SEEDS)
def test_intrinsic_contrastive_ignores_the_order_of_the_batch(mining, batch, seed):
    query, key = units(seed, (batch, 6, 5), (batch, 6, 5))
    order = permutation(seed, batch)

    loss = intrinsic(query[order], key[order], mining=mining)

    assert_close(loss, intrinsic(query, key, mining=mining))


@pytest.mark.parametrize("mining", ["symmetry", "none"])
@given(dim=SIZES, seed=SEEDS)
def test_intrinsic_contrastive_ignores_a_rotation_of_the_space(mining, dim, seed):
    query, key = units(seed, (3, 6, dim), (3, 6, dim))
    turn = rotation(seed, dim)

    loss = intrinsic(query @ turn, key @ turn, mining=mining)

    assert_close(loss, intrinsic(query, key, mining=mining))


@given(rows=st.integers(2, 4), columns=st.integers(1, 4), seed=SEEDS)
def test_symmetry_mining_ignores_a_flip_of_the_query_view(rows, columns, seed):
    query, key = units(seed, (2, rows * columns, 5), (2, rows * columns, 5))

    loss = intrinsic(mirrored(query, rows, columns), key, rows, columns)

    assert_close(loss, intrinsic(query, key, rows, columns))


@given(rows=st.integers(2, 4), columns=st.integers(1, 4), seed=SEEDS)
def test_symmetry_mining_ignores_a_flip_of_the_key_view(rows, columns, seed):
    query, key = units(seed, (2, rows * columns, 5), (2, rows * columns, 5))

    loss = intrinsic(query, mirrored(key, rows, columns), rows, columns)

    assert_close(loss, intrinsic(query, key, rows, columns))


@pytest.mark.parametrize("seed", range(5))
def test_same_cell_pairing_notices_a_flip(seed):
    query, key = units(seed, (2, 6, 5), (2, 6, 5))

    flipped = intrinsic(query, mirrored(key, 3, 2), mining="none")

    assert abs(flipped - intrinsic(query, key, mining="none")) > 1e-3


@pytest.mark.parametrize("mining", ["symmetry", "none"])
def test_intrinsic_contrastive_notices_exchanged_rows(mining):
    query, key = units(0, (2, 6, 5), (2, 6, 5))

    upside_down = intrinsic(
        query, key.unflatten(1, (3, 2)).flip(1).flatten(1, 2), mining=mining
    )

    assert abs(upside_down - intrinsic(query, key, mining=mining)) > 1e-3


def test_intrinsic_contrastive_compares_patches_of_one_image_only():
    query, key = units(0, (3, 6, 5), (3, 6, 5))

    together = intrinsic(query, key)

    alone = [intrinsic(query[i : i + 1], key[i : i + 1]) for i in range(3)]
    assert_close(together, torch.stack(alone).mean())


@pytest.mark.parametrize(
    ("rows", "columns", "mining"), [(1, 4, "symmetry"), (1, 1, "symmetry"), (1, 1, "none")]
)
def test_a_grid_without_negatives_is_refused(rows, columns, mining):
    patches = units(0, (2, rows * columns, 5))[0]

    with pytest.raises(ValueError, match="no negatives"):
        intrinsic(patches, patches, rows, columns, mining)


def test_a_grid_of_another_number_of_patches_is_refused():
    patches = units(0, (2, 6, 5))[0]

    with pytest.raises(ValueError, match="a grid of 4x2 does not have 6 patches"):
        intrinsic(patches, patches, 4, 2)


def test_the_target_of_the_consistency_receives_no_gradient():
    augmented, original, queue = units(0, (4, 5), (4, 5), (7, 5))
    augmented.requires_grad_()
    original.requires_grad_()

    consistency(augmented, original, queue).backward()

    assert original.grad is None


@pytest.mark.parametrize("loss", [nce, consistency])
def test_losses_over_the_queue_have_the_gradient_of_their_values(loss):
    query, key, queue = units(0, (2, 4), (2, 4), (3, 4))

    assert torch.autograd.gradcheck(lambda q: loss(q, key, queue), query.requires_grad_())


@any_grid
def test_intrinsic_contrastive_has_the_gradient_of_its_values(rows, columns, mining):
    query, key = units(0, (2, rows * columns, 4), (2, rows * columns, 4))

    assert torch.autograd.gradcheck(
        lambda q: intrinsic(q, key, rows, columns, mining), query.requires_grad_()
    )


@pytest.mark.parametrize("temperature", [1e-4, 1e4])
@pytest.mark.parametrize("name", ["info_nce", "consistency", "symmetry", "none"])
def test_extreme_temperatures_leave_values_and_gradients_finite(temperature, name):
    shape = (4, 6, 5) if name in {"symmetry", "none"} else (4, 5)
    query, key, queue = (e.float() for e in units(0, shape, shape, (7, 5)))
    query.requires_grad_()

    if name == "info_nce":
        loss = info_nce(query, key, queue, temperature=temperature)
    elif name == "consistency":
        loss = global_consistency(
            query, key, queue, temperature=temperature, target_temperature=temperature
        )
    else:
        loss = intrinsic_contrastive(
            query, key, rows=3, columns=2, temperature=temperature, mining=name
        )
    loss.backward()

    assert loss.isfinite()
    assert query.grad.isfinite().all()
