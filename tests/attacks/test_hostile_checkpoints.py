"""Checkpoints made to do harm: nothing in them runs, they cost little time and memory, and every error is typed."""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import pickle
import runpy
import struct
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dist_convert
from dist_convert.errors import ConversionError, CorruptFile, UnsafePickle
from dist_convert.formats.torch.shards import read_shard, shard_to_json
from dist_convert.read.restricted_pickle import load
from tests.checkpoints import Model, hf_tensors, megatron_shards, save, training_args
from tests.converting import convert

FILE = "mp_rank_00/model_optim_rng.pt"


class Call:
    """Pickled as an instruction to call a function with arguments, each of which may be a `Call` itself."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._made_from = function, arguments

    def __reduce__(self) -> Any:
        return self._made_from

    def __call__(self) -> None:
        """Pickle only writes functions that look callable."""


def _through_a_module(canary: Path) -> Call:
    (canary.parent / "canary_module.py").write_text(f"open({str(canary)!r}, 'w').close()")
    return Call(importlib.import_module, "canary_module")


def _through_a_script(canary: Path) -> Call:
    (canary.parent / "script.py").write_text(f"open({str(canary)!r}, 'w').close()")
    return Call(runpy.run_path, str(canary.parent / "script.py"))


ATTACKS: dict[str, Callable[[Path], Call]] = {
    "os.system": lambda canary: Call(os.system, f"touch {canary}"),
    "eval": lambda canary: Call(eval, f"open({str(canary)!r}, 'w').close()"),
    "exec": lambda canary: Call(exec, f"open({str(canary)!r}, 'w').close()"),
    "open": lambda canary: Call(open, str(canary), "w"),
    "subprocess": lambda canary: Call(subprocess.check_call, ["touch", str(canary)]),
    "partial": lambda canary: Call(Call(functools.partial, os.system, f"touch {canary}")),  # type: ignore[arg-type]
    "getattr of an import": lambda canary: Call(
        Call(getattr, Call(importlib.import_module, "os"), "mkdir"),
        str(canary),  # type: ignore[arg-type]
    ),
    "nested pickle": lambda canary: Call(pickle.loads, pickle.dumps(Call(os.mkdir, str(canary)))),
    "import_module": _through_a_module,
    "runpy": _through_a_script,
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_call_is_refused_and_not_made(
    attack: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    monkeypatch.syspath_prepend(str(tmp_path))
    data = pickle.dumps(ATTACKS[attack](canary), protocol)
    with pytest.raises(UnsafePickle):
        load(data, FILE)
    assert not canary.exists()
    pickle.loads(data)  # what an unrestricted reader does with it
    sys.modules.pop("canary_module", None)
    assert canary.exists()


def test_a_chain_of_getattr_over_allowed_names_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    scope: Any = Call(getattr, Call(getattr, Namespace, "__init__"), "__globals__")
    module: Any = Call(Call(getattr, scope, "get"), "_os")  # type: ignore[arg-type]
    data = pickle.dumps(Call(Call(getattr, module, "mkdir"), str(canary)), 2)  # type: ignore[arg-type]
    load(data, FILE)
    assert not canary.exists()
    pickle.loads(data)
    assert canary.exists()


REFUSED = (
    "os.system", "posix.system", "nt.system", "subprocess.Popen", "builtins.eval", "builtins.exec", "__builtin__.eval",
    "builtins.__import__", "builtins.compile", "builtins.globals", "builtins.type", "torch.hub.load", "torch.load",
    "torch.jit.load", "torch.storage._load_from_bytes", "importlib.import_module", "functools.partial",
    "operator.attrgetter", "runpy.run_path", "pickle.loads", "numpy.load", "sys.exit", "shutil.rmtree",
    "types.FunctionType", "types.CodeType", "argparse.ArgumentParser", "pathlib.Path.unlink", "ctypes.CDLL",
)  # fmt: skip


@pytest.mark.parametrize("path", REFUSED)
def test_a_dangerous_name_is_refused_however_it_is_spelled(path: str) -> None:
    module, name = path.rpartition(".")[::2]
    if path == "pathlib.Path.unlink":
        module, name = "pathlib", "Path.unlink"
    lines = f"{module}\n{name}\n".encode()
    short = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)]
    for data in (b"c" + lines + b".", b"(i" + lines + b".", b"\x80\x04" + b"".join(short) + b"\x93."):
        with pytest.raises(UnsafePickle) as caught:
            load(data, FILE)
        assert caught.value.found == path
        assert "nothing was run" in caught.value.what


@pytest.mark.parametrize("where", ["args", "optimizer", "rng_state", "model"])
def test_a_checkpoint_that_calls_os_system_is_not_converted(
    where: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, canary = Model(layers=1), tmp_path / "canary"
    shards, extra = megatron_shards(model, hf_tensors(model)), {}
    attack = Call(os.system, f"touch {canary}")
    args = training_args(model, data_path=attack if where == "args" else None)
    if where == "model":
        shards["mp_rank_00"][0]["decoder.layers.0.mlp.linear_fc1._extra_state"] = attack
    elif where != "args":
        extra = {where: {"state": [attack]}}
    save(tmp_path / "megatron", shards, args, **extra)
    assert convert(tmp_path / "megatron", tmp_path / "hf") == 1
    shown = capfd.readouterr().err
    assert f"{os.system.__module__}.system" in shown
    assert FILE in shown
    assert "Traceback" not in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron"]


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def checkpoint(args: bytes, model: bytes = b"") -> bytes:
    """The pickle of a checkpoint file around the opcodes of one of its args, and of what is put into its model."""
    namespace = b"cargparse\nNamespace\n)\x81}" + text("bomb") + args + b"sb"
    version = text("checkpoint_version") + b"K\x03s"
    return b"\x80\x02}" + text("args") + namespace + b"s" + version + text("model") + b"}" + model + b"s."


def length(opcode: bytes, size: int, form: str = "<Q") -> bytes:
    return opcode + struct.pack(form, size)


#: A list, then forty times a list of ten times the one before.
LAUGHS = b"]q\x00" + (b"0](" + b"h\x00" * 10 + b"eq\x00") * 40
#: Many items, to be closed into a list or tuple.
MANY = b"(" + b"K\x01" * 10**5
PAIRS = b"(" + b"".join(b"M" + struct.pack("<H", number) + b"N\x86" for number in range(1 << 16))
ORDERED = b"ccollections\nOrderedDict\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor\n"
TENSOR = b"h\x01((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000NK\x00tQK\x00h\x00h\x00tR"
NUMBERED = b"".join(b"M" + struct.pack("<H", number) + b"N" for number in range(20_000))
#: Puts a dict of 400 entries at 400 places of a dict, and that one at 400 of another.
FEW = [b"M" + struct.pack("<H", number) for number in range(400)]
SHARED = (
    text("a") + b"}(" + b"".join(key + b"N" for key in FEW) + b"uq\x00s"
    + text("b") + b"}(" + b"".join(key + b"h\x00" for key in FEW) + b"uq\x01s"
    + text("d") + b"}(" + b"".join(key + b"h\x01" for key in FEW) + b"us"
)  # fmt: skip
BOMBS = {
    "memo index": checkpoint(b"N" + length(b"r", 2**32 - 1, "<I")),
    "bytes": checkpoint(length(b"\x8e", 2**50)), "text": checkpoint(length(b"\x8d", 2**50)),
    "bytearray": checkpoint(length(b"\x96", 2**50)), "smaller bytearray": checkpoint(length(b"\x96", 400 << 20)),
    "frame": checkpoint(length(b"\x95", 2**50)), "long number": checkpoint(length(b"\x8b", 2**31 - 1, "<I")),
    "number of many digits": checkpoint(length(b"\x8b", 10**6, "<I") + b"\x7f" * 10**6),
    "that number as a key": checkpoint(b"}" + length(b"\x8b", 10**6, "<I") + b"\x7f" * 10**6 + b"Ns"),
    "deep tuple": checkpoint(b")" + b"\x85" * 10**6), "deep list": checkpoint(b"]" * 10**6 + b"a" * (10**6 - 1)),
    "deep dict": checkpoint(b"}" + b"K\x00}" * 10**5 + b"s" * 10**5), "marks": checkpoint(b"(" * 10**6),
    "deep tuple as a key": checkpoint(b"})" + b"\x85" * 10**6 + b"Ns"),
    "shared tuples as a key": checkpoint(b"})" + b"2\x86" * 64 + b"Ns"),
    "shared tuples as an enum's name": checkpoint(b"cbuiltins\ngetattr\nN)" + b"2\x86" * 64 + b"\x86R"),
    "shared tuples as a path": checkpoint(b"cpathlib\nPath\n)" + b"2\x86" * 64 + b"\x85R"),
    "shared tuples as a key of an ordered dict": checkpoint(ORDERED + b"])" + b"2\x86" * 64 + b"N\x86a\x85R"),
    "one tuple for many calls": checkpoint(MANY + b"tq\x00cmegatron\na\nq\x01](" + b"h\x01h\x00R" * 10**4 + b"e"),
    "one list for many dicts": checkpoint(PAIRS + b"lq\x00" + ORDERED + b"q\x01](" + b"h\x01h\x00\x85R" * 10**4 + b"e"),
    "one shape for many tensors": checkpoint(MANY + b"lq\x00" + REBUILD + b"q\x01](" + TENSOR * 10**4 + b"e"),
    "billion laughs": checkpoint(LAUGHS), "list of itself": checkpoint(b"]q\x00" + b"h\x00a" * 10),
    # Of which each byte made two hundred and more.
    "many sets": checkpoint(b"(" + b"\x8f" * 2 * 10**6 + b"l"), "many marks": checkpoint(b"(" * 2 * 10**6),
    "many sets of one": checkpoint(b"(" + b"\x8f(K\x01\x90" * 500_000 + b"l"),
    "many in the memo": checkpoint(b"N\x94" * 10**6),
    "many wide texts": checkpoint(b"\x8c\x05\xf0\x9f\x98\x80a" * 10**6),
    "many classes": checkpoint(b"]" + b"cmegatron\na\na" * 200_000),
    # Which are small in the pickle, and large where they are written out.
    "one text for many values": checkpoint(text("x" * 200_000) + b"q\x00](" + b"h\x00" * 20_000 + b"e"),
    "one text in a tuple for many": checkpoint(text("x" * 200_000) + b"\x85q\x00](" + b"h\x00" * 20_000 + b"e"),
    "one key for many dicts": checkpoint(text("x" * 200_000) + b"q\x00](" + b"}h\x00Ns" * 20_000 + b"e"),
    "one class of a long name": checkpoint(b"cmegatron\n" + b"x" * 300_000 + b"\nq\x00](" + b"h\x00" * 20_000 + b"e"),
    "one long name before many": checkpoint(b"N", text("x" * 300_000) + b"}(" + NUMBERED + b"us"),
    "dicts in dicts of one dict": checkpoint(b"N", SHARED + text("c") + b"h\x01s"),
    "no args and many names of one class": b"\x80\x02}(" + b"".join(
        text(f"{number}" + "x" * 5000) + b"cmegatron\na\n" for number in range(1000)) + b"u.",
}  # fmt: skip
PACKAGE = Path(dist_convert.__file__).parent
CHILD = """
import resource, sys
from pathlib import Path
import dist_convert
from dist_convert.errors import ConversionError
from dist_convert.formats.torch.shards import read_shard, shard_to_json
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
try:
    import json
    json.dumps(shard_to_json(read_shard(Path(sys.argv[1]), "f")))
    print("read")
except ConversionError as error:
    str(error)
    print(type(error).__name__)
status = Path("/proc/self/status")  # where there is none, getrusage counts what the parent had, too
lines = status.read_text().splitlines() if status.exists() else []
peaks_kib = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
print((peaks_kib or [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss])[0] * 1024)
"""


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_costs_little_memory_and_time(bomb: str, tmp_path: Path) -> None:
    write_container(tmp_path / "file.pt", {"archive/data.pkl": BOMBS[bomb]})
    command = [sys.executable, "-c", CHILD, str(tmp_path / "file.pt")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PACKAGE.parent)
    assert ended.returncode == 0, ended.stderr[-500:]  # a negative code is the signal that ended it
    outcome, peak_memory_bytes = ended.stdout.split()
    assert outcome in ("read", "CorruptFile", "MissingArguments")
    assert int(peak_memory_bytes) < 300 << 20


@pytest.mark.parametrize(
    ("item", "size_bytes"),
    [(b"\x8f", 8 << 20), pytest.param(b"]", 60 << 20, marks=pytest.mark.slow)],
    ids=["sets", "lists"],
)
def test_a_large_pickle_costs_at_most_eight_times_its_size_and_64_mib(
    item: bytes, size_bytes: int, tmp_path: Path
) -> None:
    peaks = []
    for name, made in (("bomb", b"(" + item * size_bytes + b"l"), ("nothing", b"N")):
        write_container(tmp_path / name, {"archive/data.pkl": checkpoint(made)})
        command = [sys.executable, "-c", CHILD, str(tmp_path / name)]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
        peaks.append(int(ended.stdout.split()[1]))
    assert peaks[0] - peaks[1] <= 8 * size_bytes + (64 << 20)


@functools.cache
def small_file() -> dict[str, bytes]:
    """The records of a checkpoint file with two tensors."""
    stream = io.BytesIO()
    model = {"decoder.layers.0.input_layernorm.weight": torch.ones(4), "output_layer.weight": torch.zeros(3, 4).T}
    args = training_args(Model(layers=1), path=Path("/a/b"))
    torch.save({"args": args, "checkpoint_version": 3.0, "model": model, "iteration": 4}, stream)
    with zipfile.ZipFile(stream) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_container(path: Path, records: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return path


def header_as_json(path: Path) -> str:
    return json.dumps(shard_to_json(read_shard(path, FILE)))


def test_a_pickle_cut_short_anywhere_is_damage() -> None:
    data = small_file()["archive/data.pkl"]
    load(data, FILE)
    for kept in range(len(data)):
        with pytest.raises(CorruptFile) as caught:
            load(data[:kept], FILE)
        assert caught.value.file == FILE


def mutated(data: bytes, changes: list[tuple[float, bytes]]) -> bytes:
    changed = bytearray(data)
    for place, value in changes:
        at = int(place * len(data))
        changed[at : at + len(value)] = value
    return bytes(changed)


def error_of(function: Callable[..., Any], *arguments: Any) -> ConversionError | None:
    try:
        function(*arguments)
    except ConversionError as error:
        return error
    return None


CHANGE = st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9))
often = settings(max_examples=250, deadline=None, derandomize=True, database=None)


@often
@given(changes=st.lists(CHANGE, min_size=1, max_size=4))
def test_a_damaged_pickle_raises_nothing_untyped(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, bytes]]
) -> None:
    records = small_file()
    damaged = records | {"archive/data.pkl": mutated(records["archive/data.pkl"], changes)}
    error = error_of(header_as_json, write_container(tmp_path_factory.getbasetemp() / "damaged.pt", damaged))
    assert error is None or error.file == FILE


@often
@given(changes=st.lists(CHANGE, min_size=1, max_size=4))
def test_a_damaged_file_raises_nothing_untyped(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, bytes]]
) -> None:
    path = write_container(tmp_path_factory.getbasetemp() / "damaged.pt", small_file())
    path.write_bytes(mutated(path.read_bytes(), changes))
    error = error_of(header_as_json, path)
    assert error is None or error.file == FILE
