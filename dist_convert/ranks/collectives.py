"""Everything that ranks say to each other: the only file with collectives.

Without a launcher there is one rank, no process group, and every function answers for that rank alone.
"""

import json
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dist_convert.errors import (
    ConversionError,
    Interrupted,
    LostRank,
    PlanError,
    UsageError,
    error_details,
    error_from_details,
)
from dist_convert.ranks.device import BACKENDS, choose_device, current_device
from dist_convert.ranks.signals import node_number, rank_and_size
from dist_convert.ranks.timeout import wait_for_end
from dist_convert.records import Message

ProcessGroup = dist.ProcessGroup


@dataclass(frozen=True)
class World:
    """This rank among all ranks.

    Attributes:
        rank, size: of all.
        nodes: for each rank, the number of its node.
        device: that this rank's collectives use.
        timeout_seconds: how long they wait for a silent rank.
        group: of all of them, over gloo; None: the default group, where there are several.
    """

    rank: int
    size: int
    nodes: tuple[int, ...]
    device: torch.device
    timeout_seconds: float = 600.0
    group: dist.ProcessGroup | None = None

    @property
    def node(self) -> int:
        return self.nodes[self.rank]

    @property
    def local_size(self) -> int:
        return self.nodes.count(self.node)

    @property
    def first_ranks(self) -> list[int]:
        """The first rank of each node, for what one rank does for all of its node."""
        return sorted(map(self.nodes.index, set(self.nodes)))


def alone() -> World:
    """A rank without others, which gathers nothing."""
    return World(0, 1, (0,), torch.device("cpu"))


def join_world(device: str, timeout_seconds: float) -> World:
    """Join the ranks that a launcher has started, alone without one; a LostRank where another one does not come."""
    rank, size = rank_and_size()
    if size > 1:
        with named_loss():
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_seconds))
    nodes = _nodes(size)
    local_rank = int(os.environ.get("LOCAL_RANK", nodes[:rank].count(nodes[rank])))
    return World(rank, size, nodes, choose_device(device, local_rank), timeout_seconds)


@contextmanager
def joined_group(group: dist.ProcessGroup, timeout_seconds: float) -> Iterator[World]:
    """The ranks of a program's process group, all of which enter the block, for as long as it lasts.

    They talk over a gloo group of their own. Bytes are gathered over the backend of the program's group, on the device
    that the program has chosen. An error of one rank is raised on all, where they would next hear of each other.

    Raises:
        UsageError: another thread of this process is in such a block, whose messages would be mixed with these.
    """
    if not (turn := _turn()).acquire(blocking=False):
        what, remedy = "this process is already converting within a process group", "make one call after the other"
        raise UsageError(what, remedy=remedy)
    try:
        with _joined(group, timeout_seconds) as world:
            yield world
    finally:
        turn.release()


@cache
def _turn() -> threading.Lock:
    return threading.Lock()


@contextmanager
def _joined(group: dist.ProcessGroup, timeout_seconds: float) -> Iterator[World]:
    members, backend = tuple(dist.get_process_group_ranks(group)), dist.get_backend(group)
    # torch names a group of some of a program's ranks by how many groups a rank is in, which its members need not have
    # in common: none is made where their own is over gloo. One of all ranks is made in the order in which all make any.
    is_control = backend == "gloo" and len(members) < dist.get_world_size()
    control = group if is_control else _group_of(members, "gloo", timeout_seconds, group)
    size, device = len(members), current_device(backend)
    nodes = _numbered(_gathered(socket.gethostname(), size, control))
    world = World(dist.get_rank(group), size, nodes, device, timeout_seconds, control)
    try:
        yield world
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # others must hear of a callback's Ctrl-C, too
        told, is_lost = _as_told(error), True
        try:
            if told.rank is None and not isinstance(told, LostRank):
                _exchange(world, ["error", error_details(told)])  # what others say meanwhile is lost
            is_lost = isinstance(told, LostRank)
        except LostRank:
            pass  # the first error counts
        finally:  # also where Ctrl-C ends the exchange
            if is_lost:
                _group_of.cache_clear()  # its connections may be broken
        raise


def _as_told(error: BaseException) -> ConversionError:
    """What other ranks raise where this one raises an error."""
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(signal.SIGINT)
    return error if isinstance(error, ConversionError) else ConversionError(f"{type(error).__name__}: {error}")


@cache
def _group_of(members: tuple[int, ...], backend: str, timeout_seconds: float, within: ProcessGroup) -> ProcessGroup:
    """A group of some ranks of the whole program, made once for a group that they are `within`; others take no part.

    It lasts as long as the program's own: torch gives a later one of the same ranks the name of one that was
    destroyed, and meets its dead connections in the store.
    """
    group: ProcessGroup = dist.new_group(
        list(members),
        timeout=timedelta(seconds=timeout_seconds),  # which is not inherited
        backend=backend,
        use_local_synchronization=len(members) < dist.get_world_size(),
    )
    return group


def _nodes(size: int) -> tuple[int, ...]:
    """Every rank's node: as the launcher numbers them, or by host names where it does not say."""
    if size == 1:
        return (0,)
    node = node_number()
    names = _gathered(node or socket.gethostname(), size)
    return tuple(map(int, names)) if node is not None else _numbered(names)


def _numbered(names: Sequence[str]) -> tuple[int, ...]:
    return tuple(map(list(dict.fromkeys(names)).index, names))


def _gathered(mine: str, size: int, group: ProcessGroup | None = None) -> list[str]:
    texts = [""] * size
    dist.all_gather_object(texts, mine, group=group)
    return texts


def leave_world(world: World) -> None:
    """Leave the process group, so that no backend warns at exit."""
    if world.size > 1:
        dist.destroy_process_group()


_Value = TypeVar("_Value")


def gather_objects(world: World, mine: _Value) -> list[_Value]:
    """Every rank's JSON value, by rank. It travels as JSON over gloo, on every device: others' tuples are lists here.

    Raises:
        LostRank: another rank is gone, or silent for too long.
        ConversionError: another rank tells of it, see `joined_group`.
    """
    if world.size == 1:
        return [mine]
    said = _exchange(world, ["value", mine])
    for rank, (kind, content) in enumerate(said):
        if kind == "error":
            error = error_from_details(content)
            error.rank = rank
            raise error
    return [content for _, content in said]


def _exchange(world: World, mine: Any) -> list[Any]:
    with named_loss():
        texts = _gathered(json.dumps(mine, separators=(",", ":")), world.size, world.group)
    return [json.loads(text) for text in texts]


#: gloo's, NCCL's and HCCL's errors, where they are nothing more special than a RuntimeError.
_OF_A_BACKEND = re.compile(r"gloo|nccl|hccl|connect|socket|peer|pipe|timed? ?out", re.IGNORECASE)
#: gloo's place in its source, what it says, and its advice.
_OF_GLOO = re.compile(r"^\[/\S*\] (.*?)(\. .*)?$")


@contextmanager
def named_loss() -> Iterator[None]:
    """Say plainly what a backend's error means: another rank is gone, or silent for too long; other errors stay."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        found = str(error).partition("\n")[0]
        if "memory" in found and not isinstance(error, dist.DistError):  # of this rank's own, on any device
            what = "this rank has no memory left for what it sends or receives"
            remedy = "start fewer ranks on this machine, or lower --max-memory-per-rank"
            raise ConversionError(what, found=found, remedy=remedy) from error
        if not isinstance(error, dist.DistError) and not _OF_A_BACKEND.search(found):
            raise
        found = _OF_GLOO.sub(r"\1", found)
        remedy = "look for the rank that ended first, or for a network that was cut, and start again"
        raise LostRank("lost contact with another rank", found=found, remedy=remedy) from error


def broadcast(world: World, mine: bytes, size_bytes: int, source: int = 0) -> bytes:
    """The source's bytes, so many of them, on every rank; others' are not used. They travel over gloo everywhere."""
    if world.size == 1:
        return mine
    buffer = bytearray(mine if world.rank == source else size_bytes)
    with named_loss():
        dist.broadcast(torch.frombuffer(buffer, dtype=torch.uint8), group=world.group, group_src=source)
    return bytes(buffer)


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    gather_objects(world, None)


#: How often ranks meet that wait for the work of others.
_MEET_SECONDS = 5.0


def run_on(world: World, ranks: Sequence[int], work: Callable[[], object]) -> None:
    """Do something on some ranks, however long it takes; all return when it is done on each of them.

    It is done in a thread. All ranks meet now and then meanwhile, so that no collective waits for longer than it may.

    Raises:
        LostRank: another rank is gone, or silent for too long.
        ConversionError: of the work, on the rank where it fails. All others end as with any failure.
    """
    if world.size == 1:  # nobody waits, and Ctrl-C of a program ends it
        for _ in ranks:
            work()
        return
    seconds, is_done = min(_MEET_SECONDS, world.timeout_seconds / 4), False
    with ThreadPoolExecutor(1) as thread:
        working = [thread.submit(work)] if world.rank in ranks else []
        try:
            while not is_done:
                done, waiting = wait(working, seconds)
                for one in done:
                    one.result()
                is_done = all(gather_objects(world, not waiting))
        finally:
            wait_for_end(lambda: all(one.done() for one in working))


def agree(world: World, digest: str) -> None:
    """Check that all ranks made the same plan; a PlanError names the first rank that differs."""
    digests = gather_objects(world, digest)
    for rank, other in enumerate(digests):
        if other != digests[0]:
            expected, found = f"{digests[0][:16]} as on rank 0", f"{other[:16]} on rank {rank}"
            remedy = "all ranks must run the same version with the same flags, and all nodes have the same config.json"
            raise PlanError("ranks made different plans", expected=expected, found=found, remedy=remedy)


#: HCCL knows no bytes, 16-bit integers or fp8; int32 is known by every backend.
WIRE_DTYPE = torch.int32


@dataclass(frozen=True)
class Staging:
    """An accelerator's memory for gathers, one buffer to send and one to receive, and the stream that they use."""

    send: torch.Tensor
    received: torch.Tensor
    stream: Any


@dataclass(frozen=True)
class Gatherer:
    """Brings raw bytes from member to member of one group, through the accelerator's memory where there is one.

    Attributes:
        group: over gloo that of all ranks, on accelerators that of the group.
        ranks: the members' numbers in the group.
        member: this rank's place among them.
        staging: the accelerator's memory.
    """

    group: dist.ProcessGroup
    ranks: tuple[int, ...]
    member: int
    staging: Staging | None

    @property
    def members(self) -> int:
        return len(self.ranks)


def make_gatherer(world: World, ranks: Sequence[int], send_bytes: int) -> Gatherer | None:
    """Prepare the gathers of a group of ranks, whose members send so many bytes at most; None for a group of one."""
    if len(ranks) == 1:
        return None
    member, backend = ranks.index(world.rank), BACKENDS[world.device.type]
    whole = world.group or dist.group.WORLD
    assert whole is not None  # there are several ranks
    if backend == "gloo":  # whose messages need no group of their own
        return Gatherer(whole, tuple(ranks), member, None)
    of_program = dist.get_process_group_ranks(whole)
    group = _group_of(tuple(of_program[rank] for rank in ranks), backend, world.timeout_seconds, whole)
    words = send_bytes // WIRE_DTYPE.itemsize
    send, received = (torch.empty(n, dtype=WIRE_DTYPE, device=world.device) for n in (words, words * len(ranks)))
    staging = Staging(send, received, torch.get_device_module(world.device).Stream())
    return Gatherer(group, tuple(range(len(ranks))), member, staging)


def begin_gather(
    gatherer: Gatherer, send: torch.Tensor, received: torch.Tensor, wanted: Sequence[Message]
) -> Callable[[], None] | None:
    """Begin to bring to each member what it needs of the others' bytes.

    An accelerator gathers all from all, at once. Over gloo only the messages go, straight from buffer to buffer, while
    this rank does other things: gloo gathers through a hidden copy of everything, and takes three times as long.

    Args:
        send: uint8, a multiple of 4 bytes, the same size on every member.
        received: uint8, `members` times as long: every member's bytes, in the order of members. What no message to this
            member names is undefined.
        wanted: the messages between all members, the same on each.

    Returns:
        What waits until all of it has come; both tensors are in use until then. None where it has come already.

    Raises:
        LostRank: at once, or from what is returned.
    """
    source, target = send.view(WIRE_DTYPE), received.view(WIRE_DTYPE)
    with named_loss():
        if gatherer.staging is not None:
            _gather_on_device(gatherer.group, gatherer.staging, source, target)
            return None
        works = _pass_messages(gatherer, source, target.view(gatherer.members, -1), wanted)

    def wait() -> None:
        with named_loss():
            for work in works:
                work.wait()

    return wait


def _pass_messages(
    gatherer: Gatherer, source: torch.Tensor, target: torch.Tensor, wanted: Sequence[Message]
) -> list[dist.Work]:
    works = []
    for message in wanted:
        first = message.offset_bytes // WIRE_DTYPE.itemsize
        words = slice(first, first + message.size_bytes // WIRE_DTYPE.itemsize)
        if message.receiver == gatherer.member:
            into = target[message.sender, words]
            works.append(dist.irecv(into, group=gatherer.group, group_src=gatherer.ranks[message.sender]))
        elif message.sender == gatherer.member:
            works.append(dist.isend(source[words], group=gatherer.group, group_dst=gatherer.ranks[message.receiver]))
    return [work for work in works if work is not None]


def _gather_on_device(group: dist.ProcessGroup, staging: Staging, source: torch.Tensor, target: torch.Tensor) -> None:
    device_source, device_target = staging.send[: source.numel()], staging.received[: target.numel()]
    with torch.get_device_module(device_source.device).stream(staging.stream):
        device_source.copy_(source, non_blocking=True)
        # torch 2.13 renames all_gather_into_tensor to all_gather_single and warns at the old name.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(device_target, device_source, group=group)
        # This copy blocks: it ends the wait for all three, and has Gaudi's lazy mode carry them out.
        target.copy_(device_target)
