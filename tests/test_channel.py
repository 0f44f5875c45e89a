"""What a rank says and heeds when others, or the store where they meet, are gone."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
import torch

from dist_convert.errors import ConversionError
from dist_convert.ranks.collectives import named_loss
from tests.warm import Process


def test_a_rank_without_memory_does_not_blame_another() -> None:
    with pytest.raises(ConversionError, match="this rank has no memory left") as caught, named_loss():
        torch.empty(1 << 60, dtype=torch.uint8)
    assert "memory" in caught.value.found


def test_a_mistake_of_its_own_in_a_collective_blames_no_other_rank() -> None:
    with pytest.raises(RuntimeError, match="invalid for input of size 3"), named_loss():
        torch.zeros(3).view(2, 2)


BUSY_RANK = """
import time
from dist_convert.ranks.channel import Channel
from dist_convert.ranks.collectives import named_loss
from dist_convert.ranks.signals import noted

with noted() as take_signal:
    channel = Channel(0, 2, take_signal)
    print("ready", flush=True)
    while True:
        time.sleep(1)
"""
STORE = """
import time
import torch
from torch.distributed import TCPStore

store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""


def test_a_busy_rank_heeds_a_signal_that_comes_after_the_store_is_gone() -> None:
    with Process(["-c", STORE], os.environ) as store:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.printed_line().strip()}
        meeting |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        with Process(["-c", BUSY_RANK], {**os.environ, **meeting}) as rank:
            assert rank.printed_line() == "ready\n"
            store.kill()
            time.sleep(2)  # until the rank has noticed
            rank.send_signal(signal.SIGTERM)
            assert rank.finish(60).returncode == 143


RANK_THAT_WAITS = """
import os
import time
from dist_convert.errors import LostRank
from dist_convert.ranks.channel import Channel
from dist_convert.ranks.collectives import gather_objects, join_world

rank = int(os.environ["RANK"])
channel = Channel(rank, 2)
channel.meet()
world = join_world("cpu", 60)
print("ready", flush=True)
if rank == 0:
    time.sleep(600)
try:
    gather_objects(world, rank)
except LostRank as error:
    print(error.found)
    channel.explain(error)
    print(error.found, flush=True)
os._exit(0)
"""


def test_a_rank_whose_others_are_gone_with_the_store_says_so_without_words_of_a_backend() -> None:
    with Process(["-c", STORE], os.environ) as store:
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.printed_line().strip()}
        env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        with (
            Process(["-c", RANK_THAT_WAITS], {**env, "RANK": "0", "LOCAL_RANK": "0"}) as first,
            Process(["-c", RANK_THAT_WAITS], {**env, "RANK": "1", "LOCAL_RANK": "1"}) as second,
        ):
            assert [first.printed_line(), second.printed_line()] == ["ready\n", "ready\n"]
            store.kill()
            first.kill()
            printed = second.finish(60).stdout.splitlines()
    assert re.fullmatch(r"Connection closed by peer \[127\.0\.0\.1\]:\d+", printed[1])
    assert printed[2] == "127.0.0.1, where all ranks meet, does not answer"
