"""A directory of Hugging Face tokenizer files: what they say, and how they are copied.

Nothing is loaded, and no code of the directory runs (docs/formats.md, "Tokenizer files"). One with a SentencePiece
model and no tokenizer.json, as old Llama 2 models have, was read by transformers 4 with the class LlamaTokenizer;
transformers 5 cuts text another way then and leaves out begin-of-text, and servers want tokenizer.json. So that file
is built, from the model and the directory's own settings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_convert.errors import CorruptFile, SourceError
from dist_convert.formats.huggingface.read import check_inside
from dist_convert.formats.tokenizer.build import build_llama2, is_sentencepiece, read_sentencepiece
from dist_convert.formats.tokenizer.record import Tokenizer
from dist_convert.read.source import read_json, read_small_file
from dist_convert.write.files import target_error

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
#: What transformers may find beside a model and read as a part of its tokenizer.
FILES = (
    "tokenizer.json", CONFIG, SPECIAL_TOKENS, "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"

_FAST_FILE = "tokenizer.json"
_FAST_CLASS = "PreTrainedTokenizerFast"
#: Classes that only transformers 5 knows, and what both versions call them.
_CLASSES_OF_5 = {"TokenizersBackend": _FAST_CLASS}
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
#: Vocabularies of tokenizers that only their own class, or another program, can read.
_NOT_COPIED = ("spiece.model", "sentencepiece.bpe.model", "*.tiktoken", "tekken.json")
#: Begin and end of a text in Llama 3 and in Llama 2, for files that name no roles.
_USUAL = (("<|begin_of_text|>", "<|end_of_text|>"), ("<s>", "</s>"))
#: transformers 4 would give this class token_type_ids as well, which models of our families refuse.
INPUT_NAMES = ["input_ids", "attention_mask"]


def is_huggingface(directory: Path) -> bool:
    """Whether transformers' files of a tokenizer are there, its vocabulary among them."""
    vocabularies = ((_FAST_FILE,), ("vocab.json", "merges.txt"), ("vocab.txt",))
    return any(all(os.path.isfile(directory / name) for name in names) for names in vocabularies)


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
    ids = {} if (directory / _FAST_FILE).is_file() else _ids_of_class(directory)
    with _parsing(directory / _FAST_FILE) as tokenizer:
        model = tokenizer.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocab, dict):
            ids.update(vocab)
        elif isinstance(vocab, list):  # Unigram: [piece, score] pairs
            ids.update({str(pair[0]): number for number, pair in enumerate(vocab)})
        ids.update({token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])})
        size = max(ids.values()) + 1 if ids else None  # before the class adds what its config lists
    with _parsing(directory / CONFIG) as config:
        added = {token["content"]: int(number) for number, token in config.get("added_tokens_decoder", {}).items()}
        ids.update(added)
        if size is not None and added:
            size = max(size, max(added.values()) + 1)
        template = config.get("chat_template")
    return Tokenizer(
        "huggingface",
        directory,
        size,
        *special_ids(directory, ids),
        is_llama3=ids.get("<|end_of_text|>") == 128001 and ids.get("<|eot_id|>") == 128009,
        has_template=bool(template) or has_template_file(directory),
        warnings=warnings_on(directory),
    )


def has_template_file(directory: Path) -> bool:
    """Whether a chat template is in a file of its own."""
    return any((directory / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))


def warnings_on(directory: Path) -> tuple[str, ...]:
    """What a copy of the directory may not do as the original does."""
    found = []
    with _parsing(directory / CONFIG) as config:
        name, is_fast = config.get("tokenizer_class"), (directory / _FAST_FILE).is_file()
        if config.get("auto_map"):
            found.append("the tokenizer's auto_map names Python code, which is not copied")
        if name in _LLAMA_CLASSES and is_fast:
            found.append(
                f"transformers 5 may cut leading spaces in another way than 4 with the tokenizer's class {name}, "
                "which is copied as it is"
            )
        if not name and not is_fast:
            found.append(f"no tokenizer_class in the tokenizer's {CONFIG} says how its vocabulary is read")
    others = sorted({path.name for pattern in _NOT_COPIED for path in directory.glob(pattern)})
    if others:
        found.append(f"vocabulary files that are not copied: {', '.join(others)}")
    return tuple(found)


def _ids_of_class(directory: Path) -> dict[str, int]:
    """The tokens of a vocabulary that a tokenizer class reads, by text: words and numbers, or a word a line."""
    with _parsing(directory / "vocab.json") as words, _parsing(directory / "added_tokens.json") as added:
        ids = {str(word): int(number) for word, number in {**words, **added}.items()}
    if not words and (directory / "vocab.txt").is_file():
        text = read_small_file(directory / "vocab.txt").decode("utf-8", errors="replace")
        lines = text.removesuffix("\n").split("\n")
        ids |= {line.removesuffix("\r"): number for number, line in enumerate(lines)}
    return ids


def special_ids(directory: Path, ids: Mapping[str, int]) -> tuple[int | None, int | None, int | None]:
    """Ids of the tokens that begin, end and pad a text, as the directory names them.

    Where it names neither begin nor end, Llama's usual tokens are taken, if the tokenizer has them.

    Args:
        directory: of the tokenizer's files.
        ids: of its tokens.
    """
    roles = ("bos_token", "eos_token", "pad_token")
    with _parsing(directory / CONFIG) as config, _parsing(directory / SPECIAL_TOKENS) as tokens:
        bos, eos, pad = (_id(config.get(role, tokens.get(role)), ids) for role in roles)
        if not {"bos_token", "eos_token"} & (config.keys() | tokens.keys()):
            usual = [(ids[begin], ids[end]) for begin, end in _USUAL if begin in ids and end in ids]
            bos, eos = usual[0] if usual else (None, None)
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
    """Copy the tokenizer's files byte for byte, but for a config that versions read differently; returns their names.

    Raises:
        SourceError: a file of it cannot be read.
        TargetError, NotEnoughSpace: the target's file system refuses.
    """
    names, config = files_of(directory), _for_both_versions(directory)
    names = tuple(dict.fromkeys((*names, CONFIG))) if config is not None else names
    for name in names:
        try:
            content = config if name == CONFIG and config is not None else (directory / name).read_bytes()
        except OSError as error:
            raise SourceError("a file of the tokenizer cannot be read", file=name, found=str(error)) from error
        try:
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_bytes(content)
        except OSError as error:
            raise target_error(error, name) from error
    return names


def _for_both_versions(directory: Path) -> bytes | None:
    """The config for transformers 4 and 5, where they would read it differently; None where it can stay as it is.

    They do where transformers 5 saved it, and where it names no class: then the model's type decides, and transformers
    4 would put Llama's `<s>` in front, whatever tokenizer.json says.
    """
    with _parsing(directory / CONFIG) as config:
        name = config.get("tokenizer_class")
        extra = config.get("extra_special_tokens")
        of_both = _CLASSES_OF_5.get(name) if name else (_FAST_CLASS if (directory / _FAST_FILE).is_file() else None)
        if of_both is None and not isinstance(extra, list):
            return None
        changed = dict(config)
        if of_both is not None:
            changed["tokenizer_class"] = of_both
            changed.setdefault("model_input_names", INPUT_NAMES)
        if isinstance(extra, list):
            del changed["extra_special_tokens"]
            changed.setdefault("additional_special_tokens", extra)  # its name in transformers 4, which 5 reads too
        return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


MODEL_FILE = "tokenizer.model"
_ADDED_FILE = "added_tokens.json"
#: Settings of the class LlamaTokenizer that the built tokenizer.json has taken over.
_TAKEN_OVER = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "sp_model_kwargs", "tokenizer_file")


def is_slow(directory: Path) -> bool:
    """Whether the directory has a config of transformers, and nothing but a SentencePiece model to cut text with."""
    model = directory / MODEL_FILE
    if not os.path.isfile(model) or not os.path.isfile(directory / CONFIG) or is_huggingface(directory):
        return False
    with model.open("rb") as opened:
        return is_sentencepiece(opened.read(3))


def read_slow(directory: Path) -> Tokenizer:
    """Size and special ids, added tokens included.

    Raises:
        SourceError: the model or a file beside it cannot be understood.
        MissingPackage: protobuf is not installed.
    """
    files_of(directory)  # refuses links before any is read
    model = read_sentencepiece(directory / MODEL_FILE)
    added = _added(directory)
    after = sorted(number for number in added if number >= (model.size or 0))
    for expected, number in enumerate(after, start=model.size or 0):
        if number != expected:
            raise SourceError(
                "added tokens of the tokenizer leave ids out",
                file=str(directory),
                expected=f"id {expected}",
                found=f"id {number}: {added[number]['content']!r}",
            )
    ids = {token["content"]: number for number, token in added.items()}
    bos, eos, pad = special_ids(directory, ids)
    size = max([model.size or 0, *(number + 1 for number in added)])
    found = replace(model, kind="slow", path=directory, size=size, chat=None, warnings=warnings_on(directory))
    config = read_json(directory / CONFIG)
    return replace(
        found,
        bos=model.bos if bos is None else bos,
        eos=model.eos if eos is None else eos,
        pad=model.pad if pad is None else pad,
        has_template=bool(config.get("chat_template")) or has_template_file(directory),
    )


def build_slow(directory: Path) -> tuple[Any, dict[str, Any]]:
    """A `tokenizers.Tokenizer` of a directory that `read_slow` has checked, and its tokenizer_config.json for it."""
    from tokenizers import AddedToken, pre_tokenizers, processors

    config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    tokenizer, roles = build_llama2(directory / MODEL_FILE)
    for number, token in sorted(_added(directory).items()):
        if number < tokenizer.get_vocab_size():
            continue
        known = ("lstrip", "normalized", "rstrip", "single_word", "special")
        added = AddedToken(token["content"], **{key: bool(token[key]) for key in known if key in token})
        (tokenizer.add_special_tokens if token.get("special") else tokenizer.add_tokens)([added])
    if config.get("legacy") is False:  # a space in front of the text only, not behind special tokens
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    roles |= {key: _content(config[key]) for key in roles if config.get(key)}
    begin = [roles["bos_token"]] if config.get("add_bos_token", True) and "bos_token" in roles else []
    end = [roles["eos_token"]] if config.get("add_eos_token", False) and "eos_token" in roles else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *end, *(f"{token}:1" for token in begin), "$B:1", *(f"{token}:1" for token in end)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*begin, *end}],
    )
    kept = {key: value for key, value in config.items() if key not in _TAKEN_OVER}
    return tokenizer, {**roles, "model_input_names": INPUT_NAMES, **kept, "tokenizer_class": "PreTrainedTokenizerFast"}


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, Mapping) else token


def _added(directory: Path) -> dict[int, dict[str, Any]]:
    """The tokens that were added to the model's, by id, each with its text and flags."""
    found: dict[int, dict[str, Any]] = {}
    for name in (_ADDED_FILE, CONFIG):
        if not (directory / name).is_file():
            continue
        data = read_json(directory / name)
        try:
            if name == _ADDED_FILE:
                found |= {int(number): {"content": str(content)} for content, number in data.items()}
            else:
                listed = data.get("added_tokens_decoder", {})
                found |= {int(number): {**token, "content": str(token["content"])} for number, token in listed.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SourceError(
                "a file of the tokenizer is damaged",
                file=str(directory / name),
                found=f"{type(error).__name__}: {error}",
            ) from error
    return found
