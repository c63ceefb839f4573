"""The cache of the Hugging Face hub as it lies on disk, holding models of these tests."""

from __future__ import annotations

from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_model(
    cache: Path, name: str, source: Path, *, commit: str = COMMIT, ref: str = "main"
) -> Path:
    """Put the files of a folder into the cache as a commit, and return the snapshot's folder.

    Args:
        cache: the folder `hub` of HF_HOME.
        name: organisation/name.
        source: a model folder.
        commit: 40 hexadecimal digits.
        ref: the branch or tag that points to it.
    """
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for file in filter(Path.is_file, Path(source).rglob("*")):
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.resolve())
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    return snapshot
