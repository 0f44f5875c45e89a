"""Small or odd files that ask for much memory or time: each is one error of ours, soon and in little memory."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_convert.__main__ import main
from dist_convert.errors import CorruptFile
from dist_convert.formats.huggingface.read import read_weights_header
from dist_convert.read.restricted_pickle import load
from dist_convert.read.source import parse_json, read_json
from dist_convert.read.torch_file import open_container
from tests.checkpoints import Model
from tests.to_megatron import make_hf

MOST_SECONDS = 10.0


def test_keys_that_are_found_by_one_number_are_few() -> None:
    """Each of them would be compared with all before it."""
    keys = (b"\x8a\x0c" + ((2**61 - 1) * n + 1).to_bytes(12, "little") + b"N" for n in range(5_100))
    with pytest.raises(CorruptFile) as caught:
        load(b"\x80\x04}(" + b"".join(keys) + b"u.", "f")
    assert "too many dict keys" in caught.value.found


def test_a_pickle_of_over_64_mb_holds_tensors(tmp_path: Path) -> None:
    size_bytes = 70 << 20
    data = b"\x80\x04]" + b"B" + struct.pack("<I", size_bytes) + bytes(size_bytes) + b"aNa."
    with pytest.raises(CorruptFile) as caught:
        load(data, "f")
    assert "hold only 0 tensors or objects" in caught.value.found


_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
_STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\1tQ"
#: A class or function, and what it is called with again and again, which each call would copy.
CALLS = {
    "a class with many arguments": (b"cmegatron.x\nY\n", b"(" + b"N" * 64 + b"t"),
    "tensors whose sizes are lists": (_TENSOR, b"(" + _STORAGE + b"K\0" + 2 * (b"(" + b"K\1" * 64 + b"l") + b"t"),
    "subclasses with a long list": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n",
        b"(cmegatron.x\nY\nctorch\nTensor\n(" + b"N" * 100_000 + b"lNt",
    ),
}


@pytest.mark.parametrize("kind", CALLS)
def test_what_calls_copy_counts(kind: str) -> None:
    function, arguments = CALLS[kind]
    data = b"\x80\x02" + function + b"q\0" + arguments + b"q\1(" + b"h\0h\1R" * 120_000 + b"l."
    tracemalloc.start()
    with pytest.raises(CorruptFile, match="damaged pickle"):
        load(data, "f")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 8 * len(data) + (64 << 20)


def test_a_million_records_are_refused_before_they_are_listed() -> None:
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0) + b"a/a"
    count = 400_000
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, count * len(entry), 0, 0)
    with pytest.raises(CorruptFile) as caught:
        open_container(io.BytesIO(entry * count + end), "f")
    assert "a directory of 19.6 MB, more than 16.8 MB" in caught.value.found


def test_a_million_empty_tensors_are_refused_before_they_are_listed(tmp_path: Path) -> None:
    text = b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(290_000)) + b"}"
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CorruptFile, match="damaged safetensors header") as caught:
        read_weights_header(tmp_path / "file", "f.safetensors")
    assert "about 2,030,000 values, more than the 2,000,000 that a valid file can have" in caught.value.found


def test_a_small_config_does_not_become_a_large_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each value gets a line of its own, and blanks before it for all levels."""
    make_hf(tmp_path / "in", Model())
    path = tmp_path / "in" / "config.json"
    more = '"more":' + "[" * 90 + "1" + ",1" * 1_900_000 + "]" * 90
    path.write_text(path.read_text().replace("{", "{" + more + ",", 1))
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "huggingface", "--device", "cpu"]) == 1
    assert "not valid JSON" in capsys.readouterr().err


JSON = {
    "900 deep": ("[" * 900 + "]" * 900, "nested more than 32 deep"),
    "deep in objects": ('{"a":[' * 60 + "1" + "]}" * 60, "nested more than 32 deep"),
    "400,000 deep": ("[" * 400_000, "recursion"),
    "5,000 digits": ('{"a":' + "9" * 5000 + "}", "Exceeds the limit"),
    "a million values": ("[" + "0," * 10**6 + "0]", "about 1,000,001 values, more than the 500,000 that a valid file"),
    "a list": ("[]", "list"),
}


@pytest.mark.parametrize("kind", JSON)
def test_json_that_asks_for_much_is_one_error(kind: str, tmp_path: Path) -> None:
    text, found = JSON[kind]
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(CorruptFile) as caught:
        read_json(tmp_path / "f.json")
    assert found in caught.value.found


def test_a_large_header_with_a_character_of_four_bytes_is_refused_before_all_take_as_many() -> None:
    content = '{"a":"\U0001f600"}'.encode() + b" " * 50_000_000
    with pytest.raises(CorruptFile) as caught:
        parse_json(content, "model.safetensors")
    assert "more than 50 MB with characters beyond ASCII" in caught.value.found


def test_a_config_of_62_mb_is_refused_unread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(tmp_path / "in", Model())
    with (tmp_path / "in" / "config.json").open("r+b") as file:
        file.truncate(62_000_000)
    assert main(["inspect", str(tmp_path / "in")]) == 1
    printed = capsys.readouterr().err
    assert "too large for its kind" in printed
    assert "expected: a file of at most 8 MB\n  found:    62 MB\n" in printed


@pytest.mark.parametrize("digits", [4200, 5000])
@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_hidden_layers", "rope_theta", "head_dim"])
def test_a_config_with_a_number_of_many_digits_is_one_error(
    key: str, digits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "in", Model())
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: "NUMBER"}).replace('"NUMBER"', "9" * digits))
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "torch", "--device", "cpu"]) == 1
    printed = capsys.readouterr().err
    assert "internal error" not in printed
    assert len(printed) < 5000


def pipe(path: Path) -> None:
    os.mkfifo(path)


JOB_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a device without an end": (lambda path: path.symlink_to("/dev/zero"), "a pipe, a device or something similar"),
    "a pipe that nobody writes to": (pipe, "a pipe, a device or something similar"),
    "a directory": (lambda path: path.mkdir(), "Is a directory"),
    "too large": (lambda path: path.write_text("# a comment\n" * 10**4), "120 kB"),
    "nested": (lambda path: path.write_text("[" * 1500), "recursion"),
    "nested, and closed": (lambda path: path.write_text("a: " + "[" * 1500 + "]" * 1500), "recursion"),
    "a number of 5,000 digits": (lambda path: path.write_text("tp: " + "9" * 5000), "not a whole number from 1"),
    "a list that holds a list of lists": (
        lambda path: path.write_text(
            "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
        ),
        "line 1: an alias",
    ),
}


@pytest.mark.parametrize("kind", JOB_FILES)
def test_a_job_file_that_is_none_is_one_error(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build, found = JOB_FILES[kind]
    build(tmp_path / "job.yaml")
    started = time.process_time()
    assert main(["convert", "--config", str(tmp_path / "job.yaml")]) == 2
    assert time.process_time() - started < MOST_SECONDS
    printed = capsys.readouterr().err
    assert str(tmp_path / "job.yaml") in printed
    assert found in printed


@pytest.mark.parametrize("flag", ["--tp", "--ranks", "--max-shard-size", "--timeout", "--iteration"])
def test_a_number_of_5000_digits_is_no_flags_value(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "torch", flag, "9" * 5000]
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert "internal error" not in printed
    assert len(printed) < 3000
