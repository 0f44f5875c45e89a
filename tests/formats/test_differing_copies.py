"""Copies of one parameter that several rank files hold: equal, or an error before the first write."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, State, make, megatron_shards, save, training_args
from tests.converting import read_tensors
from tests.to_megatron import read_shards

LLAMA, MIXTRAL = Model(heads=4, groups=4), Model(experts=4, heads=4, groups=4)
ACCEPT = "--accept-differing-copies"
HEAD, EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


def changed(
    root: Path, model: Model, grid: Grid, change: Callable[[dict[str, list[State]]], None], **args: Any
) -> dict[str, torch.Tensor]:
    """Make a checkpoint of which some copies were changed; returns the tensors before."""
    hf = make(root / "unused", model, grid)
    shards = megatron_shards(model, hf, grid)
    shards = {
        file: [{k: v.clone() if v is not None else v for k, v in c.items()} for c in chunks]
        for file, chunks in shards.items()
    }
    change(shards)
    save(root / "source", shards, training_args(model, grid, make_vocab_size_divisible_by=4, **args))
    return hf


def convert(root: Path, *flags: str, to: str = "huggingface") -> int:
    command = ["convert", str(root / "source"), str(root / "target"), "--to", to, "--device", "cpu"]
    return main([*command, *(("--target-params-dtype", "keep") if to == "huggingface" else ()), *flags])


@contextmanager
def no_checksums() -> Iterator[None]:
    """What is saved meanwhile has none in its zip directories."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def add_to(file: str, name: str, amount: float = 0.5) -> Callable[[dict[str, list[State]]], None]:
    def change(shards: dict[str, list[State]]) -> None:
        shards[file][0][name][-1:] += amount

    return change


CASES = [
    (
        LLAMA, Grid(tp=2), "mp_rank_01", "decoder.layers.1.input_layernorm.weight",
        "model.layers.1.input_layernorm.weight",
    ),
    (
        MIXTRAL, Grid(ep=2), "mp_rank_00_001", "decoder.layers.0.mlp.router.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
    ),
    (
        MIXTRAL, Grid(tp=2, ep=2), "mp_rank_01_001", "decoder.layers.2.self_attention.linear_proj.weight",
        "model.layers.2.self_attn.o_proj.weight",
    ),
    (MIXTRAL, Grid(ep=2), "mp_rank_00_001", EMBEDDING, "model.embed_tokens.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "grid", "file", "name", "published"), CASES, ids=lambda value: str(value)[-40:])
@pytest.mark.parametrize("with_checksums", [True, False])
def test_a_copy_that_differs_is_an_error_that_names_it_and_how_far_it_is_off(
    model: Model, grid: Grid, file: str, name: str, published: str, with_checksums: bool, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(with_checksums)
    try:
        changed(tmp_path, model, grid, add_to(file, name, 64.0))
    finally:
        torch.serialization.set_crc32_options(before)
    assert convert(tmp_path) == 1
    message = capsys.readouterr().err
    assert "copies of one parameter differ" in message
    assert name in message
    assert str(tmp_path / "source" / "iter_0000004" / file) in message
    assert re.search(r"other values, at most 6[345](\.\d)? apart, at row", message)  # rounded in bf16
    assert ACCEPT in message
    assert not (tmp_path / "target").exists()
    assert not (tmp_path / "target.partial").exists()


@pytest.mark.parametrize(("model", "grid", "file", "name", "published"), CASES, ids=lambda value: str(value)[-40:])
def test_accepted_copies_are_those_of_the_lowest_rank_whatever_reads_them(
    model: Model, grid: Grid, file: str, name: str, published: str, tmp_path: Path
) -> None:
    hf = changed(tmp_path, model, grid, add_to(file, name))
    for ranks, placement in (("1", "direct"), ("2", "gather")):
        flags = ("--ranks", ranks) if ranks != "1" else ()
        assert convert(tmp_path, ACCEPT, "--verify", "--placement", placement, "--overwrite", *flags) == 0
        assert torch.equal(read_tensors(tmp_path / "target")[published], hf[published])
    assert json.loads((tmp_path / "target" / "conversion.json").read_text())["flags"]["accept_differing_copies"] is True


def test_views_of_one_storage_are_compared_by_their_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = make(tmp_path / "unused", LLAMA, Grid(tp=2))
    shards = megatron_shards(LLAMA, hf, Grid(tp=2))
    for chunks in shards.values():
        weights = {name: tensor for name, tensor in chunks[0].items() if tensor is not None}
        flat = torch.cat([tensor.flatten() for tensor in weights.values()])
        parts = flat.split([tensor.numel() for tensor in weights.values()])
        chunks[0] |= {name: part.view(weights[name].shape) for name, part in zip(weights, parts, strict=True)}
    save(tmp_path / "source", shards, training_args(LLAMA, Grid(tp=2)))
    assert convert(tmp_path) == 0
    shards["mp_rank_01"][0]["decoder.final_layernorm.weight"][3] += 1
    (tmp_path / "source").rename(tmp_path / "equal")
    save(tmp_path / "source", shards, training_args(LLAMA, Grid(tp=2)))
    assert convert(tmp_path, "--overwrite") == 1
    assert "decoder.final_layernorm.weight" in capsys.readouterr().err


def test_a_router_is_compared_whole_where_no_checksum_tells_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(hidden=4096, ffn=4, groups=4, layers=1, experts=32)
    name = "decoder.layers.0.mlp.router.weight"

    def change(shards: dict[str, list[State]]) -> None:
        shards["mp_rank_00_001"][0][name][10] += 1  # between the first, middle and last 64 KiB

    with no_checksums():
        changed(tmp_path, model, Grid(ep=2), change)
    assert convert(tmp_path) == 1
    assert f"tensor:   {name}, shard 0" in capsys.readouterr().err


def test_copies_that_only_a_verification_finds_to_differ_are_told_as_such_and_may_be_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(hidden=4096, ffn=4, heads=16, groups=16, layers=1, vocab=8, padded_vocab=8, experts=2)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"

    def change(shards: dict[str, list[State]]) -> None:
        shards["mp_rank_00_001"][0][name][48] += 1  # between the first, middle and last 64 KiB

    with no_checksums():
        hf = changed(tmp_path, model, Grid(ep=2), change)
    assert convert(tmp_path, "--verify") == 1
    message = capsys.readouterr().err
    assert "copies of one tensor in the source (A) differ, which samples did not show before" in message
    assert f"convert with {ACCEPT}" in message
    assert convert(tmp_path, ACCEPT, "--verify", "--overwrite") == 0
    assert f"warning: copies differ; the lowest rank's are used: {name}" in capsys.readouterr().err
    published = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(read_tensors(tmp_path / "target")[published], hf[published])


def test_a_head_that_args_tie_to_another_embedding_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(tmp_path, Model(tied=True), Grid(pp=2), add_to("mp_rank_00_001", HEAD))
    assert convert(tmp_path) == 1
    assert "is not the embedding that the args tie it to" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["huggingface", "torch"])
def test_a_head_of_its_own_is_never_dropped(to: str, tmp_path: Path) -> None:
    hf = changed(tmp_path, Model(tied=True), Grid(pp=2), add_to("mp_rank_00_001", HEAD))
    assert convert(tmp_path, ACCEPT, "--verify", to=to) == 0
    head = hf["model.embed_tokens.weight"].clone()
    if to == "huggingface":
        found = read_tensors(tmp_path / "target")["lm_head.weight"]
        assert json.loads((tmp_path / "target" / "config.json").read_text())["tie_word_embeddings"] is False
    else:
        found = read_shards(tmp_path / "target", "iter_0000004")["mp_rank_00_001"][0][HEAD][:29]
    assert torch.equal(found[:28], head[:28])


def test_a_head_of_its_own_stays_where_other_copies_of_the_embedding_differ_too(tmp_path: Path) -> None:
    model = Model(tied=True, experts=4, heads=4, groups=4)

    def change(shards: dict[str, list[State]]) -> None:
        shards["mp_rank_00_000_001"][0][EMBEDDING][3] += 1
        for file in ("mp_rank_00_001_000", "mp_rank_00_001_001"):
            shards[file][0][HEAD][4] += 2

    hf = changed(tmp_path, model, Grid(pp=2, ep=2), change, untie_embeddings_and_output_weights=None)
    assert convert(tmp_path, ACCEPT, "--verify") == 0
    found = read_tensors(tmp_path / "target")
    assert torch.equal(found["model.embed_tokens.weight"], hf["model.embed_tokens.weight"])
    assert not torch.equal(found["lm_head.weight"][4], hf["model.embed_tokens.weight"][4])


@pytest.mark.parametrize("is_equal", [True, False])
@pytest.mark.parametrize("grid", [Grid(), Grid(pp=2)], ids=["one stage", "two stages"])
def test_where_args_do_not_say_it_a_head_is_tied_only_if_it_is_the_embedding(
    grid: Grid, is_equal: bool, tmp_path: Path
) -> None:
    model = Model(tied=True)
    last = "mp_rank_00_001" if grid.pp == 2 else "mp_rank_00"

    def change(shards: dict[str, list[State]]) -> None:
        chunk = shards[last][0]
        chunk[HEAD] = shards[min(shards)][0][EMBEDDING].clone()
        chunk[HEAD][3] += 0 if is_equal else 1

    changed(tmp_path, model, grid, change, untie_embeddings_and_output_weights=None)
    assert convert(tmp_path, "--verify") == 0
    assert json.loads((tmp_path / "target" / "config.json").read_text())["tie_word_embeddings"] is is_equal
    assert ("lm_head.weight" in read_tensors(tmp_path / "target")) is not is_equal
    assert main(["verify", str(tmp_path / "source"), str(tmp_path / "target")]) == 0


def test_where_args_do_not_say_it_and_no_checksum_does_a_head_is_compared_whole(tmp_path: Path) -> None:
    model = Model(tied=True, layers=2, hidden=64, head_dim=16, vocab=4096, padded_vocab=4096)

    def change(shards: dict[str, list[State]]) -> None:
        chunk = shards["mp_rank_00_001"][0]
        chunk[HEAD] = shards["mp_rank_00_000"][0][EMBEDDING].clone()
        chunk[HEAD][1000] += 1  # samples are of the first, the middle and the last 512 rows

    with no_checksums():
        changed(tmp_path, model, Grid(pp=2), change, untie_embeddings_and_output_weights=None)
    assert convert(tmp_path) == 0
    assert json.loads((tmp_path / "target" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in read_tensors(tmp_path / "target")


@pytest.mark.parametrize("with_checksums", [True, False])
def test_accepted_copies_are_told_in_the_log_and_the_manifest_and_are_another_plan(
    with_checksums: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "decoder.layers.1.input_layernorm.weight"
    warning = f"warning: copies differ; the lowest rank's are used: {name}"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(with_checksums)
    try:
        for case, change in (("one", lambda _: None), ("same", lambda _: None), ("other", add_to("mp_rank_01", name))):
            changed(tmp_path / case, LLAMA, Grid(tp=2), change)
    finally:
        torch.serialization.set_crc32_options(before)
    made, printed = {}, {}
    for case in ("one", "same", "other"):
        assert convert(tmp_path / case, ACCEPT) == 0
        made[case] = json.loads((tmp_path / case / "target/conversion.json").read_text())
        printed[case] = capsys.readouterr().err
    assert made["one"]["plan"] == made["same"]["plan"]
    assert made["one"]["plan"] != made["other"]["plan"]
    assert (made["one"]["warnings"], made["other"]["warnings"]) == ([], [warning])
    assert (warning in printed["one"], warning in printed["other"]) == (False, True)
