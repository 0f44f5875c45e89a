"""A model by name: a directory that is here, or one of the Hugging Face Hub, fetched into its cache.

huggingface_hub does the work, and its own settings hold: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT
(https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables).
"""

import errno
import glob
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from dist_convert.errors import CheckpointNotFound, ConversionError, NotEnoughSpace, NotFetched, UsageError
from dist_convert.formats.huggingface import read as hf
from dist_convert.formats.tokenizer.huggingface import FILES
from dist_convert.read.source import no_directory
from dist_convert.records import names

#: Beside the weights: config, tokenizer, and what a conversion from Megatron has left for the way back.
_SMALL_FILES = (hf.CONFIG_FILE, hf.GENERATION_FILE, *FILES, hf.ARGS_FILE, "capacity_bins.pt")
_FROM_ELSEWHERE = "unset HF_HUB_OFFLINE, or fetch the model on a machine with a connection and copy its HF_HOME here"


def local_directory(name: str, *, cache_only: bool = False) -> Path:
    """The directory of a model.

    Args:
        name: an existing directory, which is returned as it is, or `org/name` or `org/name@revision` on the hub. Only
            config, tokenizer and one kind of weights are fetched, safetensors where there are any. Several ranks may
            ask at once: the cache has locks, and what it holds already is not fetched again.
        cache_only: the hub hears nothing of it.

    Raises:
        CheckpointNotFound: neither a directory nor a model on the hub; NotFetched where it is not open to this user,
            or cannot be reached and the cache does not hold it.
        NotEnoughSpace: for the cache.
    """
    if Path(name).is_dir():
        return Path(name)
    repository, revision = repository_and_revision(name)
    files = [*_SMALL_FILES, *(index for index, _ in hf.WEIGHTS_KINDS)]
    directory = _snapshot(repository, revision, files, cache_only=cache_only)
    for index, single in hf.WEIGHTS_KINDS:
        named = set(hf.read_index_file(directory, index).values()) if (directory / index).is_file() else set()
        # The same commit: a branch may move on between the calls.
        directory = _snapshot(repository, directory.name, sorted({*named, single}), cache_only=cache_only)
        if named or (directory / single).is_file():
            break
    missing = [file for file in hf.find_weights(directory) if not (directory / file).is_file()]
    if missing:
        what = "the cache holds only a part of the model"
        found = "not in the cache, and the hub does not have it or cannot be reached"
        raise NotFetched(what, directory, expected=names(missing), found=found, remedy=_FROM_ELSEWHERE)
    return directory


def revision_on_hub(name: str) -> str:
    """`org/name@commit` of `org/name` or `org/name@revision`, so that all fetch the same; only its config is fetched.

    It raises what `local_directory` does; also where there is a directory of that name.
    """
    repository, revision = repository_and_revision(name)
    return f"{repository}@{_snapshot(repository, revision, [hf.CONFIG_FILE]).name}"


def cached_snapshot(name: str) -> Path | None:
    """The cache's directory of `org/name` or `org/name@revision`, which may hold a part of it; nothing is fetched."""
    check_endpoint()
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
    except (OSError, ValueError):  # not there, no such name, or a directory where the revision's commit should be
        return None


def check_endpoint() -> None:
    """Refuse what is no address of a hub in the environment, which huggingface_hub cuts up as it is imported."""
    try:
        urlsplit(os.environ.get("HF_ENDPOINT", ""))
    except ValueError as error:
        raise UsageError(
            "HF_ENDPOINT is not the address of a hub", found=error, remedy="unset it, or give https://..."
        ) from error


def repository_and_revision(name: str) -> tuple[str, str | None]:
    """What a hub is asked for by `org/name` or `org/name@revision`; CheckpointNotFound for what can only be a path."""
    repository, _, revision = name.partition("@")
    organisation, _, model = repository.partition("/")
    path = Path(name)
    if path.is_file():
        raise no_directory(path, "checkpoint")
    leads_away = revision and {"", ".", ".."} & {*revision.split("/")}  # huggingface_hub makes a path of it
    if organisation in ("", ".", "..", "~") or not model or "/" in model or path.exists() or leads_away:
        what = "the checkpoint directory does not exist"
        expected = "a directory, or org/name[@revision] on the Hugging Face Hub"
        found = "a directory, but not on every node" if path.exists() else "nothing"
        raise CheckpointNotFound(what, name, expected, found, remedy="check the path on every node")
    return repository, revision or None


def _snapshot(repository: str, revision: str | None, files: Iterable[str], *, cache_only: bool = False) -> Path:
    """The cache's directory of one revision, after fetching those of the files that the hub has."""
    check_endpoint()
    # Half a second to import, which runs from a local directory do not need.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    expected: tuple[type[Exception], ...] = (HFValidationError, *hub_errors())
    patterns = [glob.escape(file) for file in files]
    try:
        found = snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=cache_only)
    except expected as error:
        raise _explain(error, repository, revision) from error
    return Path(found)


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where a hub refuses or cannot be reached."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its error class derives from what the HTTP library below it (requests, httpx) raises itself, and from OSError.
    return tuple(c for c in HfHubHTTPError.__mro__ if issubclass(c, Exception) and c is not Exception)


def _explain(error: Exception, repository: str, revision: str | None) -> ConversionError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    kind: type[ConversionError] = NotFetched
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        kind, what, remedy = NotEnoughSpace, "no space for the hub's cache", "set HF_HOME to a larger file system"
    elif isinstance(error, GatedRepoError):
        what = "no access to the model"
        remedy = f"accept its terms at {constants.ENDPOINT}/{repository}, then set HF_TOKEN to a token of that account"
    elif isinstance(error, RepositoryNotFoundError | HFValidationError):
        kind, what = CheckpointNotFound, "neither a directory here nor a model on the Hugging Face Hub"
        remedy = "check the spelling; a private model needs HF_TOKEN, a directory its full path"
    elif isinstance(error, RevisionNotFoundError):
        kind, what = CheckpointNotFound, "the model has no such revision"
        remedy = "name a branch, a tag or a whole commit hash after the @"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        what, remedy = "the hub's cache is not writable", "set HF_HOME to a directory that this user can write to"
    elif constants.HF_HUB_OFFLINE:
        what, remedy = "the model is not in the cache, and HF_HUB_OFFLINE forbids downloads", _FROM_ELSEWHERE
    else:
        what = "the model cannot be fetched, and the cache does not hold all of it"
        remedy = f"check the connection to {constants.ENDPOINT}; what has been fetched is kept"
    cause = error.__cause__ or error
    expected = f"in {constants.HF_HUB_CACHE} or on {constants.ENDPOINT}"
    found = f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
    return kind(what, f"{repository}@{revision}" if revision else repository, expected, found, remedy)
