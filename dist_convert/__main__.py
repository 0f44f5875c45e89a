"""The command line: exit codes are 0 done, 1 failed, 2 wrong usage, 143 stopped by SIGTERM, 130 by Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dist_convert import errors
from dist_convert.cli.commands import notes_on_old_flags
from dist_convert.cli.flags import (
    build_parser,
    job_from_flags,
    options_from_flags,
    parse_all,
    ranks_to_start,
    tokenizer_job_from_flags,
)
from dist_convert.cli.job_files import job_file
from dist_convert.options import COMMANDS, HUGGINGFACE, Options, VerifyJob, check_together
from dist_convert.ranks.log import Log, as_json_line, tell_torchrun
from dist_convert.ranks.signals import ending_at_once, is_first_rank, noted, rank_and_size, stopped_by
from dist_convert.records import human_bytes

if TYPE_CHECKING:
    from dist_convert.ranks.channel import Channel


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    _open_streams()
    with contextlib.ExitStack() as stack:
        stack.enter_context(ending_at_once())
        try:
            exit_code = _reported(lambda: _main(sys.argv[1:] if argv is None else argv, stack))
            sys.stdout.flush()
        except BrokenPipeError:  # whoever has read what is printed is gone; Python would say so at length
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            return 1
        return exit_code


def _open_streams() -> None:
    """Have standard input, output and error though they are closed: no file must get a number that is printed to."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: no name is a reason to end


def _reported(run: Callable[[], int], *, is_json: bool = False) -> int:
    """The exit code of what runs, or of its error, which is reported: all ranks usually have it, but sometimes one."""
    try:
        return run()
    except KeyboardInterrupt:
        return stopped_by(signal.SIGINT)
    except Exception as raised:
        explained = _explained(raised)
        if explained is None or (isinstance(raised, BrokenPipeError) and os.environ.get("WORLD_SIZE", "1") == "1"):
            raise  # whoever reads no more, such as head, has what it wants, and no other rank waits
        error = explained
    try:
        rank, size = rank_and_size()
    except errors.UsageError:  # which is the error
        rank, size = 0, 1
    channel = None
    if size > 1:
        from dist_convert.ranks.channel import Channel

        with contextlib.suppress(errors.LostRank, RuntimeError):  # it has a thread; then each rank tells of its own
            channel = Channel(rank, size)
    return _fail(channel, error, is_json=is_json)


def _main(argv: Sequence[str], stack: contextlib.ExitStack) -> int:
    flags, wrong = parse_all(argv)
    is_json = getattr(flags, "log_format", "text") == "json"
    if wrong:
        return _reported(lambda: _refuse(flags, wrong), is_json=is_json)
    if flags.command == "inspect":
        return _inspect(flags)
    if flags.command == "models":
        return _print_models(is_json=flags.json)
    if flags.command == "completion":
        return _print_completion(flags.shell)
    if getattr(flags, "print_config", False):  # with the paths as they were given
        besides = {"source": flags.source, "target": flags.target} | ({"ranks": flags.ranks} if flags.ranks else {})
        check_together(options := options_from_flags(flags))
        print(job_file(options, **besides), end="")
        return 0
    if flags.command in ("tokenizer", "push"):
        stack.close()  # they have files to tidy away
    if flags.command == "tokenizer":
        return _add_tokenizer(flags)
    if flags.command == "push":
        wanted = {"push_to_hub": flags.push_to_hub, "private": flags.private, "keep_paths": flags.keep_paths}
        return _upload(Options(HUGGINGFACE, target=Path(flags.directory), **wanted))

    def command() -> int:
        rank_and_size()  # what is wrong with it is said first
        _refuse(flags, [])  # and all that is wrong with the job, before torch is imported
        if (ranks := ranks_to_start(flags)) == 1:
            return be_rank(flags, stack)
        return _start_ranks(ranks, lambda: _reported(lambda: be_rank(flags, stack), is_json=is_json))

    return _reported(command, is_json=is_json)


def _refuse(flags: argparse.Namespace, wrong: Sequence[errors.ConversionError]) -> int:
    """Raise what is wrong with a command line, and with a job's ranks and, where no other rank sees more, its paths."""
    from dist_convert.formats.paths import check_paths

    found = [*wrong, *(errors.collected([partial(ranks_to_start, flags)]) if "ranks" in flags else [])]
    if flags.command in COMMANDS or (flags.command in ("verify", "tokenizer") and not wrong):
        job_of = tokenizer_job_from_flags if flags.command == "tokenizer" else job_from_flags
        jobs = []
        found += errors.collected([lambda: jobs.append(job_of(flags))])
        for job in jobs:
            if isinstance(job, Options) and not wrong:  # else a flag that another needs may be the wrong one
                found += errors.collected([partial(check_together, job)])
            if "RANK" not in os.environ:
                found += errors.collected([partial(check_paths, job)])
    errors.raise_together(found)
    return 0


def be_rank(flags: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    """Do a rank's part of a command that several ranks share, or all of it; the exit code."""
    job = job_from_flags(flags)
    if flags.command == "hf-to-megatron" and is_first_rank():
        print("".join(f"{note}\n" for note in notes_on_old_flags(flags)), end="", file=sys.stderr)
    return _run(job, stack)


def _print_models(*, is_json: bool) -> int:
    from dist_convert.models import FAMILIES, REFUSED, WITH_VISION

    refused = REFUSED | {"any with vision": WITH_VISION}
    converted = {kind: family.hf_class for family in FAMILIES.values() for kind in (family.name, *family.other_types)}
    if is_json:
        print(json.dumps({"converted": converted, "refused": refused}, indent=2))
        return 0
    for title, listed in {"converted, by model_type of config.json": converted, "refused": refused}.items():
        print(f"{title}:", *(f"  {name:<15} {text}" for name, text in listed.items()), sep="\n")
    return 0


def _print_completion(shell: str) -> int:
    try:
        import shtab
    except ImportError as error:
        raise errors.MissingPackage("shell completion needs shtab", remedy="pip install shtab") from error
    parser, commands = build_parser()
    for action in (one for command in commands.values() for one in command._actions):
        if action.metavar in ("PATH", "FILE", "SRC", "DST", "A", "B", "DIRECTORY"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell))
    return 0


def _start_ranks(ranks: int, run: Callable[[], int]) -> int:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's threads, which nobody uses and a fork would lose
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    with importing():  # all that ranks import, once for all of them
        import dist_convert.move.convert  # noqa: F401
        from dist_convert.ranks.launch import run_ranks

    return run_ranks(ranks, run)


def _inspect(flags: argparse.Namespace) -> int:
    from dist_convert.formats.paths import check_checkpoint

    try:
        check_checkpoint(Path(flags.path), flags.ckpt_dir_name)  # told before torch is imported
        with importing():
            from dist_convert.formats.describe import as_screen, inspect_checkpoint

        description = inspect_checkpoint(Path(flags.path), flags.ckpt_dir_name, flags.like)
    except errors.ConversionError as error:
        error.exit_code = 1  # a conversion would not start, for whatever reason
        raise
    print(json.dumps(description, indent=2) if flags.json else as_screen(description))
    if wrong := description.get("not_convertible"):
        print(f"a conversion would not start:\n{wrong}", file=sys.stderr)
    return 1 if wrong else 0


def _add_tokenizer(flags: argparse.Namespace) -> int:
    if is_first_rank():
        _refuse(flags, [])
        from dist_convert.formats.huggingface.add_tokenizer import add_tokenizer

        job = tokenizer_job_from_flags(flags)
        print(errors.shown_line(f"{job.target}: wrote {', '.join(add_tokenizer(job))}"), file=sys.stderr)
    return 0


def _upload(job: Options) -> int:
    from dist_convert.formats.huggingface.upload import push_command, upload
    from dist_convert.formats.tokenizer.huggingface import has_tokenizer_files
    from dist_convert.formats.tokenizer.record import how_to_add_tokenizer

    if is_first_rank():
        print(errors.shown_line(f"{job.target}: uploaded as {upload(job)}"), file=sys.stderr)
        if not has_tokenizer_files(job.target):
            how = f"the target has no tokenizer; {how_to_add_tokenizer(job)}; then upload it with: {push_command(job)}"
            print(errors.shown_line(how), file=sys.stderr)
    return 0


def _run(job: Options | VerifyJob, stack: contextlib.ExitStack) -> int:
    with importing():  # torch, which takes seconds; flags do without
        from dist_convert.compare.outcome import as_json, as_text
        from dist_convert.compare.verify import verify
        from dist_convert.move.convert import convert
        from dist_convert.plan.plan import MOST_THREADS
        from dist_convert.ranks.channel import Channel
        from dist_convert.ranks.collectives import join_world, leave_world
        from dist_convert.ranks.device import limit_threads, return_freed_memory

    rank, size = rank_and_size()
    is_json = isinstance(job, Options) and job.log_format == "json"
    log = Log(is_json, job.log_interval_seconds, job.quiet, isinstance(job, Options) and job.json)
    channel: Channel | None = None
    try:
        control = Channel(rank, size, stack.enter_context(noted()), job.timeout_seconds, log)
        channel = control
        control.meet()
        # Comparing gathers nothing but reports, which need no accelerator.
        world = join_world("cpu" if isinstance(job, VerifyJob) else job.device, job.timeout_seconds)
        limit_threads(world.local_size, MOST_THREADS)
        return_freed_memory()
        exit_code = 0
        if isinstance(job, VerifyJob):
            outcome = verify(job, world, control)
            if rank == 0:
                print(as_json(outcome) if job.json else as_text(outcome), flush=True)
            exit_code = 0 if outcome.is_same else 1
        else:
            convert(job, world, control)
        control.close()
        leave_world(world)
        channel = None  # an upload may take hours, for which no other rank waits,
        stack.close()  # and which signals end
        if isinstance(job, Options) and job.push_to_hub and not job.dry_run:
            _upload(job)
        return exit_code
    except KeyboardInterrupt:
        raise
    except BaseException as raised:
        lines = traceback.format_exc().splitlines()
        error = _explained(raised) or errors.ConversionError(
            f"internal error on rank {rank}, please report it", lines=lines
        )
        if isinstance(error, errors.LostRank) and channel is not None:
            channel.explain(error)
    return _fail(channel, error, is_json=is_json)


#: torch ends the process, or cannot start a thread, where it may map less than this.
_LEAST_ADDRESSES_BYTES = 1_500_000_000


#: New objects between two searches for garbage: a plan makes a million objects and no garbage.
_SEARCHED_AFTER = 100_000


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Spares what is imported the search for garbage, here and at the end: a fifth of the time that torch takes.

    Later searches are rare: they took a fifth of the time that a plan takes.

    Raises:
        ConversionError: torch has no room here, or no current directory.
    """
    limit_bytes = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit_bytes != resource.RLIM_INFINITY and limit_bytes < _LEAST_ADDRESSES_BYTES:
        what = "the limit on address space is too small for torch"
        expected = f"at least {human_bytes(_LEAST_ADDRESSES_BYTES)}"
        remedy = "raise the limit (ulimit -v unlimited); to limit memory, use a cgroup"
        raise errors.ConversionError(what, expected=expected, found=human_bytes(limit_bytes), remedy=remedy)
    try:
        os.getcwd()
    except FileNotFoundError as error:  # MKL would end the process
        remedy = "change to an existing one, then start the same command again"
        raise errors.ConversionError("the current directory is gone", remedy=remedy) from error
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # its words on lost connections are pages of C++ frames
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.set_threshold(_SEARCHED_AFTER)
        gc.enable()


#: What Python and torch say where a process gets no more memory, or no more threads.
_NO_MEMORY = ("annot allocate memory", "an't allocate memory", "failed to map segment")
_NO_THREAD = ("can't start new thread", "Resource temporarily unavailable")
#: What may set an end to both, by the flag of the shell's ulimit.
_LIMITS = {"-v": resource.RLIMIT_AS, "-d": resource.RLIMIT_DATA, "-u": resource.RLIMIT_NPROC}


def _of_limit(error: BaseException) -> errors.ConversionError | None:
    """The error about memory or threads that this process does not get, if it is one."""
    is_memory = isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)
    if not is_memory and (isinstance(error, OSError) or not any(words in str(error) for words in _NO_THREAD)):
        return None
    limits = {flag: resource.getrlimit(number)[0] for flag, number in _LIMITS.items()}
    shown = [
        f"ulimit {flag} {n if flag == '-u' else human_bytes(n)}"
        for flag, n in limits.items()
        if n != resource.RLIM_INFINITY and not (is_memory and flag == "-u")
    ]
    what = "out of memory" if is_memory else "this process cannot start another thread"
    remedy = "raise the limit (ulimit, cgroup), start fewer ranks, or lower --max-memory-per-rank"
    return errors.ConversionError(what, found=", ".join(shown), remedy=remedy)


def _explained(error: BaseException) -> errors.ConversionError | None:
    """The error, or what a refusal of the operating system means, outside of the reading and writing of weights."""
    if isinstance(error, errors.ConversionError):
        return error
    if not isinstance(error, OSError | MemoryError | RuntimeError | ImportError):
        return None
    if of_limit := _of_limit(error):
        return of_limit
    if not isinstance(error, OSError):
        return None
    if isinstance(error, BrokenPipeError):
        return errors.ConversionError(
            "the reader of the output is gone", remedy="start it again with a reader that stays open"
        )
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "dist_convert" in frame.filename]
    where = f" (in {Path(frames[-1].filename).name}, {frames[-1].name})" if frames else ""
    what, remedy = "the operating system refused", f"{errors.remedy_of(error)}, then start the same command again"
    return errors.ConversionError(
        what, error.filename or "", found=(error.strerror or str(error)) + where, remedy=remedy
    )


def _fail(channel: Channel | None, error: errors.ConversionError, *, is_json: bool) -> int:
    """Report an error, once for all ranks; the exit code."""
    message = as_json_line("error", str(error), **errors.error_details(error)) if is_json else str(error)
    tell_torchrun(str(error))
    if channel is not None:
        return channel.fail(message, error.exit_code)
    print(message, file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
