"""Quantised weights on the disks of two nodes: a rank decodes what it has, and needs the scales beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.converting import read_tensors
from tests.distributed.launching import Answer, run_jobs
from tests.quantised import make_fp8

FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
#: One of the first file.
MOVED = "model.layers.1.mlp.down_proj.weight_scale_inv"
GRID = ("--to", "torch", "--device", "cpu", "--tp", "2", "--pp", "2", "--vocab-padding", "zeros")


def split(whole: Path, target: Path, *, second: frozenset[str] = frozenset()) -> None:
    """The model in two files, half of the layers in each, but for tensors that are in the second whatever they are."""
    tensors = read_tensors(whole)
    is_second = {name: name in second or ".layers.2." in name or ".layers.3." in name for name in tensors}
    target.mkdir()
    for number, file in enumerate(FILES):
        save_file({name: tensors[name] for name in tensors if is_second[name] == number}, target / file)
    index = {"weight_map": {name: FILES[is_second[name]] for name in tensors}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    os.link(whole / "config.json", target / "config.json")


def hand_out(model: Path, ranks: Path) -> None:
    """Give each of two ranks a directory `ranks/N` with one of the files."""
    for rank, file in enumerate(FILES):
        (ranks / f"{rank}").mkdir(parents=True)
        for name in (file, "config.json", "model.safetensors.index.json"):
            os.link(model / name, ranks / f"{rank}" / name)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quantised")
    make_fp8(root / "whole")
    split(root / "whole", root / "beside")
    split(root / "whole", root / "apart", second=frozenset({MOVED}))
    for name in ("beside", "apart"):
        hand_out(root / name, root / f"{name} ranks")
    return root


@pytest.fixture(scope="module")
def answers(root: Path) -> dict[str, Answer]:
    """Both models converted by one rank, and by two that have a file each."""
    sources = {"one": (1, root / "apart"), "two": (2, root / "beside ranks" / "{rank}")}
    sources |= {"refused": (2, root / "apart ranks" / "{rank}")}
    found = {}
    for name, (ranks, source) in sources.items():
        (root / f"records {name}").mkdir()
        found |= run_jobs(ranks, {name: ["convert", str(source), str(root / name), *GRID]}, root / f"records {name}")
    return found


def test_nodes_that_have_a_file_each_write_the_bytes_of_one_that_has_all(
    root: Path, answers: dict[str, Answer]
) -> None:
    assert answers["one"].outcome["written_bytes"] == answers["two"].outcome["written_bytes"]
    one, two = (
        {path.relative_to(root / job): path.read_bytes() for path in (root / job).rglob("*.pt")}
        for job in ("one", "two")
    )
    assert len(one) == 4
    assert one == two


def test_a_node_that_has_a_weight_without_its_scales_is_refused(root: Path, answers: dict[str, Answer]) -> None:
    refused = answers["refused"]
    assert refused.exit_codes == [1, 1]
    assert MOVED in refused.stderr[0]
    assert f"copy {FILES[1]} to every node that has {FILES[0]}" in refused.stderr[0]
    assert not (root / "refused").exists()
