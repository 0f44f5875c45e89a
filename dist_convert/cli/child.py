"""A conversion in ranks of their own, for a program that must not be forked: the command, and what its log says."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dist_convert import errors
from dist_convert.cli.flags import with_numbers
from dist_convert.cli.job_files import job_file
from dist_convert.move.report import Report, report_from_details
from dist_convert.options import CONVERT, Options
from dist_convert.records import JsonObject

#: How often a program that waits for its ranks asks whether to end them, and how often they tell how far they are.
_POLL_SECONDS, _PROGRESS_SECONDS = 0.2, 1
_LINES_OF_A_CRASH = 20
#: Imports nothing from the current directory, which may be a model's, as `python -m` would: of `-c` it is the path "".
_PROGRAM = "import sys; sys.path[:] = filter(None, sys.path); from dist_convert.__main__ import main; sys.exit(main())"


def convert_in_ranks(
    job: Options, ranks: int, on_progress: Callable[[int, int], None] | None, cancel: Callable[[], bool] | None
) -> Report:
    """Run the command in a process of its own, whose log says what happens."""
    for path in (job.source, str(job.target)):
        if (replaced := with_numbers(path)) != path:
            what, remedy = "ranks of their own replace numbers in braces in a path", "give a path without them"
            raise errors.UsageError(what, file=path, found=replaced, remedy=remedy)
    with tempfile.TemporaryDirectory(prefix="dist_convert-") as directory:
        file = Path(directory) / "job.yaml"
        logged = replace(job, log_format="json", json=False, quiet=False, log_interval_seconds=_PROGRESS_SECONDS)
        file.write_text(job_file(logged), encoding="utf-8")
        launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
        environment = {name: value for name, value in os.environ.items() if name not in launcher}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        with subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, CONVERT, "--config", str(file), "--ranks", str(ranks)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as process:
            stop, raised = threading.Event(), list[BaseException]()
            if cancel is not None:
                threading.Thread(target=_end_when_asked, args=(process, cancel, stop, raised), daemon=True).start()
            try:
                said = list(_events(process, on_progress))
            except BaseException:
                _end(process)
                raise
            finally:
                stop.set()
    if raised:
        raise raised[0]
    exit_code = process.returncode
    reports = [event["report"] for event in said if "report" in event]
    if exit_code == 0 and reports:
        return report_from_details(reports[0])
    if cancel is not None and exit_code in (128 + signal.SIGTERM, -signal.SIGTERM):
        raise errors.Cancelled
    for event in said:
        if event["event"] == "error":
            raise errors.error_from_details(event)
    lines = [event["text"] for event in said if event["event"] == "text"][-_LINES_OF_A_CRASH:]
    raise errors.LostRank(f"the ranks ended with exit code {exit_code}", lines=lines)


def _events(process: subprocess.Popen[str], on_progress: Callable[[int, int], None] | None) -> Iterator[JsonObject]:
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


def _end(process: subprocess.Popen[str]) -> None:
    """End the ranks, and wait until none of them writes any more, however often Ctrl-C is pressed."""
    assert process.stderr is not None
    process.send_signal(signal.SIGTERM)
    while process.poll() is None:
        with suppress(KeyboardInterrupt):  # for which `Popen` itself would wait a quarter of a second at most
            for _ in process.stderr:  # what they still say must not fill the pipe
                pass
            process.wait()


def _end_when_asked(
    process: subprocess.Popen[str], cancel: Callable[[], bool], stop: threading.Event, raised: list[BaseException]
) -> None:
    """Ask the program now and then whether to end the ranks; what it raises ends them, too, and is noted."""
    while not stop.wait(_POLL_SECONDS):
        try:
            is_asked = cancel()
        except BaseException as error:  # the thread that waits for the ranks raises it
            raised.append(error)
            is_asked = True
        if is_asked:
            process.send_signal(signal.SIGTERM)
            return
