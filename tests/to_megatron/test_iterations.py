"""The unit that is made, replaced and published is one iteration's directory; its neighbours are nobody's business."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.checkpoints import Grid, Model, hf_tensors
from tests.to_megatron import (
    FILE,
    TRACKER,
    assert_same_shards,
    expected_shards,
    load,
    make_hf,
    read_shards,
    to_megatron,
)

SMALL = Model(layers=1)
OTHERS = {
    "iter_0000001/mp_rank_00/model_optim_rng.pt": b"theirs",
    "iter_0000001/mp_rank_00/distrib_optim.pt": b"theirs too",
    "release/mp_rank_00/model_optim_rng.pt": b"released",
    "notes.txt": b"a word on the run",
}
OTHER_ITERATIONS = {name: content for name, content in OTHERS.items() if not name.startswith("iter_0000001")}


def make_root(root: Path, others: Mapping[str, bytes] = OTHERS) -> None:
    """A root with other iterations in it."""
    for name, content in others.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / TRACKER).write_text("1")


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("flags", "directory", "tracker", "iteration"),
    [
        ((), "iter_0000001", "1", 1),
        (("--iteration", "0"), "iter_0000000", "0", 0),
        (("--iteration", "123"), "iter_0000123", "123", 123),
        (("--iteration", "12345678"), "iter_12345678", "12345678", 12345678),
        (("--release",), "release", "release", 0),
    ],
)
def test_the_iteration_names_its_directory_the_tracker_and_the_files(
    flags: tuple[str, ...], directory: str, tracker: str, iteration: int, tmp_path: Path
) -> None:
    make_hf(tmp_path / "hf", SMALL)
    assert to_megatron(tmp_path / "hf", tmp_path / "root", *flags, grid=Grid(tp=2)) == 0
    assert sorted(files(tmp_path / "root")) == sorted([
        f"{directory}/conversion.json", f"{directory}/mp_rank_00/{FILE}", f"{directory}/mp_rank_01/{FILE}", TRACKER,
        f"{directory}/huggingface_configs.json", "target_megatron_args.json",
    ])  # fmt: skip
    assert (tmp_path / "root" / TRACKER).read_text() == tracker
    saved = load(tmp_path / "root" / directory / "mp_rank_01" / FILE)
    assert (saved["iteration"], saved["args"].iteration, saved["checkpoint_version"]) == (iteration, iteration, 3.0)


def test_other_iterations_in_the_root_stay_as_they_are(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", SMALL)
    make_root(tmp_path / "root")
    assert to_megatron(tmp_path / "hf", tmp_path / "root", "--iteration", "5") == 0
    assert_same_shards(read_shards(tmp_path / "root", "iter_0000005"), expected_shards(SMALL, hf))
    made = {f"iter_0000005/mp_rank_00/{FILE}", "iter_0000005/conversion.json"}
    made |= {"iter_0000005/huggingface_configs.json", "target_megatron_args.json"}
    assert {name: content for name, content in files(tmp_path / "root").items() if name not in made} == (
        OTHERS | {TRACKER: b"5"}
    )


def test_an_iteration_that_exists_is_refused_and_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", SMALL)
    make_root(tmp_path / "root")
    assert to_megatron(tmp_path / "hf", tmp_path / "root", "--iteration", "1") == 1
    assert "choose another target" in capsys.readouterr().err
    assert files(tmp_path / "root") == OTHERS | {TRACKER: b"1"}


def test_overwriting_replaces_one_iteration_as_a_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = make_hf(tmp_path / "hf", SMALL)
    make_root(tmp_path / "root", OTHER_ITERATIONS)
    assert to_megatron(tmp_path / "hf", tmp_path / "root") == 0
    optimizer = tmp_path / "root" / "iter_0000001" / "mp_rank_00" / "distrib_optim.pt"
    optimizer.write_bytes(b"optimizer")
    before = files(tmp_path / "root")
    assert to_megatron(tmp_path / "hf", tmp_path / "root", "--overwrite", grid=Grid(tp=2)) == 1
    assert "found:    mp_rank_00/distrib_optim.pt\n" in capsys.readouterr().err
    assert files(tmp_path / "root") == before
    optimizer.unlink()
    assert to_megatron(tmp_path / "hf", tmp_path / "root", "--overwrite", grid=Grid(tp=2)) == 0
    assert_same_shards(read_shards(tmp_path / "root"), expected_shards(SMALL, hf, Grid(tp=2)))
    found = files(tmp_path / "root")
    beside = {"target_megatron_args.json": found["target_megatron_args.json"]}
    assert {name: content for name, content in found.items() if not name.startswith("iter_0000001")} == (
        OTHER_ITERATIONS | {TRACKER: b"1"} | beside
    )


def test_an_iteration_that_no_conversion_made_is_not_even_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", SMALL)
    make_root(tmp_path / "root")
    assert to_megatron(tmp_path / "hf", tmp_path / "root", "--overwrite") == 1
    assert "the target directory was not made by a conversion, so it is not replaced" in capsys.readouterr().err
    assert files(tmp_path / "root") == OTHERS | {TRACKER: b"1"}


def test_a_tracker_that_names_another_iteration_is_spoken_of_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", SMALL)
    make_root(tmp_path / "root")
    (tmp_path / "root" / TRACKER).write_text("500\n")
    assert to_megatron(tmp_path / "hf", tmp_path / "root", "--iteration", "7", "--dry-run") == 0
    assert f"warning: {tmp_path}/root/{TRACKER} names '500', and will name '7'\n" in capsys.readouterr().err
    assert (tmp_path / "root" / TRACKER).read_text() == "500\n"


def test_a_directory_that_is_no_iteration_is_not_overwritten(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", SMALL)
    (tmp_path / "root" / "iter_0000001").mkdir(parents=True)
    (tmp_path / "root" / "iter_0000001" / "thesis.tex").write_text("years of work")
    assert to_megatron(tmp_path / "hf", tmp_path / "root", "--overwrite") == 1
    assert files(tmp_path / "root") == {"iter_0000001/thesis.tex": b"years of work"}


@pytest.mark.parametrize("flags", [("--iteration", "5"), ("--iteration", "1", "--overwrite")], ids=" ".join)
def test_a_run_that_fails_leaves_the_old_tracker_and_every_iteration(flags: tuple[str, ...], tmp_path: Path) -> None:
    tensors = hf_tensors(SMALL)
    tensors["model.norm.weight"][3] = 1e30  # fp16 cannot hold it, which only the data shows
    make_hf(tmp_path / "hf", SMALL, tensors)
    made = {name.partition("/")[2]: {} for name in OTHERS if name.startswith("iter_0000001/")}
    others = OTHERS | {"iter_0000001/conversion.json": json.dumps({"files": made}).encode()}
    make_root(tmp_path / "root", others)
    assert to_megatron(tmp_path / "hf", tmp_path / "root", *flags, "--fp16") == 1
    found = {name: content for name, content in files(tmp_path / "root").items() if ".partial/" not in name}
    assert found == others | {TRACKER: b"1"}
    assert to_megatron(tmp_path / "hf", tmp_path / "root", *flags, "--overwrite") == 0  # over what the failed run left
    assert [name for name in files(tmp_path / "root") if ".partial" in name] == []


def test_a_tracker_is_replaced_and_not_written_over(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", SMALL)
    make_root(tmp_path / "root")
    with (tmp_path / "root" / TRACKER).open() as reader:  # a reader of the old file goes on reading the old file
        assert to_megatron(tmp_path / "hf", tmp_path / "root", "--iteration", "5") == 0
        assert reader.read() == "1"
    assert (tmp_path / "root" / TRACKER).read_text() == "5"


def test_a_tracker_that_cannot_be_replaced_is_an_error_before_everything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", SMALL)
    (tmp_path / "root" / TRACKER).mkdir(parents=True)  # a directory in its place
    assert to_megatron(tmp_path / "hf", tmp_path / "root") == 1
    assert TRACKER in capsys.readouterr().err
    assert files(tmp_path / "root") == {}


def test_the_arguments_are_a_namespace_with_real_dtypes_in_every_file(tmp_path: Path) -> None:
    model = Model(experts=4, groups=4, tied=True)
    make_hf(tmp_path / "hf", model)
    margs = {"reduce_dtype": "torch.float32", "attention_backend": "AttnBackend.auto", "lr": 1e-4}
    (tmp_path / "margs.json").write_text(json.dumps(margs))
    flags = ("--bf16", "--source-margs-file", str(tmp_path / "margs.json"), "--tokenizer-model", str(tmp_path / "hf"))
    assert to_megatron(tmp_path / "hf", tmp_path / "root", *flags, grid=Grid(tp=2, ep=2)) == 0
    directories = sorted((tmp_path / "root" / "iter_0000001").glob("mp_rank_*"))
    args = [load(directory / FILE)["args"] for directory in directories]
    assert [type(each) for each in args] == [Namespace] * 4
    assert all(each == args[0] for each in args)
    expected = {
        "params_dtype": torch.bfloat16, "reduce_dtype": torch.float32, "bf16": True, "fp16": False, "lr": 1e-4,
        "num_layers": 4, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 4,
        "group_query_attention": False, "kv_channels": 4, "rotary_base": 500000, "use_rope_scaling": False,
        "normalization": "RMSNorm", "norm_epsilon": 1e-5, "swiglu": True, "vocab_size": 29, "padded_vocab_size": 32,
        "untie_embeddings_and_output_weights": False, "num_experts": 4, "moe_router_topk": 2,
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2, "virtual_pipeline_model_parallel_size": None,
        "tokenizer_model": str(tmp_path / "hf"), "tokenizer_type": "HuggingFaceTokenizer",
    }  # fmt: skip
    assert {name: getattr(args[0], name) for name in expected} == expected
    assert not hasattr(args[0], "attention_backend")
    strings = [name for name, value in vars(args[0]).items() if isinstance(value, str) and value.startswith("torch.")]
    assert strings == []


def test_target_megatron_args_json_is_the_arguments_as_text(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", SMALL)
    assert to_megatron(tmp_path / "hf", tmp_path / "root", grid=Grid(tp=2)) == 0
    args = vars(load(tmp_path / "root" / "iter_0000001" / "mp_rank_00" / FILE)["args"])
    listed = json.loads((tmp_path / "root" / "target_megatron_args.json").read_text())
    origins = listed.pop("origins_of_arguments")
    assert (origins["hidden_size"], origins["tensor_model_parallel_size"]) == (
        "config.json", "flag --target-tensor-parallel-size",
    )  # fmt: skip
    assert listed == json.loads(json.dumps(args, default=str))
    assert (listed["params_dtype"], listed["tensor_model_parallel_size"]) == ("torch.bfloat16", 2)


def test_verbose_says_where_each_argument_is_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(tmp_path / "hf", SMALL)
    (tmp_path / "margs.json").write_text(json.dumps({"lr": 1e-4, "hidden_size": 64}))
    flags = ("--source-margs-file", str(tmp_path / "margs.json"))
    assert to_megatron(tmp_path / "hf", tmp_path / "root", "--verbose", *flags) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert "lr 0.0001 <- --source-margs-file" in lines
    assert "hidden_size 16 <- config.json (not 64, as --source-margs-file says)" in lines


@pytest.mark.parametrize("flags", [("--iteration", "7"), ("--release",)], ids=" ".join)
def test_a_tracker_that_has_moved_on_stays_when_a_complete_conversion_is_started_again(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", SMALL)
    assert to_megatron(tmp_path / "hf", tmp_path / "root", *flags) == 0
    (tmp_path / "root" / TRACKER).write_text("500\n")
    (tmp_path / "root" / "target_megatron_args.json").unlink()
    before = files(tmp_path / "root")
    assert to_megatron(tmp_path / "hf", tmp_path / "root", *flags, "--strict") == 0
    assert f"{tmp_path}/root/{TRACKER} names '500' and stays as it is" in capsys.readouterr().err
    found = files(tmp_path / "root")
    assert found.pop("target_megatron_args.json") != b""  # what is gone is made anew
    assert found == before
