"""What an unfinished conversion leaves, who may go on with it, and what becomes of it: one rank, either direction."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import Grid, Model, make, megatron_shards, save, training_args
from tests.distributed.interrupting import Run, Runs, hashes_below
from tests.distributed_checkpoints import make_fsdp
from tests.to_megatron import make_hf

MODEL = Model(hidden=64, ffn=192, heads=8, groups=4, head_dim=8, layers=3, vocab=200, padded_vocab=256)
#: In the middle of the steps of `MODEL`.
MIDDLE = 90


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make(tmp_path / "in", MODEL, Grid(tp=2))
    return tmp_path / "in"


def to_hf(source: Path, *more: str) -> list[str]:
    kept = () if "--target-params-dtype" in more else ("--target-params-dtype", "keep")
    target = str(source.parent / "out")
    return ["megatron-to-hf", "--load-path", str(source), "--save-path", target, "--device", "cpu", *kept, *more]


def kill(runs: Runs, flags: list[str], moment: int = MIDDLE) -> None:
    assert runs.do(flags, rank=0, moment=moment, signals=["SIGKILL"]).exit_codes == [-9]


def journal(target: Path) -> Path:
    [path] = (target.with_name(target.name + ".partial") / ".journal").glob("run-00001-*")
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line.partition(" ")[2]) for line in path.read_text().splitlines()]


def write_records(path: Path, lines: list[dict[str, Any]]) -> None:
    texts = [json.dumps(line, separators=(",", ":")) for line in lines]
    path.write_text("".join(f"{zlib.crc32(text.encode()):08x} {text}\n" for text in texts))


def there_already(run: Run) -> str:
    """What a run says that it found."""
    return run.printed.partition(".partial: ")[2].partition(" of ")[0]


def finish(runs: Runs, source: Path, *more: str) -> Run:
    """Run to the end, and compare with an undisturbed run."""
    run = runs.do(to_hf(source, *more))
    assert run.exit_codes == [0], run.printed
    found = hashes_below(source.parent / "out")
    shutil.rmtree(source.parent / "out")
    undisturbed = runs.do(to_hf(source, *more))
    assert there_already(undisturbed) == ""
    assert found == hashes_below(source.parent / "out")
    return run


def test_what_is_written_is_not_written_again(runs: Runs, source: Path) -> None:
    kill(runs, to_hf(source))
    run = finish(runs, source)
    assert there_already(run) != ""
    assert 0 < run.written_bytes < sum(path.stat().st_size for path in (source.parent / "out").glob("*.safetensors"))


def test_a_manifest_has_the_size_and_the_checksum_of_every_other_file(runs: Runs, source: Path) -> None:
    kill(runs, to_hf(source))
    finish(runs, source)
    out = source.parent / "out"
    manifest = json.loads((out / "conversion.json").read_text())
    assert manifest["files"] == {
        path.name: {"size_bytes": path.stat().st_size, "crc32": f"{zlib.crc32(path.read_bytes()):08x}"}
        for path in sorted(out.iterdir())
        if path.name != "conversion.json"
    }
    assert manifest["source"]["path"] == str(source / "iter_0000004")
    shard = source / "iter_0000004" / "mp_rank_01" / "model_optim_rng.pt"
    found = manifest["source"]["files"]["mp_rank_01/model_optim_rng.pt"]
    assert (found["size_bytes"], found["modified_ns"]) == (shard.stat().st_size, shard.stat().st_mtime_ns)


def test_a_manifest_of_megatron_shards_has_the_checksums_of_sealed_files(runs: Runs, tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", MODEL)
    flags = ["hf-to-megatron", "--load-dir", str(tmp_path / "hf"), "--save-dir", str(tmp_path / "out")]
    flags += ["--target-tensor-parallel-size", "2"]
    kill(runs, flags)
    assert runs.do(flags).exit_codes == [0]
    iteration = tmp_path / "out" / "iter_0000001"
    for name, record in json.loads((iteration / "conversion.json").read_text())["files"].items():
        data = (iteration / name).read_bytes()
        assert record == {"size_bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
        if name.endswith(".pt"):
            torch.load(iteration / name, weights_only=False)


@pytest.mark.parametrize(
    ("kind", "more", "directory", "moment"),
    [
        ("torch", ("--to", "torch_dist", "--target-tensor-parallel-size", "4"), "iter_0000004", 500),
        ("torch", ("--to", "dcp", "--max-shard-size", "100KB"), ".", 250),
        ("fsdp_dtensor", ("--to", "torch", "--target-tensor-parallel-size", "4"), "iter_0000004", 250),
    ],
)
def test_a_killed_conversion_of_or_to_a_distributed_checkpoint_goes_on_to_the_same_bytes(
    kind: str, more: tuple[str, ...], directory: str, moment: int, runs: Runs, source: Path
) -> None:
    target = source.parent / "dist"
    if kind == "fsdp_dtensor":
        source = source.parent / "fsdp"
        make_fsdp(source, kind, MODEL, Grid(tp=2))
    flags = ["convert", str(source), str(target), *more]
    kill(runs, flags, moment)
    run = runs.do(flags, ranks=2)
    assert run.exit_codes == [0, 0]
    assert there_already(run) != ""
    found = hashes_below(target)
    made = target / directory
    for name, record in json.loads((made / "conversion.json").read_text())["files"].items():
        data = (made / name).read_bytes()
        assert record == {"size_bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
    shutil.rmtree(target)
    assert runs.do(flags).exit_codes == [0]
    assert hashes_below(target) == found


def change_size(source: Path) -> str:
    save(source.parent / "other", megatron_shards(MODEL, make(source.parent / "x", MODEL), Grid(tp=2)),
         training_args(MODEL, Grid(tp=2), more="x" * 999))  # fmt: skip
    shutil.rmtree(source)
    (source.parent / "other").rename(source)
    return "mp_rank_00/model_optim_rng.pt had"


def change_time(source: Path) -> str:
    os.utime(source / "iter_0000004" / "mp_rank_01" / "model_optim_rng.pt", (1e9, 1e9))
    return "mp_rank_01/model_optim_rng.pt was last changed"


def test_a_dry_run_says_that_what_is_unfinished_would_be_gone_on_with(runs: Runs, source: Path) -> None:
    line = f"{source.parent}/out.partial is unfinished: what it has is kept and not written again\n"
    assert line not in runs.do(to_hf(source, "--dry-run")).stdout[0]
    kill(runs, to_hf(source))
    assert line in runs.do(to_hf(source, "--dry-run")).stdout[0]
    anew = to_hf(source, "--dry-run", "--overwrite", "--target-params-dtype", "fp32")
    assert line not in runs.do(anew).stdout[0]


@pytest.mark.parametrize("change", [change_size, change_time])
def test_a_source_that_changed_is_named_and_refused_until_overwrite(change: Any, runs: Runs, source: Path) -> None:
    kill(runs, to_hf(source))
    said = change(source)
    run = runs.do(to_hf(source))
    assert run.exit_codes == [1]
    assert run.printed.count(said) == 1, run.printed
    assert "--overwrite" in run.printed
    assert runs.do(to_hf(source, "--dry-run")).exit_codes == [1]
    anew = finish(runs, source, "--overwrite")
    assert there_already(anew) == ""


def test_a_source_of_a_year_that_no_calendar_has_is_named(
    runs: Runs, make_disk: Callable[[str], Path], source: Path
) -> None:
    far = make_disk("size=64m") / "in"  # tmpfs has such times
    shutil.copytree(source, far)
    kill(runs, to_hf(far))
    file = next(far.glob("iter_*/mp_rank_01/model_optim_rng.pt"))
    os.utime(file, ns=(0, 500 * 10**18))
    run = runs.do(to_hf(far))
    assert run.exit_codes == [1]
    assert "now 500000000000000000000 ns after 1970" in run.printed


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--target-params-dtype", "fp32"), "--target-params-dtype was keep, now fp32"),
        (("--max-shard-size", "100KB"), "--max-shard-size was 5000000000, now 100000"),
        (("--true-vocab-size", "199"), "--true-vocab-size was None, now 199"),
    ],
)
def test_flags_that_change_the_weights_are_named_and_refused(
    more: tuple[str, ...], said: str, runs: Runs, source: Path
) -> None:
    kill(runs, to_hf(source))
    run = runs.do(to_hf(source, *more))
    assert run.exit_codes == [1]
    assert said in run.printed
    finish(runs, source)


def test_arguments_of_a_megatron_target_that_change_are_named_and_refused(runs: Runs, tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", MODEL)
    flags = ["hf-to-megatron", "--load-dir", str(tmp_path / "hf"), "--save-dir", str(tmp_path / "out")]
    kill(runs, flags)
    run = runs.do([*flags, "--tokenizer-model", "other/tokenizer"])
    assert run.exit_codes == [1]
    assert "--tokenizer-model was None, now other/tokenizer" in run.printed


def test_flags_of_the_run_itself_may_change(runs: Runs, source: Path) -> None:
    kill(runs, to_hf(source))
    run = finish(runs, source, "--placement", "gather", "--max-memory-per-rank", "500MB", "--overwrite")
    assert there_already(run) != ""


def test_after_a_loss_of_power_only_what_is_marked_counts(runs: Runs, source: Path) -> None:
    kill(runs, to_hf(source))
    path = journal(source.parent / "out")
    head, *wrote = records(path)
    assert len(wrote) > 2
    head["boot"] = "before the machine was started again"
    write_records(path, [head, *wrote[:2]])
    write_records(path, [head, *wrote[:2], {"mark": path.stat().st_size}, *wrote[2:]])
    marked_bytes = sum(window[2] for line in wrote[:2] for window in line["wrote"])
    run = finish(runs, source)
    assert there_already(run) == f"{marked_bytes / 1000:.3g} kB"


def test_after_a_loss_of_power_without_a_mark_nothing_counts(runs: Runs, source: Path) -> None:
    kill(runs, to_hf(source))
    path = journal(source.parent / "out")
    head, *wrote = records(path)
    write_records(path, [head | {"boot": "before"}, *wrote])
    assert there_already(finish(runs, source)) == ""


def test_a_file_whose_sync_failed_is_written_again_whole(runs: Runs, source: Path) -> None:
    kill(runs, to_hf(source))
    path = journal(source.parent / "out")
    write_records(path, [*records(path), {"lost": "model.safetensors", "until": 1}])
    assert there_already(finish(runs, source)) == ""


@pytest.mark.parametrize("damage", ["cut", "flip", "zeros"])
def test_a_torn_line_of_a_journal_does_not_count(damage: str, runs: Runs, source: Path) -> None:
    kill(runs, to_hf(source))
    path = journal(source.parent / "out")
    lines = path.read_bytes().splitlines(keepends=True)
    last = {"cut": lines[-1][:-9], "flip": lines[-1].replace(b"wrote", b"wrota"), "zeros": bytes(len(lines[-1]))}
    path.write_bytes(b"".join([*lines[:-1], last[damage]]))
    finish(runs, source)


def test_a_file_that_is_gone_is_made_again(runs: Runs, source: Path) -> None:
    kill(runs, to_hf(source))
    (source.parent / "out.partial" / "model.safetensors").unlink()
    assert there_already(finish(runs, source)) == ""


def test_values_that_became_infinite_before_a_kill_are_not_forgotten(runs: Runs, tmp_path: Path) -> None:
    hf = make(tmp_path / "x", MODEL)
    large = {name: tensor * (1e9 if "embed" in name else 1) for name, tensor in hf.items()}
    save(tmp_path / "in", megatron_shards(MODEL, large, Grid(tp=2)), training_args(MODEL, Grid(tp=2)))
    flags = to_hf(tmp_path / "in", "--target-params-dtype", "fp16")
    kill(runs, [*flags, "--allow-overflow"], moment=130)
    assert '"overflowed"' in journal(tmp_path / "out").read_text()
    run = runs.do(flags)
    assert run.exit_codes == [1]
    assert "finite values become infinite in fp16" in run.printed
    assert "start the same command again" not in run.printed
    assert not (tmp_path / "out.partial" / "resumable").exists()
    accepted = runs.do([*flags, "--allow-overflow"])
    assert accepted.exit_codes == [0]
    count = sum(int(tensor.half().isinf().sum()) for tensor in large.values())
    assert f"{count:,} values became infinite" in accepted.printed


def test_a_conversion_at_work_is_named_to_a_second_one(runs: Runs, source: Path) -> None:
    kill(runs, to_hf(source))
    lock = source.parent / "out.partial" / ".journal" / "lock"
    holder = {"host": "here", "boot": "now", "process": 4711, "started": "2024-05-01T12:00:00+02:00"}
    with lock.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.truncate()
        json.dump(holder, held)
        held.flush()
        run = runs.do(to_hf(source, "--overwrite"))
    assert run.exit_codes == [1]
    assert "process 4711 on here, since 2024-05-01T12:00:00+02:00" in run.printed
    assert len(records(journal(source.parent / "out"))) > 1


def test_what_ranks_left_that_were_killed_as_they_looked_around_goes_after_a_day(runs: Runs, source: Path) -> None:
    two_days_ago = time.time() - 2 * 24 * 3600.0
    for name, text, changed in (
        ("0" * 16, "", two_days_ago), ("1" * 16, "", time.time()), ("2" * 16, "text", two_days_ago),
        ("notes", "", two_days_ago),
    ):  # fmt: skip
        path = source.parent / f".dist_convert-{name}"
        path.write_text(text)
        os.utime(path, (changed, changed))
    assert runs.do(to_hf(source, "--dry-run"), ranks=2).exit_codes == [0, 0]
    assert sorted(path.name for path in source.parent.glob(".*")) == [
        f".dist_convert-{'1' * 16}", f".dist_convert-{'2' * 16}", ".dist_convert-notes",
    ]  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("more", ["", "--dry-run", "--verify", "--timeout 300 --placement gather"])
def test_the_same_command_after_the_end_says_so_and_changes_nothing(
    more: str, ranks: int, runs: Runs, source: Path
) -> None:
    assert runs.do(to_hf(source)).exit_codes == [0]
    before = hashes_below(source.parent / "out")
    run = runs.do(to_hf(source, *more.split()), ranks=ranks)
    assert run.exit_codes == [0] * ranks
    assert (run.printed + "".join(run.stdout)).count("out is complete already: an earlier run") == 1
    assert run.printed.count("out: verified, 30 tensors with ") == (more == "--verify")
    assert (run.written_bytes, hashes_below(source.parent / "out")) == (0, before)


def test_a_megatron_target_that_is_complete_is_found_so_too(runs: Runs, tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", MODEL)
    flags = ["hf-to-megatron", "--load-dir", str(tmp_path / "hf"), "--save-dir", str(tmp_path / "out")]
    assert runs.do(flags).exit_codes == [0]
    run = runs.do([*flags, "--verify", "--timeout", "300", "--verbose"])
    assert (run.exit_codes, run.written_bytes) == ([0], 0)
    assert "iter_0000001: verified, 30 tensors with " in run.printed
    assert "iter_0000001 is complete already" in run.printed
    dry = runs.do([*flags, "--dry-run"])
    assert (dry.exit_codes, dry.stdout) == (
        [0],
        [f"done: {tmp_path}/out/iter_0000001 is complete already: an earlier run of this conversion has finished\n"],
    )


def test_verify_finds_what_has_become_of_a_target_that_was_complete(runs: Runs, source: Path) -> None:
    assert runs.do(to_hf(source)).exit_codes == [0]
    with (source.parent / "out" / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        [last] = weights.read(1)
        weights.seek(-1, os.SEEK_END)
        weights.write(bytes([last ^ 1]))
    before = hashes_below(source.parent)
    run = runs.do(to_hf(source, "--verify"))
    assert run.exit_codes == [1]
    assert "lm_head.weight: A and B differ in 1 element, first at [199, 63]" in run.printed
    assert "convert again to another target" in run.printed
    assert hashes_below(source.parent) == before


def test_another_command_after_the_end_finds_the_target_in_its_way_and_says_what_is_other(
    runs: Runs, source: Path
) -> None:
    assert runs.do(to_hf(source)).exit_codes == [0]
    run = runs.do(to_hf(source, "--instruct"))
    assert run.exit_codes == [1]
    assert "the target directory is not empty" in run.printed
    assert "found:    a conversion: --instruct was False, now True\n" in run.printed


@pytest.mark.parametrize("is_complete", [True, False], ids=["complete", "unfinished"])
def test_what_another_checkpoint_has_made_in_the_targets_place_is_told_by_both_paths(
    is_complete: bool, runs: Runs, source: Path
) -> None:
    other = source.parent / "other"
    make(other, MODEL, Grid(tp=2), seed=1)
    runs.do(to_hf(source), **({} if is_complete else {"rank": 0, "moment": MIDDLE, "signals": ["SIGKILL"]}))
    run = runs.do(["megatron-to-hf", "--load-path", str(other), *to_hf(source)[3:]])
    assert run.exit_codes == [1]
    below, kind = ("/iter_0000004", "a conversion: ") if is_complete else ("", "")
    assert f"found:    {kind}made from {source}{below}; this one from {other}{below}\n" in run.printed
    assert "was last changed" not in run.printed


def test_a_complete_target_of_which_a_file_is_gone_says_so(runs: Runs, source: Path) -> None:
    assert runs.do(to_hf(source)).exit_codes == [0]
    (source.parent / "out" / "model.safetensors").unlink()
    run = runs.do(to_hf(source))
    assert run.exit_codes == [1]
    assert "found:    a conversion: some of its files are gone or have another size\n" in run.printed


def test_a_replaced_target_keeps_its_name_or_has_it_back_whenever_the_run_is_killed(runs: Runs, source: Path) -> None:
    make(source.parent / "old", MODEL, seed=1)
    out = source.parent / "out"
    old = [*to_hf(source)[:2], str(source.parent / "old"), *to_hf(source)[3:]]
    assert runs.do(old).exit_codes == [0]
    calls = runs.do([*to_hf(source, "--overwrite")[:4], str(source.parent / "new"), *to_hf(source)[5:]]).calls[0]
    for moment in range(calls - 14, calls + 8):
        if runs.do(to_hf(source, "--overwrite"), rank=0, moment=moment, signals=["SIGKILL"]).exit_codes == [0]:
            break
        assert out.exists() or (source.parent / "out.replaced").exists()
    assert runs.do(to_hf(source, "--overwrite")).exit_codes == [0]
    assert (out / "model.safetensors").read_bytes() == (source.parent / "new" / "model.safetensors").read_bytes()
    assert sorted(path.name for path in source.parent.iterdir()) == ["in", "new", "old", "out"]


def test_one_of_a_later_format_is_refused_and_left_as_it_is(runs: Runs, source: Path) -> None:
    kill(runs, to_hf(source))
    partial = source.parent / "out.partial"
    identity = partial / ".journal" / "identity.json"
    assert json.loads(identity.read_text())["format"] == 2
    identity.write_text(json.dumps({**json.loads(identity.read_text()), "format": 3}))
    before = hashes_below(partial)
    run = runs.do(to_hf(source))
    assert run.exit_codes == [1]
    assert "made by another version (format 3, 2 now); only that version can resume it" in run.printed
    assert hashes_below(partial) == before
