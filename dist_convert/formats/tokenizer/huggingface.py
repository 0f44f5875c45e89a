"""A directory of Hugging Face tokenizer files: what they say, and how one is written, copied or built.

Nothing is loaded, and no code of the directory runs (docs/formats.md, "Tokenizer files"). One with a SentencePiece
model and no tokenizer.json, as old Llama 2 models have, was read by transformers 4 with the class LlamaTokenizer;
transformers 5 cuts text another way then and leaves out begin-of-text, and servers want tokenizer.json. So that file
is built, from the model and the directory's own settings.
"""

import json
import os
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import NoneType
from typing import Any

from dist_convert.errors import CorruptFile
from dist_convert.formats.huggingface.read import CONFIG_FILE, GENERATION_FILE, check_inside
from dist_convert.formats.tokenizer import build
from dist_convert.formats.tokenizer.build import roles
from dist_convert.formats.tokenizer.chat import CHAT_TEMPLATES
from dist_convert.formats.tokenizer.record import Style, Tokenizer
from dist_convert.read.source import read_json, read_small_file
from dist_convert.records import JsonObject

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
    """Whether transformers' files of a tokenizer are there, its vocabulary among them, whatever has their names."""
    vocabularies = ((_FAST_FILE,), ("vocab.json", "merges.txt"), ("vocab.txt",))
    return any(all(os.path.lexists(directory / name) for name in names) for names in vocabularies)


#: A vocabulary of 600,000 tokens and their merges, which are pairs; tokens a line each; what a library's ids can be.
_MOST_VALUES, _MOST_WORDS_BYTES, _MOST_IDS = 5_000_000, 16_000_000, 1 << 32
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
#: What else is read of tokenizer_config.json; null is as if it were not there.
_TYPES: Mapping[str, tuple[type, ...]] = {
    "tokenizer_class": (str,), "chat_template": (str, list, dict), "extra_special_tokens": (list, dict),
    "added_tokens_decoder": (dict,), "legacy": (bool,), "add_bos_token": (bool,), "add_eos_token": (bool,),
}  # fmt: skip
_CALLED = {str: "a text", bool: "true or false", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class _Settings:
    """What the small files of a tokenizer's directory say, with the types that they should have.

    Attributes:
        config: the content of tokenizer_config.json.
        roles: for each of `_ROLES` that is named, the token's text, or None.
        added: the tokens that were added to the model's, by id, each with its text and flags.
    """

    config: JsonObject
    roles: Mapping[str, str | None]
    added: Mapping[int, JsonObject]


def _damaged(path: Path, key: str, expected: str, found: object) -> CorruptFile:
    what, remedy = "a file of the tokenizer is damaged", "copy it again, or give another directory with --tokenizer"
    return CorruptFile(what, path, expected=f"{key}: {expected}", found=reprlib.repr(found), remedy=remedy)


def _typed(path: Path, key: str, value: Any, *types: type) -> Any:
    """The value under a key, of one of the types that JSON gives; a bool is no int."""
    if type(value) in types:
        return value
    raise _damaged(path, key, " or ".join(_CALLED[one] for one in types if one is not NoneType), value)


def _id(path: Path, key: str, value: Any) -> int:
    if type(value) is int and 0 <= value < _MOST_IDS:
        return value
    raise _damaged(path, key, "an id", value)


def _settings(directory: Path) -> _Settings:
    """The settings in a directory, whose links have been checked."""
    paths = [directory / name for name in (_SPECIAL_TOKENS, CONFIG, _ADDED_FILE)]
    tokens, config, ids = map(_read_settings, paths)
    for key, types in _TYPES.items():
        _typed(paths[1], key, config.get(key), *types, NoneType)
    roles = {}
    for (path, content), role in product(zip(paths, (tokens, config), strict=False), _ROLES):  # the latter file wins
        if role in content:
            token = content[role]
            text = token.get("content") if isinstance(token, dict) else token
            roles[role] = None if token is None else _typed(path, role, text, str)
    added: dict[int, JsonObject] = {_id(paths[2], text, number): {"content": text} for text, number in ids.items()}
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        key = f"added_tokens_decoder, {number}"
        _typed(paths[1], key, token, dict)
        _typed(paths[1], f"{key}, content", token.get("content"), str)
        for flag in _FLAGS:
            _typed(paths[1], f"{key}, {flag}", token.get(flag, False), bool)
        added[_id(paths[1], key, int(number) if re.fullmatch("[0-9]{1,10}", number) else number)] = token
    return _Settings(config, roles, added)


def _read_settings(path: Path) -> JsonObject:
    """An object from a file, nothing where there is none, whose texts can be written again."""
    content = read_json(path) if path.is_file() else {}
    for key, value in content.items():
        try:
            json.dumps({key: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise _damaged(path, key, "characters", error.object[error.start : error.end]) from error
    return content


def read_huggingface(directory: Path) -> Tokenizer:
    """Size and special ids of the tokenizer in a directory, added tokens included.

    Where it names neither begin nor end, Llama's usual tokens are taken, if the tokenizer has them.

    Raises:
        SourceError: a file of it is damaged, or added tokens leave ids out.
        MissingPackage: protobuf is not installed, and there is a SentencePiece model alone.
        OSError: a file of it cannot be read.
    """
    files_of(directory)  # refuses links before any is read
    for name in (CONFIG_FILE, GENERATION_FILE):  # whose ids the model gets: what is damaged is to be known now
        if (directory / name).is_file():
            check_inside(directory, name)
            read_json(directory / name)
    said = _settings(directory)
    if is_slow(directory):
        model, ids = build.read_sentencepiece(directory / MODEL_FILE)
        model = replace(model, kind="slow", path=directory, chat=None)
        _check_added(directory, ids, said)
    else:
        model, ids = Tokenizer("huggingface", directory), _vocabulary(directory)
    size = max(ids.values(), default=-1) + 1
    ids |= {token["content"]: number for number, token in said.added.items()}
    special = {"bos_token": model.bos, "eos_token": model.eos, "pad_token": model.pad}
    usual = next((pair for pair in _USUAL if ids.keys() >= set(pair)), None)
    if model.kind != "slow" and usual and said.roles.keys().isdisjoint(("bos_token", "eos_token")):
        special |= {"bos_token": ids[usual[0]], "eos_token": ids[usual[1]]}
    special |= {role: ids[text] for role, text in said.roles.items() if text in ids}
    has_template, warnings = _notes_on(directory, said.config)
    return replace(
        model,
        size=max([size, *(number + 1 for number in said.added)]) if size else None,
        bos=special["bos_token"],
        eos=special["eos_token"],
        pad=special["pad_token"],
        is_llama3=ids.get("<|end_of_text|>") == 128001 and ids.get("<|eot_id|>") == 128009,
        has_template=has_template,
        warnings=warnings,
    )


def _check_added(directory: Path, pieces: Mapping[str, int], said: _Settings) -> None:
    """Refuse what cannot be added to a model's pieces in the order of the ids, and roles of no token."""
    ids = dict(pieces)
    for number, token in sorted(said.added.items()):
        text = token["content"]
        expected = ids.setdefault(text, len(ids))
        if expected != number or not text:
            what = "added tokens of the tokenizer skip ids or repeat a token"
            raise CorruptFile(what, directory, expected=f"id {expected}", found=f"id {number}: {text!r}")
    for role, text in said.roles.items():
        if text and (text not in ids or not build.can_begin(text)):
            name = CONFIG if role in said.config else _SPECIAL_TOKENS
            raise _damaged(directory / name, role, "a token of the model, or an added one, without colons", text)


def _vocabulary(directory: Path) -> dict[str, int]:
    """The tokens by text: of tokenizer.json, or of what a class reads: words and numbers, or a word a line."""
    path = directory / _FAST_FILE
    if path.is_file():
        content = read_json(path, most_values=_MOST_VALUES)
        model, key = _typed(path, "model", content.get("model"), dict), "model, vocab"
        vocab = _typed(path, key, model.get("vocab"), dict, list)
        if isinstance(vocab, list):  # Unigram: [piece, score] pairs
            texts = (next(iter(_typed(path, key, pair, list)), None) for pair in vocab)
            vocab = {_typed(path, key, text, str): number for number, text in enumerate(texts)}
        ids, key = {text: _id(path, key, number) for text, number in vocab.items()}, "added_tokens"
        for token in _typed(path, key, content.get(key) or [], list):
            text = _typed(path, key, _typed(path, key, token, dict).get("content"), str)
            ids[text] = _id(path, f"{key}, {text}", token.get("id"))
        return ids
    path = directory / "vocab.json"
    if path.is_file() and (words := read_json(path, most_values=_MOST_VALUES)):
        return {word: _id(path, word, number) for word, number in words.items()}
    path = directory / "vocab.txt"
    if not path.is_file():
        return {}
    text = read_small_file(path, _MOST_WORDS_BYTES).decode("utf-8", errors="replace")
    return {line.removesuffix("\r"): number for number, line in enumerate(text.removesuffix("\n").split("\n"))}


def _notes_on(directory: Path, config: JsonObject) -> tuple[bool, tuple[str, ...]]:
    """Whether there is a chat template, and what a copy of the directory may not do as the original does."""
    name, is_fast, found = config.get("tokenizer_class"), (directory / _FAST_FILE).is_file(), []
    has_template = bool(config.get("chat_template"))
    if config.get("auto_map"):
        found.append("the tokenizer's auto_map names Python code, which is not copied")
    if name in _LLAMA_CLASSES and is_fast:
        cuts = "transformers 5 may cut leading spaces differently from 4"
        found.append(f"{cuts} with the tokenizer's class {name}, which is copied as it is")
    if not name and not is_fast:
        found.append(f"no tokenizer_class in the tokenizer's {CONFIG} says how its vocabulary is read")
    if others := sorted({path.name for pattern in _NOT_COPIED for path in directory.glob(pattern)}):
        found.append(f"vocabulary files that are not copied: {', '.join(others)}")
    return has_template or any((directory / name).is_file() for name in _TEMPLATE_FILES), tuple(found)


def files_of(directory: Path) -> tuple[str, ...]:
    """Names of the tokenizer's files in a directory, the directory of further chat templates included.

    Raises:
        CorruptFile: one is no plain file, or a link to somewhere else, whose content would be copied into the target.
    """
    templates = sorted((directory / TEMPLATES).glob("*.jinja"))
    names = (*FILES, *(f"{TEMPLATES}/{path.name}" for path in templates))
    found = tuple(name for name in names if os.path.lexists(directory / name))
    for name in found:
        check_inside(directory, name)
        if not (directory / name).is_file():  # such as a link of the hub's cache to what is gone
            raise CorruptFile(f"{name} is not a plain file, or links to something else", directory / name)
    return found


def _for_both_versions(directory: Path) -> bytes | None:
    """The config for transformers 4 and 5, where they would read it differently; None where it can stay as it is.

    They do where transformers 5 saved it, and where it names no class: then the model's type decides, and transformers
    4 would put Llama's `<s>` in front, whatever tokenizer.json says.
    """
    config = dict(_settings(directory).config)
    name, extra = config.get("tokenizer_class"), config.get("extra_special_tokens")
    of_both = _CLASSES_OF_5.get(name) if name else (_FAST_CLASS if (directory / _FAST_FILE).is_file() else None)
    if of_both is None and not isinstance(extra, list):
        return None
    if of_both is not None:
        config["tokenizer_class"] = of_both
        config.setdefault("model_input_names", _INPUT_NAMES)
    if isinstance(extra, list):
        del config["extra_special_tokens"]
        config.setdefault("additional_special_tokens", extra)  # its name in transformers 4, which 5 reads too
    return _json(config)


#: Settings of the class LlamaTokenizer that the built tokenizer.json has taken over.
_TAKEN_OVER = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "sp_model_kwargs", "tokenizer_file")


def is_slow(directory: Path) -> bool:
    """Whether the directory has a config of transformers, and nothing but a SentencePiece model to cut text with."""
    model = directory / MODEL_FILE
    if not os.path.isfile(model) or not os.path.lexists(directory / CONFIG) or has_tokenizer_files(directory):
        return False
    with model.open("rb") as opened:
        return build.is_sentencepiece(opened.read(3))


def _build_slow(directory: Path) -> tuple[Any, JsonObject]:
    """A `tokenizers.Tokenizer` of a directory that has been read, and its tokenizer_config.json for it."""
    from tokenizers import AddedToken, pre_tokenizers

    said = _settings(directory)
    tokenizer, special = build.build_llama2(directory / MODEL_FILE)
    for number, token in sorted(said.added.items()):
        if number >= tokenizer.get_vocab_size():
            added = AddedToken(token["content"], **{flag: token[flag] for flag in _FLAGS if flag in token})
            (tokenizer.add_special_tokens if token.get("special") else tokenizer.add_tokens)([added])
    if said.config.get("legacy") is False:  # a space in front of the text only, not behind special tokens
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    special |= {role: text for role, text in said.roles.items() if text}
    begin = [special["bos_token"]] if said.config.get("add_bos_token", True) and "bos_token" in special else []
    end = [special["eos_token"]] if said.config.get("add_eos_token", False) and "eos_token" in special else []
    tokenizer.post_processor = build.around_texts(tokenizer, begin, end)
    kept = {key: value for key, value in said.config.items() if key not in _TAKEN_OVER}
    ours = {"tokenizer_class": _FAST_CLASS, "added_tokens_decoder": _added_to(tokenizer)}
    return tokenizer, {**special, "model_input_names": _INPUT_NAMES, **kept, **ours}


def tokenizer_files(tokenizer: Tokenizer, style: Style) -> Iterator[tuple[str, bytes]]:
    """The files of the tokenizer as found on this machine, each read when it is its turn: name and content.

    Raises:
        SourceError: a file of the tokenizer cannot be read.
        MissingPackage: what building one needs is not installed.
    """
    path = tokenizer.path
    if path is None:
        return
    files = {}
    if tokenizer.kind in ("huggingface", "slow"):
        files = dict.fromkeys(files_of(path))
    if tokenizer.kind == "huggingface":
        changed = _for_both_versions(path)
        files |= {} if changed is None else {CONFIG: changed}
    elif tokenizer.kind == "slow":
        built, config = _build_slow(path)
        files |= {_FAST_FILE: built.to_str(pretty=True).encode(), CONFIG: _json(config)}
    else:
        if tokenizer.kind == "tiktoken":
            built, special = (
                build.build_llama3(path, style.model_type),
                roles(style.model_type, instruct=style.instruct),
            )
        else:
            built, special = build.build_llama2(path)
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
        yield name, read_small_file(path / name) if content is None else content


def _added_to(built: Any) -> dict[str, JsonObject]:
    added = sorted(built.get_added_tokens_decoder().items())
    return {str(number): {key: getattr(token, key) for key in ("content", *_FLAGS)} for number, token in added}


def _json(data: JsonObject) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
