"""Parameters as training leaves them in storage convert to the same bytes as plain ones, and nothing else is read."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_convert.move.convert import convert as convert_job
from dist_convert.move.report import Report
from dist_convert.options import Options
from dist_convert.ranks.channel import Channel
from dist_convert.ranks.collectives import join_world
from tests.checkpoints import Grid, Model, State, hf_tensors, megatron_shards, save, training_args
from tests.converting import assert_same, convert, read_tensors

GRIDS = [
    (Model(), Grid()), (Model(), Grid(tp=2, pp=2, vpp=2)), (Model(experts=4, heads=4, groups=4), Grid(tp=2, ep=2)),
]  # fmt: skip
GRID_NAMES = ["one file", "TP2 PP2 VPP2", "Mixtral TP2 EP2"]


def outcome_of(source: Path, target: Path, **flags: Any) -> Report:
    job = Options("huggingface", str(source), target=target, target_params_dtype="keep", **flags)
    with closing(Channel(0, 1)) as channel:
        return convert_job(job, join_world("cpu", 60.0), channel)


def bytes_of_files(target: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in target.glob("*.safetensors")}


def tensors_of(shards: dict[str, list[State]]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of all chunks of each rank directory, under names of their own."""
    return {
        name: {f"{n}.{key}": x for n, chunk in enumerate(chunks) for key, x in chunk.items() if x is not None}
        for name, chunks in shards.items()
    }  # fmt: skip


def on_flat_buffers(shards: dict[str, list[State]]) -> dict[str, list[State]]:
    """Make the parameters of each file views of one buffer, padded and from the last to the first, as DDP does."""
    moved: dict[str, list[State]] = {}
    for name, tensors in tensors_of(shards).items():
        room = {key: -(-tensor.numel() // 64) * 64 for key, tensor in tensors.items()}
        flat = torch.full((sum(room.values()) + 7,), 3.25, dtype=next(iter(tensors.values())).dtype)
        moved[name], start = [dict(chunk) for chunk in shards[name]], 7
        for key, tensor in reversed(tensors.items()):
            view = flat[start : start + tensor.numel()].view(tensor.shape)
            start += room[key]
            chunk, _, stored_name = key.partition(".")
            moved[name][int(chunk)][stored_name] = view.copy_(tensor)
    return moved


def adam_state(elements: int) -> dict[str, Any]:
    state = {0: {"step": torch.tensor(5.0), "exp_avg": torch.randn(elements), "exp_avg_sq": torch.rand(elements)}}
    return {"optimizer": {"state": state, "param_groups": [{"lr": 1e-4, "params": [0]}]}, "grad_scaler": None}


@pytest.mark.parametrize(("model", "grid"), GRIDS, ids=GRID_NAMES)
def test_views_of_one_reversed_buffer_beside_adam_state_give_the_bytes_of_a_plain_checkpoint(
    model: Model, grid: Grid, tmp_path: Path
) -> None:
    hf, args = hf_tensors(model), training_args(model, grid)
    plain = megatron_shards(model, hf, grid)
    elements = sum(tensor.numel() for tensors in tensors_of(plain).values() for tensor in tensors.values())
    save(tmp_path / "plain", plain, args)
    save(tmp_path / "trained", on_flat_buffers(plain), args, optimizer=adam_state(elements), rng_state=[{"a": b"x"}])

    from_plain = outcome_of(tmp_path / "plain", tmp_path / "from_plain")
    from_trained = outcome_of(tmp_path / "trained", tmp_path / "from_trained")
    assert bytes_of_files(tmp_path / "from_trained") == bytes_of_files(tmp_path / "from_plain")
    assert_same(read_tensors(tmp_path / "from_trained"), hf)
    weights_bytes = sum(tensor.nbytes for tensor in hf.values())
    assert from_trained.read_bytes == from_plain.read_bytes == from_trained.written_bytes == weights_bytes


def bytes_read_by_this_process() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines() if "rchar" in line)


def test_the_system_sees_no_reads_of_optimizer_bytes(tmp_path: Path) -> None:
    if not Path("/proc/self/io").exists():
        pytest.skip("/proc/self/io counts a process's reads on Linux only")
    model = Model(layers=1)
    trained = on_flat_buffers(megatron_shards(model, hf_tensors(model)))
    save(tmp_path / "megatron", trained, training_args(model), optimizer=adam_state(5_000_000))
    outcome_of(tmp_path / "megatron", tmp_path / "warm", overwrite=True)  # what Python imports is read only once
    before = bytes_read_by_this_process()
    outcome_of(tmp_path / "megatron", tmp_path / "hf")
    assert bytes_read_by_this_process() - before < 1_000_000  # of a file of 40 MB


def with_attributes(tensor: torch.Tensor) -> torch.Tensor:
    """As Megatron marks its parameters."""
    tensor.tensor_model_parallel, tensor.partition_dim = True, 0  # type: ignore[attr-defined]
    return tensor


#: Other tensors of equal shape and dtype, and maybe other values, in storage of another layout.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "transposed at an offset": lambda x: torch.cat([x.new_ones(3), x.t().reshape(-1)])[3:].view(x.t().shape).t(),
    "every third element": lambda x: x.repeat_interleave(3, -1)[..., ::3],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "inner block": lambda x: torch.nn.functional.pad(x, (2, 5))[..., 2:-5],
    "transposed steps": lambda x: x.t().repeat_interleave(3, -1)[..., ::3].t(),
    "rows far apart": lambda x: x.repeat_interleave(60, 0)[::60],
    "elements far apart": lambda x: (
        x.repeat_interleave(20, 0).repeat_interleave(12, -1)[::20, ..., ::12]
        if x.dim() == 2
        else x.repeat_interleave(600)[::600]
    ),
    "columns of a wider matrix": lambda x: torch.stack([x, x + 1, x + 2], -1)[..., 1],
    "equal rows of stride 0": lambda x: x[:1].expand(x.shape),
    "equal columns of stride 0": lambda x: x[..., :1].expand(x.shape),
    "one value of stride 0": lambda x: x.reshape(-1)[:1].view([1] * x.dim()).expand(x.shape),
    "parameter": lambda x: torch.nn.Parameter(x),
    "parameter with attributes": lambda x: with_attributes(torch.nn.Parameter(x)),
    "tensor with attributes": lambda x: with_attributes(x.clone()),
}


@pytest.mark.parametrize("dtype", ["keep", "fp32"])
@pytest.mark.parametrize(("model", "grid"), [GRIDS[0], GRIDS[2]], ids=[GRID_NAMES[0], GRID_NAMES[2]])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_storage_layout_does_not_change_the_output(
    layout: str, model: Model, grid: Grid, dtype: str, tmp_path: Path
) -> None:
    args, stored, plain = training_args(model, grid), {}, {}
    for name, chunks in megatron_shards(model, hf_tensors(model), grid).items():
        laid_out = [{key: x if x is None else LAYOUTS[layout](x) for key, x in chunk.items()} for chunk in chunks]
        stored[name] = laid_out
        plain[name] = [{key: x if x is None else x.detach().contiguous() for key, x in c.items()} for c in laid_out]
    save(tmp_path / "stored", stored, args)
    save(tmp_path / "plain", plain, args)
    for name in ("stored", "plain"):
        assert convert(tmp_path / name, tmp_path / f"hf {name}", "--target-params-dtype", dtype) == 0
    assert bytes_of_files(tmp_path / "hf stored") == bytes_of_files(tmp_path / "hf plain")


def test_parameters_that_share_one_storage_are_each_read(tmp_path: Path) -> None:
    model = Model(layers=2)
    shards = megatron_shards(model, hf_tensors(model))
    state = shards["mp_rank_00"][0]
    state["output_layer.weight"] = state["embedding.word_embeddings.weight"]
    state["decoder.layers.1.input_layernorm.weight"] = state["decoder.layers.0.input_layernorm.weight"]
    state["decoder.final_layernorm.weight"] = state["embedding.word_embeddings.weight"][3]
    save(tmp_path / "megatron", shards, training_args(model))
    assert convert(tmp_path / "megatron", tmp_path / "hf") == 0
    found = read_tensors(tmp_path / "hf")
    embedding, norms = found["model.embed_tokens.weight"], "model.layers.{}.input_layernorm.weight"
    assert torch.equal(embedding, state["embedding.word_embeddings.weight"][: model.vocab])
    assert torch.equal(found["lm_head.weight"], embedding)
    assert torch.equal(found["model.norm.weight"], embedding[3])
    assert torch.equal(found[norms.format(0)], found[norms.format(1)])


@pytest.mark.parametrize("layout", ["transposed", "transposed steps", "every third element", "inner block"])
def test_a_layout_does_not_change_tensors_of_several_blocks(layout: str, tmp_path: Path) -> None:
    """Blocks are 4 MiB; of the embedding, one row is left over for the last one."""
    model = Model(layers=1, hidden=1024, vocab=2049, padded_vocab=2052, tied=True)
    hf = hf_tensors(model)
    shards = megatron_shards(model, hf)
    embedding = shards["mp_rank_00"][0]["embedding.word_embeddings.weight"]
    shards["mp_rank_00"][0]["embedding.word_embeddings.weight"] = LAYOUTS[layout](embedding)
    save(tmp_path / "megatron", shards, training_args(model))
    assert convert(tmp_path / "megatron", tmp_path / "hf") == 0
    assert_same(read_tensors(tmp_path / "hf"), hf)


EXTRA_STATES = {
    "none": None, "BytesIO": io.BytesIO(b"\x80\xff" * 9), "empty BytesIO": io.BytesIO(), "bytes": b"\xff", "": b"",
    "uint8 tensor": torch.arange(100, dtype=torch.uint8), "empty tensor": torch.empty(0), "dict": {"scale": 1.0},
    "strided tensor": torch.zeros(100, 4)[::3, 1:3], "int64 tensor": torch.arange(3),
}  # fmt: skip


@pytest.mark.parametrize("kind", EXTRA_STATES)
def test_extra_state_is_left_behind_unread(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(layers=2, experts=2)
    hf = hf_tensors(model)
    shards = megatron_shards(model, hf)
    state = shards["mp_rank_00"][0]
    entries = ["decoder.layers.0.self_attention.linear_qkv", "decoder.layers.1.mlp.experts", "output_layer", ""]
    state |= {f"{entry}._extra_state".lstrip("."): EXTRA_STATES[kind] for entry in entries}
    save(tmp_path / "megatron", shards, training_args(model))
    assert outcome_of(tmp_path / "megatron", tmp_path / "hf").read_bytes == sum(x.nbytes for x in hf.values())
    assert_same(read_tensors(tmp_path / "hf"), hf)
    assert "extra state (no weights)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrap",
    [
        lambda key: f"module.{key}",
        lambda key: f"module.module.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module._orig_mod.module.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: key.replace("decoder.layers.", "decoder._orig_mod.layers."),
        lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
        lambda key: key.replace(".weight", "._orig_mod.weight").replace("._extra", "._orig_mod._extra"),
        lambda key: f"module.{key}".replace(".mlp.", "._orig_mod.mlp._orig_mod."),
    ],
    ids=lambda wrap: wrap("decoder.layers.0.mlp.linear_fc1.weight"),
)
@pytest.mark.parametrize("experts", ["dense", "sequential", "te-grouped", "dynamic"])
def test_names_that_wrappers_made_longer_are_the_same_names(
    wrap: Callable[[str], str], experts: str, tmp_path: Path
) -> None:
    model, grid = Model(layers=2, experts=0 if experts == "dense" else 2), Grid(pp=2)
    hf = hf_tensors(model)
    shards = megatron_shards(model, hf, grid, experts="sequential" if experts == "dense" else experts)
    wrapped = {
        name: [{wrap(key): value for key, value in c.items()} for c in chunks] for name, chunks in shards.items()
    }
    save(tmp_path / "megatron", wrapped, training_args(model, grid, moe_permuted_weights=True))
    assert convert(tmp_path / "megatron", tmp_path / "hf") == 0
    assert_same(read_tensors(tmp_path / "hf"), hf)


def test_two_tensors_that_differ_only_in_a_wrapper_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, name = Model(layers=1), "decoder.layers.0.input_layernorm.weight"
    shards = megatron_shards(model, hf_tensors(model))
    shards["mp_rank_00"][0][f"module.{name}"] = torch.zeros(model.hidden, dtype=torch.bfloat16)
    save(tmp_path / "megatron", shards, training_args(model))
    assert convert(tmp_path / "megatron", tmp_path / "hf") == 1
    assert name in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_a_tensor_of_few_bytes_and_endless_shape_is_refused_by_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, name = Model(layers=1), "decoder.final_layernorm.weight"
    shards = megatron_shards(model, hf_tensors(model))
    shards["mp_rank_00"][0][name] = torch.ones(1, dtype=torch.bfloat16).expand(2**60)
    save(tmp_path / "megatron", shards, training_args(model))
    assert convert(tmp_path / "megatron", tmp_path / "hf") == 1
    shown = capsys.readouterr().err
    assert f"wrong shape for {name}" in shown
    assert str(2**60) in shown
