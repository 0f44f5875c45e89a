"""A directory of Hugging Face tokenizer files: what they say, and how they are copied.

Nothing is loaded, and no code of the directory runs (docs/formats.md, "Tokenizer files").
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_convert.errors import CorruptFile, SourceError
from dist_convert.read.json_file import read_json
from dist_convert.read.weights_index import check_inside
from dist_convert.tokenizer.record import Tokenizer
from dist_convert.write.file_writer import target_error

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
#: What transformers may find beside a model and read as a part of its tokenizer.
FILES = (
    "tokenizer.json", CONFIG, SPECIAL_TOKENS, "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"

#: Classes that only transformers 5 knows, and what both versions call them.
_CLASSES_OF_5 = {"TokenizersBackend": "PreTrainedTokenizerFast"}
#: transformers 4 would give this class token_type_ids as well, which models of our families refuse.
INPUT_NAMES = ["input_ids", "attention_mask"]


def is_huggingface(directory: Path) -> bool:
    """Whether transformers' files of a tokenizer are there."""
    return any(os.path.isfile(directory / name) for name in ("tokenizer.json", CONFIG))


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


def read_huggingface(directory: Path) -> Tokenizer:
    """Size and special ids of the tokenizer in a directory.

    Raises:
        CorruptFile: a file of it is damaged.
        OSError: a file of it cannot be read.
    """
    files_of(directory)  # refuses links before any is read
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
    with _parsing(directory / CONFIG) as config:
        added = {token["content"]: int(number) for number, token in config.get("added_tokens_decoder", {}).items()}
        ids.update(added)
        if size is not None and added:
            size = max(size, max(added.values()) + 1)
    return Tokenizer("huggingface", directory, size, *special_ids(directory, ids))


def special_ids(directory: Path, ids: Mapping[str, int]) -> tuple[int | None, int | None, int | None]:
    """Ids of the tokens that begin, end and pad a text, where the directory names them.

    Args:
        directory: of the tokenizer's files.
        ids: of its tokens.
    """
    roles = ("bos_token", "eos_token", "pad_token")
    with _parsing(directory / CONFIG) as config, _parsing(directory / SPECIAL_TOKENS) as tokens:
        bos, eos, pad = (_id(config.get(role, tokens.get(role)), ids) for role in roles)
    return bos, eos, pad


def _id(token: Any, ids: Mapping[str, int]) -> int | None:
    content = token.get("content") if isinstance(token, dict) else token
    return ids.get(content) if isinstance(content, str) else None


def files_of(directory: Path) -> tuple[str, ...]:
    """Names of the tokenizer's files in a directory, the directory of further chat templates included.

    Raises:
        CorruptFile: one is a link to somewhere else, whose content would be copied into the target.
    """
    templates = sorted((directory / TEMPLATES).glob("*.jinja"))
    names = (*FILES, *(f"{TEMPLATES}/{path.name}" for path in templates))
    found = tuple(name for name in names if (directory / name).is_file())
    for name in found:
        check_inside(directory, name)
    return found


def copy_huggingface(directory: Path, target: Path) -> tuple[str, ...]:
    """Copy the tokenizer's files byte for byte, but for a config that only transformers 5 reads; returns their names.

    Raises:
        SourceError: a file of it cannot be read.
        TargetError, NotEnoughSpace: the target's file system refuses.
    """
    names = files_of(directory)
    for name in names:
        try:
            content = (directory / name).read_bytes()
        except OSError as error:
            raise SourceError("a file of the tokenizer cannot be read", file=name, found=str(error)) from error
        if name == CONFIG:
            content = _for_both_versions(directory) or content
        try:
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_bytes(content)
        except OSError as error:
            raise target_error(error, name) from error
    return names


def _for_both_versions(directory: Path) -> bytes | None:
    """The config as transformers 4 reads it too, where transformers 5 saved it; else None."""
    with _parsing(directory / CONFIG) as config:
        name = config.get("tokenizer_class")
        extra = config.get("extra_special_tokens")
        if name not in _CLASSES_OF_5 and not isinstance(extra, list):
            return None
        changed = dict(config)
        if name in _CLASSES_OF_5:
            changed["tokenizer_class"] = _CLASSES_OF_5[name]
            changed.setdefault("model_input_names", INPUT_NAMES)
        if isinstance(extra, list):
            del changed["extra_special_tokens"]
            changed.setdefault("additional_special_tokens", extra)  # its name in transformers 4, which 5 reads too
        return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()
