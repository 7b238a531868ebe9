"""Teacher and student of different patch sizes: who sees how many pixels, and on which grids they meet."""

from typing import NamedTuple

from proteus import config
from proteus.config import Config
from proteus.errors import InputError
from proteus.models import Encoder
from proteus.training.resize import Grid
from proteus.training.teacher import Teacher

ON_PATCHES = {"patch", "feature", "patch_feature"}  # losses that compare patch by patch


class Sizes(NamedTuple):
    """Image sizes in pixels, and patch grids (h, w).

    crop:     what images are rendered at, the largest size there is; who sees fewer pixels gets them resized from it.
    compared: where the student's patches meet each teacher's: the smaller of their grids.
    mask:     where masks are drawn: the smallest grid among the student and the teachers with a patch loss, so that
              what is masked there is masked as a whole everywhere.
    """

    crop: int
    student: int
    student_grid: Grid
    teacher_grids: list[Grid]
    compared: list[Grid]
    mask: Grid


def student_size(cfg: Config, student: Encoder, teachers: list[Teacher]) -> int:
    """Pixels that the student sees, which a network made for one size has to be built for.

    With `student.image_size: auto`, what gives it the grid of the first teacher with a loss on patches: comparing
    patch by patch needs no interpolation then. Without such a loss it is `data.image_size`.
    """
    if cfg.student and cfg.student.image_size != "auto":
        return cfg.student.image_size
    for (key, section), teacher in zip(cfg.all_teachers.items(), teachers, strict=True):
        if cfg.losses_of(section).keys() & ON_PATCHES:
            return max(_teacher_grid(key, section, teacher)) * student.patch_size
    return cfg.data.image_size


def match_sizes(cfg: Config, student: Encoder, size: int, teachers: list[Teacher]) -> Sizes:
    """Who sees what, the student `size` pixels; InputError where a patch does not divide its image."""
    grids, masked = [], []
    for (key, section), teacher in zip(cfg.all_teachers.items(), teachers, strict=True):
        grids.append(_teacher_grid(key, section, teacher))
        masked += grids[-1:] if "patch" in cfg.losses_of(section) else []
    own = _grid_of(student, size, "data." if size == cfg.data.image_size else "student.")
    return Sizes(
        crop=max(size, *(teacher.image_size for teacher in teachers), 0),
        student=size,
        student_grid=own,
        teacher_grids=grids,
        compared=[_smallest(own, grid) for grid in grids],
        mask=_smallest(own, *masked),
    )


def _teacher_grid(key: str, section: config.Teacher, teacher: Teacher) -> Grid:
    return _grid_of(teacher.encoder, teacher.image_size, f"{key}." if section.image_size else "data.")


def describe_sizes(cfg: Config, sizes: Sizes, teachers: list[Teacher]) -> list[str]:
    """A line where sizes or grids differ, and what is done about it; none where all are one."""
    pixels = {sizes.student, *(teacher.image_size for teacher in teachers)}
    if len(pixels) == 1 and {*sizes.teacher_grids} <= {sizes.student_grid}:
        return []
    parts = [f"student {_shown(sizes.student, sizes.student_grid)}"]
    for index, section in enumerate(cfg.all_teachers.values()):
        teacher, grid, (height, width) = teachers[index], sizes.teacher_grids[index], sizes.compared[index]
        part = f"{teacher.name} {_shown(teacher.image_size, grid)}"
        if grid != sizes.student_grid and cfg.losses_of(section).keys() & ON_PATCHES:
            part += f" interpolated to {height} x {width}"
        parts.append(part)
    return [f"sizes    {', '.join(parts)}"]


def _grid_of(encoder: Encoder, size: int, section: str) -> Grid:
    try:
        return encoder.grid_of(size, size)
    except ValueError as error:
        raise InputError(f"{section}image_size={size}: {error}") from None


def _smallest(*grids: Grid) -> Grid:
    heights, widths = zip(*grids, strict=True)
    return min(heights), min(widths)


def _shown(size: int, grid: Grid) -> str:
    return f"{size} px ({grid[0]} x {grid[1]})"
