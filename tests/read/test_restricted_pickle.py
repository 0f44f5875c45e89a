"""The unpickler: classes of real checkpoints become inert records, and nothing that a pickle names is imported."""

from __future__ import annotations

import enum
import io
import pathlib
import pickle
import signal
import sys
import types
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_convert.errors import CorruptFile, UnsafePickle
from dist_convert.read.restricted_pickle import Dtype, Inert, Storage, Tensor, foreign_classes, load
from dist_convert.read.torch_file import open_object

#: torch.save writes protocol 2, where builtins are named `__builtin__`; pickle's own default is 4 or 5.
PROTOCOLS = (2, 3, 4, 5)

#: docs/formats.md, "Pickled classes": those of Megatron that are enums, and those that are not.
MEGATRON_ENUMS = (
    "megatron.core.enums.ModelType",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
)
MEGATRON_CLASSES = (
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "transformer_engine.common.recipe.DelayedScaling",
)


@contextmanager
def importable(cls: type, module: str) -> Iterator[None]:
    """Make `module` exist, with just this class in it, so that pickle can write the class by name."""
    with pytest.MonkeyPatch.context() as patched:
        parts = module.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[:count])
            patched.setitem(sys.modules, name, types.ModuleType(name))
        setattr(sys.modules[module], cls.__name__, cls)
        yield


class _ByName(enum.Enum):
    """An enum whose members are pickled as `getattr(class, name)`, as some Python releases do."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (type(self), self.name)


class _ByValue(enum.Enum):
    """An enum whose members are pickled as `class(value)`, as other Python releases do."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), (self.value,)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("base", [_ByName, _ByValue], ids=["getattr", "value"])
@pytest.mark.parametrize("path", MEGATRON_ENUMS)
def test_enum_members_of_megatron_load_without_megatron(path: str, base: Any, protocol: int) -> None:
    module, _, name = path.rpartition(".")
    cls = base(name, {"first": 1, "second": 2}, module=module)
    with importable(cls, module):
        data = pickle.dumps({"member": cls.second}, protocol)
    before = set(sys.modules)
    loaded = load(data, "f")
    assert isinstance(loaded["member"], Inert)
    assert loaded["member"].arguments[-1] in (2, "second")
    assert set(sys.modules) == before


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("path", MEGATRON_CLASSES)
def test_objects_of_megatron_keep_their_state_and_no_behaviour(path: str, protocol: int) -> None:
    module, _, name = path.rpartition(".")

    def explode(*_: Any) -> None:
        raise AssertionError("the class itself was used")

    cls = type(name, (), {"__module__": module, "__setstate__": explode})
    instance = cls()
    instance.__dict__["lr"] = 0.5
    with importable(cls, module):
        data = pickle.dumps(instance, protocol)
        loaded = load(data, "f")
    assert isinstance(loaded, Inert)
    assert loaded.class_name == path
    assert loaded.state == {"lr": 0.5}


RNG = np.random.RandomState(3)
HARMLESS = {
    "BytesIO": io.BytesIO(b"\xff\x00fp8"), "empty BytesIO": io.BytesIO(), "bytes": b"\xff", "empty bytes": b"",
    "bytearray": bytearray(b"a"), "empty bytearray": bytearray(), "path": pathlib.PurePosixPath("/a/b"),
    "concrete path": pathlib.Path("/a/b"), "signal": signal.SIGTERM, "set": {1, 2}, "empty set": set(),
    "frozenset": frozenset({1}), "range": range(3), "slice": slice(1, 2), "complex": 1j, "object": object(),
    "SimpleNamespace": types.SimpleNamespace(a=1), "torch generator state": torch.get_rng_state().numpy()[:16],
    "numpy rng state": RNG.get_state(), "numpy float": np.float64(1.5), "numpy int": np.int64(3),
    "numpy bool": np.bool_(True), "numpy array": np.arange(3.0), "numpy strings": np.array(["a"]),
    "numpy dtype": np.dtype("float32"), "torch device": torch.device("cpu"), "torch size": torch.Size([1, 2]),
    "defaultdict": defaultdict(list, {1: [2]}), "class of builtins": int,
}  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", HARMLESS)
def test_training_state_of_plain_libraries_is_accepted(kind: str, protocol: int) -> None:
    data = pickle.dumps({"before": 1, "state": HARMLESS[kind], "after": 2}, protocol)
    loaded = load(data, "f")
    assert (loaded["before"], loaded["after"]) == (1, 2)


def test_a_torch_generator_is_accepted(tmp_path: pathlib.Path) -> None:
    torch.save({"rng_state": torch.Generator(), "after": 2}, tmp_path / "file.pt")
    with (tmp_path / "file.pt").open("rb") as file:
        _, loaded = open_object(file, "f")
    assert loaded["rng_state"].class_name == "torch._C.Generator"
    assert loaded["after"] == 2


@pytest.mark.parametrize("package", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_arrays_of_numpy_1_and_2_are_accepted(package: bytes) -> None:
    data = pickle.dumps(np.arange(3), 2)
    assert b"numpy._core.multiarray\n" in data or b"numpy.core.multiarray\n" in data
    loaded = load(data.replace(b"numpy._core.m", b"numpy.core.m").replace(b"numpy.core.multiarray", package), "f")
    assert loaded.class_name == f"{package.decode()}._reconstruct"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_args_keep_every_value(protocol: int) -> None:
    values = {"num_layers": 4, "eps": 1e-5, "path": "/a", "none": None, "on": True, "sizes": [1, 2], "pair": (1, "b")}
    loaded = load(pickle.dumps(Namespace(**values), protocol), "f")
    assert loaded.class_name == "argparse.Namespace"
    assert loaded.state == values


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ordered_dicts_keep_their_order_and_lose_their_attributes(protocol: int) -> None:
    state = OrderedDict(b=1, a=2)
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined] # as Module.state_dict() does
    loaded = load(pickle.dumps(state, protocol), "f")
    assert list(loaded.items()) == [("b", 1), ("a", 2)]


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, "F32"), (torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.int64, "I64")],
)
def test_torch_dtypes_are_known_by_their_safetensors_name(dtype: torch.dtype, name: str) -> None:
    assert load(pickle.dumps(dtype, 2), "f") == Dtype(name, str(dtype))


class _Recorder(pickle.Pickler):
    """Writes tensors as torch.save does, with the storage's key in place of its bytes."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            return "storage", torch.FloatStorage, "0", "cuda:0", obj._size()
        return None


def test_a_tensor_becomes_its_storage_offset_shape_and_strides() -> None:
    stream = io.BytesIO()
    _Recorder(stream, 2).dump(torch.zeros(24)[4:].view(5, 4)[1:, ::2])
    assert load(stream.getvalue(), "f") == Tensor(Storage("0", "F32", 24), 8, (4, 2), (4, 2))


def test_a_tensor_whose_values_are_negated_on_loading_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch._neg_view(torch.ones(2))}, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt")["weight"].tolist() == [-1, -1]
    with (tmp_path / "a.pt").open("rb") as file, pytest.raises(CorruptFile) as caught:
        open_object(file, "a.pt")
    assert caught.value.found.endswith("a tensor that is stored negated or conjugated; save it with resolve_neg()")


def tensor_with(offset: Any = 0, shape: Any = (2,), strides: Any = (1,)) -> bytes:
    """A pickled tensor whose numbers pickle does not check."""

    class Rebuild:
        def __reduce__(self) -> Any:
            storage = torch.zeros(2).storage()
            return torch._utils._rebuild_tensor_v2, (storage, offset, shape, strides, False, OrderedDict())

    stream = io.BytesIO()
    _Recorder(stream, 2).dump(Rebuild())
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    "sizes",
    [
        {"offset": -1}, {"offset": 0.5}, {"offset": None}, {"shape": (-1,)}, {"shape": (1.0,)}, {"shape": 3},
        {"shape": ("a",)}, {"strides": (-1,)}, {"strides": (1, 1)}, {"strides": ()}, {"strides": None},
        {"shape": ((1,),)}, {"offset": 1 << 63}, {"shape": (1 << 63,)}, {"strides": (1 << 63,)},
    ],
    ids=str,
)  # fmt: skip
def test_a_tensor_of_impossible_sizes_is_damage(sizes: dict[str, Any]) -> None:
    assert isinstance(load(tensor_with(), "f"), Tensor)
    with pytest.raises(CorruptFile, match="damaged pickle"):
        load(tensor_with(**sizes), "f")


@pytest.mark.parametrize("elements", [-1, 1 << 63, 10**5000], ids=["negative", "2^63", "5,000 digits"])
def test_a_storage_of_more_elements_than_any_file_has_is_damage(elements: int) -> None:
    class Reference(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", elements) if obj == "a storage" else None

    stream = io.BytesIO()
    Reference(stream, 2).dump({"optimizer": "a storage"})
    with pytest.raises(CorruptFile, match="damaged pickle"):
        load(stream.getvalue(), "f")


@pytest.mark.parametrize(
    "saved", [{"iteration": 10**5000}, {10**5000: "a value"}, [(-(10**5000),)]], ids=["value", "key", "negative"]
)
def test_a_number_that_python_does_not_print_is_damage(saved: Any) -> None:
    with pytest.raises(CorruptFile) as caught:
        load(pickle.dumps(saved, 2), "f")
    assert caught.value.found == "UnpicklingError: a number of 16,610 bits"


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("changed", [{"shape": ("a",)}, {"offset": -8}, {"storage": None}], ids=str)
def test_a_checked_tensor_cannot_be_changed_by_a_later_opcode(changed: dict[str, Any]) -> None:
    """BUILD writes into an object's attributes; that of a tensor record would undo its checks."""
    state = pickle.dumps(changed, 2)[2:-1]
    with pytest.raises(CorruptFile):
        load(tensor_with()[:-1] + state + b"b.", "f")


@pytest.mark.parametrize("changed", [{"items": 1}, {"get": None}], ids=str)
def test_a_dict_cannot_be_given_methods_by_the_pickle(changed: dict[str, Any]) -> None:
    class Shadowed:
        def __reduce__(self) -> Any:
            return OrderedDict, (), changed, None, iter([("a", 1)])

    loaded = load(pickle.dumps(Shadowed(), 2), "f")
    assert list(loaded.items()) == [("a", 1)]
    assert loaded.get("a") == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_of_a_fork_of_megatron_are_inert_and_listed(protocol: int) -> None:
    class Meta:
        pass

    instance = Meta()
    instance.__dict__["model_type"] = "llama"
    Meta.__qualname__, Meta.__module__ = "Meta", "swift.megatron.register"
    with importable(Meta, "swift.megatron.register"):
        data = pickle.dumps({"args": [instance], "rng": np.arange(2)}, protocol)
    loaded = load(data, "f")
    assert loaded["args"][0].state == {"model_type": "llama"}
    assert foreign_classes(loaded) == ["swift.megatron.register.Meta"]
    assert "swift" not in sys.modules


def test_a_tensor_of_a_foreign_class_is_no_tensor() -> None:
    class Quantised(torch.Tensor):
        pass

    Quantised.__qualname__, Quantised.__module__ = "Quantised", "torchao.quantised"
    stream = io.BytesIO()
    with importable(Quantised, "torchao.quantised"):
        _Recorder(stream, 2).dump(torch.zeros(2).as_subclass(Quantised))
    loaded = load(stream.getvalue(), "f")
    assert isinstance(loaded, Inert)
    assert loaded.class_name == "torchao.quantised.Quantised"


def test_a_function_of_python_is_refused_by_name() -> None:
    class Unknown:
        def __reduce__(self) -> Any:
            return sys.intern, ("a",)

    with pytest.raises(UnsafePickle, match=r"names sys\.intern") as caught:
        load(pickle.dumps(Unknown(), 4), "mp_rank_00/model_optim_rng.pt")
    assert caught.value.file == "mp_rank_00/model_optim_rng.pt"
    assert caught.value.found == "sys.intern"
