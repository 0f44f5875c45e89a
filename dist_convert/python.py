"""What `import dist_convert` offers: the commands as functions. Heavy imports come with the first call.

Nothing is printed, no signal is caught, and errors are the exceptions of `dist_convert.errors`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_convert import errors
from dist_convert.listener import Collector
from dist_convert.options import CONVERT, FORMATS, Options, VerifyJob, check_values, flag_of, options_of
from dist_convert.units import parse_bytes

if TYPE_CHECKING:
    import torch

    from dist_convert.compare.outcome import Outcome
    from dist_convert.ranks.collectives import ProcessGroup
    from dist_convert.report import Report
    from dist_convert.weights import Weights

#: How often a program that waits for its ranks asks whether to end them, and how often they tell how far they are.
_POLL_SECONDS, _PROGRESS_SECONDS = 0.2, 1
_LINES_OF_A_CRASH = 20


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    *,
    ranks: int | None = None,
    group: ProcessGroup | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
    **options: Any,
) -> Report:
    """Convert a checkpoint of any kind, as `dist-convert convert` does.

    Args:
        source: root or iteration of a Megatron checkpoint, Hugging Face directory, or hub id (org/name[@revision]).
        target: the Hugging Face directory that is made, or the root of the Megatron checkpoint.
        to: the target's format, "huggingface" or "torch".
        ranks: processes on this machine that share the work, each a fresh interpreter. None: this one alone.
        group: the process group of this program whose ranks share the work; each of them calls this function.
        on_progress: is called now and then, from any thread, with the bytes done and those of the whole conversion;
            in a `group`, with the bytes that this rank has done.
        cancel: is asked now and then whether to end; the same call goes on later.
        options: those of the command, by their names with underscores: `target_tensor_parallel_size=4`. Sizes are
            bytes or text with a unit, `max_shard_size="2GB"`. `iteration` may be "release".

    Returns:
        What was done, or of a dry run what would be.

    Raises:
        ConversionError: see `dist_convert.errors`; nothing is left under the target's name.
        TypeError: an option that the command does not have.
    """
    job = _job(source, target, to, options)
    if ranks is not None and group is not None:
        raise errors.UsageError("ranks are started, or those of a group", found="ranks and group", remedy="give one")
    if ranks is not None and ranks > 1:
        return _convert_in_ranks(job, ranks, on_progress, cancel)
    from dist_convert.api import convert as convert_job
    from dist_convert.ranks.collectives import alone, joined_group
    from dist_convert.ranks.embedded import Embedded

    listener = Collector(on_progress)
    if group is None:
        world = alone()
        return convert_job(job, world, Embedded(world, listener, cancel))
    with joined_group(group, job.timeout_seconds) as world:
        return convert_job(job, world, Embedded(world, listener, cancel))


def _job(source: str | os.PathLike[str], target: str | os.PathLike[str], to: str, given: Mapping[str, Any]) -> Options:
    """The options of a conversion, checked as those of the command line are."""
    if to not in FORMATS:
        raise errors.UsageError("no such format", expected=" or ".join(FORMATS), found=repr(to))
    known = {_plain_name(one.name): (one.name, option.kind) for one, option in options_of(CONVERT)}
    values: dict[str, Any] = {"source": os.fspath(source), "target": Path(target).resolve()}
    for name, value in given.items():
        if _plain_name(name) not in known or name in values:
            raise TypeError(f"convert() has no option {name!r}; see dist-convert convert --help")
        field, kind = known[_plain_name(name)]
        if value is not None and kind == "path":
            value = Path(value)
        elif kind == "size" and isinstance(value, str):
            value = parse_bytes(value)
        values[field] = value
    job = Options(to, **values)
    check_values(job)
    return job


def _plain_name(name: str) -> str:
    return name.removesuffix("_bytes").removesuffix("_seconds")


def _convert_in_ranks(
    job: Options, ranks: int, on_progress: Callable[[int, int], None] | None, cancel: Callable[[], bool] | None
) -> Report:
    """Run the command in a process of its own, whose log says what happens."""
    from dist_convert.report import report_from_details

    with tempfile.TemporaryDirectory(prefix="dist_convert-") as directory:
        file = Path(directory) / "job.yaml"
        file.write_text(json.dumps(_job_file(replace(job, log_format="json", log_interval_seconds=_PROGRESS_SECONDS))))
        command = [sys.executable, "-m", "dist_convert", CONVERT, "--config", str(file), "--ranks", str(ranks)]
        launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
        environment = {name: value for name, value in os.environ.items() if name not in launcher}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, errors="replace",
        )  # fmt: skip
        with process:
            stop = threading.Event()
            watcher = threading.Thread(target=_end_when_asked, args=(process, cancel, stop), daemon=True)
            if cancel is not None:
                watcher.start()
            try:
                said = list(_events(process, on_progress))
            except BaseException:
                process.send_signal(signal.SIGTERM)
                raise
            finally:
                stop.set()
            exit_code = process.wait()
    for event in said:
        if "report" in event:
            return report_from_details(event["report"])
    if cancel is not None and exit_code == 128 + signal.SIGTERM:
        raise errors.Cancelled
    for event in said:
        if event["event"] == "error":
            raise errors.error_from_details(event)
    lines = [event["text"] for event in said if event["event"] == "text"][-_LINES_OF_A_CRASH:]
    raise errors.LostRank(f"the ranks ended with exit code {exit_code}", found="\n".join(lines))


def _job_file(job: Options) -> dict[str, Any]:
    """What a job file says of options, by the names of the command's flags."""
    found: dict[str, Any] = {"to": job.to, "source": job.source, "target": str(job.target)}
    for one, known in options_of(CONVERT):
        value = getattr(job, one.name)
        if one.name not in found and value != one.default:
            shown = f"{value}B" if known.kind == "size" else value if isinstance(value, bool | int) else str(value)
            found[flag_of(one, CONVERT)[2:]] = shown
    return found


def _events(process: subprocess.Popen[str], on_progress: Callable[[int, int], None] | None) -> Iterator[dict[str, Any]]:
    """What a command says, but for its progress, which goes on to the caller's function."""
    assert process.stderr is not None
    for line in process.stderr:
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict) or "event" not in event:
            yield {"event": "text", "text": line.rstrip("\n")}
        elif event["event"] != "progress":
            yield event
        elif on_progress is not None:
            on_progress(event["done_bytes"], event["total_bytes"])


def _end_when_asked(process: subprocess.Popen[str], cancel: Callable[[], bool], stop: threading.Event) -> None:
    while not stop.wait(_POLL_SECONDS):
        if cancel():
            process.send_signal(signal.SIGTERM)
            return


def open(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    ckpt_dir_name: str | None = None,
    true_vocab_size: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    habana_imported_experts: bool = False,
) -> Weights:
    """Open a checkpoint of any kind; only headers are read. Use it as `safetensors.safe_open`.

    Args:
        path: root or iteration of a Megatron checkpoint, or a Hugging Face directory.
        dtype: of all tensors, "bfloat16" or `torch.bfloat16`; None: as they are stored.
        device: where tensors are put.
        ckpt_dir_name: the iteration; None: what the tracker file says.
        true_vocab_size: tokens without padding; None: what the checkpoint or its tokenizer says.
        tokenizer: where the args' own path is not here.
        habana_imported_experts: see `dist-convert convert --help`.

    Raises:
        ConversionError: no checkpoint, an incomplete or a damaged one, or no supported model.
    """
    from dist_convert.model import Where
    from dist_convert.weights import open_weights

    said = None if tokenizer is None else Path(tokenizer)
    where = Where(Path(path), ckpt_dir_name, habana_imported_experts, true_vocab_size, said)
    return open_weights(where, dtype, device)


def verify(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    sample: Fraction | float = 1,
    on_progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
    **options: Any,
) -> Outcome:
    """Compare two checkpoints of any kind, as `dist-convert verify` does; `is_same` of what it returns is the answer.

    Args:
        a, b: the checkpoints; A is rounded to B's dtype where they differ.
        sample: the share of the blocks that is compared.
        on_progress, cancel: see `convert`.
        options: those of the command, by their names with underscores.

    Raises:
        ConversionError: see `dist_convert.errors`.
    """
    from dist_convert.compare.verify import verify as verify_job
    from dist_convert.ranks.collectives import alone
    from dist_convert.ranks.embedded import Embedded

    known = {_plain_name(one.name): one.name for one in fields(VerifyJob)}
    unknown = [name for name in options if _plain_name(name) not in known or name in ("json", "timeout")]
    if unknown:
        raise TypeError(f"verify() has no option {unknown[0]!r}; see dist-convert verify --help")
    values = {known[_plain_name(name)]: value for name, value in options.items()}
    if isinstance(values.get("max_memory_per_rank_bytes"), str):
        values["max_memory_per_rank_bytes"] = parse_bytes(values["max_memory_per_rank_bytes"])
    share = Fraction(sample).limit_denominator(1_000_000)
    if not 0 < share <= 1:
        raise errors.UsageError("not a share", expected="above 0 and up to 1", found=sample)
    world = alone()
    job = VerifyJob(Path(a), Path(b), sample=share, **values)
    return verify_job(job, world, Embedded(world, Collector(on_progress), cancel))


def inspect(path: str | os.PathLike[str], ckpt_dir_name: str | None = None) -> dict[str, Any]:
    """Describe a checkpoint from its headers, as `dist-convert inspect --json` does; an incomplete one, too.

    Raises:
        ConversionError: no checkpoint, or a damaged one.
    """
    from dist_convert.describe import inspect_checkpoint

    return inspect_checkpoint(Path(path), ckpt_dir_name)
