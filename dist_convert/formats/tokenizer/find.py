"""Where the tokenizer of a checkpoint is.

`--tokenizer` says it, or else the checkpoint's args do. They name a path on the machine that trained: what is not there
is looked for beside the checkpoint, under the same name.
"""

import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dist_convert.errors import MissingPackage, SourceError, UsageError
from dist_convert.formats.huggingface.hub import cached_snapshot
from dist_convert.formats.megatron.args import true_vocab
from dist_convert.formats.tokenizer import huggingface as hf
from dist_convert.formats.tokenizer.build import is_sentencepiece, is_tiktoken, read_sentencepiece, read_tiktoken
from dist_convert.formats.tokenizer.record import Tokenizer
from dist_convert.models.catalog import Where
from dist_convert.records import JsonObject

if TYPE_CHECKING:
    from dist_convert.ranks.collectives import World

#: Arguments that may name the tokenizer; the last two are GPT2BPETokenizer's.
_ARGUMENTS = ("tokenizer_model", "tokenizer_name_or_path", "vocab_file", "merge_file")
#: Of an original Llama checkpoint; Llama 2's puts the tokenizer beside the folder.
_ORIGINAL = "params.json"
_FLAG = "--tokenizer"
#: The revision is a commit, a branch or a tag: huggingface_hub makes a path of it.
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w-][\w.-]*(/[\w-][\w.-]*)*)?")


def named_tokenizer(named: Path, flag: str) -> Tokenizer:
    """The tokenizer that the user names with a flag: a path, or org/name[@revision] of a model in the hub's cache.

    Raises:
        UsageError: there is none.
        SourceError: it is damaged, or of a kind that cannot be converted.
        MissingPackage: building it needs one.
    """
    if found := _named(str(named)):
        return replace(found, note=f"{found.path} (from {flag})")
    what = "nothing at this path" + _nor_in_cache(str(named))
    if os.path.lexists(named):
        beside = named if named.is_dir() else named.parent if named.name in hf.FILES else None
        is_incomplete = beside is not None and (beside / hf.CONFIG).is_file()
        what = f"{hf.CONFIG}, but no vocabulary that matches it" if is_incomplete else "something else"
    raise UsageError(
        f"{flag} names no tokenizer",
        named,
        expected="a directory of Hugging Face tokenizer files; or a tokenizer.model of Llama 2, Llama 3, Mistral or "
        "Mixtral, or its directory",
        found=what,
        remedy=f"correct {flag}" + ("; leave it out to convert without the tokenizer" if flag == _FLAG else ""),
    )


def find_tokenizer(flag: Path | None, args: JsonObject, iteration: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's iteration; of kind "none", with a note that says why, where there is none.

    The flag names it, or else the training arguments; it is also looked for beside the iteration and its parent.
    """
    if flag is not None:
        return named_tokenizer(flag, _FLAG)
    named = next((args[name] for name in _ARGUMENTS if args.get(name)), None)
    named = named if isinstance(named, str) else None
    try:
        if named is not None and (found := _named(named)):
            return replace(found, note=f"{found.path} (from the checkpoint's args)")
        if found := next(filter(None, map(_at, _beside(named, iteration))), None):
            return replace(found, note=f"{found.path} (beside the checkpoint)")
    except MissingPackage as error:
        return Tokenizer("none", note=f"{error.what}: {error.file} ({error.remedy.partition(',')[0]})")
    except SourceError as error:  # nobody asked for this one, and the weights do not need it
        return Tokenizer("none", note=f"{error.what}: {error.file}" + (f" ({error.found})" if error.found else ""))
    if named is None:
        return Tokenizer("none", note="the args name none, and none is beside the checkpoint")
    is_here = os.path.lexists(named)
    why = "is not a tokenizer that can be converted" if is_here else "is not on this machine" + _nor_in_cache(named)
    return Tokenizer("none", note=f"{named}, which the checkpoint's args name, {why}")


def _beside(named: str | None, iteration: Path) -> list[Path]:
    iteration = iteration.absolute()
    is_inside = iteration.name == "release" or iteration.name.startswith("iter_")
    checkpoint = iteration.parent if is_inside else iteration
    own = [name] if named and (name := Path(named).name.replace("..", "")) else []
    near = [base / name for base in (iteration, checkpoint) for name in (*own, "tokenizer", "")]
    return near + [checkpoint.parent / name for name in own]


def _named(name: str) -> Tokenizer | None:
    """The tokenizer at a path, or of a model in the hub's cache."""
    found = _at(Path(name))
    if found is None and _HUB_ID.fullmatch(name) and (directory := cached_snapshot(name)):
        return _at(directory)
    return found


def _nor_in_cache(name: str) -> str:
    return ", nor in the cache of the Hugging Face Hub" if _HUB_ID.fullmatch(name) else ""


def _at(path: Path) -> Tokenizer | None:
    """The tokenizer at a path: of a file's directory too, as args often name one file of several."""
    is_file = os.path.isfile(path)
    if not is_file and not os.path.isdir(path):
        return None
    directory = path.parent if is_file else path
    try:
        # A bare file beside the files of another tokenizer is meant itself.
        if (not is_file or path.name in hf.FILES) and (hf.has_tokenizer_files(directory) or hf.is_slow(directory)):
            return hf.read_huggingface(directory)
        file = path if is_file else _bare_file(directory)
        if file is None:
            return None
        with file.open("rb") as opened:
            start = opened.read(512)  # both kinds are called tokenizer.model
        if is_tiktoken(start):
            return read_tiktoken(file)
        return read_sentencepiece(file)[0] if is_sentencepiece(start) else None
    except OSError as error:
        name = str(error.filename or path)
        raise SourceError("the tokenizer cannot be read", name, found=error.strerror or error) from error


def _bare_file(directory: Path) -> Path | None:
    places = [directory / hf.MODEL_FILE, directory / "original" / hf.MODEL_FILE]
    if os.path.isfile(directory / _ORIGINAL):
        places.append(directory.absolute().parent / hf.MODEL_FILE)
    found = next((place for place in places if os.path.isfile(place)), None)
    versions = (
        [path for path in sorted(directory.glob(f"{hf.MODEL_FILE}.*")) if path.is_file()] if found is None else []
    )
    return versions[0] if len(versions) == 1 else found


def shared_tokenizer(
    where: Where, args: JsonObject, directory: Path, world: "World", *, padded: int, file: str
) -> tuple[Tokenizer, int | None]:
    """Rank 0's view of the tokenizer: its path may exist there only, and all ranks must plan alike.

    Returns:
        The tokenizer, and the tokens without padding, of which nobody may say how many there are.
    """
    from dist_convert.ranks.collectives import gather_objects  # only here, as it imports torch

    found = find_tokenizer(where.asked.tokenizer, args, directory) if world.rank == 0 else Tokenizer("none")
    shared = gather_objects(world, asdict(replace(found, path=None)))[0]
    tokenizer = Tokenizer(**{**shared, "path": found.path})
    flag = where.asked.true_vocab_size
    vocab, who = true_vocab(flag=flag, args=args, tokenizer=tokenizer.size, padded=padded, file=file)
    return tokenizer, None if who == "padded size" else vocab
