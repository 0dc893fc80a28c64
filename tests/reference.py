"""The documented formulas in plain loops over Python numbers, slow and obvious.

Nothing here is imported from the package: a test compares the two.
"""

import math
from collections.abc import Sequence

Vector = Sequence[float]


def dot(left: Vector, right: Vector) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def cross_entropy(positive: float, negatives: Sequence[float], temperature: float) -> float:
    """-log( e^{s+/t} / (e^{s+/t} + sum of e^{s-/t}) )."""
    numerator = math.exp(positive / temperature)
    others = [math.exp(negative / temperature) for negative in negatives]
    return -math.log(numerator / (numerator + math.fsum(others)))


def softmax(values: Sequence[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in values]
    return [power / math.fsum(powers) for power in powers]


def info_nce(
    query: Sequence[Vector], key: Sequence[Vector], queue: Sequence[Vector], temperature: float
) -> float:
    return mean(
        [
            cross_entropy(dot(query[i], key[i]), [dot(query[i], k) for k in queue], temperature)
            for i in range(len(query))
        ]
    )


def global_consistency(
    augmented: Sequence[Vector],
    original: Sequence[Vector],
    queue: Sequence[Vector],
    temperature: float,
    target_temperature: float,
) -> float:
    divergences = []
    for i in range(len(augmented)):
        target = softmax([dot(original[i], key) for key in queue], target_temperature)
        prediction = softmax([dot(augmented[i], key) for key in queue], temperature)
        divergences.append(
            math.fsum(t * math.log(t / p) for t, p in zip(target, prediction, strict=True))
        )
    return mean(divergences)


def intrinsic_contrastive(
    query_patches: Sequence[Sequence[Vector]],
    key_patches: Sequence[Sequence[Vector]],
    rows: int,
    columns: int,
    temperature: float,
    mining: str,
) -> float:
    losses = []
    for queries, keys in zip(query_patches, key_patches, strict=True):
        for row in range(rows):
            for column in range(columns):
                query = queries[row * columns + column]
                positives, negatives = [], []
                for other_row in range(rows):
                    for other_column in range(columns):
                        similarity = dot(query, keys[other_row * columns + other_column])
                        if mining == "symmetry":
                            is_positive = other_row == row
                        else:
                            is_positive = (other_row, other_column) == (row, column)
                        (positives if is_positive else negatives).append(similarity)
                losses.append(cross_entropy(min(positives), negatives, temperature))
    return mean(losses)


def batch_hard_triplet(features: Sequence[Vector], pids: Sequence[int], margin: float) -> float:
    losses = []
    for anchor, pid in zip(features, pids, strict=True):
        distances = [(math.dist(anchor, f), p) for f, p in zip(features, pids, strict=True)]
        positive = max(distance for distance, other in distances if other == pid)
        negative = min(distance for distance, other in distances if other != pid)
        losses.append(max(0.0, positive - negative + margin))
    return mean(losses)


def retrieval(
    distances: Sequence[Vector],
    query_ids: Sequence[tuple[int, int]],
    gallery_ids: Sequence[tuple[int, int]],
    max_rank: int,
) -> tuple[float, list[float], float, int] | None:
    """Return mAP, CMC, mINP and the number of valid queries; None without any.

    Ids are pairs of pid and camid.
    """
    precisions, inverse_penalties = [], []
    found = [0] * max_rank
    for query, (pid, camid) in enumerate(query_ids):
        remaining = [
            g
            for g, (gallery_pid, gallery_camid) in enumerate(gallery_ids)
            if gallery_pid != -1 and (gallery_pid, gallery_camid) != (pid, camid)
        ]
        remaining.sort(key=lambda g: distances[query][g])
        hits = [rank for rank, g in enumerate(remaining, 1) if gallery_ids[g][0] == pid]
        if not hits:
            continue
        precisions.append(mean([count / rank for count, rank in enumerate(hits, 1)]))
        inverse_penalties.append(len(hits) / hits[-1])
        for k in range(1, max_rank + 1):
            found[k - 1] += hits[0] <= k
    if not precisions:
        return None
    return (
        mean(precisions),
        [count / len(precisions) for count in found],
        mean(inverse_penalties),
        len(precisions),
    )


def reranked(
    distances: Sequence[Sequence[float]], num_queries: int, k1: int, k2: int, weight: float
) -> list[list[float]]:
    """Return k-reciprocal re-ranked distances of queries and gallery images.

    Zhong et al. 2017, equations 1 to 12, from the squared distances of all images, the
    queries first.
    """
    images = range(len(distances))
    relative = [[d / max(row) for d in row] for row in distances]
    ranking = [sorted(images, key=lambda j: row[j]) for row in distances]

    def reciprocal(i: int, k: int) -> set[int]:
        return {j for j in ranking[i][: k + 1] if i in ranking[j][: k + 1]}

    encodings = []
    for i in images:
        near = reciprocal(i, k1)
        expanded = set(near)
        for j in near:
            candidates = reciprocal(j, round(k1 / 2))
            if 3 * len(candidates & near) > 2 * len(candidates):
                expanded |= candidates
        weights = {j: math.exp(-relative[i][j]) for j in expanded}
        total = sum(weights.values())
        encodings.append({j: w / total for j, w in weights.items()})
    averaged = [
        {
            j: mean([encodings[neighbor].get(j, 0.0) for neighbor in ranking[i][:k2]])
            for j in images
        }
        for i in images
    ]
    result = []
    for i in range(num_queries):
        row = []
        for j in images[num_queries:]:
            smaller = sum(min(averaged[i][n], averaged[j][n]) for n in images)
            larger = sum(max(averaged[i][n], averaged[j][n]) for n in images)
            row.append((1 - weight) * (1 - smaller / larger) + weight * relative[i][j])
        result.append(row)
    return result


def cluster_contrast(
    features: Sequence[Vector],
    labels: Sequence[int],
    memory: Sequence[Vector],
    temperature: float,
) -> float:
    losses = []
    for feature, label in zip(features, labels, strict=True):
        others = [dot(feature, memory[c]) for c in range(len(memory)) if c != label]
        losses.append(cross_entropy(dot(feature, memory[label]), others, temperature))
    return mean(losses)


def updated_memory(
    memory: Sequence[Vector], batch: Sequence[Vector], labels: Sequence[int], momentum: float
) -> list[Vector]:
    updated = list(memory)
    for image, label in zip(batch, labels, strict=True):
        pairs = zip(updated[label], image, strict=True)
        moved = [momentum * old + (1 - momentum) * new for old, new in pairs]
        length = math.sqrt(dot(moved, moved))
        updated[label] = [value / length for value in moved]
    return updated
