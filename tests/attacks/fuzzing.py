"""Damages valid files in every reader's format and reads them again: an error of ours is the answer, or a value.

As a program it does that for as long as it is told: `python -m tests.attacks.fuzzing --seconds 3600`. Every round is a
search by hypothesis from a new seed; what it finds is shown with the smallest damage that does it.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dist_convert.errors import ConversionError
from dist_convert.metadata.hf_architecture import architecture_from_config, config_vocab
from dist_convert.read.json_file import read_json
from dist_convert.read.megatron_shard import read_shard, shard_to_json
from dist_convert.read.pickled_weights import read_pickled_weights
from dist_convert.read.safetensors_header import read_safetensors_header
from dist_convert.read.weights_index import read_index_file
from tests.checkpoints import Model, training_args
from tests.to_megatron import config_of

#: Bytes that formats are made of: numbers at their limits, and the opcodes, brackets and signatures of the formats.
TOKENS = (
    b"\x00" * 4, b"\xff" * 4, b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06",
    b"c__builtin__\neval\n", b"R", b"b", b"s", b"u", b"e", b"(", b"t", b"0", b"2", b"h\x00", b"q\x00", b"\x81", b"\x93",
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"-1", b"1e999", b"NaN", b"9" * 30, b"../", b"/etc/passwd",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A valid file and the reader of its format."""

    name: str
    data: bytes
    read: Callable[[Path], Any]


def _read_config(path: Path) -> None:
    config = read_json(path)
    architecture_from_config(config, padded_vocab=config_vocab(config, file=path.name), file=path.name)


def _read_shard(path: Path) -> None:
    json.dumps(shard_to_json(read_shard(path, path.name)))


def _read_pickle(path: Path) -> None:
    """As a shard whose container is sound, else nearly every damage is found by the checksum."""
    with zipfile.ZipFile(path.with_name("sound.pt")) as saved, zipfile.ZipFile(path.with_suffix(".pt"), "w") as archive:
        for name in saved.namelist():
            archive.writestr(name, path.read_bytes() if name.endswith("/data.pkl") else saved.read(name))
    _read_shard(path.with_suffix(".pt"))


def targets(directory: Path) -> list[Target]:
    """Small files of every format whose header is read."""
    weights = {"a.weight": torch.ones(4, 3), "b.weight": torch.zeros(2, dtype=torch.bfloat16)}
    args = training_args(Model(layers=1), path=Path("/a/b"))
    torch.save({"args": args, "checkpoint_version": 3.0, "model": weights, "iteration": 4}, directory / "shard.pt")
    with zipfile.ZipFile(directory / "shard.pt") as archive:
        (directory / "data.pkl").write_bytes(archive.read("shard/data.pkl"))
    shutil.copyfile(directory / "shard.pt", directory / "sound.pt")
    torch.save(weights, directory / "model.bin")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": 56}, "weight_map": dict.fromkeys(weights, "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(config_of(Model()).to_json_string())
    readers: dict[str, Callable[[Path], Any]] = {
        "data.pkl": _read_pickle,
        "shard.pt": _read_shard,
        "model.bin": lambda path: read_pickled_weights(path, path.name),
        "model.safetensors": lambda path: read_safetensors_header(path, path.name),
        "model.safetensors.index.json": lambda path: read_index_file(path.parent, path.name),
        "config.json": _read_config,
    }
    return [Target(name, (directory / name).read_bytes(), read) for name, read in readers.items()]


#: What is done at a place, as a share of the file's length: bytes put over others or between them, or bytes taken out.
CHANGES = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["over", "between", "out"]),
        st.one_of(st.sampled_from(TOKENS), st.binary(min_size=1, max_size=8)),
    ),
    min_size=1,
    max_size=3,
)


def damage(data: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
    """The bytes of a file after some changes."""
    for place, kind, value in changes:
        at = int(place * len(data))
        data = data[:at] + (b"" if kind == "out" else value) + data[at + (0 if kind == "between" else len(value)) :]
    return data


def fuzz(target: Target, directory: Path, examples: int, chosen_seed: int) -> Counter[str]:
    """Read damaged files; returns how often each answer came: "read", or the name of an error of ours.

    Raises:
        Exception: whatever a reader raised that is no error of ours.
    """
    answers: Counter[str] = Counter()
    path = directory / target.name

    @seed(chosen_seed)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changes=CHANGES)
    def once(changes: list[tuple[float, str, bytes]]) -> None:
        path.write_bytes(damage(target.data, changes))
        try:
            target.read(path)
            answers["read"] += 1
        except ConversionError as error:
            answers[type(error).__name__ if str(error) else "no text"] += 1

    once()
    return answers


def main() -> None:
    """Fuzz all readers in turn until the time is over, and print how often each answer came."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    ends_at = time.monotonic() + parser.parse_args().seconds
    chance = random.Random()
    answers: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        made = targets(Path(name))
        while time.monotonic() < ends_at:
            for target in made:
                counted = answers.setdefault(target.name, Counter())
                counted += fuzz(target, Path(name), 500, chance.randrange(1 << 32))
    for name, counted in answers.items():
        print(f"{name:30}{counted.total():9,} files:", ", ".join(f"{n:,} {kind}" for kind, n in counted.most_common()))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB, nothing untyped")


if __name__ == "__main__":
    main()
