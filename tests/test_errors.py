"""What is wrong with a checkpoint is said once, with tensor, file, expected, found and remedy, and nothing is left."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_convert import errors
from tests.checkpoints import Grid, Model, State, hf_tensors, make, megatron_shards, save, training_args
from tests.converting import convert

SMALL = Model(layers=2)
ONE_RANK = Grid()
SHARD = "model_optim_rng.pt"
Failure = Callable[..., str]


@pytest.fixture
def failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Failure:
    """Converts `tmp_path / "in"`, which must fail without a trace of the target, and returns the message."""

    def fail(*flags: str, exit_code: int = 1) -> str:
        assert convert(tmp_path / "in", tmp_path / "out", *flags) == exit_code
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        assert not (tmp_path / "out").exists()
        return err

    return fail


def assert_says(message: str, **details: str) -> None:
    """Every detail is in the line with its label."""
    for label, text in details.items():
        lines = [line for line in message.splitlines() if line.strip().startswith(f"{label}:")]
        assert any(text in line for line in lines), f"{label}: {text} is not in\n{message}"


def save_changed(
    tmp_path: Path, change: Callable[[State], Any], model: Model = SMALL, grid: Grid = ONE_RANK, **args: Any
) -> None:
    """A checkpoint whose first shard is changed before it is saved."""
    shards = megatron_shards(model, hf_tensors(model), grid)
    change(shards[min(shards)][0])
    save(tmp_path / "in", shards, training_args(model, grid, **args))


@pytest.mark.parametrize(
    ("name", "parent", "exit_code"),
    [
        ("ConversionError", "Exception", 1),
        ("UsageError", "ConversionError", 2),
        ("SourceError", "ConversionError", 1),
        ("CheckpointNotFound", "SourceError", 2),
        ("NotFetched", "CheckpointNotFound", 1),
        ("MissingShard", "SourceError", 1),
        ("InconsistentShards", "SourceError", 1),
        ("CorruptFile", "SourceError", 1),
        ("UnsafePickle", "SourceError", 1),
        ("MissingArguments", "SourceError", 1),
        ("UnsupportedModel", "SourceError", 1),
        ("MissingTensor", "SourceError", 1),
        ("UnknownTensor", "SourceError", 1),
        ("WrongShape", "SourceError", 1),
        ("ValueOverflow", "SourceError", 1),
        ("PlanError", "ConversionError", 1),
        ("TargetError", "ConversionError", 1),
        ("TargetExists", "TargetError", 1),
        ("NotEnoughSpace", "TargetError", 1),
        ("BudgetTooSmall", "ConversionError", 2),
        ("Problems", "ConversionError", 1),
    ],
)
def test_the_tree_of_errors_is_the_one_that_is_drawn(name: str, parent: str, exit_code: int) -> None:
    error = getattr(errors, name)
    assert error.__bases__[0].__name__ == parent
    assert not issubclass(error, errors.ConversionError) or error.exit_code == exit_code
    assert name in str(errors.__doc__)


def test_every_error_is_drawn_in_the_tree() -> None:
    classes = [name for name, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, Exception)]
    assert [name for name in classes if name not in str(errors.__doc__)] == []


def test_an_error_shows_the_details_that_it_has_a_line_each() -> None:
    error = errors.WrongShape("wrong", tensor="w", file="f", expected=[2, 3], found=[3, 2], remedy="turn it")
    assert str(error) == (
        "wrong\n  tensor:   w\n  file:     f\n  expected: [2, 3]\n  found:    [3, 2]\n  remedy:   turn it"
    )
    assert str(errors.WrongShape("wrong", found=0)) == "wrong\n  found:    0"


def test_many_problems_are_shown_together_up_to_a_limit() -> None:
    problems = [errors.MissingTensor(f"problem {chr(97 + n)}", tensor=f"t{n}") for n in range(23)]
    lines = str(errors.Problems(problems)).splitlines()
    assert lines[0] == "23 problems found; nothing was written"
    assert lines[1:3] == ["problem a", "  tensor:   t0"]
    assert lines[-1] == "... and 3 more kinds"
    with pytest.raises(errors.MissingTensor, match="problem a"):
        errors.raise_together(problems[:1])
    with pytest.raises(errors.Problems):
        errors.raise_together(problems)


def test_problems_that_differ_in_numbers_alone_are_one_with_a_count_and_causes_come_first() -> None:
    missing = [errors.MissingTensor(f"nothing for layers.{n}.norm", tensor=f"layers.{n}.norm") for n in range(61)]
    shard = errors.MissingShard("a file is missing", file="mp_rank_01")
    assert str(errors.Problems([*missing, shard])).splitlines() == [
        "62 problems found; nothing was written",
        "a file is missing",
        "  file:     mp_rank_01",
        "nothing for layers.0.norm",
        "  tensor:   layers.0.norm",
        "  and 60 more like it, the last for layers.60.norm",
    ]


def test_problems_of_other_arguments_are_all_shown() -> None:
    what = "an argument changes what the model computes"
    problems = [errors.UnsupportedModel(what, file="f", found=f"{name} = 3") for name in ("softcap", "scale")]
    assert [line for line in str(errors.Problems(problems)).splitlines() if "found" in line and "=" in line] == [
        "  found:    softcap = 3",
        "  found:    scale = 3",
    ]


def test_problems_stay_what_they_are_on_their_way_to_another_rank() -> None:
    problems = errors.Problems([errors.MissingTensor("a", tensor="t"), errors.MissingShard("b", file="f")])
    arrived = errors.error_from_details(json.loads(json.dumps(errors.error_details(problems))))
    assert isinstance(arrived, errors.Problems)
    assert [type(problem) for problem in arrived.problems] == [errors.MissingShard, errors.MissingTensor]
    assert str(arrived) == str(problems)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("a\nb\r", r"a\nb\r"),
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("\u202etxt.exe", r"\u202etxt.exe"),
        ("caf\u00e9 \u4e2d", "caf\u00e9 \u4e2d"),
        ("a path that is no UTF-8: \udce9", r"a path that is no UTF-8: \udce9"),
        ("z" * 300, "z" * 200 + "..."),
    ],
)
def test_a_text_of_others_is_one_line_that_no_terminal_obeys(text: str, printed: str) -> None:
    assert errors.shown(text) == printed
    assert str(errors.SourceError("what", tensor=text)) == f"what\n  tensor:   {printed}"


def test_a_traceback_keeps_its_lines_of_which_none_looks_like_an_errors() -> None:
    error = errors.ConversionError("internal error", lines=["Traceback", "  resume:   now"])
    assert str(error) == "internal error\n  | Traceback\n  |   resume:   now"


def test_an_absent_checkpoint_is_named(failure: Failure, tmp_path: Path) -> None:
    assert_says(failure(exit_code=2), file=f"{tmp_path}/in", remedy="check the path")


def test_an_absent_iteration_is_reported_with_those_that_are_there(failure: Failure, tmp_path: Path) -> None:
    make(tmp_path / "in", SMALL)
    message = failure("--ckpt-dir-name", "iter_0000040", exit_code=2)
    assert_says(message, file="in/iter_0000040", expected="iter_0000004", remedy="--ckpt-dir-name")


@pytest.mark.parametrize("content", [None, "", "latest", "9" * 5000], ids=["absent", "empty", "a word", "huge"])
def test_a_tracker_file_that_names_no_iteration_says_so(content: str | None, failure: Failure, tmp_path: Path) -> None:
    make(tmp_path / "in", SMALL)
    tracker = tmp_path / "in" / "latest_checkpointed_iteration.txt"
    tracker.unlink()
    if content is not None:
        tracker.write_text(content)
    message = failure(exit_code=2 if content is None else 1)  # no checkpoint's root, or a damaged one
    assert "latest_checkpointed_iteration.txt" in message
    assert_says(message, remedy="--ckpt-dir-name")


def test_a_distributed_checkpoint_of_another_kind_is_refused_with_how_to_save_it(
    failure: Failure, tmp_path: Path
) -> None:
    (tmp_path / "in" / "iter_0000004").mkdir(parents=True)
    (tmp_path / "in" / "iter_0000004" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    (tmp_path / "in" / "iter_0000004" / ".metadata").write_bytes(b"")
    message = failure("--ckpt-dir-name", "iter_0000004")
    assert_says(message, expected="torch_dist", found="zarr", remedy="--ckpt-format torch_dist")


@pytest.mark.parametrize("grid", [Grid(tp=2), Grid(pp=2), Grid(tp=2, pp=2)], ids=str)
def test_a_missing_shard_is_named(grid: Grid, failure: Failure, tmp_path: Path) -> None:
    make(tmp_path / "in", SMALL, grid)
    last = max((tmp_path / "in" / "iter_0000004").iterdir())
    (last / SHARD).unlink()
    assert_says(failure(), expected=last.name, found="mp_rank_00", remedy="copy the missing directories")


def test_a_rank_directory_of_another_grid_is_named(failure: Failure, tmp_path: Path) -> None:
    make(tmp_path / "in", SMALL, Grid(tp=2))
    iteration = tmp_path / "in" / "iter_0000004"
    (iteration / "mp_rank_07").mkdir()
    (iteration / "mp_rank_07" / SHARD).write_bytes((iteration / "mp_rank_00" / SHARD).read_bytes())
    assert_says(failure(), found="mp_rank_07", remedy="two checkpoints")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_named_with_how_to_get_it_whole(kept: float, failure: Failure, tmp_path: Path) -> None:
    make(tmp_path / "in", SMALL, Grid(tp=2))
    file = tmp_path / "in" / "iter_0000004" / "mp_rank_01" / SHARD
    os.truncate(file, int(file.stat().st_size * kept))
    assert_says(failure(), file=f"mp_rank_01/{SHARD}", expected="zip", remedy="copy the file again")


def test_a_file_that_is_no_checkpoint_is_named(failure: Failure, tmp_path: Path) -> None:
    make(tmp_path / "in", SMALL)
    torch.save([1, 2, 3], tmp_path / "in" / "iter_0000004" / "mp_rank_00" / SHARD)
    assert_says(failure(), file=f"mp_rank_00/{SHARD}", expected="dict", found="list")


def test_a_wrong_shape_is_reported_with_both_shapes(failure: Failure, tmp_path: Path) -> None:
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    save_changed(tmp_path, lambda state: state.update({name: torch.zeros(40, 16)}), grid=Grid(tp=2))
    message = failure()
    assert message.startswith("wrong shape for decoder.layers.1.mlp.linear_fc1.weight\n")  # and no second problem
    assert_says(message, tensor=name, file=f"mp_rank_00/{SHARD}", expected="[24, 16]", found="[40, 16]", remedy="args")


def test_a_missing_tensor_is_reported_with_the_names_that_it_could_have(failure: Failure, tmp_path: Path) -> None:
    name = "decoder.layers.1.input_layernorm.weight"
    save_changed(tmp_path, lambda state: state.pop(name))
    message = failure()
    assert_says(message, tensor=name, file=f"mp_rank_00/{SHARD}", expected="[16]", found="nothing", remedy="copy")
    assert "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight" in message


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("decoder.layers.0.self_attention.q_layernorm.weight", "query layernorm"),
        ("decoder.layers.0.self_attention.k_layernorm.weight", "key layernorm"),
        ("decoder.layers.0.input_layernorm.bias", "LayerNorm bias"),
        ("decoder.layers.0.mlp.shared_experts.linear_fc1.weight", "shared experts"),
        ("mtp.layers.0.eh_proj.weight", "multi-token prediction"),
        ("embedding.position_embeddings.weight", "learned position embeddings"),
        ("decoder.layers.0.adapter.weight", "a parameter that no table names"),
    ],
)
def test_an_unknown_tensor_is_named_and_never_dropped(name: str, what: str, failure: Failure, tmp_path: Path) -> None:
    save_changed(tmp_path, lambda state: state.update({name: torch.zeros(4)}))
    assert_says(failure(), tensor=name, file=f"mp_rank_00/{SHARD}", found=what, remedy="nothing is dropped silently")


def test_all_problems_of_the_headers_are_reported_together(failure: Failure, tmp_path: Path) -> None:
    def change(state: State) -> None:
        del state["decoder.final_layernorm.weight"]
        state["output_layer.weight"] = torch.zeros(3, 16)
        state["adapter.weight"] = torch.zeros(3)

    save_changed(tmp_path, change)
    message = failure()
    assert message.startswith("3 problems found; nothing was written\n")
    for name in ("decoder.final_layernorm.weight", "output_layer.weight", "adapter.weight"):
        assert_says(message, tensor=name)


def test_shards_of_two_iterations_are_refused(failure: Failure, tmp_path: Path) -> None:
    make(tmp_path / "in", SMALL, Grid(tp=2))
    shards = megatron_shards(SMALL, hf_tensors(SMALL, seed=1), Grid(tp=2))
    save(tmp_path / "later", shards, training_args(SMALL, Grid(tp=2)), iteration=8)
    late = tmp_path / "later" / "iter_0000008" / "mp_rank_01" / SHARD
    late.replace(tmp_path / "in" / "iter_0000004" / "mp_rank_01" / SHARD)
    message = failure()
    assert_says(
        message,
        file=f"mp_rank_01/{SHARD}",
        expected=f"4 as in {tmp_path}/in/iter_0000004/mp_rank_00",
        found="8",
        remedy="copy",
    )
    assert "iteration" in message.splitlines()[0]


@pytest.mark.parametrize(
    ("more", "remedy"),
    [
        ((), "raise --max-memory-per-rank"),
        (
            ("--placement", "gather"),
            "raise --max-memory-per-rank, or use --placement direct where every rank sees all files",
        ),
    ],
)
def test_a_budget_that_is_too_small_says_how_much_is_needed(
    more: tuple[str, ...], remedy: str, failure: Failure, tmp_path: Path
) -> None:
    make(tmp_path / "in", SMALL)
    message = failure("--max-memory-per-rank", "1MB", *more, exit_code=2)
    assert_says(message, expected="--max-memory-per-rank of at least", found="1 MB", remedy=remedy)
    assert message.endswith(remedy + "\n")


def test_a_word_of_a_command_can_be_pasted_whatever_is_in_it() -> None:
    words = ["out", "a b", "it's", "line\nbreak", "\x1b[2Kit's\\x41", "\u3000wide", os.fsdecode(b"\xff\xfe")]
    command = " ".join(["printf '%s\\0'", *map(errors.quoted, words)])
    assert command.isprintable()
    printed = subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout
    assert printed.split(b"\0")[:-1] == list(map(os.fsencode, words))
