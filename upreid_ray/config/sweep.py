"""Settings of the search of a sweep."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from upreid_ray.config.section import Section


class SearchConfig(Section):
    """The search of a sweep: how points are drawn and trials stopped."""

    num_trials: PositiveInt = 16
    """Number of points to draw; each is combined with every value of grid(...)."""
    num_seeds: PositiveInt = 1
    """Number of trials of each point, with the seeds --seed, --seed + 1 and so on."""
    searcher: Literal["random", "tpe"] = "random"
    """How points are drawn: at random, or near good ones (Optuna's TPE)."""
    scheduler: Literal["asha", "none"] = "asha"
    """How trials are stopped early: at the rungs of ASHA, or not at all (none)."""
    grace_epochs: PositiveInt | None = None
    """Number of epochs before a trial may be stopped. Default: --evaluation.every_epochs."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """Reduction factor of ASHA: one in this many trials continues at each rung."""
    trial_epochs: PositiveInt | None = None
    """Number of epochs of a trial, which its schedules span. Default: --training.epochs."""
    max_concurrent: PositiveInt | None = None
    """Largest number of trials at a time. Default: as many as fit on the cluster."""
    retrain: bool = False
    """Whether to train the best point again for --training.epochs, and register the result."""
