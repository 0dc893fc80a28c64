"""What a checkpoint says of its run; this module does not import torch."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

POSITION_FILE = "state.json"


class Outcome(BaseModel):
    """What a run has reached, as its checkpoint says (``state.json``).

    Attributes:
        best_scores: Scores of the best backbone, 0..1 by name.
        scores_untrained: Scores of the backbone before training.
        num_queries_without_match: Query images that the scores leave out.
        images_per_second: Mean speed of training so far.
    """

    model_config = ConfigDict(frozen=True)

    best_scores: dict[str, float]
    scores_untrained: dict[str, float]
    num_queries_without_match: int = 0  # Older checkpoints do not have it.
    images_per_second: float


def read_outcome(folder: Path) -> Outcome:
    """Read the outcome from the checkpoint in ``folder``."""
    return Outcome.model_validate_json((folder / POSITION_FILE).read_text())
