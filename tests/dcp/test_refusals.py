"""What of a plain distributed checkpoint is damaged, hostile or not known is named before a byte moves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

import dist_convert
from dist_convert.__main__ import main
from dist_convert.errors import CorruptFile
from tests.checkpoints import Model, hf_tensors
from tests.converting import assert_same, read_tensors
from tests.dcp.test_reading import LLAMA, as_torchtitan, convert, save_plain
from tests.to_megatron import config_of
from tests.torch_dist.test_refusals import change_metadata, chunk_of

NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


def _escape(metadata: Any) -> None:
    chunk_of(metadata, NORM).relative_path = "../__0_0.distcp"


def _past_the_end(metadata: Any) -> None:
    chunk_of(metadata, QUERY).length = 1 << 40


def _wrong_dtype(metadata: Any) -> None:
    metadata.state_dict_metadata[NORM].properties.dtype = torch.float32


def _chunk_twice(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata[QUERY].chunks
    chunks[1].offsets, chunks[1].sizes = chunks[0].offsets, torch.Size([11, 16])


def _one_row_up(metadata: Any) -> None:
    """A box that lies on the last row of the other one, and leaves its own last row out."""
    _, second = metadata.state_dict_metadata[QUERY].chunks
    index = next(i for i in metadata.storage_data if i.fqn == QUERY and i.offset == second.offsets)
    second.offsets = torch.Size([second.offsets[0] - 1, 0])
    metadata.storage_data[type(index)(QUERY, second.offsets)] = metadata.storage_data.pop(index)


def _without_a_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata[QUERY].chunks.pop()


def _compressed(metadata: Any) -> None:
    chunk_of(metadata, QUERY).transform_descriptors = ["zstd"]


def _huge(metadata: Any) -> None:
    metadata.state_dict_metadata[NORM].size = torch.Size([1 << 62])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_escape, ("damaged .metadata", "../__0_0.distcp", "bare name")),
        (_past_the_end, ("a blob reaches into the next one or past its file", "__0_0.distcp")),
        (_wrong_dtype, ("a blob differs from what .metadata says", NORM, "F32", "BF16")),
        (_chunk_twice, ("a blob reaches into the next one or past its file", "__0_0.distcp")),
        (_one_row_up, ("the chunks do not make up a tensor exactly", QUERY, "covered twice")),
        (_without_a_chunk, ("damaged .metadata", QUERY)),
        (_compressed, ("compressed or otherwise changed", QUERY, "transform_descriptors")),
        (_huge, ("damaged .metadata", "a torch.Size")),
    ],
)
def test_a_hostile_metadata_is_held_to_the_limits_of_torch_dist(
    change: Callable[[Any], object], words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_plain(tmp_path / "dcp", hf_tensors(LLAMA))
    change_metadata(tmp_path / "dcp", change)
    assert convert(tmp_path / "dcp", tmp_path / "hf") == 1
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == [], error
    assert not (tmp_path / "hf").exists()


def test_chunks_that_overlap_are_a_damaged_source_for_programs_too(tmp_path: Path) -> None:
    save_plain(tmp_path / "dcp", hf_tensors(LLAMA))
    change_metadata(tmp_path / "dcp", _one_row_up)
    with pytest.raises(CorruptFile, match="copy the file again"):
        dist_convert.open(tmp_path / "dcp")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"model.model.norm.extra": torch.ones(4, 4)},
            ("model.norm.extra has no place", "nothing is dropped silently"),
        ),
        ({"ema.weight": torch.ones(4, 4)}, ("ema.weight has no place in a LlamaForCausalLM",)),
        (
            {"ema.model.embed_tokens.weight": torch.ones(4, 4)},
            ("several models in one checkpoint", "ema.model.embed_tok"),
        ),
    ],
)
def test_a_tensor_that_is_not_known_is_named(
    more: dict[str, torch.Tensor], words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_plain(tmp_path / "dcp", {f"model.{name}": tensor for name, tensor in hf_tensors(LLAMA).items()} | more)
    assert convert(tmp_path / "dcp", tmp_path / "hf") == 1
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == [], error


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model.module.embedding.word_embeddings.weight", ("the checkpoint has no args", "--like CONFIG")),
        ("model.embedding.word_embeddings.weight", ("the checkpoint has no args", "--like CONFIG")),
        ("transformer.wte.weight", ("no known language model", "transformer.wte.weight")),
    ],
)
def test_other_models_are_refused_by_name(
    key: str, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_plain(tmp_path / "dcp", {key: torch.ones(4, 4)})
    (tmp_path / "dcp/config.json").unlink()  # which Megatron does not write
    assert convert(tmp_path / "dcp", tmp_path / "hf") == 1
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == [], error


def test_a_tensor_under_torchtitans_and_transformers_name_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = hf_tensors(LLAMA)
    titan = as_torchtitan(hf, {"q": LLAMA.heads, "k": LLAMA.groups}, early=False)
    save_plain(tmp_path / "dcp", titan | {QUERY: torch.zeros_like(hf[QUERY])})
    assert convert(tmp_path / "dcp", tmp_path / "hf") == 1
    error = capsys.readouterr().err
    assert f"{QUERY} is stored twice, under this and another name" in error
    assert f"found:    {QUERY}, layers.0.attention.qkv_linear.wq.weight\n" in error


@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_torchtitans_heads_of_an_odd_size_are_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(layers=1, head_dim=3)
    save_plain(tmp_path / "dcp", as_torchtitan(hf_tensors(model), {}, early=False), model)
    target = [str(tmp_path / "hf"), "--to", "huggingface"] if command == "convert" else []
    assert main([command, str(tmp_path / "dcp"), *target]) == 1
    error = capsys.readouterr().err
    assert "heads of an odd size" in error
    assert "found:    3\n" in error


def test_without_a_config_it_is_said_where_one_is_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_plain(tmp_path / "dcp", hf_tensors(LLAMA))
    (tmp_path / "dcp/config.json").unlink()
    assert convert(tmp_path / "dcp", tmp_path / "hf") == 1
    assert "--like" in capsys.readouterr().err


def test_of_what_accelerate_saves_the_models_directory_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("optimizer_0", "pytorch_model_fsdp_0"):
        (tmp_path / "root").mkdir(exist_ok=True)
        save_plain(tmp_path / "root" / part, {})
        (tmp_path / "root" / part / "config.json").unlink()
    assert convert(tmp_path / "root", tmp_path / "hf") == 2
    assert f"did you mean {tmp_path}/root/pytorch_model_fsdp_0?\n" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_files_that_torch_has_saved_as_hugging_faces_need_a_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "saved").mkdir()
    torch.distributed.checkpoint.save(
        hf_tensors(LLAMA), storage_writer=HuggingFaceStorageWriter(tmp_path / "saved"), no_dist=True
    )
    assert convert(tmp_path / "saved", tmp_path / "hf") == 2
    assert "weights without their config.json" in capsys.readouterr().err
    config_of(LLAMA).save_pretrained(tmp_path / "saved")
    assert convert(tmp_path / "saved", tmp_path / "hf") == 0
    assert_same(read_tensors(tmp_path / "hf"), hf_tensors(LLAMA))


def _other_offsets(text: str) -> str:
    return text.replace('"saved_offsets": [0, 0]', '"saved_offsets": [1, 0]', 1)


def _no_offsets(text: str) -> str:
    return text.replace("saved_offsets", "of_another_kind")


@pytest.mark.parametrize("kind", ["safetensors", "shards"])
@pytest.mark.parametrize("change", [_other_offsets, _no_offsets, lambda text: json.dumps([1])])
def test_a_shard_that_says_another_place_is_refused(
    kind: str, change: Callable[[str], str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dcp").mkdir()
    for path in (trained / kind).iterdir():
        (tmp_path / "dcp" / path.name).write_bytes(path.read_bytes())
    first = min(path for path in (tmp_path / "dcp").iterdir() if path.name != ".metadata")
    tensors, header = load_file(first), first.read_bytes()[8:]
    metadata = json.JSONDecoder().raw_decode(header.decode(errors="replace"))[0]["__metadata__"]
    save_file(tensors, first, metadata | {"DCP_SHARDING_INFO": change(metadata["DCP_SHARDING_INFO"])})
    assert convert(tmp_path / "dcp", tmp_path / "hf", "--like", str(trained / "hf")) == 1
    assert f"file:     {first}\n" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
