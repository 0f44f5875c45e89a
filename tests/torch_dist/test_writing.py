"""`torch_dist` is written without Megatron, in the boxes that training at the target's grid would save."""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

import dist_convert
from dist_convert.__main__ import main
from dist_convert.formats.dcp.pickled_metadata import metadata_bytes
from dist_convert.read.dcp import Blob, Chunk, SavedTensor, read_metadata
from tests.checkpoints import Grid, Model, make
from tests.distributed.launching import hashes
from tests.distributed_checkpoints import make_distributed
from tests.to_megatron import make_hf

LLAMA = Model()
MIXTRAL = Model(experts=4, layers=2)


def to_torch_dist(source: Path, target: Path, grid: Grid, *more: str) -> int:
    sizes = {
        "tensor": grid.tp, "pipeline": grid.pp, "expert": grid.ep, "expert-tensor": grid.etp or grid.tp,
    }  # fmt: skip
    flags = [word for axis, size in sizes.items() for word in (f"--target-{axis}-parallel-size", str(size))]
    flags += ["--target-virtual-pipeline-parallel-size", str(grid.vpp)] if grid.vpp > 1 else []
    padding = ["--make-vocab-size-divisible-by", str(32 // grid.tp)]
    return main(["convert", str(source), str(target), "--to", "torch_dist", *flags, *padding, *more])


def metadata_of(root: Path) -> Metadata:
    """As torch reads it."""
    return FileSystemReader(next(root.glob("iter_*"))).read_metadata()


def tensors_of(root: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the model, put together by torch."""
    saved = metadata_of(root).state_dict_metadata.items()
    state = {
        key: torch.zeros(tensor.size, dtype=tensor.properties.dtype)
        for key, tensor in saved
        if isinstance(tensor, TensorStorageMetadata) and "optimizer." not in key
    }
    torch_dcp.load(state, checkpoint_id=next(root.glob("iter_*")), no_dist=True)
    return state


def chunks_of(root: Path) -> dict[str, set[tuple[Any, ...]]]:
    """Key -> first elements and sizes of its boxes."""
    return {
        key: {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks}
        for key, tensor in metadata_of(root).state_dict_metadata.items()
        if isinstance(tensor, TensorStorageMetadata) and "optimizer." not in key
    }


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("model", "grid", "norms"),
    [
        (LLAMA, Grid(), "te"),
        (LLAMA, Grid(tp=2, pp=2), "te"),
        (LLAMA, Grid(tp=4, pp=2, vpp=2), "te"),
        (Model(tied=True), Grid(tp=2, pp=2), "te"),
        (Model(qkv_bias=True), Grid(tp=2), "te"),
        (Model(linear_bias=True), Grid(tp=2), "te"),
        (MIXTRAL, Grid(tp=2, ep=2), "te"),
        (MIXTRAL, Grid(tp=2, pp=2, ep=2, etp=1), "te"),
        (MIXTRAL, Grid(ep=4), "te"),
    ],
)
def test_torch_finds_the_tensors_and_the_boxes_that_training_saves(
    model: Model, grid: Grid, norms: str, tmp_path: Path
) -> None:
    make_distributed(tmp_path / "training", model, grid, norms=norms)
    make(tmp_path / "torch", model, Grid(tp=2, ep=2 if model.experts else 1), norms=norms)
    assert to_torch_dist(tmp_path / "torch", tmp_path / "dist", grid, "--verify") == 0
    expected, found = tensors_of(tmp_path / "training"), tensors_of(tmp_path / "dist")
    padding = slice(model.vocab, None)
    for tensors in (expected, found):
        for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            if key in tensors:
                tensors[key][padding] = 0
    assert {key: torch.equal(found[key], tensor) for key, tensor in expected.items()} == dict.fromkeys(expected, True)
    assert found.keys() == expected.keys()
    if grid.etp is None:  # the maker cuts experts like all else
        assert chunks_of(tmp_path / "dist") == chunks_of(tmp_path / "training")


FUSED, UNFUSED = "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"


@pytest.mark.parametrize(
    ("model", "impl", "keys"),
    [
        (LLAMA, "local", [FUSED, "mlp.linear_fc1.layer_norm_weight"]),
        (LLAMA, "transformer_engine", [FUSED, "mlp.linear_fc1.layer_norm_weight"]),
        (LLAMA, "habana", [UNFUSED, "pre_mlp_layernorm.weight"]),
        (MIXTRAL, "local", [FUSED, "mlp.linear_fc1.layer_norm_weight"]),
        (MIXTRAL, "transformer_engine", [FUSED, "pre_mlp_layernorm.weight"]),
        (MIXTRAL, "habana", [UNFUSED, "pre_mlp_layernorm.weight"]),
    ],
)
def test_norms_have_the_keys_of_their_modules(model: Model, impl: str, keys: list[str], tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", model)
    assert to_torch_dist(tmp_path / "hf", tmp_path / "dist", Grid(), "--saver-transformer-impl", impl, "--verify") == 0
    saved = metadata_of(tmp_path / "dist").state_dict_metadata
    assert [name for name in saved if "norm" in name and "layers" in name and "_extra_state" not in name] == [
        f"decoder.layers.{key}" for key in keys
    ]


def test_there_is_a_file_for_each_model_parallel_rank_and_the_args_say_the_format(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", MIXTRAL)
    assert to_torch_dist(tmp_path / "hf", tmp_path / "dist", Grid(tp=2, pp=2, ep=2)) == 0
    directory = tmp_path / "dist/iter_0000001"
    assert sorted(path.name for path in directory.iterdir()) == [
        ".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp", "__3_0.distcp", "__4_0.distcp", "__5_0.distcp",
        "__6_0.distcp", "__7_0.distcp", "common.pt", "conversion.json", "huggingface_configs.json", "metadata.json",
    ]  # fmt: skip
    common = torch.load(directory / "common.pt", weights_only=False)
    assert (common["iteration"], common["args"].ckpt_format, common["args"].use_dist_ckpt) == (1, "torch_dist", True)
    assert (tmp_path / "dist/latest_checkpointed_iteration.txt").read_text() == "1"


QKV, FC1 = "decoder.layers.self_attention.linear_qkv.weight", "decoder.layers.mlp.experts.experts.linear_fc1.weight"
PROJ, NORM = "decoder.layers.self_attention.linear_proj.weight", "decoder.layers.pre_mlp_layernorm.weight"


@pytest.mark.parametrize(
    ("grid", "files", "places"),
    [
        # Rank 0 has experts 0 and 1 whole, rank 1 experts 2 and 3: no other pair of dense and expert shards exists.
        (
            Grid(tp=2, ep=2, etp=1),
            ["__0_0.distcp", "__3_0.distcp"],
            {
                (QKV, (0, 0, 0)): "__0_0.distcp", (QKV, (0, 16, 0)): "__3_0.distcp",
                (QKV, (1, 0, 0)): "__0_0.distcp", (QKV, (1, 16, 0)): "__3_0.distcp",
                (NORM, (0, 0)): "__0_0.distcp", (NORM, (1, 0)): "__0_0.distcp",
                (FC1, (0, 1, 0, 0)): "__0_0.distcp", (FC1, (0, 1, 24, 0)): "__0_0.distcp",
                (FC1, (0, 2, 0, 0)): "__3_0.distcp", (FC1, (1, 3, 24, 0)): "__3_0.distcp",
            },
        ),
        # Ranks 0 and 2 both have experts 0 and 1, ranks 1 and 3 experts 2 and 3.
        (
            Grid(tp=4, ep=2, etp=1),
            ["__0_0.distcp", "__2_0.distcp", "__5_0.distcp", "__7_0.distcp"],
            {
                (QKV, (0, 0, 0)): "__0_0.distcp", (QKV, (0, 8, 0)): "__5_0.distcp",
                (QKV, (0, 16, 0)): "__2_0.distcp", (QKV, (0, 24, 0)): "__7_0.distcp",
                (FC1, (0, 0, 0, 0)): "__0_0.distcp", (FC1, (1, 1, 24, 0)): "__0_0.distcp",
                (FC1, (0, 2, 0, 0)): "__5_0.distcp", (FC1, (1, 3, 24, 0)): "__5_0.distcp",
            },
        ),
        # Files 0 to 3 are of layer 0's stage, 4 to 7 of layer 1's; in each, the first two of expert rank 0.
        (
            Grid(tp=2, pp=2, ep=2),
            [f"__{number}_0.distcp" for number in range(8)],
            {
                (QKV, (0, 0, 0)): "__0_0.distcp", (QKV, (0, 16, 0)): "__1_0.distcp",
                (PROJ, (0, 0, 0)): "__2_0.distcp", (PROJ, (0, 0, 8)): "__3_0.distcp",
                (NORM, (0, 0)): "__0_0.distcp",
                (QKV, (1, 0, 0)): "__6_0.distcp", (QKV, (1, 16, 0)): "__7_0.distcp",
                (PROJ, (1, 0, 0)): "__4_0.distcp", (PROJ, (1, 0, 8)): "__5_0.distcp",
                (NORM, (1, 0)): "__6_0.distcp",
                (FC1, (0, 1, 0, 0)): "__0_0.distcp", (FC1, (0, 1, 12, 0)): "__1_0.distcp",
                (FC1, (0, 2, 0, 0)): "__2_0.distcp", (FC1, (0, 2, 12, 0)): "__3_0.distcp",
                (FC1, (1, 0, 0, 0)): "__4_0.distcp", (FC1, (1, 3, 36, 0)): "__7_0.distcp",
            },
        ),
    ],
    ids=["tp2-ep2-etp1", "tp4-ep2-etp1", "tp2-pp2-ep2"],
)  # fmt: skip
def test_dense_chunks_go_round_the_files_of_a_stages_expert_ranks_and_experts_to_the_lowest_rank_that_holds_them(
    grid: Grid, files: list[str], places: dict[tuple[str, tuple[int, ...]], str], tmp_path: Path
) -> None:
    make_hf(tmp_path / "hf", MIXTRAL)
    assert to_torch_dist(tmp_path / "hf", tmp_path / "dist", grid) == 0
    assert sorted(path.name for path in tmp_path.glob("dist/iter_*/*.distcp")) == files
    stored = metadata_of(tmp_path / "dist").storage_data.items()
    found = {(index.fqn, tuple(index.offset or ())): place.relative_path for index, place in stored}
    assert {chunk: found[chunk] for chunk in places} == places


def test_every_blob_passes_the_test_of_its_zip_container_and_torch_loads_it(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", MIXTRAL)
    assert to_torch_dist(tmp_path / "hf", tmp_path / "dist", Grid(tp=2, ep=2)) == 0
    places = metadata_of(tmp_path / "dist").storage_data.values()
    assert len(places) == 25 + 67  # empty states of modules, and chunks
    for place in places:
        with (tmp_path / "dist/iter_0000001" / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            blob = file.read(place.length)
        assert zipfile.ZipFile(io.BytesIO(blob)).testzip() is None
        torch.load(io.BytesIO(blob))


def test_the_data_of_large_chunks_begins_at_a_page(tmp_path: Path) -> None:
    # An embedding and a head of 1 MiB each at TP2; the feed-forward layer's two are smaller.
    make_hf(tmp_path / "hf", Model(hidden=512, ffn=600, vocab=2048, padded_vocab=2048, layers=2))
    assert to_torch_dist(tmp_path / "hf", tmp_path / "dist", Grid(tp=2)) == 0
    sizes_bytes, begin_bytes = [], []
    for place in metadata_of(tmp_path / "dist").storage_data.values():
        content = (tmp_path / "dist/iter_0000001" / place.relative_path).read_bytes()
        with zipfile.ZipFile(io.BytesIO(content[place.offset : place.offset + place.length])) as blob:
            for record in blob.infolist():
                if record.filename.endswith("/data/0"):
                    header = place.offset + record.header_offset
                    name_bytes, extra_bytes = struct.unpack("<HH", content[header + 26 : header + 30])
                    sizes_bytes.append(record.file_size)
                    begin_bytes.append(header + 30 + name_bytes + extra_bytes)
    large = [begin % 4096 for size, begin in zip(sizes_bytes, begin_bytes, strict=True) if size >= 1 << 20]
    assert large == [0] * 4
    assert any(begin % 4096 for begin in begin_bytes)


def test_ranks_and_placement_change_no_byte(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", MIXTRAL)
    found = []
    for number, placement in ((1, "direct"), (3, "direct"), (3, "gather")):
        target = tmp_path / f"{number}-{placement}"
        dist_convert.convert(
            tmp_path / "hf", target, to="torch_dist", ranks=number, placement=placement,
            target_tensor_parallel_size=2, target_expert_parallel_size=2,
        )  # fmt: skip
        files = sorted((target / "iter_0000001").iterdir())
        found.append({path.name: path.read_bytes() for path in files if path.name != "conversion.json"})
    assert found[0] == found[1] == found[2]


def test_a_budget_that_is_too_small_is_refused_and_the_least_one_that_it_names_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", MIXTRAL)

    def run(budget: str, *more: str) -> int:
        flags = ("--max-memory-per-rank", budget, *more)
        return to_torch_dist(tmp_path / "hf", tmp_path / budget, Grid(tp=2, ep=2), *flags)

    assert run("1MB") == 2
    [least_mb] = map(int, re.findall(r"at least (\d+)MB", capsys.readouterr().err))
    assert run(f"{least_mb - 1}MB") == 2
    assert not (tmp_path / f"{least_mb - 1}MB").exists()
    least = f"{least_mb}MB"
    assert run(least, "--dry-run", "--json") == 0
    [rank] = json.loads(capsys.readouterr().out)["ranks"]
    assert (least_mb - 1) * 10**6 < rank["buffers_bytes"] <= least_mb * 10**6
    assert run(least) == run("1GB") == 0
    found, expected = (hashes(tmp_path / budget / "iter_0000001") for budget in (least, "1GB"))
    assert len(expected) == 9
    assert found | {"conversion.json": ""} == expected | {"conversion.json": ""}


def test_metadata_is_pickled_to_the_same_bytes_and_torch_reads_what_was_meant(tmp_path: Path) -> None:
    chunks = tuple(Chunk((row, 0), (2, 3), Blob("__0_0.distcp", row << 32, 700)) for row in (0, 2))
    tensors = {"a.weight": SavedTensor("BF16", (4, 3), chunks)}
    data = metadata_bytes(tensors, {"a._extra_state/shard_0_1": Blob("__0_0.distcp", 5, 9)})
    assert hashlib.sha256(data).hexdigest() == "ab6b3adfc36f20d48774c5dee8a8a11a110abe9dd764252d8a7b13d6201f28dc"
    (tmp_path / ".metadata").write_bytes(data)
    assert read_metadata(tmp_path / ".metadata").tensors == tensors
    found = FileSystemReader(tmp_path).read_metadata()
    [tensor, _] = found.state_dict_metadata.values()
    assert (tensor.size, tensor.properties.dtype) == (torch.Size([4, 3]), torch.bfloat16)
    assert {(index.fqn, index.offset, place.offset) for index, place in found.storage_data.items()} == {
        ("a._extra_state/shard_0_1", None, 5),
        ("a.weight", torch.Size([0, 0]), 0),
        ("a.weight", torch.Size([2, 0]), 2 << 32),
    }


def test_there_and_back_at_another_grid_gives_the_same_hugging_face_files(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", LLAMA)
    assert to_torch_dist(tmp_path / "hf", tmp_path / "dist", Grid(tp=2, pp=2)) == 0
    assert to_torch_dist(tmp_path / "dist", tmp_path / "other", Grid(tp=4)) == 0
    assert main(["convert", str(tmp_path / "other"), str(tmp_path / "back"), "--to", "huggingface"]) == 0
    assert main(["verify", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0


def test_the_older_command_makes_it_with_a_flag_and_verify_names_both_kinds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", LLAMA)
    command = ["hf-to-megatron", "--load-dir", str(tmp_path / "hf"), "--save-dir", str(tmp_path / "dist")]
    assert main([*command, "--target-format", "torch_dist", "--target-tensor-parallel-size", "2"]) == 0
    make(tmp_path / "torch", LLAMA, Grid(tp=4))
    assert main(["verify", str(tmp_path / "dist"), str(tmp_path / "torch")]) == 0
    assert [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()[:2]] == [
        "Megatron torch_dist, iteration 1", "Megatron TP4 PP1 VPP1 EP1 ETP4, iteration 4",
    ]  # fmt: skip


@pytest.mark.parametrize("flag", ["--target-ranks-per-node", "--load-capacity-bins"])
def test_what_only_rank_files_have_is_refused(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(tmp_path / "hf", MIXTRAL)
    more = [flag, "2"] if flag == "--target-ranks-per-node" else [flag]
    assert to_torch_dist(tmp_path / "hf", tmp_path / "dist", Grid(), *more) == 2
    assert f"{flag}: no effect in a conversion from huggingface to torch_dist" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["torch", "torch_dist"])
@pytest.mark.parametrize(("saved", "wanted"), [(Grid(tp=4, pp=4), Grid(tp=2)), (Grid(tp=8, pp=2), Grid(tp=8))])
def test_files_of_many_ranks_are_put_together_in_the_order_of_rows(
    saved: Grid, wanted: Grid, to: str, tmp_path: Path
) -> None:
    model = Model(heads=8, groups=8, padded_vocab=64)
    make_distributed(tmp_path / "dist", model, saved)  # __8_0 and __9_0 come before __10_0, and not by name
    flags = ["--target-tensor-parallel-size", str(wanted.tp), "--target-pipeline-parallel-size", "1"]
    assert main(["convert", str(tmp_path / "dist"), str(tmp_path / "other"), "--to", to, *flags]) == 0
    assert main(["verify", str(tmp_path / "dist"), str(tmp_path / "other")]) == 0


def test_layers_of_different_dtypes_are_refused_as_one_tensor_holds_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = make_hf(tmp_path / "hf", LLAMA)
    norm = "model.layers.2.input_layernorm.weight"
    save_file({**hf, norm: hf[norm].float()}, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    assert to_torch_dist(tmp_path / "hf", tmp_path / "dist", Grid()) == 1
    error = capsys.readouterr().err
    assert "decoder.layers.2.input_layernorm.weight" in error
    assert "need one dtype" in error


def test_dynamic_experts_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(tmp_path / "hf", MIXTRAL)
    assert to_torch_dist(tmp_path / "hf", tmp_path / "dist", Grid(), "--expert-layout", "habana-dynamic") == 2
    assert "habana-dynamic" in capsys.readouterr().err
    assert not (tmp_path / "dist").exists()
