"""A directory of Hugging Face tokenizer files: what they say, and how one is written, copied or built.

Nothing is loaded, and no code of the directory runs (docs/formats.md, "Tokenizer files"). One with a SentencePiece
model and no tokenizer.json, as old Llama 2 models have, was read by transformers 4 with the class LlamaTokenizer;
transformers 5 cuts text another way then and leaves out begin-of-text, and servers want tokenizer.json. So that file
is built, from the model and the directory's own settings.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_convert.errors import CorruptFile, SourceError
from dist_convert.formats.huggingface.read import check_inside
from dist_convert.formats.tokenizer.build import (
    around_texts,
    build_llama2,
    build_llama3,
    is_sentencepiece,
    read_sentencepiece,
    roles,
)
from dist_convert.formats.tokenizer.chat import CHAT_TEMPLATES
from dist_convert.formats.tokenizer.record import Style, Tokenizer
from dist_convert.read.source import read_json, read_small_file
from dist_convert.write.files import write_file

CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_FAST_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
_ADDED_FILE = "added_tokens.json"
#: A chat template in a file of its own.
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
#: What transformers may find beside a model and read as a part of its tokenizer.
FILES = (
    _FAST_FILE, CONFIG, _SPECIAL_TOKENS, _ADDED_FILE, "vocab.json", "vocab.txt", "merges.txt", MODEL_FILE,
    *_TEMPLATE_FILES,
)  # fmt: skip
TEMPLATES = "additional_chat_templates"

_FAST_CLASS = "PreTrainedTokenizerFast"
#: Classes that only transformers 5 knows, and what both versions call them.
_CLASSES_OF_5 = {"TokenizersBackend": _FAST_CLASS}
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
#: Vocabularies of tokenizers that only their own class, or another program, can read.
_NOT_COPIED = ("spiece.model", "sentencepiece.bpe.model", "*.tiktoken", "tekken.json")
#: Begin and end of a text in Llama 3 and in Llama 2, for files that name no roles.
_USUAL = (("<|begin_of_text|>", "<|end_of_text|>"), ("<s>", "</s>"))
#: transformers 4 would give this class token_type_ids as well, which models of our families refuse.
_INPUT_NAMES = ["input_ids", "attention_mask"]


def has_tokenizer_files(directory: Path) -> bool:
    """Whether transformers' files of a tokenizer are there, its vocabulary among them."""
    vocabularies = ((_FAST_FILE,), ("vocab.json", "merges.txt"), ("vocab.txt",))
    return any(all(os.path.isfile(directory / name) for name in names) for names in vocabularies)


#: A vocabulary of 600,000 tokens and their merges, which are pairs.
_MOST_VALUES = 5_000_000


@contextmanager
def _parsing(path: Path) -> Iterator[dict[str, Any]]:
    """The content of a file, or nothing where there is none; what cannot be understood in it names the file."""
    try:
        yield read_json(path, most_values=_MOST_VALUES) if path.is_file() else {}
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CorruptFile(
            "a file of the tokenizer is damaged",
            file=str(path),
            expected="what Hugging Face's tokenizers write",
            found=f"{type(error).__name__}: {error}",
            remedy="copy it again, or give another directory with --tokenizer",
        ) from error


def read_huggingface(directory: Path) -> Tokenizer:
    """Size and special ids of the tokenizer in a directory, added tokens included.

    Raises:
        SourceError: a file of it is damaged, or added tokens leave ids out.
        MissingPackage: protobuf is not installed, and there is a SentencePiece model alone.
        OSError: a file of it cannot be read.
    """
    files_of(directory)  # refuses links before any is read
    added = _added(directory)
    if is_slow(directory):
        model = replace(read_sentencepiece(directory / MODEL_FILE), kind="slow", path=directory, chat=None)
        ids, size = {}, model.size or 0
        for expected, number in enumerate(sorted(number for number in added if number >= size), start=size):
            if number != expected:
                raise SourceError(
                    "added tokens of the tokenizer leave ids out",
                    file=str(directory),
                    expected=f"id {expected}",
                    found=f"id {number}: {added[number]['content']!r}",
                )
    else:
        model, ids = Tokenizer("huggingface", directory), _vocabulary(directory)
        size = max(ids.values(), default=-1) + 1
    ids |= {token["content"]: number for number, token in added.items()}
    bos, eos, pad = _special_ids(directory, ids)
    has_template, warnings = _notes_on(directory)
    return replace(
        model,
        size=max([size, *(number + 1 for number in added)]) if size else None,
        bos=model.bos if bos is None else bos,
        eos=model.eos if eos is None else eos,
        pad=model.pad if pad is None else pad,
        is_llama3=ids.get("<|end_of_text|>") == 128001 and ids.get("<|eot_id|>") == 128009,
        has_template=has_template,
        warnings=warnings,
    )


def _vocabulary(directory: Path) -> dict[str, int]:
    """The tokens by text: of tokenizer.json, or of what a class reads: words and numbers, or a word a line."""
    if (directory / _FAST_FILE).is_file():
        with _parsing(directory / _FAST_FILE) as tokenizer:
            model = tokenizer.get("model")
            vocab = model.get("vocab") if isinstance(model, dict) else None
            if isinstance(vocab, list):  # Unigram: [piece, score] pairs
                vocab = {str(pair[0]): number for number, pair in enumerate(vocab)}
            found = dict(vocab) if isinstance(vocab, dict) else {}
            found |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
            return {str(token): int(number) for token, number in found.items()}
    with _parsing(directory / "vocab.json") as words:
        ids = {str(word): int(number) for word, number in words.items()}
    if not ids and (directory / "vocab.txt").is_file():
        text = read_small_file(directory / "vocab.txt").decode("utf-8", errors="replace")
        lines = text.removesuffix("\n").split("\n")
        ids = {line.removesuffix("\r"): number for number, line in enumerate(lines)}
    return ids


def _notes_on(directory: Path) -> tuple[bool, tuple[str, ...]]:
    """Whether there is a chat template, and what a copy of the directory may not do as the original does."""
    found = []
    with _parsing(directory / CONFIG) as config:
        name, is_fast = config.get("tokenizer_class"), (directory / _FAST_FILE).is_file()
        has_template = bool(config.get("chat_template"))
        if config.get("auto_map"):
            found.append("the tokenizer's auto_map names Python code, which is not copied")
        if name in _LLAMA_CLASSES and is_fast:
            found.append(
                f"transformers 5 may cut leading spaces in another way than 4 with the tokenizer's class {name}, "
                "which is copied as it is"
            )
        if not name and not is_fast:
            found.append(f"no tokenizer_class in the tokenizer's {CONFIG} says how its vocabulary is read")
    if others := sorted({path.name for pattern in _NOT_COPIED for path in directory.glob(pattern)}):
        found.append(f"vocabulary files that are not copied: {', '.join(others)}")
    return has_template or any((directory / name).is_file() for name in _TEMPLATE_FILES), tuple(found)


def _special_ids(directory: Path, ids: Mapping[str, int]) -> tuple[int | None, int | None, int | None]:
    """Ids of the tokens that begin, end and pad a text, as the directory names them.

    Where it names neither begin nor end, Llama's usual tokens are taken, if the tokenizer has them.
    """
    with _parsing(directory / CONFIG) as config, _parsing(directory / _SPECIAL_TOKENS) as tokens:
        named = [config.get(role, tokens.get(role)) for role in ("bos_token", "eos_token", "pad_token")]
        texts = [token.get("content") if isinstance(token, dict) else token for token in named]
        bos, eos, pad = (ids.get(text) if isinstance(text, str) else None for text in texts)
        if not {"bos_token", "eos_token"} & (config.keys() | tokens.keys()):
            usual = [(ids[begin], ids[end]) for begin, end in _USUAL if begin in ids and end in ids]
            bos, eos = usual[0] if usual else (None, None)
    return bos, eos, pad


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


def _contents_of(directory: Path) -> dict[str, bytes]:
    """The tokenizer's files by name, byte for byte, but for a config that versions of transformers read differently."""
    files = {name: read_small_file(directory / name) for name in files_of(directory)}
    config = _for_both_versions(directory)
    return files if config is None else {**files, CONFIG: config}


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
            changed.setdefault("model_input_names", _INPUT_NAMES)
        if isinstance(extra, list):
            del changed["extra_special_tokens"]
            changed.setdefault("additional_special_tokens", extra)  # its name in transformers 4, which 5 reads too
        return _json(changed)


#: Settings of the class LlamaTokenizer that the built tokenizer.json has taken over.
_TAKEN_OVER = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "sp_model_kwargs", "tokenizer_file")


def is_slow(directory: Path) -> bool:
    """Whether the directory has a config of transformers, and nothing but a SentencePiece model to cut text with."""
    model = directory / MODEL_FILE
    if not os.path.isfile(model) or not os.path.isfile(directory / CONFIG) or has_tokenizer_files(directory):
        return False
    with model.open("rb") as opened:
        return is_sentencepiece(opened.read(3))


def _build_slow(directory: Path) -> tuple[Any, dict[str, Any]]:
    """A `tokenizers.Tokenizer` of a directory that has been read, and its tokenizer_config.json for it."""
    from tokenizers import AddedToken, pre_tokenizers

    config = read_json(directory / CONFIG)
    tokenizer, special = build_llama2(directory / MODEL_FILE)
    for number, token in sorted(_added(directory).items()):
        if number < tokenizer.get_vocab_size():
            continue
        known = ("lstrip", "normalized", "rstrip", "single_word", "special")
        added = AddedToken(token["content"], **{key: bool(token[key]) for key in known if key in token})
        (tokenizer.add_special_tokens if token.get("special") else tokenizer.add_tokens)([added])
    if config.get("legacy") is False:  # a space in front of the text only, not behind special tokens
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    named = {role: config[role] for role in special if config.get(role)}
    special |= {role: token["content"] if isinstance(token, Mapping) else token for role, token in named.items()}
    begin = [special["bos_token"]] if config.get("add_bos_token", True) and "bos_token" in special else []
    end = [special["eos_token"]] if config.get("add_eos_token", False) and "eos_token" in special else []
    tokenizer.post_processor = around_texts(tokenizer, begin, end)
    kept = {key: value for key, value in config.items() if key not in _TAKEN_OVER}
    ours = {"tokenizer_class": _FAST_CLASS, "added_tokens_decoder": _added_to(tokenizer)}
    return tokenizer, {**special, "model_input_names": _INPUT_NAMES, **kept, **ours}


def _added(directory: Path) -> dict[int, dict[str, Any]]:
    """The tokens that were added to the model's, by id, each with its text and flags."""
    with _parsing(directory / _ADDED_FILE) as ids:
        found: dict[int, dict[str, Any]] = {int(number): {"content": str(token)} for token, number in ids.items()}
    with _parsing(directory / CONFIG) as config:
        listed = config.get("added_tokens_decoder", {})
        return found | {int(number): {**token, "content": str(token["content"])} for number, token in listed.items()}


def write_tokenizer(tokenizer: Tokenizer, style: Style, target: Path) -> tuple[str, ...]:
    """Write the tokenizer's files, as found on this machine, into an existing directory; returns their names.

    Raises:
        SourceError: a file of the tokenizer cannot be read.
        MissingPackage: what building one needs is not installed.
        TargetError, NotEnoughSpace: the target's file system refuses.
    """
    path = tokenizer.path
    if path is None:
        return ()
    if tokenizer.kind == "huggingface":
        files = _contents_of(path)
    elif tokenizer.kind == "slow":
        built, config = _build_slow(path)
        files = _contents_of(path) | {_FAST_FILE: built.to_str(pretty=True).encode(), CONFIG: _json(config)}
    else:
        if tokenizer.kind == "tiktoken":
            built, special = build_llama3(path, style.model_type), roles(style.model_type, instruct=style.instruct)
        else:
            built, special = build_llama2(path)
        # In transformers 4's keys, which 5 reads too. With the class LlamaTokenizer, 5 would replace the normalizer and
        # cut leading spaces another way.
        config = {
            "added_tokens_decoder": _added_to(built),
            **special,
            "clean_up_tokenization_spaces": False,
            "model_input_names": _INPUT_NAMES,
            "model_max_length": style.max_positions,
            "tokenizer_class": _FAST_CLASS,
        }
        config |= {"chat_template": CHAT_TEMPLATES[style.model_type]} if style.instruct else {}
        fast = built.to_str(pretty=True).encode()
        files = {_FAST_FILE: fast, CONFIG: _json(config), _SPECIAL_TOKENS: _json(special)}
        if tokenizer.kind == "sentencepiece":
            files[MODEL_FILE] = read_small_file(path)  # some readers prefer it
    for name, content in files.items():
        write_file(target, name, content)
    return tuple(files)


def _added_to(built: Any) -> dict[str, dict[str, Any]]:
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = sorted(built.get_added_tokens_decoder().items())
    return {str(number): {flag: getattr(token, flag) for flag in flags} for number, token in added}


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
