"""Checkpoints of other programs, and parts of one: known by name, by every command, with what to do about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dist_convert
from dist_convert.errors import CheckpointNotFound, ConversionError, UnsupportedModel
from tests.checkpoints import Grid, Model, State, hf_tensors, make, megatron_shards, save, training_args
from tests.converting import assert_same, read_tensors
from tests.distributed_checkpoints import make_distributed
from tests.to_megatron import make_hf

LLAMA = Model(layers=1)
SHARD = "model_optim_rng.pt"


def files(*names: str) -> Callable[[Path], None]:
    """Files that are told by their names; what torch saves holds a small tensor."""

    def make_files(root: Path) -> None:
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in (".pt", ".pth"):
                torch.save({"a": torch.ones(2)}, path)
            else:
                path.write_text("{}")

    return make_files


def tracked(*names: str) -> Callable[[Path], None]:
    """Files of a checkpoint whose tracker names iteration 4."""

    def make_files(root: Path) -> None:
        root.mkdir()
        files(*names)(root)
        (root / "latest_checkpointed_iteration.txt").write_text("4")

    return make_files


def neox(root: Path) -> None:
    files("global_step100/layer_00-model_00-model_states.pt", "global_step100/mp_rank_00_model_states.pt")(root)
    (root / "latest").write_text("global_step100")
    (root / "latest_checkpointed_iteration.txt").write_text("100")  # which Megatron-DeepSpeed writes, too


def gguf(root: Path) -> None:
    root.mkdir(exist_ok=True)
    (root / "llama.Q4_K_M.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(16))


def zarr(root: Path) -> None:
    files("iter_0000100/embedding.word_embeddings.weight/.zarray")(root)
    (root / "latest_checkpointed_iteration.txt").write_text("100")


def newer_zarr(root: Path) -> None:
    files("iter_0000100/.metadata")(root)
    (root / "iter_0000100/metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    (root / "latest_checkpointed_iteration.txt").write_text("100")


def model_rng(root: Path) -> None:
    make(root, LLAMA)
    (root / "iter_0000004/mp_rank_00" / SHARD).rename(root / "iter_0000004/mp_rank_00/model_rng.pt")


def peft(root: Path) -> None:
    root.mkdir()
    (root / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)},
              root / "adapter_model.safetensors")  # fmt: skip


def gptq(root: Path) -> None:
    make_hf(root, LLAMA)
    tensors = read_tensors(root)
    name = "model.layers.0.self_attn.q_proj."
    del tensors[name + "weight"]
    save_file(tensors | {name + "qweight": torch.ones(2, 16, dtype=torch.int32)}, root / "model.safetensors")


def mlx(root: Path) -> None:
    """mlx-lm packs eight codes into a number, with scales and biases of 64 each beside them."""
    make_hf(root, LLAMA)
    tensors, name = read_tensors(root), "model.layers.0.self_attn.q_proj."
    packed = {name + "weight": torch.ones(16, 2, dtype=torch.uint32)}
    beside = {name + what: torch.ones(16, 1, dtype=torch.bfloat16) for what in ("scales", "biases")}
    save_file({**tensors, **packed, **beside}, root / "model.safetensors", metadata={"format": "mlx"})


def renamed(change: Callable[[State], State]) -> Callable[[Path], None]:
    """A `torch` checkpoint whose model has other names."""

    def make_files(root: Path) -> None:
        [chunk] = megatron_shards(LLAMA, hf_tensors(LLAMA))["mp_rank_00"]
        save(root, {"mp_rank_00": [change(chunk)]}, training_args(LLAMA))

    return make_files


def wrapped(chunk: State) -> State:
    """Megatron-Bridge and NeMo: linear layers are wrapped."""
    name = "decoder.layers.0.self_attention.linear_qkv."
    adapter = {f"{name}adapter.linear_{way}.weight": torch.ones(2, 2) for way in ("in", "out")}
    return {k.replace(name, name + "to_wrap."): v for k, v in chunk.items()} | adapter


def beside(chunk: State) -> State:
    """Megatron-Bridge: `X.weight` beside `X.adapter.linear_in.weight`."""
    return chunk | {"decoder.layers.0.mlp.linear_fc1.adapter.linear_in.weight": torch.ones(2, 2)}


def swift(chunk: State) -> State:
    """ms-swift saves adapters alone."""
    return {f"decoder.layers.0.mlp.linear_fc1.lora_{x}.default.weight": torch.ones(2, 2) for x in "AB"}


CASES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "GPT-NeoX": (neox, "a DeepSpeed checkpoint", "convert_neox_to_hf.py"),
    "DeepSpeed, sharded": (
        files("global_step9/zero_pp_rank_0_mp_rank_00_model_states.pt"), "a DeepSpeed checkpoint", "convert_checkpoint"
    ),
    "NeMo 2": (files("context/model.yaml", "weights/common.pt"), "a NeMo checkpoint", "export_ckpt"),
    "NeMo 1": (files("llama.nemo"), "a NeMo checkpoint", "export_ckpt"),
    "nanotron": (
        files("latest.txt", "10/config.yaml", "10/model/model/w.safetensors"), "a nanotron checkpoint",
        "convert_nanotron_to_hf.py",
    ),
    "Meta": (files("consolidated.00.pth"), "weights in Meta's or Mistral's own files", "params.json"),
    "Mistral": (
        files("consolidated-00001-of-00002.safetensors", "params.json"), "weights in Meta's or Mistral's own files",
        "convert_mistral_weights_to_hf.py",
    ),
    "PEFT": (peft, "a LoRA adapter without its model", "merge_and_unload()"),
    "GGUF": (gguf, "a GGUF file", "gguf_file"),
    "GPTQ": (gptq, "weights quantised by GPTQ, AWQ or MLX", "dequantised"),
    "MLX": (files("weights.npz", "config.json"), "MLX, ONNX, TensorFlow", "model*.safetensors"),
    "ONNX": (files("model.onnx", "model.onnx_data", "config.json"), "MLX, ONNX, TensorFlow", "model*.safetensors"),
    "MLX, quantised": (mlx, "weights quantised by GPTQ, AWQ or MLX", "dequantised"),
    "diffusers": (files("model_index.json", "unet/config.json"), "a diffusers pipeline", "Llama"),
    "zarr": (zarr, "a distributed checkpoint of the format zarr", "--ckpt-format torch_dist"),
    "zarr with metadata": (newer_zarr, "a distributed checkpoint of another kind", "--ckpt-format torch_dist"),
    "model_rng.pt": (model_rng, "rank directories with model_rng.pt", "links"),
    "LoRA, wrapped": (renamed(wrapped), "a LoRA adapter that is not merged", "merge"),
    "LoRA, beside": (renamed(beside), "a LoRA adapter that is not merged", "merge"),
    "LoRA of ms-swift": (renamed(swift), "a LoRA adapter that is not merged", "--merge_lora true"),
    "empty": (renamed(lambda chunk: {}), "the files hold no layers", "look for the weights elsewhere"),
    "an iteration of nothing": (
        tracked("iter_0000004/mp_rank_00/distrib_optim.pt"),
        "no rank sees any weights", "from where it was saved",
    ),
    "no iteration": (tracked(), "the iteration does not exist", "copy it here from where it was saved"),
    "half": (
        renamed(lambda chunk: {name: tensor for name, tensor in chunk.items() if "mlp" not in name}),
        "no tensor for decoder.layers.0.mlp.linear_fc1.weight", "the shard is incomplete",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_foreign_checkpoint_is_known_by_name_by_every_command(case: str, tmp_path: Path) -> None:
    make_it, name, remedy = CASES[case]
    root = tmp_path / "in"
    make_it(root)
    before = sorted(tmp_path.rglob("*"))
    said = []
    for command in (
        lambda: dist_convert.convert(root, tmp_path / "out", to="huggingface"),
        lambda: dist_convert.convert(root, tmp_path / "out", to="torch"),
        lambda: dist_convert.open(root).keys(),
        lambda: dist_convert.verify(root, root),
    ):
        with pytest.raises(ConversionError) as caught:
            command()
        said.append(str(caught.value))
    said.append(inspected(root))
    for message in said:
        assert name in message
        assert remedy in message
    assert sorted(tmp_path.rglob("*")) == before


def inspected(root: Path) -> str:
    """What `inspect` says of something that cannot be converted."""
    try:
        return str(dist_convert.inspect(root)["not_convertible"])
    except ConversionError as error:
        return str(error)


def test_adapters_in_a_distributed_checkpoint_are_known_by_name(tmp_path: Path) -> None:
    make_distributed(tmp_path / "dist", LLAMA)
    path = tmp_path / "dist/iter_0000004/.metadata"
    key, other = b"decoder.final_layernorm.weight", b"decoder.final_lora_A_01.weight"
    path.write_bytes(path.read_bytes().replace(key, other))
    with pytest.raises(UnsupportedModel, match="a LoRA adapter that is not merged"):
        dist_convert.convert(tmp_path / "dist", tmp_path / "out", to="huggingface")


def test_a_gguf_file_itself_is_known_by_name(tmp_path: Path) -> None:
    gguf(tmp_path)
    with pytest.raises(UnsupportedModel, match="a GGUF file"):
        dist_convert.inspect(tmp_path / "llama.Q4_K_M.gguf")


def test_weights_of_a_format_that_is_read_win_over_what_lies_beside_them(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", LLAMA)
    files("consolidated.00.pth")(tmp_path / "hf")
    gguf(tmp_path / "hf")
    assert dist_convert.inspect(tmp_path / "hf")["parameters"] == sum(tensor.numel() for tensor in hf.values())


def test_the_links_that_are_advised_for_model_rng_convert(tmp_path: Path) -> None:
    hf = make(tmp_path / "again", LLAMA, Grid(tp=2))
    make(tmp_path / "old", LLAMA, Grid(tp=2))
    for rank in ("mp_rank_00", "mp_rank_01"):
        old = tmp_path / "old/iter_0000004" / rank
        (old / SHARD).rename(old / "model_rng.pt")
        (tmp_path / "links" / rank).mkdir(parents=True)
        (tmp_path / "links" / rank / SHARD).symlink_to(old / "model_rng.pt")
    dist_convert.convert(tmp_path / "links", tmp_path / "hf", to="huggingface")
    assert_same(read_tensors(tmp_path / "hf"), hf)


@pytest.mark.parametrize("inside", ["", SHARD])
def test_one_ranks_directory_or_file_is_answered_with_the_iteration(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "in", LLAMA)
    iteration = tmp_path / "in/iter_0000004"
    for path in (iteration / "mp_rank_00" / inside, Path(inside)):
        monkeypatch.chdir(iteration / "mp_rank_00")
        for command in (dist_convert.inspect, dist_convert.open):
            with pytest.raises(CheckpointNotFound, match="one rank's part of a checkpoint") as caught:
                command(path)
            assert caught.value.remedy == f"give {iteration}"


@pytest.mark.parametrize("kind", ["torch", "torch_dist", "huggingface"])
def test_a_directory_of_one_checkpoint_is_answered_with_it(kind: str, tmp_path: Path) -> None:
    maker: dict[str, Callable[..., Any]] = {"torch": make, "torch_dist": make_distributed, "huggingface": make_hf}
    maker[kind](tmp_path / "models/llama", LLAMA)
    (tmp_path / "models/logs").mkdir()
    for command in (dist_convert.inspect, dist_convert.open):
        with pytest.raises(CheckpointNotFound, match="a directory of checkpoints") as caught:
            command(tmp_path / "models")
        assert caught.value.remedy == f"did you mean {tmp_path}/models/llama?"


def test_a_directory_of_several_checkpoints_is_answered_with_all_of_them(tmp_path: Path) -> None:
    make_hf(tmp_path / "models/a", LLAMA)
    make_hf(tmp_path / "models/b", LLAMA)
    with pytest.raises(CheckpointNotFound) as caught:
        dist_convert.convert(tmp_path / "models", tmp_path / "out", to="torch")
    assert caught.value.remedy == f"did you mean {tmp_path}/models/a or {tmp_path}/models/b?"


def test_an_iteration_that_is_named_within_itself_is_known(tmp_path: Path) -> None:
    make(tmp_path / "in", LLAMA)
    with pytest.raises(CheckpointNotFound) as caught:
        dist_convert.inspect(tmp_path / "in/iter_0000004", "iter_0000004")
    assert caught.value.remedy == f"leave --ckpt-dir-name out: {tmp_path}/in/iter_0000004 is an iteration itself"


def test_half_a_model_is_told_by_its_layers(tmp_path: Path) -> None:
    model = Model(layers=2)
    [chunk] = megatron_shards(model, hf_tensors(model))["mp_rank_00"]
    half = {name: tensor for name, tensor in chunk.items() if ".layers.1." not in name}
    save(tmp_path / "in", {"mp_rank_00": [half]}, training_args(model))
    found = dist_convert.inspect(tmp_path / "in")
    assert "found:    1 (stage 0 model0: 1)\n" in found["not_convertible"]
    assert "the number of layers in the files differs from the args" in found["not_convertible"]
    assert "num_layers=2" in found["not_convertible"]
