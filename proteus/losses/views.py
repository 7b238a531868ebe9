"""What a loss compares."""

from typing import NamedTuple

from torch import Tensor

from proteus.models.features import Features


class Projected(NamedTuple):
    """The student's features after the heads for one teacher, Dt wide as its, on the grid where they are compared.

    What no loss reads is left as it came.

    plain:        Features of all B images: class token through the token head, patch tokens through the feature head.
    masked:       Features of the first M images, masked: patch tokens through the patch head.
    logits:       [B, K] of the head that learns from the teacher's logits, or a map [B, K, h, w]; None where no loss
                  reads it.
    label_logits: [B, K] of the head that learns from labels, or a map [B, K, H, W] as large as the labels; likewise.
    """

    plain: Features
    masked: Features
    logits: Tensor = None  # type: ignore[assignment]
    label_logits: Tensor = None  # type: ignore[assignment]


class Target(NamedTuple):
    """What the student is asked for. What a run has not (a teacher, labels) is None, and no loss of the run reads it.

    features: the teacher's Features of the B unmasked images, on the grid where they are compared.
    mask:     [M, N] bool on that grid, True where the student saw the mask token.
    logits:   [B, K] of the teacher's head, or a map [B, K, h, w] as large as the student's.
    labels:   [B] int64, or [B, H, W] for maps.
    temperature: both sides' logits are divided by it in `logits_kl`.
    """

    features: Features = None  # type: ignore[assignment]
    mask: Tensor = None  # type: ignore[assignment]
    logits: Tensor = None  # type: ignore[assignment]
    labels: Tensor = None  # type: ignore[assignment]
    temperature: float = 1.0
