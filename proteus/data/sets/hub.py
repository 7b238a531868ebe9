"""A set from a copy on the Hugging Face hub, at one commit of it."""

import re
from pathlib import Path

from proteus.data.huggingface import HuggingFaceSource
from proteus.data.sets.files import one_line
from proteus.errors import InputError, MissingDataError

PATTERNS = ["*.parquet", "README.md", "dataset_infos.json"]


def hub_source(
    repo: str,
    split: str,
    *,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    config: str | None = None,
    download: bool = False,
) -> HuggingFaceSource:
    """A labelled split of a data set of parquet files: of the hub, or in a folder on this disk.

    repo:     a hub id, or a folder.
    revision: the commit of the hub id, all 40 digits: a branch or a tag may hold other images tomorrow.
    config:   the configuration, where the set has several.
    download: whether it may be fetched. Otherwise it has to be in the cache of Hugging Face, at that commit.

    MissingDataError where it is not there; InputError where a column or split is not in it.
    """
    folder, where = Path(repo).expanduser(), repo
    if not folder.exists():
        if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise InputError(f"{repo}: no such folder; a hub id needs its commit (40 hex digits), not {revision!r}")
        where = f"{repo}@{revision[:12]}"
        folder = _snapshot(repo, revision, download, where)
    return HuggingFaceSource(
        str(folder),
        split,
        use_labels=True,
        download=False,
        image_column=image_column,
        label_column=label_column,
        config=config,
        where=where,
    )


def _snapshot(repo: str, revision: str, download: bool, where: str) -> Path:
    """The folder of a commit in the cache. `datasets` itself, offline, would take any commit that is there."""
    from huggingface_hub import constants, snapshot_download

    try:
        local = not download or constants.HF_HUB_OFFLINE
        return Path(
            snapshot_download(
                repo, repo_type="dataset", revision=revision, allow_patterns=PATTERNS, local_files_only=local
            )
        )
    except Exception as error:  # the hub and the cache have errors of their own
        reason = one_line(error) if download else f"not in {constants.HF_HUB_CACHE}, and it may not be downloaded"
        raise MissingDataError(f"{where}: {reason}") from None
