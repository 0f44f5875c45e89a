"""A model by name: a directory that is here, or one of the Hugging Face Hub, fetched into its cache.

huggingface_hub does the work, and its own settings hold: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT
(https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables).
"""

from __future__ import annotations

import errno
import glob
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_convert.errors import CheckpointNotFound, ConversionError, NotEnoughSpace, NotFetched
from dist_convert.formats.huggingface.read import CONFIG_FILE, WEIGHTS_KINDS, find_weights, read_index_file

#: Beside the weights: config, tokenizer, and what a conversion from Megatron has left for the way back.
_SMALL_FILES = (
    CONFIG_FILE, "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json", "source_megatron_args.json", "capacity_bins.pt",
)  # fmt: skip

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def local_directory(name: str) -> Path:
    """The directory of a model.

    Args:
        name: an existing directory, which is returned as it is, or `org/name` or `org/name@revision` on the hub. Only
            config, tokenizer and one kind of weights are fetched, safetensors where there are any. Several ranks may
            ask at once: the cache has locks, and what it holds already is not fetched again.

    Raises:
        CheckpointNotFound: neither a directory nor a model on the hub; NotFetched where it is not open to this user,
            or cannot be reached and the cache does not hold it.
        NotEnoughSpace: for the cache.
    """
    if Path(name).is_dir():
        return Path(name)
    return _fetch(*_repository_and_revision(name))


def revision_on_hub(name: str) -> str:
    """`org/name@commit` of `org/name` or `org/name@revision`, so that all fetch the same; only its config is fetched.

    Raises:
        CheckpointNotFound, NotEnoughSpace: as `local_directory`; also where there is a directory of that name.
    """
    repository, revision = _repository_and_revision(name)
    return f"{repository}@{_snapshot(repository, revision, [CONFIG_FILE]).name}"


def fetched_directory(name: str) -> Path:
    """As `local_directory`, from the cache alone: many ranks may ask at once, and the hub hears nothing of it."""
    return _fetch(*_repository_and_revision(name), cache_only=True)


def _repository_and_revision(name: str) -> tuple[str, str | None]:
    repository, _, revision = name.partition("@")
    organisation, _, model = repository.partition("/")
    path = Path(name)
    if organisation in ("", ".", "..", "~") or not model or "/" in model or path.exists():
        raise CheckpointNotFound(
            "the directory does not exist",
            file=name,
            expected="a directory, or org/name[@revision] on the Hugging Face Hub",
            found="a directory, but not on every node" if path.is_dir() else "a file" if path.exists() else "nothing",
            remedy="check the path on every node",
        )
    return repository, revision or None


def cached_snapshot(name: str) -> Path | None:
    """The cache's directory of `org/name` or `org/name@revision`, which may hold a part of it; nothing is fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _fetch(repository: str, revision: str | None, *, cache_only: bool = False) -> Path:
    files = [*_SMALL_FILES, *(index for index, _ in WEIGHTS_KINDS)]
    directory = _snapshot(repository, revision, files, cache_only=cache_only)
    for index, single in WEIGHTS_KINDS:
        named = set(read_index_file(directory, index).values()) if (directory / index).is_file() else set()
        # The same commit: a branch may move on between the calls.
        directory = _snapshot(repository, directory.name, sorted({*named, single}), cache_only=cache_only)
        if named or (directory / single).is_file():
            break
    missing = [file for file in find_weights(directory) if not (directory / file).is_file()]
    if missing:
        raise NotFetched(
            "the cache holds only a part of the model",
            file=str(directory),
            expected=", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else ""),
            found="not in the cache, and not on the hub or no way to it",
            remedy="unset HF_HUB_OFFLINE, or fetch the model on a machine with a connection and copy its HF_HOME here",
        )
    return directory


def _snapshot(repository: str, revision: str | None, files: Sequence[str], *, cache_only: bool = False) -> Path:
    """The cache's directory of one revision, after fetching those of the files that the hub has."""
    # Half a second to import, which runs from a local directory do not need.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    expected: tuple[type[Exception], ...] = (HFValidationError, *hub_errors())
    try:
        patterns = [glob.escape(file) for file in files]
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=cache_only)
        )
    except expected as error:
        raise _explain(error, repository, revision) from error


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where a hub refuses or cannot be reached."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its error class derives from what the HTTP library below it (requests, httpx) raises itself, and from OSError.
    return tuple(c for c in HfHubHTTPError.__mro__ if issubclass(c, Exception) and c is not Exception)


def _explain(error: Exception, repository: str, revision: str | None) -> ConversionError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    name = f"{repository}@{revision}" if revision else repository
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return NotEnoughSpace(
            "no space for the hub's cache",
            file=str(constants.HF_HUB_CACHE),
            found=str(error),
            remedy="set HF_HOME to a larger file system",
        )
    if isinstance(error, GatedRepoError):
        what = "no access to the model"
        remedy = f"accept its terms at {constants.ENDPOINT}/{repository}, then set HF_TOKEN to a token of that account"
    elif isinstance(error, RepositoryNotFoundError | HFValidationError):
        what = "neither a directory here nor a model on the Hugging Face Hub"
        remedy = "check the spelling; a private model needs HF_TOKEN, a directory its full path"
    elif isinstance(error, RevisionNotFoundError):
        what, remedy = "the model has no such revision", "name a branch, a tag or a whole commit hash after the @"
    elif isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
        what, remedy = "the hub's cache cannot be written", "set HF_HOME to a directory that this user may write"
    elif constants.HF_HUB_OFFLINE:
        what = "the model is not in the cache, and HF_HUB_OFFLINE forbids to fetch it"
        remedy = "unset HF_HUB_OFFLINE, or fetch the model on a machine with a connection and copy its HF_HOME here"
    else:
        what = "the model cannot be fetched, and the cache does not hold all of it"
        remedy = f"check the connection to {constants.ENDPOINT}; what has been fetched is kept"
    is_named_wrong = isinstance(error, RepositoryNotFoundError | HFValidationError | RevisionNotFoundError)
    kind = CheckpointNotFound if is_named_wrong and not isinstance(error, GatedRepoError) else NotFetched
    cause = error.__cause__ or error
    return kind(
        what,
        file=name,
        expected=f"in {constants.HF_HUB_CACHE} or on {constants.ENDPOINT}",
        found=f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}",
        remedy=remedy,
    )
