"""What crosses from member to member in a gather step: each message, from the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dist_convert.plan.limits import ALIGNMENT_BYTES, Limits
from dist_convert.plan.steps import Step


@dataclass(frozen=True)
class Message:
    """A stretch of the sender's buffer that the receiver needs. Sender and receiver are positions in the team."""

    sender: int
    receiver: int
    offset_bytes: int
    size_bytes: int

    def leads_to(self, sender: int, receiver: int, offset_bytes: int) -> bool:
        """Whether a stretch of the same two members follows this one without a gap."""
        return (self.sender, self.receiver, self.offset_bytes + self.size_bytes) == (sender, receiver, offset_bytes)


def messages(step: Step) -> list[Message]:
    """All messages of a step, in one order for all members; stretches that touch are one message."""
    if not step.send_bytes:
        return []
    needed = {(step.reads[part.read].reader, write.writer, part.read) for write in step.writes for part in write.parts}
    crossing = ((r, w, step.reads[n].offset_bytes, step.reads[n].size_bytes) for r, w, n in needed if r != w)
    found: list[Message] = []
    for sender, receiver, offset_bytes, size_bytes in sorted(crossing):
        size_bytes = -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES  # up to where the next piece begins
        if found and found[-1].leads_to(sender, receiver, offset_bytes):
            found[-1] = replace(found[-1], size_bytes=found[-1].size_bytes + size_bytes)
        else:
            found.append(Message(sender, receiver, offset_bytes, size_bytes))
    return found


def received_bytes(step: Step, passed: Sequence[Message], member: int, limit: Limits) -> int:
    """What a member receives in a step with such messages: of an accelerator all that is sent, over gloo its share."""
    if limit.on_accelerator:
        return step.send_bytes * limit.members
    return sum(message.size_bytes for message in passed if message.receiver == member)
