"""What a loss compares."""

from typing import NamedTuple

from torch import Tensor

from proteus.models.features import Features


class Projected(NamedTuple):
    """The student's features after its heads, Dt wide as the teacher's. What no loss reads is left as it came.

    plain:  Features of all B images: class token through the token head, patch tokens through the feature head.
    masked: Features of the first M images, masked: patch tokens through the patch head.
    logits: [B, K] of a linear classifier on the class token; None where no loss reads it.
    """

    plain: Features
    masked: Features
    logits: Tensor = None  # type: ignore[assignment]


class Target(NamedTuple):
    """What the student is asked for. What a run has not (a teacher, labels) is None, and no loss of the run reads it.

    features: the teacher's Features of the B unmasked images.
    mask:     [M, N] bool, True where the student saw the mask token.
    logits:   [B, K] of the teacher's classifier.
    labels:   [B] int64.
    temperature: both sides' logits are divided by it in `logits_kl`.
    """

    features: Features
    mask: Tensor
    logits: Tensor = None  # type: ignore[assignment]
    labels: Tensor = None  # type: ignore[assignment]
    temperature: float = 1.0
