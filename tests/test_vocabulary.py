"""The true vocabulary: --true-vocab-size, then the args, then the tokenizer; the rows beyond it are cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import dist_convert
from tests.checkpoints import Grid, Model, hf_tensors, make, megatron_shards, save, training_args
from tests.converting import assert_same, convert, read_tensors
from tests.to_megatron import make_hf, to_megatron

LAYER = Model(layers=1)  # 29 tokens in 32 rows; the rows of padding hold 7.0


def tokenizer_of(directory: Path, tokens: int) -> Path:
    directory.mkdir()
    words = {f"word{number}": number for number in range(tokens - 2)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="word0"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    assert tokenizer.get_vocab_size() == tokens
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def rows_of(target: Path) -> tuple[int, int, int]:
    """Rows of the embedding, rows of the head, and vocab_size of the config."""
    tensors = read_tensors(target)
    config = json.loads((target / "config.json").read_text())
    return len(tensors["model.embed_tokens.weight"]), len(tensors["lm_head.weight"]), config["vocab_size"]


@pytest.mark.parametrize(
    ("flag", "in_args", "in_tokenizer", "size", "who"),
    [
        (26, 27, 28, 26, "--true-vocab-size"),
        (26, None, None, 26, "--true-vocab-size"),
        (None, 27, 28, 27, "args"),
        (None, 27, None, 27, "args"),
        (None, None, 28, 28, "tokenizer"),
        (None, None, None, 32, "padded size"),
    ],
)
def test_the_first_that_knows_the_size_decides(
    flag: int | None,
    in_args: int | None,
    in_tokenizer: int | None,
    size: int,
    who: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path / "in", LAYER, vocab_size=in_args)
    flags = ["--true-vocab-size", str(flag)] if flag else []
    if in_tokenizer:
        flags += ["--tokenizer", str(tokenizer_of(tmp_path / "tokenizer", in_tokenizer))]
    assert convert(tmp_path / "in", tmp_path / "out", *flags) == 0
    assert rows_of(tmp_path / "out") == (size, size, size)
    assert f"vocabulary: {size} tokens according to {who}, 32 rows in the embedding" in capsys.readouterr().err


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 8, 20, 24, 25, 31, 32])
def test_rows_beyond_the_size_are_cut_whichever_rank_holds_them(size: int, tp: int, tmp_path: Path) -> None:
    model = Model(layers=1, vocab=32, groups=4)
    expected = make(tmp_path / "in", model, Grid(tp=tp), vocab_size=size)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    found = read_tensors(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(found[name], expected[name][:size])


def test_without_any_authority_the_rows_of_padding_are_kept(tmp_path: Path) -> None:
    expected = make(tmp_path / "in", LAYER, Grid(tp=2), vocab_size=None)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    found = read_tensors(tmp_path / "out")["lm_head.weight"]
    assert torch.equal(found[:29], expected["lm_head.weight"])
    assert set(found[29:].flatten().tolist()) == {7.0}


def test_a_tied_embedding_is_cut_like_any_other(tmp_path: Path) -> None:
    expected = make(tmp_path / "in", Model(layers=2, tied=True), Grid(tp=2, pp=2))
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    found = read_tensors(tmp_path / "out")
    assert torch.equal(found["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])
    assert "lm_head.weight" not in found


def test_a_vocabulary_without_padding_needs_no_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in", Model(layers=1, vocab=32))
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert "vocabulary:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "in_args", "who", "found"),
    [
        (("--true-vocab-size", "33"), 29, "--true-vocab-size", "--true-vocab-size 33, args 29, tokenizer unknown"),
        ((), 33, "args", "--true-vocab-size unknown, args 33, tokenizer unknown"),
    ],
)
def test_a_size_beyond_the_padded_one_is_refused_with_who_said_it(
    flags: tuple[str, ...], in_args: int, who: str, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", LAYER, vocab_size=in_args)
    assert convert(tmp_path / "in", tmp_path / "out", *flags) == (2 if flags else 1)
    err = capsys.readouterr().err
    assert f"the vocabulary size of {who} does not fit the embedding\n" in err
    assert "expected: at most 32 (padded_vocab_size)\n" in err
    assert f"found:    {found}\n" in err
    assert "--true-vocab-size" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("in_tokenizer", "in_args", "flags", "rows", "warning"),
    [
        (30, 29, (), 29, "tokenizer 30, args 29, embedding 32 rows; 29 are written. The tokenizer's ids from 29 on "
         "have no row; --true-vocab-size 30 keeps theirs"),
        (28, 29, (), 29, "tokenizer 28, args 29, embedding 32 rows; 29 are written"),
        (33, 29, (), 29, "tokenizer 33, args 29, embedding 32 rows; 29 are written. The tokenizer's ids from 29 on "
         "have no row"),
        (30, None, ("--true-vocab-size", "31"), 31,
         "tokenizer 30, args unknown, --true-vocab-size 31, embedding 32 rows; 31 are written"),
    ],
)  # fmt: skip
def test_sizes_that_disagree_are_a_warning_with_every_number(
    in_tokenizer: int,
    in_args: int | None,
    flags: tuple[str, ...],
    rows: int,
    warning: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path / "in", LAYER, vocab_size=in_args)
    tokenizer = tokenizer_of(tmp_path / "tokenizer", in_tokenizer)
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(tokenizer), *flags) == 0
    assert f"warning: the vocabulary's sizes disagree: {warning}\n" in capsys.readouterr().err
    assert rows_of(tmp_path / "out") == (rows, rows, rows)


def test_sizes_that_agree_are_no_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in", LAYER)
    tokenizer = tokenizer_of(tmp_path / "tokenizer", 29)
    assert convert(tmp_path / "in", tmp_path / "out", "--tokenizer", str(tokenizer)) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("said", [16, 64, None])
def test_the_embedding_is_believed_over_the_padded_size_that_args_say(
    said: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", LAYER, padded_vocab_size=said)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert rows_of(tmp_path / "out") == (29, 29, 29)
    warning = f"warning: the args say padded_vocab_size {said}, the embedding has 32 rows; the embedding is right\n"
    assert (warning in capsys.readouterr().err) is (said is not None)


@pytest.mark.parametrize(("tokenizer_type", "rows"), [("NullTokenizer", 30), ("HuggingFaceTokenizer", 29)])
def test_a_null_tokenizer_has_an_end_of_text_behind_its_ids(tokenizer_type: str, rows: int, tmp_path: Path) -> None:
    make(tmp_path / "in", LAYER, tokenizer_type=tokenizer_type)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert rows_of(tmp_path / "out") == (rows, rows, rows)


@pytest.mark.parametrize(("tokens", "is_told"), [(29, False), (30, True), (40, True)], ids=str)
def test_a_tokenizer_with_ids_that_have_no_row_is_told_of_on_the_way_to_megatron(
    tokens: int, is_told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", Model(layers=1))
    tokenizer = tokenizer_of(tmp_path / "tokenizer", tokens)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", "--tokenizer-model", str(tokenizer)) == 0
    assert ("The tokenizer's ids from 29 on have no row" in capsys.readouterr().err) is is_told


@pytest.mark.parametrize("sizes", [(512, 256), (256, 512)], ids=str)
def test_stages_that_say_other_padded_sizes_are_a_warning_that_says_both(
    sizes: tuple[int, int], tmp_path: Path
) -> None:
    """As Habana's importer of 1.23 and 1.24 writes them: the rows of one shard in place of all."""
    model, grid = Model(layers=2, vocab=512, padded_vocab=512), Grid(tp=2, pp=2)
    hf = hf_tensors(model)
    for file, chunks in megatron_shards(model, hf, grid).items():
        args = training_args(model, grid, padded_vocab_size=sizes[file.endswith("_001")])
        save(tmp_path / "in", {file: chunks}, args)
    report = dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface", verify="full")
    said = f"the args say padded_vocab_size {sizes[0]} and {sizes[1]}, the embedding has 512 rows"
    warning = f"warning: {said}; the embedding is right"
    assert [note for note in report.notes if note.startswith("warning")] == [warning]
    assert rows_of(tmp_path / "out") == (512, 512, 512)
    assert_same(read_tensors(tmp_path / "out"), hf)
