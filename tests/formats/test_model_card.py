"""The model card: what it says, whom it leaves out, and that the hub's own library understands it."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from huggingface_hub import ModelCard

from dist_convert.records import __version__
from tests.checkpoints import Grid, Model, make
from tests.converting import convert, read_tensors
from tests.tokenizer.pieces import train
from tests.tokenizer.test_finding import tiktoken_lines
from tests.tokenizer.test_huggingface_directory import make_tokenizer

MIXTRAL = Model(layers=2, experts=4, groups=4)


def card(place: Path, model: Model = MIXTRAL, grid: Grid | None = None, source: str = "in", *flags: str) -> str:
    """The card of a converted checkpoint of four expert ranks."""
    make(place / source, model, grid or Grid(tp=2, ep=2))
    assert convert(place / source, place / "out", "--overwrite", *flags) == 0
    return (place / "out" / "README.md").read_text()


def test_the_card_says_what_was_converted_from_what(tmp_path: Path) -> None:
    text = card(tmp_path)
    count = sum(tensor.numel() for tensor in read_tensors(tmp_path / "out").values())
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE))
    assert re.fullmatch(r"`[0-9a-f]{64}`", rows.pop("Plan digest"))
    assert rows == {
        "Layers": "2",
        "Hidden size": "16",
        "Feed-forward size": "24 of each expert",
        "Attention heads": "4, each of 4",
        "Key and value heads": "4",
        "Vocabulary": "29",
        "Positions": "64",
        "Experts": "4, 2 for each token",
        "Parameters": f"{count:,}",
        "Stored as": f"bfloat16 ({count:,})",
        "Checkpoint": "`in`, `iter_0000004`",
        "Format": "Megatron-LM `torch`, TP2 PP1 VPP1 EP2 ETP2, bfloat16",
        "Converted by": f"dist_convert {__version__} with torch {torch.__version__}",
        "Weights load with": "transformers 4.49 and later",
        "Tokenizer at conversion": "none",
    }


def test_a_model_without_experts_has_none_in_its_card(tmp_path: Path) -> None:
    text = card(tmp_path, Model(layers=2, tied=True), Grid(pp=2))
    assert "xpert" not in text
    assert "| Vocabulary | 29, tied embeddings |" in text


def test_the_hubs_library_reads_the_front_matter(tmp_path: Path) -> None:
    data = ModelCard(card(tmp_path)).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", None)
    assert data.tags == ["mixtral", "megatron-lm", "dist_convert"]


def test_the_card_of_a_checkpoint_is_the_same_wherever_it_lies_and_names_no_path(tmp_path: Path) -> None:
    first = card(tmp_path / "here")
    assert card(tmp_path / "there") == first
    assert str(tmp_path) not in first
    assert re.search(r"\d{4}-\d\d-\d\d", first) is None


@pytest.mark.parametrize(("name", "shown"), [("a | b", "a _ b"), ("a `b`", "a _b_"), ("a\nb", "a_b")])
def test_the_name_of_a_directory_leaves_the_table_whole(name: str, shown: str, tmp_path: Path) -> None:
    assert f"| Checkpoint | `{shown}`, `iter_0000004` |\n" in card(tmp_path, source=name)


def test_the_digest_follows_the_grid(tmp_path: Path) -> None:
    digests = {re.findall("[0-9a-f]{64}", card(tmp_path / f"{tp}", grid=Grid(tp=tp)))[0] for tp in (1, 2)}
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("directory", "copied from the directory `words`"),
        ("slow", "copied from the directory `words`, `tokenizer.json` built with {versions}"),
        ("lines", "built from `tokenizer.model` (tiktoken) with {versions}"),
        ("pieces", "built from `tokenizer.model` (SentencePiece) with {versions}"),
    ],
)
def test_the_card_names_the_tokenizers_origin_without_its_path(kind: str, said: str, tmp_path: Path) -> None:
    source, file = tmp_path / "words", tmp_path / "words" / "tokenizer.model"
    model = Model(layers=1, vocab=400, padded_vocab=512)
    if kind == "directory":
        make_tokenizer(source)
    elif kind == "lines":
        source.mkdir()
        tiktoken_lines(file)
        model = Model(layers=1, vocab=128256, padded_vocab=128256, hidden=4, ffn=4)
    else:
        source.mkdir()
        train(file)
    if kind == "slow":
        (source / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    text = card(tmp_path, model, Grid(), "in", "--tokenizer", str(source))
    versions = f"transformers {transformers.__version__} and tokenizers {tokenizers.__version__}"
    assert f"| Tokenizer at conversion | {said.format(versions=versions)} |\n" in text
    assert str(tmp_path) not in text


def test_the_card_claims_no_more_of_the_digest_than_it_is_and_says_where_checksums_are(tmp_path: Path) -> None:
    text = card(tmp_path).replace("\n", " ")
    assert (
        "It tells how the bytes were moved, not which bytes: checksums of the files are in `conversion.json`." in text
    )
    weights = json.loads((tmp_path / "out" / "conversion.json").read_text())["files"]["model.safetensors"]
    assert int(weights["crc32"], 16) == zlib.crc32((tmp_path / "out" / "model.safetensors").read_bytes())
