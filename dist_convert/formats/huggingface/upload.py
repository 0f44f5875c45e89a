"""A finished directory, uploaded to the Hugging Face Hub.

The only module that writes to a hub; huggingface_hub's own settings hold: HF_TOKEN, HF_ENDPOINT, HF_HOME,
HF_HUB_OFFLINE. `HfApi.upload_folder` does the work, because every version from 0.26 on has it, shows its progress and
sends on a second call only what the hub has not got (https://huggingface.co/docs/huggingface_hub/guides/upload).
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_convert.errors import UploadError, UsageError, quoted, shown_line
from dist_convert.formats.foreign import refuse_foreign
from dist_convert.formats.huggingface.hub import check_endpoint, hub_errors
from dist_convert.formats.huggingface.read import ARGS_FILE, CONFIG_FILE, check_inside, find_weights
from dist_convert.formats.tokenizer.huggingface import FILES, TEMPLATES, has_tokenizer_files
from dist_convert.options import Options, given_flags
from dist_convert.ranks.timeout import call_with_timeout
from dist_convert.read.source import no_directory, read_json
from dist_convert.records import JsonObject, human_bytes, names
from dist_convert.write.files import PARTIAL_SUFFIX
from dist_convert.write.partial import refuse_unfinished

if TYPE_CHECKING:
    from huggingface_hub import HfApi


#: Hidden files, which file systems and file managers leave, and what is not finished.
_IGNORED = [".*", "*/.*", f"*{PARTIAL_SUFFIX}", f"*{PARTIAL_SUFFIX}/*"]

#: Weights of an earlier upload, which go where the directory has no such file: transformers might load them instead.
_WEIGHTS = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
#: Files of an earlier tokenizer, which go where the directory has one: some reader might mix them with the new ones.
_TOKENIZER = (*FILES, f"{TEMPLATES}/*.jinja", "tokenizer.model.v*", "tekken.json", "spiece.model")
#: How long one answer is waited for, before the upload itself, which takes as long as it takes.
_ANSWER_SECONDS = 30.0


def _check_directory(directory: Path) -> int:
    """The size in bytes of what a complete directory sends."""
    refuse_foreign(directory)
    refuse_unfinished(directory)
    if not directory.is_dir():
        raise no_directory(directory, "finished")
    missing = [name for name in (CONFIG_FILE, *find_weights(directory)) if not (directory / name).is_file()]
    if missing or directory.resolve().name.endswith(PARTIAL_SUFFIX):
        found = f"without {names(missing)}" if missing else "an unfinished conversion"
        raise UploadError("the directory to upload is not complete", directory, found=found, remedy="convert again")
    leftovers = sorted(path.name for path in directory.iterdir() if path.name.endswith(PARTIAL_SUFFIX))
    if leftovers:
        what = "the directory to upload has unfinished files"
        remedy = "run the interrupted command again, such as dist-convert tokenizer, or remove it"
        raise UploadError(what, directory, found=names(leftovers), remedy=remedy)
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    paths = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    sent = list(filter_repo_objects(paths, ignore_patterns=_IGNORED))
    for path in sent:
        check_inside(directory, path)
    return sum((directory / path).stat().st_size for path in sent)


def check_repository_name(text: str) -> str:
    """The name of a repository, `organisation/name`; a UsageError if it is none that a hub allows."""
    check_endpoint()
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    found = repr(text)
    try:
        validate_repo_id(text)
        if text.count("/") == 1:
            return text
    except HFValidationError as error:
        found = str(error)
    raise UsageError("not the name of a repository", expected="org/name or user/name", found=found)


def push_command(job: Options) -> str:
    """The command line that uploads the finished target of a conversion, or what is missing of it."""
    flags = [flag for flag in given_flags(job) if flag in ("--private", "--keep-paths")]
    return " ".join(map(quoted, ["dist-convert", "push", str(job.target), str(job.push_to_hub), *flags]))


def check_upload(job: Options, answer_seconds: float = _ANSWER_SECONDS) -> str:
    """Find out, without a trace on the hub, what would keep an upload from starting; says where it would go.

    Raises:
        UploadError: offline; no token, or one that is not valid or may not write there; a public repository that should
            be private; a hub that cannot be reached or does not answer in so many seconds.
    """
    from huggingface_hub import HfApi, constants

    repository = str(job.push_to_hub)
    with _explained(repository, f"or convert without --push-to-hub, and upload later with: {push_command(job)}"):
        _check_settings()
        asked = f"asking {constants.ENDPOINT} whether the model can go to {repository}"
        print(shown_line(asked), file=sys.stderr, flush=True)
        api = HfApi()
        _check_permission(call_with_timeout(answer_seconds, api.whoami), repository)
        is_there = call_with_timeout(answer_seconds, lambda: _check_privacy(api, repository, job.private))
    kind = "private repository" if job.private else "repository"
    kind = f"an existing {kind}" if is_there else f"a new {kind}"
    paths = "whole, as --keep-paths says" if job.keep_paths else "as names (--keep-paths leaves them whole)"
    where = f"the finished directory goes to {constants.ENDPOINT}/{repository}, {kind}"
    return f"{where}; the training's arguments go with it, their paths {paths}"


def upload(job: Options) -> str:
    """Upload a finished target, and return its address; what the hub has of it already is not sent again.

    Files of the same names are replaced; weights that the directory does not have are removed, and so are tokenizer
    files where the directory has a tokenizer; other files stay. Hidden files are not sent.

    Raises:
        UploadError, CheckpointNotFound: as `check_upload`, or the upload broke off, or the directory is not complete.
    """
    directory, repository = job.target, str(job.push_to_hub)
    size_bytes, has_tokenizer = _check_directory(directory), has_tokenizer_files(directory)
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
        if "HF_HUB_VERBOSITY" not in os.environ:
            hub_logging.set_verbosity(logging.INFO)  # a line now and then, in place of bars
    command, where = push_command(job), f"{constants.ENDPOINT}/{repository}"
    remedy = f"then continue with: {command}"
    with _explained(repository, remedy):
        _check_settings()
    work = f"uploading {human_bytes(size_bytes)} to {where}; if it is interrupted, continue with: {command}"
    print(shown_line(work), file=sys.stderr)
    if not has_tokenizer:
        print(shown_line(f"warning: {directory} has no tokenizer and is uploaded without one"), file=sys.stderr)
    api = HfApi()
    is_private = True if job.private else None  # None: public, or what is usual in the organisation
    with _explained(repository, remedy, directory):
        call_with_timeout(_ANSWER_SECONDS, lambda: api.create_repo(repository, private=is_private, exist_ok=True))
        call_with_timeout(_ANSWER_SECONDS, lambda: _check_privacy(api, repository, job.private))
        with nullcontext(directory) if job.keep_paths else _without_paths(directory) as folder:
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message="Upload what dist_convert has converted",
                delete_patterns=[*_WEIGHTS, *(_TOKENIZER if has_tokenizer else ())],
                ignore_patterns=_IGNORED,
            )
    return str(commit.commit_url)


#: The directories of an absolute path inside a text; not what follows a host's name.
_DIRECTORIES = re.compile(r"(?<![\w.:/~-])~?/(?:[^/\s]+/)*")


@contextmanager
def _without_paths(directory: Path) -> Iterator[Path]:
    """A directory of links to the files of another one; what has paths in it is there as a copy with their names."""
    from dist_convert.write.manifest import MANIFEST_FILE, renew_manifest  # torch is behind it; a wrong path needs none

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for path in (path for path in directory.rglob("*") if path.is_file()):
            link = folder / path.relative_to(directory)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        named = (ARGS_FILE, MANIFEST_FILE, CONFIG_FILE)
        contents = {name: read_json(directory / name) for name in named if (directory / name).is_file()}
        changed = [name for name, content in contents.items() if _shortened(content) != content]
        for name in changed:
            (folder / name).unlink()
            (folder / name).write_text(json.dumps(_shortened(contents[name]), indent=2) + "\n")
        renew_manifest(folder, gone=(), fresh=[name for name in changed if name != MANIFEST_FILE])
        yield folder


def _shortened(value: Any) -> Any:
    """JSON data in which of each path only the last name is left."""
    if isinstance(value, str):
        is_path = value.startswith(("/", "~/"))
        return value.rstrip("/").rpartition("/")[2] if is_path else _DIRECTORIES.sub("", value)
    if isinstance(value, list):
        return [_shortened(one) for one in value]
    return {name: _shortened(one) for name, one in value.items()} if isinstance(value, dict) else value


def _check_settings() -> None:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UploadError("HF_HUB_OFFLINE forbids uploads", remedy="unset it")
    if get_token() is None:
        expected = "HF_TOKEN, or what `hf auth login` leaves below HF_HOME"
        remedy = f"set HF_TOKEN to a token of {constants.ENDPOINT}/settings/tokens that may write"
        raise UploadError("no token for the hub", expected=expected, found="neither", remedy=remedy)


def _check_permission(who: JsonObject, repository: str) -> None:
    """Refuse where the hub says outright that this token cannot write; what it leaves open is seen at the upload."""
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        what, expected = "the token can read but not write", "a token with the role write, or a fine-grained one"
        found = f"the token {token.get('displayName', '')!r} of {who.get('name')}"
        raise UploadError(what, expected=expected, found=found, remedy="set HF_TOKEN to a token that may write")
    namespace = repository.partition("/")[0]
    organisations = [org for org in who.get("orgs") or [] if org.get("roleInOrg") != "read"]
    writable = [str(member.get("name")) for member in (who, *organisations)]
    if namespace.lower() not in map(str.lower, writable):
        expected = f"one of {', '.join(writable)}"
        remedy = "name another repository, or set HF_TOKEN to the token of a member"
        raise UploadError(f"no permission to write to {namespace}", expected=expected, found=repository, remedy=remedy)


def _check_privacy(api: HfApi, repository: str, private: bool) -> bool:
    """Whether the repository is there; one that is public cannot take what should be private."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        is_private = bool(api.model_info(repository).private)
    except RepositoryNotFoundError:
        return False
    if private and not is_private:
        what, expected = "the repository exists and is public", "a private repository, because of --private"
        remedy = "make it private in its settings, or name another one"
        raise UploadError(what, expected=expected, found=f"{repository}, public", remedy=remedy)
    return True


@contextmanager
def _explained(repository: str, remedy: str, directory: Path | None = None) -> Iterator[None]:
    """Say plainly what the hub's, the network's or the file system's error means, and how to go on.

    `remedy` is the second half of a sentence, `directory` what is being uploaded, if that has begun.
    """
    # The last two: the card's front matter, and hf_xet.
    expected: tuple[type[Exception], ...] = (*hub_errors(), ValueError, RuntimeError)
    try:
        yield
    except UploadError as error:
        error.remedy += f", {remedy}"
        raise
    except expected as error:
        from huggingface_hub import constants

        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        codes = (getattr(getattr(link, "response", None), "status_code", None) for link in chain)
        status = next(filter(None, codes), None)
        first = f"check the connection to {constants.ENDPOINT}"
        what = "the hub cannot be queried" if status else "the hub cannot be reached"
        if status == 401:
            what, first = "the hub does not accept the token", "set HF_TOKEN to a valid token"
        elif status == 403:
            what, first = f"no permission to write to {repository}", "set HF_TOKEN to a token that may write there"
        elif isinstance(error, TimeoutError):
            what = "the hub does not answer"
        elif directory is not None:
            what = "the upload broke off"
        what += f"; the model in {directory} is complete" if directory is not None else ""
        file = f"{constants.ENDPOINT}/{repository}"
        found = "; ".join(f"{type(link).__name__}: {' '.join(str(link).split())}" for link in chain[:2])
        raise UploadError(what, file, found=found, remedy=f"{first}, {remedy}") from error
