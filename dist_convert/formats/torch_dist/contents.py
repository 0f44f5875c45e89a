"""What the small files of a `torch_dist` checkpoint say: `.metadata`, the args and the iteration. Needs no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_convert.errors import MissingArguments, UnknownTensor, UnsupportedModel
from dist_convert.formats.dcp.headers import sort_out
from dist_convert.formats.megatron.args import in_megatrons_words
from dist_convert.formats.megatron.iterations import KIND_FILE
from dist_convert.formats.torch_dist.names import common_object, is_of_model, reason_to_leave
from dist_convert.formats.torch_dist.run_config import RUN_CONFIG_FILE, args_of_run_config
from dist_convert.options import TORCH_DIST
from dist_convert.read.dcp import METADATA_FILE, Blob, Metadata, SavedTensor, read_metadata, read_object
from dist_convert.read.restricted_pickle import Inert, foreign_classes, plain_dict
from dist_convert.read.source import opened_source, read_json
from dist_convert.read.torch_file import open_dict

COMMON_FILE = "common.pt"


def is_torch_dist(directory: Path) -> bool:
    """Whether a distributed checkpoint is Megatron's, by the files beside it."""
    return any((directory / name).is_file() for name in (KIND_FILE, COMMON_FILE, RUN_CONFIG_FILE))


def read_contents(directory: Path, *, may_lack_args: bool = False) -> dict[str, Any]:
    """The tensors of the model by key, what lies beside them, the args and the iteration, in JSON values.

    `may_lack_args` says that something else tells what the model is: args that are not there are empty.

    Raises:
        CorruptFile, UnsafePickle: a damaged file, or one that names what no checkpoint needs.
        MissingArguments, UnsupportedModel: no args, or another format of Megatron's.
    """
    _check_kind(directory)
    metadata = read_metadata(directory / METADATA_FILE)

    def reason_of(key: str, saved: SavedTensor | Blob) -> str:
        reason = reason_to_leave(key)
        if reason is None and isinstance(saved, Blob) and is_of_model(key):
            raise UnknownTensor(
                f"{key} has no place in any model",
                tensor=key,
                file=str(directory / METADATA_FILE),
                expected="tensors, and extra state of modules",
                found="an object",
                remedy="nothing is dropped silently: save the checkpoint without it",
            )
        return reason or (f"object {key}" if isinstance(saved, Blob) else "")

    found = sort_out(metadata, reason_of)
    args_file, args, iteration, classes = _args(directory, metadata, may_lack_args=may_lack_args)
    return found | {
        "beside": [one for one in found["beside"] if one[0] != "args"],
        "args": args,
        "args_file": args_file,
        "iteration": iteration,
        "foreign_classes": classes,
    }


def _check_kind(directory: Path) -> None:
    """Refuse Megatron's other distributed formats.

    Raises:
        UnsupportedModel
    """
    path = directory / KIND_FILE
    kind = read_json(path).get("sharded_backend") if path.is_file() else TORCH_DIST
    if kind != TORCH_DIST:
        raise UnsupportedModel(
            "a distributed checkpoint of another kind",
            file=str(path),
            expected=f"sharded_backend {TORCH_DIST}",
            found=str(kind)[:80],
            remedy="load it with Megatron-LM and save it with --ckpt-format torch_dist",
        )


def _args(
    directory: Path, metadata: Metadata, *, may_lack_args: bool
) -> tuple[str, dict[str, Any], int | None, list[str]]:
    """Which file has the training arguments, these, the iteration, and foreign classes beside them.

    They are in `common.pt`, or in an object that newer versions have instead. Megatron-Bridge has no args there; see
    `run_config.py`.

    Raises:
        MissingArguments: there are none.
    """
    path, args_file = directory / COMMON_FILE, COMMON_FILE
    saved: object = None
    if path.is_file():
        with opened_source(path, str(path)) as file:
            saved = open_dict(file, str(path))[1]
    else:
        args_file = METADATA_FILE
        for key in filter(common_object, metadata.objects):
            listed = read_object(directory, metadata.objects[key])
            saved = listed[0] if isinstance(listed, list) and listed else listed
    common: Mapping[str, Any] = saved if isinstance(saved, Mapping) else {}
    args = common.get("args")
    values = args.state if isinstance(args, Inert) else args
    if not isinstance(values, Mapping) and (directory / RUN_CONFIG_FILE).is_file():
        args_file, values = RUN_CONFIG_FILE, args_of_run_config(directory)
    if not isinstance(values, Mapping) and may_lack_args:
        args_file, values = METADATA_FILE, {}
    if not isinstance(values, Mapping):
        raise MissingArguments(
            "the checkpoint has no args",
            file=str(path),
            expected=f"Megatron-LM's args, in {COMMON_FILE} or in an object of .metadata, or {RUN_CONFIG_FILE}",
            found=", ".join(map(str, common))[:200] or "none of them",
            remedy="convert a checkpoint that training saved, or say with --like CONFIG what the model is",
        )
    iteration = common.get("iteration")
    iteration = iteration if isinstance(iteration, int) else None
    return args_file, in_megatrons_words(plain_dict(values)), iteration, foreign_classes(saved)
