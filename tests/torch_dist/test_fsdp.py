"""What Megatron-LM saves with FSDP, `torch_dcp` and `fsdp_dtensor`, is read as its other formats are.

`tests/oracle/test_fsdp.py` shows that Megatron-Core's own wrappers write the same keys and boxes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dist_convert
from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, make
from tests.converting import assert_same, bytes_read, convert, read_tensors
from tests.distributed_checkpoints import make_fsdp
from tests.to_megatron import config_of
from tests.torch_dist.test_refusals import change_metadata, chunk_of

LLAMA, MIXTRAL = Model(), Model(experts=4, layers=2)
FORMATS = ("torch_dcp", "fsdp_dtensor")
EMBEDDING = "embedding.word_embeddings.weight"


@pytest.mark.parametrize(
    ("format", "model", "grid", "how"),
    [
        ("torch_dcp", LLAMA, Grid(), {}),
        ("torch_dcp", LLAMA, Grid(), {"norms": "te"}),
        ("torch_dcp", LLAMA, Grid(), {"ranks": 1}),
        ("torch_dcp", MIXTRAL, Grid(), {}),
        ("torch_dcp", MIXTRAL, Grid(), {"experts": "te-grouped"}),
        ("fsdp_dtensor", LLAMA, Grid(tp=2), {}),
        ("fsdp_dtensor", LLAMA, Grid(), {"norms": "te"}),
        ("fsdp_dtensor", LLAMA, Grid(), {"apart": False}),
        ("fsdp_dtensor", Model(tied=True), Grid(), {}),
        ("fsdp_dtensor", Model(linear_bias=True), Grid(tp=2), {}),
        ("fsdp_dtensor", MIXTRAL, Grid(ep=2), {}),
        ("fsdp_dtensor", MIXTRAL, Grid(tp=2, ep=2), {"experts": "te-grouped"}),
    ],
)
def test_every_spelling_and_grid_becomes_the_files_of_its_torch_twin(
    format: str, model: Model, grid: Grid, how: dict[str, Any], tmp_path: Path
) -> None:
    hf = make_fsdp(tmp_path / "fsdp", format, model, grid, **how)
    make(tmp_path / "torch", model, grid)
    assert convert(tmp_path / "fsdp", tmp_path / "hf", "--verify") == 0
    assert convert(tmp_path / "torch", tmp_path / "twin") == 0
    assert_same(load_file(tmp_path / "hf/model.safetensors"), hf)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "twin" / name).read_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_it_becomes_torch_with_its_own_args_and_iteration(format: str, tmp_path: Path) -> None:
    model = Model(experts=4, layers=2, vocab=32)  # no row is padding, which is not kept
    make_fsdp(tmp_path / "fsdp", format, model, norms="te", consumed_train_samples=512)
    make(tmp_path / "twin", model, norms="te")
    flags = ["--to", "torch", "--make-vocab-size-divisible-by", "32"]
    assert main(["convert", str(tmp_path / "fsdp"), str(tmp_path / "torch"), *flags]) == 0
    files = [tmp_path / root / "iter_0000004/mp_rank_00/model_optim_rng.pt" for root in ("torch", "twin")]
    found, expected = (torch.load(file, weights_only=False) for file in files)
    weights = {name: tensor for name, tensor in expected["model"].items() if isinstance(tensor, torch.Tensor)}
    assert_same({name: found["model"][name] for name in weights}, weights)
    args = found["args"]
    assert (found["iteration"], args.consumed_train_samples, args.ckpt_format) == (4, 512, "torch")


def test_it_is_opened_and_compared_as_a_root_or_an_iteration(tmp_path: Path) -> None:
    hf = make_fsdp(tmp_path / "fsdp", "fsdp_dtensor", MIXTRAL, Grid(ep=2))
    make(tmp_path / "torch", MIXTRAL, Grid(tp=4))
    for path in (tmp_path / "fsdp", tmp_path / "fsdp/iter_0000004"):
        with dist_convert.open(path) as model:
            assert_same(dict(model.tensors()), hf)
        assert main(["verify", str(path), str(tmp_path / "torch")]) == 0


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_left_behind_is_named(format: str, tmp_path: Path) -> None:
    make_fsdp(tmp_path / "fsdp", format)
    report = dist_convert.convert(tmp_path / "fsdp", tmp_path / "hf", to="huggingface")
    beside = {reason: count for reason, count, _ in report.left_behind}
    assert beside == {
        "extra state (no weights)": 5,
        "object num_floating_point_operations_so_far": 1,
        "opt_param_scheduler": 1,
        "optimizer": {"torch_dcp": 27, "fsdp_dtensor": 31}[format],
        "rng_state": 1,
    }
    assert report.read_bytes == report.written_bytes
    assert report.source_format == format


@pytest.mark.parametrize("format", FORMATS)
def test_inspect_says_what_is_there(format: str, tmp_path: Path) -> None:
    hf = make_fsdp(tmp_path / "fsdp", format)
    found = dist_convert.inspect(tmp_path / "fsdp")
    facts = ("kind", "format", "family", "parameters", "iteration", "files", "missing_shards")
    assert [found[name] for name in facts] == [
        "megatron",
        format,
        "llama",
        sum(one.numel() for one in hf.values()),
        4,
        3,
        [],
    ]
    assert "not_convertible" not in found


def test_fp32_that_training_in_bf16_keeps_is_no_reason_for_a_warning(tmp_path: Path) -> None:
    model = Model(dtype=torch.float32)
    hf = make_fsdp(tmp_path / "fsdp", "fsdp_dtensor", model, params_dtype=torch.bfloat16)
    report = dist_convert.convert(tmp_path / "fsdp", tmp_path / "hf", to="huggingface")
    assert [note for note in report.notes if note.startswith("warning")] == []
    assert_same(read_tensors(tmp_path / "hf"), {name: tensor.bfloat16() for name, tensor in hf.items()})


def test_several_ranks_write_the_same_bytes(tmp_path: Path) -> None:
    make_fsdp(tmp_path / "fsdp", "fsdp_dtensor", MIXTRAL, Grid(ep=2))
    assert convert(tmp_path / "fsdp", tmp_path / "hf") == 0
    for placement in ("gather", "direct"):
        target = tmp_path / placement
        dist_convert.convert(tmp_path / "fsdp", target, to="huggingface", ranks=3, placement=placement)
        assert (target / "model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()


def test_every_byte_of_the_weights_is_read_about_once(tmp_path: Path) -> None:
    make_fsdp(tmp_path / "small", "fsdp_dtensor")
    assert convert(tmp_path / "small", tmp_path / "imported") == 0
    model = Model(hidden=1024, ffn=2816, heads=8, groups=4, head_dim=128, layers=2, vocab=4000, padded_vocab=4096)
    hf = make_fsdp(tmp_path / "fsdp", "fsdp_dtensor", model)
    before = bytes_read()
    assert convert(tmp_path / "fsdp", tmp_path / "hf") == 0
    assert bytes_read() - before <= 1.02 * sum(tensor.nbytes for tensor in hf.values())


def test_like_says_what_a_checkpoint_without_args_is(tmp_path: Path) -> None:
    hf = make_fsdp(tmp_path / "fsdp", "torch_dcp")
    change_metadata(tmp_path / "fsdp/iter_0000004", _without_args)
    config_of(LLAMA).save_pretrained(tmp_path)
    report = dist_convert.convert(tmp_path / "fsdp", tmp_path / "hf", to="huggingface", like=tmp_path)
    assert any(note.endswith("gate and up are read as saved with a tensor parallel size of 1") for note in report.notes)
    assert_same(read_tensors(tmp_path / "hf"), hf)


def _rename(metadata: Any, old: str, new: str) -> None:
    state, places = metadata.state_dict_metadata, metadata.storage_data
    state[new] = state.pop(old)
    for index in [index for index in places if index.fqn == old]:
        places[type(index)(new, index.offset)] = places.pop(index)


def _without_args(metadata: Any) -> None:
    del metadata.state_dict_metadata["args"]


def _args_elsewhere(metadata: Any) -> None:
    chunk_of(metadata, "args").relative_path = "__7_0.distcp"


def _args_past_the_end(metadata: Any) -> None:
    chunk_of(metadata, "args").length = 1 << 40


def _number_of_a_rank(metadata: Any) -> None:
    at = "model.module.decoder.layers.0.mlp.experts.local_experts."
    _rename(metadata, f"{at}2.linear_fc2.weight", f"{at}7.linear_fc2.weight")


def _half_a_gate(metadata: Any) -> None:
    del metadata.state_dict_metadata["model.module.decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight_v"]


def _twice(metadata: Any) -> None:
    _rename(metadata, "model.module.decoder.layers.0.mlp.router.weight", f"model.module.module.{EMBEDDING}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without_args, ("the checkpoint has no args", "--like")),
        (_args_elsewhere, ("__7_0.distcp",)),
        (_args_past_the_end, ("a blob reaches into the next one or past its file", "__0_0.distcp")),
        (_number_of_a_rank, ("no tensor for decoder.layers.0.mlp.experts.2.linear_fc2.weight", "no place", ".7.")),
        (_half_a_gate, ("no tensor for decoder.layers.0.mlp.experts.0.linear_fc1.weight", "weight_w has no place")),
        (_twice, (f"model.module.{EMBEDDING} is stored twice", f"model.module.module.{EMBEDDING}")),
    ],
)
def test_what_is_damaged_is_named_with_key_and_file(
    change: Callable[[Any], object], words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_fsdp(tmp_path / "fsdp", "fsdp_dtensor", MIXTRAL)
    change_metadata(tmp_path / "fsdp/iter_0000004", change)
    assert convert(tmp_path / "fsdp", tmp_path / "hf") > 0
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == [], error
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(("layers", "words"), [(3, "decoder.layers.3."), (5, "decoder.layers.4.")])
def test_args_of_another_number_of_layers_are_refused(
    layers: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_fsdp(tmp_path / "fsdp", "torch_dcp", num_layers=layers)
    assert convert(tmp_path / "fsdp", tmp_path / "hf") == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("axis", ["tp", "etp"])
def test_gates_that_tensor_parallel_ranks_stacked_are_refused(
    axis: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_fsdp(tmp_path / "fsdp", "fsdp_dtensor", MIXTRAL, Grid(**{"tp": 1, "etp": 1, axis: 2}), apart=False)
    assert convert(tmp_path / "fsdp", tmp_path / "hf") == 1
    error = capsys.readouterr().err
    assert "gate and up of each tensor parallel rank lie one after the other" in error
    assert "model.module.decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight" in error


def test_args_that_name_a_function_are_refused_and_nothing_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "was run"),)

    make_fsdp(tmp_path / "fsdp", "torch_dcp", hostile=Hostile())
    assert convert(tmp_path / "fsdp", tmp_path / "hf") == 1
    assert "mkdir" in capsys.readouterr().err
    assert not (tmp_path / "was run").exists()


def test_a_tensor_that_no_table_names_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_fsdp(tmp_path / "fsdp", "torch_dcp")
    change_metadata(
        tmp_path / "fsdp/iter_0000004",
        lambda metadata: _rename(metadata, "rng_state.0.torch_rng_state", "ema.weight"),
    )
    assert convert(tmp_path / "fsdp", tmp_path / "hf") == 1
    assert "ema.weight has no place in a llama model" in capsys.readouterr().err
