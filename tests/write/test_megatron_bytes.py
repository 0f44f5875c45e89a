"""Which bytes `model_optim_rng.pt` has before any data: the same in every process, for args that are equal."""

from __future__ import annotations

import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_convert.formats.huggingface.files import TensorSpec
from dist_convert.formats.pickles import Named, pickled
from dist_convert.formats.torch.target import lay_out_shard
from tests.write import write_shard

FILE = "mp_rank_00/model_optim_rng.pt"
ARGS: dict[str, object] = {
    "num_layers": 2, "norm_epsilon": 1e-05, "swiglu": True, "tokenizer_model": None, "normalization": "RMSNorm",
    "params_dtype": Named("torch", "bfloat16"), "main_grads_dtype": Named("torch", "float32"), "betas": (0.9, 0.95),
}  # fmt: skip
CHUNKS: list[list[TensorSpec]] = [[("embedding", "BF16", (6, 4)), ("norm", "F32", (4,))], [("norm", "F32", (4,))]]


def test_the_pickle_is_these_bytes() -> None:
    _, container = lay_out_shard({"b": "x", "a": Named("torch", "bfloat16")}, 7, [[("w", "BF16", (2, 3))]], FILE)
    assert container.pieces[0][1].partition(b"\x80\x02")[2].partition(b"PK")[0] == (
        b"}("
        b"X\x04\x00\x00\x00args" b"cargparse\nNamespace\n)\x81}("
        b"X\x01\x00\x00\x00a" b"ctorch\nbfloat16\n" b"X\x01\x00\x00\x00b" b"X\x01\x00\x00\x00x" b"ub"
        b"X\x12\x00\x00\x00checkpoint_version" b"G\x40\x08\x00\x00\x00\x00\x00\x00"
        b"X\x09\x00\x00\x00iteration" b"K\x07"
        b"X\x05\x00\x00\x00model" b"ccollections\nOrderedDict\n)R"
        b"X\x01\x00\x00\x00w" b"ctorch._utils\n_rebuild_tensor_v2\n("
        b"(X\x07\x00\x00\x00storage" b"ctorch\nBFloat16Storage\n" b"X\x01\x00\x00\x000" b"X\x03\x00\x00\x00cpu"
        b"K\x06tQ"
        b"K\x00" b"K\x02K\x03\x86" b"K\x03K\x01\x86" b"\x89" b"ccollections\nOrderedDict\n)R" b"tRs"
        b"u."
    )  # fmt: skip


def test_the_pickle_remembers_no_object(tmp_path: Path) -> None:
    path = tmp_path / "model_optim_rng.pt"
    write_shard(path.parent, path.name, ARGS, 7, CHUNKS)
    with zipfile.ZipFile(path) as archive:
        operations = {operation.name for operation, _, _ in pickletools.genops(archive.read("archive/data.pkl"))}
    assert not {name for name in operations if "PUT" in name or "GET" in name or "MEMO" in name}


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize(
    "value",
    [
        [0, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**63, 2**64, 1 << 2000, 1 << 2039],
        [1 << 2040, -1 << 2039, -1 << 2047],
        [-1, -128, -129, -(2**31), -(2**31) - 1, -(2**39), -(2**63), -(2**63) - 1],
        [0.0, -0.0, 1e-5, float("inf"), True, False, None, "", "a", "a", "\u00e4", "\U0001f600", "\ud800"],
        [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1], {}, {1: "a"}, {"a": {None: [()]}}],
        *(list(range(count)) for count in (999, 1000, 1001, 2000, 2001)),
        *(OrderedDict.fromkeys(range(count), "b") for count in (0, 1, 999, 1000, 1001, 2001)),
    ],
    ids=lambda value: f"{type(value).__name__} of {len(value)}",
)
def test_python_unpickles_what_was_meant(value: object, once: bool) -> None:
    found = pickle.loads(pickled(value, once=once))
    assert (type(found), repr(found)) == (type(value), repr(value))  # 0.0 and -0.0, 1 and True are equal


def not_interned(text: str) -> str:
    return "".join(list(text))


def _shared() -> dict[str, object]:
    inner, text = ["RMSNorm", 1.5], "RMSNorm"
    return {"a": inner, "b": inner, "c": [inner, inner], "RMSNorm": text, "d": text, "e": (text, text)}


def _equal() -> dict[str, object]:
    def inner() -> list[object]:
        return [not_interned("RMSNorm"), float("1.5")]

    text = not_interned
    return {
        text("a"): inner(), text("b"): inner(), text("c"): [inner(), inner()], text("RMSNorm"): text("RMSNorm"),
        "d": text("RMSNorm"), "e": (text("RMSNorm"), text("RMSNorm")),
    }  # fmt: skip


def _reversed() -> dict[str, object]:
    return dict(reversed(_shared().items()))


@pytest.mark.parametrize("same", [_equal, _reversed])
def test_equal_args_give_equal_bytes_whichever_objects_they_share(same: Callable[[], dict[str, object]]) -> None:
    expected = lay_out_shard(_shared(), 7, CHUNKS, FILE)
    assert lay_out_shard(same(), 7, CHUNKS, FILE) == expected


def test_another_process_with_another_hash_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from tests.write.test_megatron_bytes import *;"
        "write_shard(pathlib.Path(sys.argv[1]), 'renamed.pt', {name: ARGS[name] for name in set(ARGS)}, 7, CHUNKS)"
    )
    path, other = tmp_path / "model_optim_rng.pt", tmp_path / "elsewhere" / "renamed.pt"
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    other.parent.mkdir()
    subprocess.run([sys.executable, "-c", program, str(other.parent)], env=environment, check=True)
    write_shard(path.parent, path.name, ARGS, 7, CHUNKS)
    assert other.read_bytes() == path.read_bytes()
