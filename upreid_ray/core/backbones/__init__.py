"""Families of backbones, one file each; no other module knows a family.

A file of this folder defines ``FAMILY``, an instance of a subclass of `Family`. A new family
takes nothing else in the package; CONTRIBUTING.md walks through it.

Dimensions: B images, F features.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from upreid_ray.config.errors import InputError

Size = tuple[int, int]
"""Height and width of images, in pixels."""
DEFAULT_SIZE: Size = (256, 128)
Backbone = Any
"""A module with the attribute ``num_features``, the number F of its features."""
# Names of the classifier in torchvision, torchreid, fast-reid and BoT.
HEADS = ("fc", "classifier", "head", "heads", "bottleneck")


@dataclass(frozen=True)
class Constructor:
    """How another tool makes a backbone without a file.

    Attributes:
        text: What is written in the tool: an expression, or words of a command line.
        head: Names of the tensors that the tool adds to those of the backbone.
    """

    text: str
    head: tuple[str, ...] = ()


class Family(ABC):
    """A family of backbones: how they are built, and what other modules must know of them.

    Attributes:
        names: Names of its members, as `--model.backbone` takes them.
        optimizer: Optimizer that trains them unless the user chooses another one.
        drop_path: Largest probability with which stochastic depth leaves out a block, unless
            the user chooses another one.
        has_last_stride: Whether the last stage can keep the resolution of the one before.
    """

    names: tuple[str, ...]
    optimizer: Literal["sgd", "adamw"] = "adamw"
    drop_path = 0.0
    has_last_stride = False

    def has(self, name: str) -> bool:
        """Return whether ``name`` is a member of the family.

        Raises:
            InputError: It can be no member of any family.
        """
        return name in self.names

    @abstractmethod
    def build(self, name: str, *, size: Size, last_stride: int, drop_path: float) -> Backbone:
        """Return a randomly initialized member that maps images to features ``[B, F]``.

        Args:
            name: Name of the member.
            size: Size of the images that it is trained on; a member that takes images of other
                sizes too must do so whatever this size is.
            last_stride: Stride of the last stage; ignored without `has_last_stride`.
            drop_path: Largest probability with which stochastic depth leaves out a block.

        Raises:
            InputError: The member has no stochastic depth, or cannot be built.
        """

    @abstractmethod
    def blocks(self, backbone: Backbone) -> Iterable[nn.Module]:
        """Yield the blocks whose activations can be computed again in the backward pass."""

    @abstractmethod
    def landmarks(self, name: str | None = None) -> tuple[str, ...]:
        """Return names of tensors that a file of weights of the family holds.

        No other part of a model has all of them under one prefix. There are none if members
        differ in all names and the name of the member is not given.
        """

    def check_size(self, name: str, size: Size, *, of_patches: bool = False) -> None:
        """Check that the member takes images, or the patches of images, of this size.

        Raises:
            ValueError: It does not; the message says what it takes, after its name.
        """
        return  # most families take any size

    def frozen(self, backbone: Backbone) -> Iterable[nn.Parameter]:
        """Yield the parameters that pre-training leaves as they are."""
        return ()

    def heads(self, name: str) -> tuple[str, ...]:
        """Return the names of modules behind the features in a file, such as a classifier."""
        return HEADS

    def translate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a whole file, with prefixes, under the names of the family."""
        return tensors

    def fit(
        self, name: str, weights: dict[str, Tensor], size: Size, *, old_size: Size | None = None
    ) -> dict[str, Tensor]:
        """Return the weights for images of another size.

        Args:
            name: Name of the member.
            weights: State dict of the backbone.
            size: New size of the images.
            old_size: Size for which the weights were made; None if it is unknown.
        """
        return weights

    def constructors(self, name: str, size: Size) -> Mapping[str, Constructor]:
        """Return how other tools make this member, by the name of the tool."""
        return {}


def families() -> Iterator[Family]:
    """Yield the families in the order of their files, each imported when its turn comes."""
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        yield importlib.import_module(f"{__name__}.{module.name}").FAMILY


def find(name: str) -> Family:
    """Return the family that has a backbone of this name.

    Raises:
        InputError: There is none; the message lists the names.
    """
    known: list[str] = []
    for family in families():
        if family.has(name):
            return family
        known += family.names
    raise InputError(f"{name}: is no backbone; there are {', '.join(known)}")
