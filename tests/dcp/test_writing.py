"""What is written with `--to dcp` is loaded by torch at any sharding, bit for bit."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
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


@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (2, 2)], ids=["columns", "rows-and-columns"])
def test_it_is_loaded_by_ranks_that_cut_columns(rows: int, columns: int, trained: Path, tmp_path: Path) -> None:
    assert convert(trained / "hf", tmp_path / "dcp", "--max-shard-size", "4KB", to="dcp") == 0
    weights = str(trained / "hf/model.safetensors")
    train(rows * columns, "load_blocks", weights, str(tmp_path / "dcp"), str(rows), str(columns))


def test_torch_puts_it_together_and_every_blob_passes_the_test_of_its_zip_container(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    assert convert(tmp_path / "hf", tmp_path / "dcp", "--max-shard-size", "4KB", to="dcp") == 0
    files = sorted(path.name for path in (tmp_path / "dcp").glob("*.distcp"))
    assert len(files) > 2
    assert files == sorted(f"__{number}_0.distcp" for number in range(len(files)))
    for place in FileSystemReader(tmp_path / "dcp").read_metadata().storage_data.values():
        content = (tmp_path / "dcp" / place.relative_path).read_bytes()
        blob = io.BytesIO(content[place.offset : place.offset + place.length])
        assert zipfile.ZipFile(blob).testzip() is None  # torch compares no checksum
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "whole.pt")
    assert_same(torch.load(tmp_path / "whole.pt"), hf)
    assert main(["verify", str(tmp_path / "hf"), str(tmp_path / "dcp")]) == 0


def test_a_megatron_checkpoint_becomes_one_with_its_config_and_comes_back(tmp_path: Path) -> None:
    hf = make(tmp_path / "torch", Model(experts=4, layers=2), Grid(tp=2))
    assert convert(tmp_path / "torch", tmp_path / "dcp", "--target-params-dtype", "keep", "--verify", to="dcp") == 0
    beside = {path.name for path in (tmp_path / "dcp").iterdir()} - {".metadata", "__0_0.distcp"}
    assert beside == {"config.json", "conversion.json", "generation_config.json", "source_megatron_args.json"}
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "whole.pt")
    assert_same(torch.load(tmp_path / "whole.pt"), hf)
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
    metadata = FileSystemReader(tmp_path / "dcp").read_metadata()
    chunks = metadata.state_dict_metadata["model.embed_tokens.weight"].chunks
    assert [(*chunk.offsets, *chunk.sizes) for chunk in chunks] == [(0, 0, 16384, 512), (16384, 0, 3616, 512)]
    # Each of four ranks loads a quarter; those of the second half of the rows need both chunks.
    train(4, "load_blocks", str(tmp_path / "hf/model.safetensors"), str(tmp_path / "dcp"), "2", "2")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "whole.pt")
    assert_same(torch.load(tmp_path / "whole.pt"), load_file(tmp_path / "hf/model.safetensors"))
