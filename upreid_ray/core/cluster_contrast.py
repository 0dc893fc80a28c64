"""Unsupervised fine-tuning: Cluster Contrast (Dai et al. 2021).

https://arxiv.org/abs/2103.11568: images are clustered before each epoch, and each image is
contrasted with a memory that holds one feature for each cluster.

Dimensions: N training images, B images of the whole batch, G of a group, F features,
C clusters.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import sparse
from sklearn.cluster import DBSCAN
from torch import Tensor, nn

from upreid_ray.config.downstream import ClusterContrastConfig, ClusteringConfig
from upreid_ray.config.errors import InputError
from upreid_ray.core import distributed
from upreid_ray.core.backbone import Description, NeckedBackbone
from upreid_ray.core.finetuning import DownstreamState, PersonBatch, person_step
from upreid_ray.core.precision import autocast
from upreid_ray.core.reranking import jaccard_distances, reciprocal_encoding
from upreid_ray.core.retrieval import row_parts

OUTLIER = -1


def pseudo_labels(features: Tensor, config: ClusteringConfig) -> NDArray[np.int64]:
    """Cluster images by DBSCAN on their k-reciprocal Jaccard distance.

    The ``[N, N]`` distances never exist at once: they are computed a few rows at a time, and
    only those within ``eps`` are kept. This takes some hundred bytes of memory for each pair of
    neighbours, and 32 MB for the rows.

    Args:
        features: ``[N, F]``, unit length.
        config: Settings of the clustering.

    Returns:
        ``[N]``, the cluster of each image, counted from 0; -1 for outliers.

    Raises:
        InputError: There are fewer than two clusters, so that there is nothing to contrast.
    """
    encoding, _ = reciprocal_encoding(features, k1=config.k1, k2=config.k2)
    by_column = encoding.tocsc()
    parts = []
    for part in row_parts(len(features), len(features)):
        # Rounding may leave the distance of an image to itself below 0.
        distances = jaccard_distances(encoding[part], by_column).clip(min=0)
        rows, columns = np.nonzero(distances <= config.eps)
        # A sparse matrix that is made from coordinates keeps explicit zeros.
        coordinates = (distances[rows, columns], (rows, columns))
        parts.append(sparse.csr_matrix(coordinates, shape=distances.shape))
    dbscan = DBSCAN(eps=config.eps, min_samples=config.min_samples, metric="precomputed")
    labels: NDArray[np.int64] = dbscan.fit_predict(sparse.vstack(parts, "csr"))
    num_clusters = labels.max() + 1
    if num_clusters < 2:  # noqa: PLR2004, two sides of a contrast
        found = "no cluster" if num_clusters == 0 else "a single cluster"
        raise InputError(
            f"--clustering.eps {config.eps}: finds {found} among {len(labels)} images, of "
            f"which {(labels == OUTLIER).sum()} are outliers; take a "
            f"{'larger' if num_clusters == 0 else 'different'} one"
        )
    return labels


def centroids(features: Tensor, labels: NDArray[np.int64]) -> Tensor:
    """Return the mean features of clusters, ``[C, F]``, at unit length.

    Args:
        features: ``[N, F]``.
        labels: ``[N]``, the cluster of each image, counted from 0; -1 for outliers.
    """
    inside = torch.from_numpy(labels != OUTLIER).to(features.device)
    clusters = torch.from_numpy(labels).to(features.device)[inside]
    # A sum is as good as a mean, because the result is scaled to unit length.
    sums = features.new_zeros(int(labels.max()) + 1, features.shape[1])
    return F.normalize(sums.index_add(0, clusters, features[inside]), dim=1)


def cluster_contrast(
    features: Tensor, labels: Tensor, memory: Tensor, *, temperature: float
) -> Tensor:
    """Contrast the cluster of each image with all other clusters.

    This is InfoNCE as Dai et al. use it: cross-entropy of cosine similarities divided by the
    temperature.

    Args:
        features: ``[G, F]``, unit length, carry the gradient.
        labels: ``[G]``, the cluster of each image.
        memory: ``[C, F]``, unit length.
        temperature: Divides the similarities.

    Returns:
        The mean over G in nats; ``log(C)`` if all similarities are equal.
    """
    return F.cross_entropy(features @ memory.T / temperature, labels)


class ClusterMemory(nn.Module):
    """The clusters of an epoch: the images in them, and a feature of each cluster.

    Attributes:
        labels: ``[N]``, int64, the cluster of each training image, -1 for outliers.
        features: ``[C, F]``, unit length.
    """

    labels: Tensor
    features: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64))
        self.register_buffer("features", torch.empty(0, 0))
        self.register_load_state_dict_pre_hook(_take_shapes)  # type: ignore[no-untyped-call]

    def begin(self, labels: Tensor, features: Tensor) -> None:
        """Replace the clusters by those of a new epoch."""
        self.labels, self.features = labels.to(self.labels.device), features

    @torch.no_grad()
    def update(
        self,
        batch: Tensor,
        labels: Tensor,
        *,
        momentum: float,
        is_skipped: Tensor | bool = False,
    ) -> None:
        """Move the features of clusters towards the images of a batch, one after the other.

        Each image sets ``feature = momentum * feature + (1 - momentum) * image``, which is then
        scaled to unit length. This is the update of the published paper and of its authors'
        code (``CM``); an earlier version used only the hardest image of each cluster.

        Args:
            batch: ``[B, F]``, unit length.
            labels: ``[B]``, the cluster of each image.
            momentum: Weight (0..1) of the present feature.
            is_skipped: ``[]``, bool, on the device; whether nothing is to change.
        """
        is_skipped = torch.as_tensor(is_skipped, device=self.features.device)
        for i in range(len(batch)):
            label = labels[i : i + 1]  # a number would wait for the device, a tensor does not
            present = self.features[label]
            moved = F.normalize(momentum * present + (1 - momentum) * batch[i], dim=1)
            self.features[label] = torch.where(is_skipped, present, moved)


def _take_shapes(
    module: ClusterMemory, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Give the buffers the shapes of a checkpoint, whose number of clusters may differ."""
    for name in ("labels", "features"):
        buffer, saved = getattr(module, name), state_dict[prefix + name]
        setattr(module, name, buffer.new_empty(saved.shape))


class ClusterContrastModel(nn.Module):
    """A backbone with a BNNeck, and the memory of clusters."""

    def __init__(self, backbone: nn.Module, *, precision: str) -> None:
        super().__init__()
        self.precision = precision
        self.extractor = NeckedBackbone(backbone)
        self.memory = ClusterMemory()

    def forward(self, images: Tensor) -> Tensor:
        """Return features ``[G, F]`` of unit length, in fp32."""
        with autocast(images, self.precision):
            features = self.extractor.backbone(images)
        return F.normalize(self.extractor.neck(features.float()), dim=1)


class ClusterContrastState(DownstreamState):
    """State of an unsupervised run: backbone and neck, trained by Adam, and the memory."""

    config: ClusterContrastConfig

    def __init__(
        self,
        config: ClusterContrastConfig,
        backbone: nn.Module,
        images: Description,
        *,
        device: torch.device,
    ) -> None:
        """Add a neck and a memory to a backbone, which is changed in place."""
        super().__init__(
            config,
            lambda: ClusterContrastModel(backbone, precision=config.training.precision),
            images,
            steps_per_epoch=config.training.steps_per_epoch,
            device=device,
        )


def cluster_contrast_step(state: ClusterContrastState, batch: PersonBatch) -> dict[str, Tensor]:
    """Take one step; arguments and result are those of `person_step`.

    All groups of the step are compared with the same memory; the whole batch updates it then.
    """
    training, memory = state.config.training, state.model.memory
    seen = []

    def objective(features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        seen.append(features.detach())
        loss = cluster_contrast(
            features, labels, memory.features, temperature=training.temperature
        )
        return {"loss": loss}

    terms = person_step(state, batch, objective)
    labels = batch.labels.to(state.device, non_blocking=True)
    all_features, all_labels = (
        distributed.gather_rows(rows, num_groups=state.config.num_groups)
        for rows in (torch.cat(seen), labels)
    )
    memory.update(
        all_features(),
        all_labels(),
        momentum=training.memory_momentum,
        is_skipped=state.is_skipped,
    )
    return terms
