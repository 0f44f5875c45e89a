"""The model card: what it says, whom it leaves out, and that the hub's own library understands it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from dist_convert.version import __version__
from tests.checkpoints import Grid, Model, make
from tests.converting import convert, read_tensors

MIXTRAL = Model(layers=2, experts=4, groups=4)


def card(place: Path, model: Model = MIXTRAL, grid: Grid | None = None, source: str = "in") -> str:
    """The card of a converted checkpoint of four expert ranks."""
    make(place / source, model, grid or Grid(tp=2, ep=2))
    assert convert(place / source, place / "out", "--overwrite") == 0
    return (place / "out" / "README.md").read_text()


def test_the_card_says_what_was_converted_from_what(tmp_path: Path) -> None:
    text = card(tmp_path)
    count = sum(tensor.numel() for tensor in read_tensors(tmp_path / "out").values())
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE))
    assert re.fullmatch(r"`[0-9a-f]{64}`", rows.pop("Digest of the plan"))
    assert rows == {
        "Layers": "2",
        "Hidden size": "16",
        "Feed-forward size": "24 of each expert",
        "Attention heads": "4 of 4",
        "Key and value heads": "4",
        "Vocabulary": "29",
        "Positions": "64",
        "Experts": "4, 2 for each token",
        "Parameters": f"{count:,}",
        "Stored as": f"bfloat16 ({count:,})",
        "Checkpoint": "`in`, `iter_0000004`",
        "Format": "Megatron-LM `torch`, TP2 PP1 VPP1 EP2 ETP2, bfloat16",
        "Converted by": f"dist_convert {__version__} with torch {torch.__version__}",
        "Loads with": "transformers 4.49 and later",
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
