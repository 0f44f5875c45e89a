"""What a conversion knows of a tokenizer before it writes one, and what it says about it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dist_convert.errors import quoted
from dist_convert.options import Options, TokenizerJob
from dist_convert.records import JsonObject

#: A directory that is copied; one that is copied and lacks tokenizer.json, which is built; tiktoken's lines or a
#: SentencePiece model, which a Hugging Face tokenizer is built from.
Kind = Literal["none", "huggingface", "slow", "tiktoken", "sentencepiece"]

#: Llama 3 was trained on 8192 positions, 3.1 and later on 131072.
_LLAMA3_POSITIONS = 8192


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as far as a conversion needs it.

    Attributes:
        kind: see `Kind`.
        path: of the directory or file, on the machine of the rank that found it.
        size: tokens, added ones included; None where it cannot be told without loading it.
        bos, eos, pad: ids of begin and end of text and of padding, where the files name them.
        note: where it was found or, where it was not, why: one sentence for the user.
        is_llama3: whether the tokens that end a text and a turn have Llama 3's ids.
        chat: "mistral v3" or "mistral v7" where its own control tokens tell whose chat format it has.
        has_template: whether a directory has a chat template.
        warnings: what the user should know of its files, a sentence each.
    """

    kind: Kind
    path: Path | None = None
    size: int | None = None
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    note: str = ""
    is_llama3: bool = False
    chat: str | None = None
    has_template: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Style:
    """What a bare tokenizer file does not say of the tokenizer that is built from it.

    Attributes:
        model_type: one of the values of `--source-model-type`, or `Tokenizer.chat` where the tokenizer tells.
        instruct: whether it gets a chat template, and the token that ends a turn as end of text.
        max_positions: tokens that the model can attend to.
    """

    model_type: str
    instruct: bool
    max_positions: int


def style_of(tokenizer: Tokenizer, config: JsonObject, job: Options | TokenizerJob) -> Style:
    """The style that the tokenizer tells or `--source-model-type` asks for, as far as it fits; else the config's."""
    said, positions = job.source_model_type, int(config.get("max_position_embeddings") or 0)
    if tokenizer.chat is not None:
        model_type = tokenizer.chat
    elif tokenizer.kind == "tiktoken":
        is_later = config.get("rope_scaling") or positions > _LLAMA3_POSITIONS
        model_type = said if said in ("llama3", "llama3.1") else ("llama3.1" if is_later else "llama3")
    else:
        of_config = "mixtral" if config.get("model_type") == "mixtral" else "llama2"
        model_type = said if said in ("llama2", "mistral", "mixtral") else of_config
    return Style(model_type, job.instruct, positions)


_NAMES = {
    "llama2": "Llama 2", "llama3": "Llama 3", "llama3.1": "Llama 3.1", "mistral": "Mistral", "mixtral": "Mixtral",
    "mistral v3": "Mistral v3", "mistral v7": "Mistral v7",
}  # fmt: skip


def notes_on_tokenizer(tokenizer: Tokenizer, style: Style, said: str | None) -> list[str]:
    """Which tokenizer is written, or why none is; `said` is `--source-model-type`."""
    if tokenizer.kind == "none":
        return [f"no tokenizer files are written: {tokenizer.note}"]
    if tokenizer.kind in ("huggingface", "slow"):
        built = ", with a tokenizer.json built from its tokenizer.model" if tokenizer.kind == "slow" else ""
        warnings = list(tokenizer.warnings)
        if style.instruct and not tokenizer.has_template:
            warnings.append("--instruct was given, but the tokenizer has no chat template, and none is written")
        return [f"tokenizer: {tokenizer.note}, copied{built}", *(f"warning: {text}" for text in warnings)]
    details = ["special tokens"] if tokenizer.kind == "tiktoken" else []
    details += ["chat format"] if style.instruct else []
    if not details:
        return [f"tokenizer: built from {tokenizer.note}"]
    why = "" if said == style.model_type else ", as its config suggests; --source-model-type overrides it"
    why = ", by its control tokens" if tokenizer.chat is not None else why
    return [f"tokenizer: built from {tokenizer.note}; {' and '.join(details)} of {_NAMES[style.model_type]}{why}"]


def how_to_add_tokenizer(job: Options) -> str:
    """What to do about a conversion's target that has no tokenizer."""
    flags = " --instruct" if job.instruct else ""
    flags += f" --source-model-type {job.source_model_type}" if job.source_model_type else ""
    how = f"dist-convert tokenizer PATH {quoted(str(job.target))}{flags}"
    return f"add one (a directory or a tokenizer.model) with: {how}"


def vocabulary_warnings(claims: Mapping[str, int | None], rows: int, kept: int) -> list[str]:
    """What to say where sizes of the vocabulary disagree, and where the tokenizer has tokens without a row.

    `claims` are who says how many tokens there are, such as {"tokenizer": 128256, "args": None}; `rows` the
    embedding's, padding included; `kept` those that the target has.
    """
    known = {size for size in claims.values() if size is not None}
    tokens = claims.get("tokenizer")
    if len(known) < 2 and (tokens is None or tokens <= kept):
        return []
    said = ", ".join(f"{who} {size if size is not None else 'unknown'}" for who, size in claims.items())
    warning = f"warning: the vocabulary's sizes disagree: {said}, embedding {rows} rows; {kept} are written"
    if tokens is not None and tokens > kept:
        warning += f". The tokenizer's ids from {kept} on have no row"
        warning += f"; --true-vocab-size {tokens} keeps theirs" if tokens <= rows else ""
    return [warning]
