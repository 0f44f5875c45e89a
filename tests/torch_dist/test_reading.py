"""`torch_dist` is read without Megatron: every way in which training saves it becomes the same Hugging Face files."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import Metadata

import dist_convert
from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, make
from tests.converting import assert_same, bytes_read, convert
from tests.distributed_checkpoints import make_distributed
from tests.to_megatron import config_of
from tests.torch_dist.test_refusals import change_metadata

LLAMA = Model()
MIXTRAL = Model(experts=4, layers=2)


@pytest.mark.parametrize(
    ("model", "grid", "how"),
    [
        (LLAMA, Grid(), {}),
        (LLAMA, Grid(tp=2, pp=2), {}),
        (LLAMA, Grid(tp=4), {"norms": "local"}),
        (LLAMA, Grid(tp=2), {"norms": "habana-fused"}),
        (LLAMA, Grid(tp=2), {"keys": "layers"}),
        (LLAMA, Grid(tp=2), {"keys": "singleton"}),
        (LLAMA, Grid(tp=2), {"common": "object"}),
        (Model(tied=True), Grid(tp=2, pp=2), {}),
        (Model(qkv_bias=True), Grid(tp=2), {}),
        (Model(linear_bias=True), Grid(tp=2), {}),
        (MIXTRAL, Grid(tp=2, ep=2), {}),
        (MIXTRAL, Grid(tp=2, pp=2, ep=2), {"grouped": 2}),
        (MIXTRAL, Grid(ep=2), {"keys": "layers", "grouped": 2}),
        (MIXTRAL, Grid(tp=2, ep=2), {"keys": "singleton"}),
    ],
)
def test_every_spelling_and_grid_becomes_the_files_of_its_torch_twin(
    model: Model, grid: Grid, how: dict[str, str], tmp_path: Path
) -> None:
    hf = make_distributed(tmp_path / "dist", model, grid, **how)
    make(tmp_path / "torch", model, grid)
    assert convert(tmp_path / "dist", tmp_path / "hf", "--verify") == 0
    assert convert(tmp_path / "torch", tmp_path / "twin") == 0
    written = load_file(tmp_path / "hf/model.safetensors")
    assert {name: torch.equal(written[name], tensor) for name, tensor in hf.items()} == dict.fromkeys(hf, True)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "twin" / name).read_bytes()


def test_several_ranks_write_the_same_bytes_in_either_placement(tmp_path: Path) -> None:
    make_distributed(tmp_path / "dist", MIXTRAL, Grid(tp=2, pp=2, ep=2))
    assert convert(tmp_path / "dist", tmp_path / "hf") == 0
    alone = (tmp_path / "hf/model.safetensors").read_bytes()
    for placement in ("gather", "direct"):
        target = tmp_path / placement
        dist_convert.convert(tmp_path / "dist", target, to="huggingface", ranks=3, placement=placement)
        assert (target / "model.safetensors").read_bytes() == alone


@pytest.mark.parametrize("said", [64, 16])
def test_a_vocabulary_padded_otherwise_than_the_args_say_is_read(said: int, tmp_path: Path) -> None:
    hf = make_distributed(tmp_path / "dist", LLAMA, Grid(tp=2), padded_vocab_size=said)
    assert convert(tmp_path / "dist", tmp_path / "hf") == 0
    written = load_file(tmp_path / "hf/model.safetensors")
    assert torch.equal(written["lm_head.weight"], hf["lm_head.weight"])


def test_without_a_vocabulary_size_all_rows_are_kept(tmp_path: Path) -> None:
    make_distributed(tmp_path / "dist", LLAMA, Grid(tp=2), padded_vocab_size=64, vocab_size=None)
    assert convert(tmp_path / "dist", tmp_path / "hf") == 0
    assert load_file(tmp_path / "hf/model.safetensors")["lm_head.weight"].shape == (32, 16)


def test_optimizer_random_state_and_extra_state_are_left_behind_by_name(tmp_path: Path) -> None:
    make_distributed(tmp_path / "dist")
    report = dist_convert.convert(tmp_path / "dist", tmp_path / "hf", to="huggingface")
    assert report.read_bytes == report.written_bytes
    assert [(reason, count) for reason, count, _ in report.left_behind] == [
        ("extra state (no weights)", 4), ("optimizer", 1), ("rng_state", 1),
    ]  # fmt: skip
    assert report.source_format == "torch_dist"


def test_every_byte_of_the_weights_is_read_about_once(tmp_path: Path) -> None:
    make_distributed(tmp_path / "small")
    dist_convert.convert(tmp_path / "small", tmp_path / "imported", to="huggingface")
    model = Model(hidden=1024, ffn=2816, heads=8, groups=4, head_dim=128, layers=2, vocab=4000, padded_vocab=4096)
    hf = make_distributed(tmp_path / "dist", model, Grid(tp=2, pp=2))
    before = bytes_read()
    dist_convert.convert(tmp_path / "dist", tmp_path / "hf", to="huggingface")
    assert bytes_read() - before <= 1.02 * sum(tensor.nbytes for tensor in hf.values())


def test_a_chunk_whose_strides_are_turned_is_read_by_them(tmp_path: Path) -> None:
    """As `torch.save` keeps a transposed tensor: its elements lie column after column."""
    hf = make_distributed(tmp_path / "dist")
    file = tmp_path / "dist/iter_0000004/__0_0.distcp"

    def turn(metadata: Metadata) -> None:
        for index, place in metadata.storage_data.items():
            if "linear_fc2.weight" in index.fqn:
                chunk = torch.load(io.BytesIO(file.read_bytes()[place.offset : place.offset + place.length]))
                saved = io.BytesIO()
                torch.save(chunk.mT.contiguous().mT, saved)
                place.offset, place.length = file.stat().st_size, len(saved.getvalue())
                file.write_bytes(file.read_bytes() + saved.getvalue())

    change_metadata(file.parent, turn)
    assert convert(tmp_path / "dist", tmp_path / "hf", "--verify") == 0
    assert_same(load_file(tmp_path / "hf/model.safetensors"), hf)


def test_it_is_opened_lazily_and_compared_with_its_twin(tmp_path: Path) -> None:
    hf = make_distributed(tmp_path / "dist", MIXTRAL, Grid(tp=2, ep=2))
    make(tmp_path / "torch", MIXTRAL, Grid(tp=4))
    with dist_convert.open(tmp_path / "dist") as model:
        assert {name: torch.equal(tensor, hf[name]) for name, tensor in model.tensors()} == dict.fromkeys(hf, True)
    assert main(["verify", str(tmp_path / "dist"), str(tmp_path / "torch")]) == 0


def test_it_becomes_torch_at_another_grid_with_its_own_args(tmp_path: Path) -> None:
    make_distributed(tmp_path / "dist", MIXTRAL, Grid(tp=2, ep=2), consumed_train_samples=512)
    flags = ["--to", "torch", "--target-tensor-parallel-size", "1", "--target-pipeline-parallel-size", "2"]
    assert main(["convert", str(tmp_path / "dist"), str(tmp_path / "torch"), *flags]) == 0
    args = torch.load(tmp_path / "torch/iter_0000004/mp_rank_00_000_000/model_optim_rng.pt", weights_only=False)["args"]
    assert (args.pipeline_model_parallel_size, args.expert_model_parallel_size) == (2, 2)
    assert (args.consumed_train_samples, args.ckpt_format) == (512, "torch")
    assert main(["verify", str(tmp_path / "dist"), str(tmp_path / "torch")]) == 0


def test_inspect_says_what_is_there_and_what_is_missing(tmp_path: Path) -> None:
    make_distributed(tmp_path / "dist", MIXTRAL, Grid(tp=2, ep=2))
    found = dist_convert.inspect(tmp_path / "dist")
    facts = ("format", "family", "parameters", "iteration", "chunks", "files", "missing_shards")
    assert {name: found[name] for name in facts} == {
        "format": "torch_dist",
        "family": "mixtral",
        "parameters": 11888,
        "iteration": 4,
        "chunks": 67,
        "files": 4,
        "missing_shards": [],
    }
    assert list(found["left_behind"]) == ["extra state (no weights)", "optimizer", "rng_state"]
    assert found["grid"] == {"TP": 2, "PP": 1, "VPP": 1, "EP": 2, "ETP": 2}
    (tmp_path / "dist/iter_0000004/__3_0.distcp").unlink()
    assert dist_convert.inspect(tmp_path / "dist")["missing_shards"] == ["__3_0.distcp"]


@pytest.mark.parametrize("model", [LLAMA, MIXTRAL, Model(tied=True)], ids=["llama", "mixtral", "tied"])
def test_like_says_what_a_checkpoint_without_args_is(model: Model, tmp_path: Path) -> None:
    hf = make_distributed(tmp_path / "dist", model, Grid(tp=2))
    (tmp_path / "dist/iter_0000004/common.pt").unlink()
    config_of(model).save_pretrained(tmp_path)
    report = dist_convert.convert(tmp_path / "dist", tmp_path / "hf", to="huggingface", like=tmp_path, verify="full")
    assert_same(load_file(tmp_path / "hf/model.safetensors"), hf)
    assert [note for note in report.notes if "there are no args" in note]
    assert "not_convertible" not in dist_convert.inspect(tmp_path / "dist", like=tmp_path)


def test_a_release_is_read_whose_keys_begin_with_module(tmp_path: Path) -> None:
    hf = make_distributed(tmp_path / "dist", LLAMA, prefix="module.")
    (tmp_path / "dist/iter_0000004").rename(tmp_path / "dist/release")
    (tmp_path / "dist/latest_checkpointed_iteration.txt").write_text("release")
    assert convert(tmp_path / "dist", tmp_path / "hf") == 0
    assert_same(load_file(tmp_path / "hf/model.safetensors"), hf)


def test_a_head_beside_args_that_do_not_say_is_one_of_its_own(tmp_path: Path) -> None:
    hf = make_distributed(tmp_path / "dist", LLAMA, untie_embeddings_and_output_weights=None)
    assert convert(tmp_path / "dist", tmp_path / "hf") == 0
    assert torch.equal(load_file(tmp_path / "hf/model.safetensors")["lm_head.weight"], hf["lm_head.weight"])


def test_a_head_beside_args_that_tie_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_distributed(tmp_path / "dist", LLAMA, untie_embeddings_and_output_weights=False)
    assert convert(tmp_path / "dist", tmp_path / "hf") == 1
    assert "a separate head, although the args tie it" in capsys.readouterr().err


def test_norms_of_local_modules_are_stored_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_distributed(tmp_path / "dist", LLAMA, apply_layernorm_1p=True, transformer_impl="local")
    assert convert(tmp_path / "dist", tmp_path / "hf") == 1
    assert "nothing says whether the norms are stored as gamma - 1" in capsys.readouterr().err
