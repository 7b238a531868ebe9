"""What a loss compares."""

from typing import NamedTuple

from torch import Tensor

from proteus.models.features import Features


class Projected(NamedTuple):
    """The student's features after its heads, Dt wide as the teacher's. What no loss reads is left as it came.

    plain:  Features of all B images: class token through the token head, patch tokens through the feature head.
    masked: Features of the first M images, masked: patch tokens through the patch head.
    logits: [B, K] of a linear classifier on the class token, or None.
    """

    plain: Features
    masked: Features
    logits: Tensor | None = None


class Target(NamedTuple):
    """What the student is asked for.

    features: the teacher's Features of the B unmasked images (None where there is no teacher).
    mask:     [M, N] bool, True where the student saw the mask token.
    logits:   [B, K] of the teacher's classifier, or None.
    labels:   [B] int64, or None.
    temperature: both sides' logits are divided by it in `logits_kl`.
    """

    features: Features | None
    mask: Tensor
    logits: Tensor | None = None
    labels: Tensor | None = None
    temperature: float = 1.0
