"""The tokenizer of a checkpoint: where its files are, how many tokens it has, and which ids begin and end a text.

Files of a Hugging Face tokenizer are copied as they are; nothing is loaded (docs/formats.md, "Tokenizer files").
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_convert.errors import CorruptFile
from dist_convert.read.json_file import read_json

_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"
_BARE_FILES = ("tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as far as a conversion needs it.

    Attributes:
        directory: of Hugging Face tokenizer files; None where there are none to copy.
        size: tokens, added ones included; None where it cannot be told without loading it.
        bos, eos: ids of begin and end of text, where the files name them.
        note: one sentence for the user where nothing is copied.
    """

    directory: Path | None
    size: int | None = None
    bos: int | None = None
    eos: int | None = None
    note: str = ""


def find_tokenizer(flag: Path | None, args: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `--tokenizer` or the checkpoint's args name, if its files are here."""
    named = flag or _path_in(args)
    if named is None:
        return Tokenizer(None, note="the checkpoint's args name no tokenizer; add one with --tokenizer PATH")
    directory = named.parent if named.is_file() else named
    if (directory / "tokenizer.json").is_file() or (directory / "tokenizer_config.json").is_file():
        return _from_directory(directory)
    if named.is_file() or any((directory / name).is_file() for name in _BARE_FILES if named.is_dir()):
        return Tokenizer(
            None,
            note=f"{named} is a bare tokenizer file; building a Hugging Face tokenizer from one is not supported yet: "
            "give the directory of a Hugging Face tokenizer with --tokenizer",
        )
    return Tokenizer(None, note=f"the tokenizer {named} is not on this machine; give its path here with --tokenizer")


def _path_in(args: Mapping[str, Any]) -> Path | None:
    path = args.get("tokenizer_model") or args.get("tokenizer_name_or_path")
    return Path(path) if isinstance(path, str) and path else None


@contextmanager
def _parsing(path: Path) -> Iterator[dict[str, Any]]:
    """The content of a file, or nothing where there is none; what cannot be understood in it names the file."""
    try:
        yield read_json(path) if path.is_file() else {}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CorruptFile(
            "a file of the tokenizer is damaged",
            file=str(path),
            expected="what Hugging Face's tokenizers write",
            found=f"{type(error).__name__}: {error}",
            remedy="copy it again, or give another directory with --tokenizer",
        ) from error


def _from_directory(directory: Path) -> Tokenizer:
    ids: dict[str, int] = {}
    with _parsing(directory / "tokenizer.json") as tokenizer:
        model = tokenizer.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocab, dict):
            ids.update(vocab)
        elif isinstance(vocab, list):  # Unigram: [piece, score] pairs
            ids.update({str(pair[0]): number for number, pair in enumerate(vocab)})
        ids.update({token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])})
        size = max(ids.values()) + 1 if ids else None
    with _parsing(directory / "tokenizer_config.json") as config:
        added = {token["content"]: int(number) for number, token in config.get("added_tokens_decoder", {}).items()}
        ids.update(added)
        if size is not None and added:
            size = max(size, max(added.values()) + 1)
        return Tokenizer(directory, size, _id(config.get("bos_token"), ids), _id(config.get("eos_token"), ids))


def _id(token: Any, ids: Mapping[str, int]) -> int | None:
    content = token.get("content") if isinstance(token, dict) else token
    return ids.get(content) if isinstance(content, str) else None


def copy_tokenizer(tokenizer: Tokenizer, target: Path) -> tuple[str, ...]:
    """Copy the tokenizer's files byte for byte; returns their names."""
    if tokenizer.directory is None:
        return ()
    templates = sorted((tokenizer.directory / _TEMPLATES).glob("*.jinja"))
    names = (*_FILES, *(f"{_TEMPLATES}/{path.name}" for path in templates))
    present = tuple(name for name in names if (tokenizer.directory / name).is_file())
    if templates:
        (target / _TEMPLATES).mkdir()
    for name in present:
        shutil.copyfile(tokenizer.directory / name, target / name)
    return present
