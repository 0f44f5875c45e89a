"""What is written with `--to dcp` is loaded by torch at any sharding, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, make
from tests.converting import assert_same, read_tensors
from tests.dcp.conftest import train
from tests.dcp.test_reading import convert
from tests.distributed.launching import hashes, run_ranks
from tests.to_megatron import make_hf


def test_what_three_ranks_have_saved_comes_back_at_two(trained: Path, tmp_path: Path) -> None:
    like = ["--like", str(trained / "hf")]
    assert convert(trained / "plain", tmp_path / "dcp", *like, to="dcp") == 0
    train(2, "load", str(trained / "hf/model.safetensors"), str(tmp_path / "dcp"))


def test_torch_puts_it_together_and_finds_every_checksum_right(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    assert convert(tmp_path / "hf", tmp_path / "dcp", "--max-shard-size", "4KB", to="dcp") == 0
    files = sorted(path.name for path in (tmp_path / "dcp").glob("*.distcp"))
    assert len(files) > 2
    assert files == sorted(f"__{number}_0.distcp" for number in range(len(files)))
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "whole.pt")
    assert_same(torch.load(tmp_path / "whole.pt"), hf)
    assert main(["verify", str(tmp_path / "hf"), str(tmp_path / "dcp")]) == 0


def test_a_megatron_checkpoint_becomes_one_with_its_config_and_comes_back(tmp_path: Path) -> None:
    hf = make(tmp_path / "torch", Model(experts=4, layers=2), Grid(tp=2))
    assert convert(tmp_path / "torch", tmp_path / "dcp", "--target-params-dtype", "keep", "--verify", to="dcp") == 0
    beside = {path.name for path in (tmp_path / "dcp").iterdir()} - {".metadata", "__0_0.distcp"}
    assert beside == {"config.json", "conversion.json", "generation_config.json", "source_megatron_args.json"}
    assert convert(tmp_path / "dcp", tmp_path / "hf") == 0
    assert_same(read_tensors(tmp_path / "hf"), hf)


def test_several_ranks_write_the_same_bytes(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf")
    job = ["convert", str(tmp_path / "hf"), str(tmp_path / "dcp"), "--to", "dcp", "--max-shard-size", "4KB"]
    run = run_ranks(2, *job)
    assert run.returncode == 0, run.stderr
    of_two = hashes(tmp_path / "dcp")
    shutil.rmtree(tmp_path / "dcp")
    assert main(job) == 0
    assert hashes(tmp_path / "dcp") == of_two


def test_a_large_tensor_is_cut_into_chunks_that_are_loaded_alone(tmp_path: Path) -> None:
    model = Model(layers=1, hidden=512, heads=1, groups=1, vocab=20_000, padded_vocab=20_000)
    make_hf(tmp_path / "hf", model)
    assert convert(tmp_path / "hf", tmp_path / "dcp", to="dcp") == 0
    metadata = torch.distributed.checkpoint.FileSystemReader(tmp_path / "dcp").read_metadata()
    chunks = metadata.state_dict_metadata["model.embed_tokens.weight"].chunks
    assert [(*chunk.offsets, *chunk.sizes) for chunk in chunks] == [(0, 0, 16384, 512), (16384, 0, 3616, 512)]
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "whole.pt")
    assert_same(torch.load(tmp_path / "whole.pt"), load_file(tmp_path / "hf/model.safetensors"))
