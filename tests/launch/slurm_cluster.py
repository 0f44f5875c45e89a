"""A real Slurm of two nodes on this machine: Debian's `slurm-wlm` and `munge`, started by root in a directory."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.launching import REPOSITORY, environment, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun")
TIMEOUT_SECONDS = 120.0

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={directory}/munge.socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=node[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE
PartitionName=patient Nodes=node[1-2] PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=node[1-2] PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why there can be no cluster here, or None."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        return f"no {', '.join(missing)} here (Debian: slurm-wlm and munge)"
    return None if os.getuid() == 0 else "Slurm's daemons are started by root only"


@dataclass(frozen=True)
class Job:
    """A job that has ended: its state, how often it was started again, and what it printed."""

    state: str
    restarts: int
    printed: str


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    directory: Path

    def run(self, *command: str, env: Mapping[str, str] | None = None) -> str:
        """What a command of Slurm prints."""
        found = environment(SLURM_CONF=str(self.directory / "slurm.conf"), **(env or {}))
        done = subprocess.run(command, env=found, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def fields(self, job: str) -> dict[str, str]:
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def submit(self, *arguments: str, **env: str) -> Job:
        """Run `launch/slurm.sbatch` on both nodes, one rank on each, until it has ended."""
        return self.wait(self.start(*arguments, **env))

    def start(self, *arguments: str, partition: str = "all", **env: str) -> str:
        """Put `launch/slurm.sbatch` into the queue, for one rank on each node; returns the job's number."""
        log = self.directory / "%j.log"
        limits = ("--parsable", "--nodes=2", "--cpus-per-task=1", f"--partition={partition}", f"--output={log}")
        script = str(REPOSITORY / "launch" / "slurm.sbatch")
        meeting = {"RANKS_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "PYTHON": sys.executable}
        return self.run("sbatch", *limits, script, *arguments, env=meeting | env).strip()

    def wait(self, job: str) -> Job:
        """Wait until a job has ended, however often it goes back into the queue."""
        log = self.directory / f"{job}.log"
        deadline, started = time.monotonic() + TIMEOUT_SECONDS, "0"
        while time.monotonic() < deadline:
            fields = self.fields(job)
            if fields["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED"):
                return Job(fields["JobState"], int(fields["Restarts"]), log.read_text())
            if fields["JobState"] == "PENDING" and fields["Restarts"] != started:
                # Slurm lets a requeued job wait for two minutes. A node refuses it in the second in which it was ended.
                time.sleep(2)
                started = fields["Restarts"]
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(0.2)
        raise TimeoutError(f"{self.fields(job)}\n{log.read_text() if log.exists() else 'nothing printed'}")


@contextmanager
def _daemon(*command: str, log: Path) -> Iterator[None]:
    with log.open("w") as output:
        running = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            yield
        finally:
            running.terminate()
            running.wait(timeout=30)


@contextmanager
def cluster(directory: Path) -> Iterator[Cluster]:
    """Two nodes that wait for jobs."""
    (directory / "munge.key").write_bytes(os.urandom(1024))
    (directory / "munge.key").chmod(0o400)
    (directory / "state").mkdir()
    conf = directory / "slurm.conf"
    ports = [free_port() for _ in range(3)]
    conf.write_text(CONFIGURATION.format(host=socket.gethostname(), directory=directory, ports=ports))
    names = {"key": "key", "socket": "socket", "pid": "pid", "log": "log", "seed": "seed"}
    files = [f"--{kind}{'' if kind == 'socket' else '-file'}={directory}/munge.{name}" for kind, name in names.items()]
    with ExitStack() as daemons:
        for name, *command in (
            ("munged", "munged", "--foreground", "--force", *files),
            ("slurmctld", "slurmctld", "-D", "-c", "-f", str(conf)),
            ("node1", "slurmd", "-D", "-N", "node1", "-f", str(conf)),
            ("node2", "slurmd", "-D", "-N", "node2", "-f", str(conf)),
        ):
            daemons.enter_context(_daemon(*command, log=directory / f"{name}.output"))
            if name == "munged":
                _wait_for(lambda: (directory / "munge.socket").exists(), directory)
        found = Cluster(directory)
        _wait_for(lambda: _idle_nodes(conf) == 2, directory)
        yield found


def _idle_nodes(conf: Path) -> int:
    command = ["sinfo", "--noheader", "--Node", "--partition=all", "--format=%T"]
    done = subprocess.run(command, env=environment(SLURM_CONF=str(conf)), capture_output=True, text=True, check=False)
    return done.stdout.split().count("idle")


def _wait_for(is_there: Callable[[], bool], directory: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not is_there():
        if time.monotonic() > deadline:
            raise TimeoutError("\n".join(path.read_text() for path in directory.glob("*.output")))
        time.sleep(0.1)
