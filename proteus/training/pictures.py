"""Principal components of patch tokens as colours: what student and teacher see, side by side."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from proteus.models.features import Features


def component_colours(tokens: Tensor, basis_tokens: Tensor | None = None) -> Tensor:
    """First three principal components of patch tokens [B, N, D] as colours in [0, 1], [B, N, 3].

    The components are those of `basis_tokens` [B, N, D], the tokens' own where it is None: tokens of one space under
    one basis have comparable colours. Each component spans its 1st to 99th percentile; its sign makes the largest
    loading positive, so that a picture does not flip from one run to the next.
    """
    tokens = tokens.nan_to_num()  # a run that diverges is told elsewhere
    basis = (tokens if basis_tokens is None else basis_tokens.nan_to_num()).flatten(0, 1).double()  # [B * N, D]
    mean = basis.mean(dim=0)
    _, _, directions = torch.linalg.svd(basis - mean, full_matrices=False)
    directions = directions[:3]  # [3, D]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    directions = directions * largest.sign()

    def project(t: Tensor) -> Tensor:
        return (t.double() - mean) @ directions.T

    low, high = torch.quantile(project(basis), torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    return ((project(tokens) - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float()


def components_picture(
    images: Tensor, teacher: Features | None, student: Features, shared_space: bool, path: Path | None
) -> np.ndarray:
    """Rows of (image, teacher, student) to a PNG, if one is wanted; returns its pixels [H, W, 3] uint8.

    images: [B, 3, S, S] uint8. shared_space: the student's tokens are projected to the teacher's space, so both are
    coloured by the teacher's components.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = [("image", images.permute(0, 2, 3, 1).numpy())]
    if teacher is not None:
        columns.append(("teacher", _as_image(component_colours(teacher.patch), teacher.grid)))
    basis = teacher.patch if teacher is not None and shared_space else None
    columns.append(("student", _as_image(component_colours(student.patch, basis), student.grid)))

    figure = Figure(figsize=(1.6 * len(columns), 1.6 * len(images) + 0.3), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for column, (title, pictures) in enumerate(columns):
        axes[0, column].set_title(title, fontsize=9)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture, interpolation="nearest")
            axes[row, column].set_axis_off()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _as_image(colours: Tensor, grid: tuple[int, int]) -> np.ndarray:
    return colours.unflatten(1, grid).numpy()  # [B, h, w, 3]
