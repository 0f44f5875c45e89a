"""Messages of a gather step: what each member needs of the others, and nothing else."""

from __future__ import annotations

from dist_convert.plan.plan import Limits
from dist_convert.plan.steps import Read, ReadColumns, Step, Write, messages, received_bytes
from dist_convert.records import Message, View


def view(columns: int) -> View:
    return View("file", "tensor", "BF16", 0, 8, columns, columns, 1)


def read(reader: int, offset_bytes: int, columns: int = 8) -> Read:
    return Read(view(columns), "BF16", 0, reader, offset_bytes)


def write(writer: int, *reads: int) -> Write:
    return Write(view(8 * len(reads)), tuple(ReadColumns(number, 0, 8) for number in reads), writer)


#: Two blocks of two pieces, a piece of each on member 0 and 1; member 0 writes the first block, member 1 the second.
TWO_BLOCKS = Step(
    (read(0, 0), read(1, 0), read(0, 128), read(1, 128)),
    (write(0, 0, 1), write(1, 2, 3)),
    send_bytes=256,
)


def test_a_member_gets_the_pieces_that_it_writes_and_has_not_read() -> None:
    assert messages(TWO_BLOCKS) == [Message(0, 1, 128, 128), Message(1, 0, 0, 128)]


def test_pieces_that_touch_in_the_senders_buffer_are_one_message() -> None:
    step = Step((read(0, 0), read(0, 128), read(0, 256), read(0, 384)), (write(1, 0, 1, 3),), 512)
    assert messages(step) == [Message(0, 1, 0, 256), Message(0, 1, 384, 128)]


def test_a_message_ends_where_the_next_piece_may_begin() -> None:
    step = Step((read(0, 0, columns=5), read(0, 128)), (write(1, 0, 1),), 256)  # 8 x 5 elements: 80 bytes
    assert messages(step) == [Message(0, 1, 0, 256)]


def test_a_piece_that_a_member_writes_to_several_files_comes_once() -> None:
    step = Step((read(0, 0),), (write(1, 0), write(1, 0), write(2, 0), write(0, 0)), 128)
    assert messages(step) == [Message(0, 1, 0, 128), Message(0, 2, 0, 128)]


def test_over_gloo_a_member_receives_its_messages_and_on_an_accelerator_everything() -> None:
    passed = messages(TWO_BLOCKS)
    for member in (0, 1):
        assert received_bytes(TWO_BLOCKS, passed, member, Limits(256, members=2)) == 128
        assert received_bytes(TWO_BLOCKS, passed, member, Limits(256, members=2, on_accelerator=True)) == 512


def test_a_step_in_which_nothing_crosses_receives_nothing() -> None:
    alone = Step((read(0, 0),), (write(0, 0),), send_bytes=0)
    assert messages(alone) == []
    assert received_bytes(alone, messages(alone), 0, Limits(0, members=2)) == 0
