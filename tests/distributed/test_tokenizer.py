"""Rank 0 alone handles the tokenizer: several ranks write what one writes."""

from __future__ import annotations

from pathlib import Path

from tests.checkpoints import Grid, Model, make
from tests.converting import convert
from tests.distributed.launching import flags, run_ranks
from tests.tokenizer.pieces import train
from tests.tokenizer.test_huggingface_directory import files_of

MODEL = Model(layers=1, vocab=400, padded_vocab=512, experts=2)


def test_two_ranks_write_the_tokenizer_and_the_rows_that_one_writes(tmp_path: Path) -> None:
    make(tmp_path / "in", MODEL, Grid(tp=2), vocab_size=None)
    train(tmp_path / "in" / "tokenizer" / "tokenizer.model")
    assert convert(tmp_path / "in", tmp_path / "one", "--instruct") == 0
    run = run_ranks(2, *flags(tmp_path / "in", tmp_path / "two"), "--placement", "gather", "--instruct")
    assert run.returncode == 0, run.stderr
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    assert (tmp_path / "two" / "tokenizer.json").is_file()
