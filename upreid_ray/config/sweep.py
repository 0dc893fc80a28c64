"""Settings of the search of a sweep."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from upreid_ray.config.section import Section


class SearchConfig(Section):
    """How a sweep looks for the best settings."""

    num_trials: PositiveInt = 16
    """Points to try; the values of grid(...) come on top, each with every point."""
    num_seeds: PositiveInt = 1
    """Trials of each point, with the seeds --seed, --seed + 1, ..."""
    searcher: Literal["random", "tpe"] = "random"
    """Draw points at random, or near good ones (Optuna's TPE)."""
    scheduler: Literal["asha", "none"] = "asha"
    """Stop trials that are behind at a rung (ASHA), or none."""
    grace_epochs: PositiveInt | None = None
    """Epochs before a trial may be stopped; none takes --evaluation.every_epochs."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """One trial of this many goes on at a rung; the next rung is this many times as far."""
    trial_epochs: PositiveInt | None = None
    """Length of a trial, its schedules included; none takes --training.epochs."""
    max_concurrent: PositiveInt | None = None
    """Trials at a time; none takes as many as the cluster holds."""
    retrain: bool = False
    """Train the best point again, for --training.epochs, and register that."""
