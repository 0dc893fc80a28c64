"""k-reciprocal re-ranking and its Jaccard distance.

Zhong et al. 2017, https://arxiv.org/abs/1701.08398. An image is described by a sparse row of
weights of its k-reciprocal neighbours; images that share neighbours are alike. Memory holds the
sparse rows, and only a few rows of distances at a time.

Dimensions: N images, Q query and G gallery images, F features.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from upreid_ray.core.retrieval import row_parts

SMALLEST_DISTANCE = 1e-5


def reranked_distances(
    query: Tensor,
    gallery: Tensor,
    *,
    k1: int = 20,
    k2: int = 6,
    distance_weight: float = 0.3,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield re-ranked distances of unit-length features, a few queries at a time.

    Args:
        query: ``[Q, F]``.
        gallery: ``[G, F]``.
        k1: Number of neighbours among which reciprocal ones are searched.
        k2: Number of nearest images whose descriptions are averaged.
        distance_weight: Weight (0..1) of the distance of the features; the rest is that of the
            Jaccard distance.

    Yields:
        Which queries, and their distances ``[n, G]``, 0..1.
    """
    features = torch.cat([query, gallery])
    encoding, farthest = reciprocal_encoding(features, k1=k1, k2=k2)
    in_gallery = encoding[len(query) :].tocsc()
    for part in row_parts(len(query), len(gallery)):
        squared = 2 - 2 * query[part] @ gallery.T
        jaccard = torch.from_numpy(jaccard_distances(encoding[part], in_gallery))
        jaccard = jaccard.to(squared)
        relative = squared / farthest[part, None]
        yield part, torch.lerp(jaccard, relative, distance_weight)


def reciprocal_encoding(
    features: Tensor, *, k1: int, k2: int
) -> tuple[sparse.csr_array, Tensor]:
    """Describe each image by its expanded k-reciprocal neighbours.

    Args:
        features: ``[N, F]``, unit length.
        k1: Number of neighbours among which reciprocal ones are searched.
        k2: Number of nearest images, including the image itself, whose descriptions are
            averaged.

    Returns:
        ``[N, N]``, sparse, rows that sum to 1; and ``[N]``, the largest squared distance of
        each image to any other.
    """
    num_images = len(features)
    nearest = np.empty((num_images, min(max(k1 + 1, k2), num_images)), np.int64)
    farthest = features.new_empty(num_images)
    for part in row_parts(num_images, num_images):
        similarity = features[part] @ features.T
        nearest[part] = similarity.topk(nearest.shape[1], dim=1).indices.cpu().numpy()
        # If all images are equal, their distances are rounding errors.
        farthest[part] = (2 - 2 * similarity.amin(dim=1)).clamp(min=SMALLEST_DISTANCE)

    reciprocal = _reciprocal(nearest[:, : k1 + 1])
    # Python rounds half to even, as NumPy does in the authors' code.
    of_half = _reciprocal(nearest[:, : round(k1 / 2) + 1])
    shared = reciprocal.multiply(reciprocal @ of_half.T).tocsr()
    sizes = of_half.sum(axis=1)
    shared.data = (shared.data > 2 / 3 * sizes[shared.tocoo().col]).astype(np.float32)
    expanded = (reciprocal + shared @ of_half).tocoo()
    kept = expanded.data > 0
    rows, columns = expanded.row[kept], expanded.col[kept]
    weights = np.exp(
        -_squared_distances(features, rows, columns) / farthest.cpu().numpy()[rows]
    )
    encoding = sparse.csr_array((weights, (rows, columns)), shape=expanded.shape)
    encoding = encoding.multiply(1 / encoding.sum(axis=1)[:, None]).tocsr()
    if k2 > 1:
        near = _adjacency(nearest[:, :k2])
        encoding = (near @ encoding) / min(k2, num_images)
    return encoding, farthest


def jaccard_distances(left: sparse.csr_array, right: sparse.csc_array) -> NDArray[np.float32]:
    """Return the Jaccard distances ``[n, m]``, 0..1, of encodings ``[n, N]`` and ``[m, N]``."""
    distances = np.empty((left.shape[0], right.shape[0]), np.float32)
    for row in range(left.shape[0]):
        own = slice(left.indptr[row], left.indptr[row + 1])
        columns = right[:, left.indices[own]]
        weights = np.repeat(left.data[own], np.diff(columns.indptr))
        smaller = np.minimum(columns.data, weights)
        shared = np.bincount(columns.indices, smaller, minlength=right.shape[0])
        distances[row] = 1 - shared / (2 - shared)
    return distances


def _adjacency(nearest: NDArray[np.int64]) -> sparse.csr_array:
    """Return the sparse matrix with a 1 for each image (row) and neighbour (column)."""
    num_images, num_neighbors = nearest.shape
    starts = np.arange(0, nearest.size + 1, num_neighbors)
    ones = np.ones(nearest.size, np.float32)
    return sparse.csr_array((ones, nearest.ravel(), starts), shape=(num_images, num_images))


def _reciprocal(nearest: NDArray[np.int64]) -> sparse.csr_array:
    """Return, for each image, the neighbours that have the image as a neighbour too."""
    adjacency = _adjacency(nearest)
    return adjacency.multiply(adjacency.T).tocsr()


def _squared_distances(
    features: Tensor, rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the squared distances of some pairs of unit-length features."""
    left, right = torch.from_numpy(rows).long(), torch.from_numpy(columns).long()
    parts = [
        2 - 2 * (features[left[part]] * features[right[part]]).sum(dim=1)
        for part in row_parts(len(left), features.shape[1])
    ]
    return torch.cat(parts).cpu().numpy()
