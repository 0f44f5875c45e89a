"""The command line: exit codes are 0 done, 1 failed, 2 wrong usage, 143 stopped by SIGTERM, 130 by Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dist_convert.cli.flags import options_from_flags, parse, ranks_to_start, verify_job_from_flags
from dist_convert.cli.old_flags import notes_on_old_flags
from dist_convert.errors import ConversionError, LostRank, error_details
from dist_convert.options import Options, VerifyJob
from dist_convert.ranks.listener import JsonLog, Listener, TextLog, as_json_line
from dist_convert.ranks.signals import Signals, ending_at_once, stopped_by

if TYPE_CHECKING:
    from dist_convert.ranks.channel import Channel

#: Of the time that ranks wait for a silent one, after so much it is given up, before their collectives fail.
_SILENT_SHARE = 0.9


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(ending_at_once())
        try:
            exit_code = _heeding_ctrl_c(lambda: _main(argv, stack))
            sys.stdout.flush()
        except BrokenPipeError:  # whoever has read what is printed is gone; Python would say so at length
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            return 1
        return exit_code


def _heeding_ctrl_c(run: Callable[[], int]) -> int:
    try:
        return run()
    except KeyboardInterrupt:
        return stopped_by(signal.SIGINT)


def _main(argv: Sequence[str] | None, stack: contextlib.ExitStack) -> int:
    is_json = False
    try:
        flags = parse(sys.argv[1:] if argv is None else argv)
        is_json = getattr(flags, "log_format", "text") == "json"
        if flags.command == "inspect":
            return _inspect(flags)
        if flags.command in ("tokenizer", "push"):
            stack.close()  # they have files to tidy away
        if flags.command == "tokenizer":
            return _add_tokenizer(flags)
        if flags.command == "push":
            return _upload(flags.directory, flags.push_to_hub, flags.private)
        ranks = ranks_to_start(flags)
        if ranks > 1:
            _job(flags)  # what is wrong with it is said before ranks are there
            return _start_ranks(ranks, lambda: _heeding_ctrl_c(lambda: be_rank(flags, stack)))
    except ConversionError as error:
        return _fail_early(error, is_json=is_json)
    except OSError as error:
        return _fail_early(_refused(error), is_json=is_json)
    return be_rank(flags, stack)


def be_rank(flags: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    """Do a rank's part of a command that several ranks share, or all of it; the exit code."""
    try:
        job = _job(flags)
        if flags.command == "hf-to-megatron" and os.environ.get("RANK", "0") == "0":
            print("".join(f"{note}\n" for note in notes_on_old_flags(flags)), end="", file=sys.stderr)
    except ConversionError as error:
        return _fail_early(error)
    except OSError as error:
        return _fail_early(_refused(error))
    return _run(job, stack)


def _job(flags: argparse.Namespace) -> Options | VerifyJob:
    return verify_job_from_flags(flags) if flags.command == "verify" else options_from_flags(flags)


def _start_ranks(ranks: int, run: Callable[[], int]) -> int:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's threads, which nobody uses and a fork would lose
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    with importing():  # all that ranks import, once for all of them
        import dist_convert.api
        import dist_convert.compare.verify  # noqa: F401
        from dist_convert.ranks.launch import run_ranks

    return run_ranks(ranks, run)


def _fail_early(error: ConversionError, *, is_json: bool = False) -> int:
    """Report an error of flags or job files, which all ranks usually have, but sometimes one of them alone."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        from dist_convert.ranks.channel import Channel, is_served_by_launcher

        if is_served_by_launcher():
            return Channel(rank, size).fail(_message(error, is_json=is_json), error.exit_code)
    print(_message(error, is_json=is_json), file=sys.stderr)
    return error.exit_code


def _message(error: ConversionError, *, is_json: bool) -> str:
    return as_json_line("error", str(error), **error_details(error)) if is_json else str(error)


def _inspect(flags: argparse.Namespace) -> int:
    from dist_convert.formats.describe import as_screen, inspect_checkpoint, missing_line

    description = inspect_checkpoint(flags.path, flags.ckpt_dir_name)
    print(json.dumps(description, indent=2) if flags.json else as_screen(description))
    if missing := missing_line(description):
        print(missing, file=sys.stderr)
    return 1 if missing else 0


def _add_tokenizer(flags: argparse.Namespace) -> int:
    from dist_convert.cli.flags import tokenizer_job_from_flags
    from dist_convert.formats.huggingface.add_tokenizer import add_tokenizer

    if os.environ.get("RANK", "0") == "0":
        job = tokenizer_job_from_flags(flags)
        print(f"{job.target}: wrote {', '.join(add_tokenizer(job))}", file=sys.stderr)
    return 0


def _upload(
    directory: Path, repository: str, private: bool, instruct: bool = False, model_type: str | None = None
) -> int:
    from dist_convert.formats.huggingface.upload import upload, upload_command
    from dist_convert.formats.tokenizer.huggingface import is_huggingface
    from dist_convert.formats.tokenizer.record import how_to_add_tokenizer

    if os.environ.get("RANK", "0") == "0":
        address = upload(directory, repository, private=private)
        print(f"{directory}: uploaded as {address}", file=sys.stderr)
        if not is_huggingface(directory):
            how = how_to_add_tokenizer(directory, instruct=instruct, model_type=model_type)
            print(
                f"{how}; then upload it with: {upload_command(directory, repository, private=private)}", file=sys.stderr
            )
    return 0


def _run(job: Options | VerifyJob, stack: contextlib.ExitStack) -> int:
    with importing():  # torch, which takes seconds; flags and inspect do without
        from dist_convert.api import convert
        from dist_convert.compare.outcome import Outcome
        from dist_convert.compare.outcome import as_json as outcome_json
        from dist_convert.compare.outcome import as_text as outcome_text
        from dist_convert.compare.verify import verify
        from dist_convert.ranks.channel import Channel, is_served_by_launcher
        from dist_convert.ranks.collectives import join_world, leave_world
        from dist_convert.ranks.device import limit_threads, return_freed_memory

    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def connect() -> Channel:
        signals = Signals()
        stack.enter_context(signals.caught())
        return Channel(rank, size, signals, _SILENT_SHARE * job.timeout_seconds, _listener(job))

    def show(outcome: Outcome, as_json: bool) -> None:
        if rank == 0:
            print(outcome_json(outcome) if as_json else outcome_text(outcome), flush=True)

    channel = connect() if size == 1 or is_served_by_launcher() else None
    try:
        # Comparing gathers nothing but reports, which need no accelerator.
        world = join_world("cpu" if isinstance(job, VerifyJob) else job.device, job.timeout_seconds)
        channel = channel or connect()  # without torchrun rank 0 serves the store, from joining on
        limit_threads(world.local_size)
        return_freed_memory()
        exit_code = 0
        if isinstance(job, VerifyJob):
            outcome = verify(job, world, channel)
            show(outcome, job.json)
            exit_code = 0 if outcome.is_same else 1
        else:
            convert(job, world, channel)
        channel.close()
        leave_world(world)
        channel = None  # an upload may take hours, for which no other rank waits,
        stack.close()  # and which signals end
        if isinstance(job, Options) and job.push_to_hub and not job.dry_run:
            _upload(job.target, job.push_to_hub, job.private, job.instruct, job.source_model_type)
    except ConversionError as error:
        if isinstance(error, LostRank) and channel is not None:
            channel.explain(error)
        return _fail(channel, error, job)
    except KeyboardInterrupt:
        raise
    except OSError as error:
        return _fail(channel, _refused(error), job)
    except BaseException:
        found = f"internal error on rank {rank}, please report it:\n{traceback.format_exc()}"
        return _fail(channel, ConversionError(found), job)
    return exit_code


def _listener(job: Options | VerifyJob) -> Listener:
    if isinstance(job, Options):
        kind = JsonLog if job.log_format == "json" else TextLog
        return kind(job.log_interval_seconds)
    return TextLog()


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Spares what is imported the search for garbage, here and at the end: a fifth of the time that torch takes."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _refused(error: OSError) -> ConversionError:
    """An operating system's refusal outside of the reading and writing of weights, and where it was met."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "dist_convert" in frame.filename]
    where = f" (in {Path(frames[-1].filename).name}, {frames[-1].name})" if frames else ""
    if isinstance(error, BrokenPipeError):
        return ConversionError("nobody reads what is printed", remedy="start it again with a reader that stays")
    return ConversionError(
        "the operating system refuses",
        file=str(error.filename or ""),
        found=(error.strerror or str(error)) + where,
        remedy="check the disk or network file system, then start the same command again",
    )


def _fail(channel: Channel | None, error: ConversionError, job: Options | VerifyJob) -> int:
    """Report an error, once for all ranks; the exit code."""
    message = _message(error, is_json=isinstance(job, Options) and job.log_format == "json")
    if channel is not None:
        return channel.fail(message, error.exit_code)
    print(message, file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
