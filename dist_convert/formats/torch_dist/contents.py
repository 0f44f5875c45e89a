"""What the small files of Megatron's distributed checkpoints say: `.metadata`, args and iteration. Needs no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_convert.errors import InconsistentShards, MissingArguments, UnknownTensor, UnsupportedModel
from dist_convert.formats.dcp.headers import sort_out
from dist_convert.formats.megatron.args import in_megatrons_words
from dist_convert.formats.megatron.iterations import KIND_FILE
from dist_convert.formats.megatron.names import TIED
from dist_convert.formats.torch_dist.names import OF_STATE, STATE, format_of, is_of_model, reason_to_leave
from dist_convert.options import TORCH_DIST
from dist_convert.read.dcp import METADATA_FILE, Blob, Metadata, SavedTensor, read_metadata, read_object
from dist_convert.read.restricted_pickle import Inert, foreign_classes, plain_dict
from dist_convert.read.source import opened_source, read_json, read_small_file
from dist_convert.read.torch_file import MAX_PICKLE_BYTES, open_dict
from dist_convert.read.yaml_file import read_yaml
from dist_convert.records import JsonObject, names

COMMON_FILE = "common.pt"
RUN_CONFIG_FILE = "run_config.yaml"
_COMMON_STATE = "common_state/"
#: Ten times what Megatron-Bridge writes.
_MOST_BYTES = 1 << 17
#: Argument -> the field that says the same.
_RENAMED = {
    "num_experts": "num_moe_experts",
    "max_position_embeddings": "seq_length",
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "use_rope_scaling": "rope_scaling",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
}
#: Fields without which a default would be guessed. All versions write every field.
_NEEDED = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "layernorm_epsilon", "seq_length", "rotary_base", "rope_scaling", "position_embedding_type", "normalization",
    "gated_linear_unit", "activation_func", "share_embeddings_and_output_weights", "add_bias_linear", "add_qkv_bias",
    "num_moe_experts", "layernorm_zero_centered_gamma",
)  # fmt: skip


def is_of_megatron(directory: Path) -> bool:
    """Whether a distributed checkpoint is Megatron's, by the files beside it, or by the embedding that it lists."""
    path = directory / METADATA_FILE
    has_files = any((directory / name).is_file() for name in (KIND_FILE, COMMON_FILE, RUN_CONFIG_FILE))
    return has_files or (path.is_file() and TIED[0].encode() in read_small_file(path, MAX_PICKLE_BYTES))


def read_contents(directory: Path, *, may_lack_args: bool = False) -> dict[str, Any]:
    """The tensors of the model by key, what lies beside them, the args and the iteration, in JSON values.

    `may_lack_args` says that something else tells what the model is: args that are not there are empty.

    Raises:
        CorruptFile, UnsafePickle: a damaged file, or one that names what no checkpoint needs.
        MissingArguments, UnsupportedModel: no args, or another format of Megatron's.
    """
    _check_kind(directory)
    metadata = read_metadata(directory / METADATA_FILE)
    format = format_of(metadata.tensors)
    prefix = "" if format == TORCH_DIST else STATE

    def reason_of(key: str, saved: SavedTensor | Blob) -> str:
        if prefix and key in OF_STATE and isinstance(saved, Blob):
            return "args"
        key = key.removeprefix(prefix)
        reason = reason_to_leave(key)
        if reason is None and isinstance(saved, Blob) and is_of_model(key):
            what, expected = f"{key} has no place in any model", "tensors, and extra state of modules"
            found, remedy = "an object", "nothing is dropped silently: save the checkpoint without it"
            raise UnknownTensor(what, directory / METADATA_FILE, expected, found, remedy, tensor=key)
        return reason or (f"object {key}" if isinstance(saved, Blob) else "")

    found = sort_out(metadata, reason_of)
    args_file, args, iteration, classes = _args(directory, metadata, may_lack_args=may_lack_args)
    return found | {
        "beside": [one for one in found["beside"] if one[0] != "args"],
        "format": format,
        "prefix": prefix,
        "args": args,
        "args_file": args_file,
        "iteration": iteration,
        "foreign_classes": classes,
    }


def _check_kind(directory: Path) -> None:
    """Refuse Megatron's other distributed formats, by an UnsupportedModel."""
    path = directory / KIND_FILE
    kind = read_json(path).get("sharded_backend") if path.is_file() else TORCH_DIST
    if kind != TORCH_DIST:
        what, expected = "a distributed checkpoint of another kind", f"sharded_backend {TORCH_DIST}"
        remedy = "load it with Megatron-LM and save it with --ckpt-format torch_dist"
        raise UnsupportedModel(what, path, expected, found=str(kind)[:80], remedy=remedy)


def _args(directory: Path, metadata: Metadata, *, may_lack_args: bool) -> tuple[str, JsonObject, int | None, list[str]]:
    """Which file has the training arguments, these, the iteration, and foreign classes beside them.

    They are in `common.pt`, or in an object that newer versions have instead; FSDP saves an object of each.
    Megatron-Bridge has `run_config.yaml`.

    Raises:
        MissingArguments: there are none.
        InconsistentShards: two objects hold some.
    """
    path, args_file = directory / COMMON_FILE, COMMON_FILE
    saved: object = None
    if path.is_file():
        with opened_source(path) as file:
            saved = open_dict(file, str(path))[1]
    else:
        args_file = METADATA_FILE
        holders = [key for key in metadata.objects if key == "args" or key.startswith(_COMMON_STATE)]
        if len(holders) > 1:
            what, expected = "the args are stored twice", "one object that holds them"
            remedy = "files of two checkpoints may be mixed; copy the directory again"
            raise InconsistentShards(what, directory / METADATA_FILE, expected, found=names(holders), remedy=remedy)
        for key in holders:
            if key.startswith(_COMMON_STATE):
                listed = read_object(directory, metadata.objects[key])
                saved = listed[0] if isinstance(listed, list) and listed else listed
        if saved is None:
            saved = {key: read_object(directory, metadata.objects[key]) for key in OF_STATE if key in metadata.objects}
    common: JsonObject = saved if isinstance(saved, Mapping) else {}
    args = common.get("args")
    values = args.state if isinstance(args, Inert) else args
    if not isinstance(values, Mapping) and (directory / RUN_CONFIG_FILE).is_file():
        args_file, values = RUN_CONFIG_FILE, args_of_run_config(directory)
    if not isinstance(values, Mapping) and may_lack_args:
        args_file, values = METADATA_FILE, {}
    if not isinstance(values, Mapping):
        raise MissingArguments(
            "the checkpoint has no args",
            path,
            expected=f"Megatron-LM's args, in {COMMON_FILE} or in an object of .metadata, or {RUN_CONFIG_FILE}",
            found=", ".join(map(str, common))[:200] or "none of them",
            remedy="convert a checkpoint that training saved, or say with --like CONFIG what the model is",
        )
    iteration = common.get("iteration")
    iteration = iteration if isinstance(iteration, int) else None
    return args_file, in_megatrons_words(plain_dict(values)), iteration, foreign_classes(saved)


def args_of_run_config(directory: Path) -> JsonObject:
    """The training arguments that say what Megatron-Bridge's `run_config.yaml` says; tensors tell the sizes later.

    Its section `model` holds all fields of a TransformerConfig and of the class that builds the model, most of them
    under the names of the arguments. Classes and functions in it are texts here. Source, of 0.3.1:
    https://github.com/NVIDIA-NeMo/Megatron-Bridge/blob/main/src/megatron/bridge/models/gpt_provider.py

    Raises:
        CorruptFile: it is no YAML of plain values, or too large.
        MissingArguments: a field that decides the model is absent.
    """
    path = directory / RUN_CONFIG_FILE
    model = read_yaml(path, _MOST_BYTES, numbers=True).get("model")
    fields: JsonObject = model if isinstance(model, Mapping) else {}
    absent = [name for name in _NEEDED if name not in fields]
    if absent:
        what = "run_config.yaml does not say what the model is"
        expected = "the fields of a GPT model in its section model"
        remedy = "convert the checkpoint with the version of Megatron-Bridge that saved it"
        raise MissingArguments(what, path, expected, found=f"no {', '.join(absent)}", remedy=remedy)
    # All of them: whatever decides what a model computes is then compared with what its family can be.
    args = {name: value for name, value in fields.items() if not isinstance(value, Mapping)}
    args |= {name: fields[field] for name, field in _RENAMED.items() if field in fields}
    function = fields["activation_func"]
    is_silu = isinstance(function, Mapping) and function.get("_target_") == "torch.nn.functional.silu"
    return args | {
        "swiglu": is_silu and fields["gated_linear_unit"] is True,
        "untie_embeddings_and_output_weights": not fields["share_embeddings_and_output_weights"],
        "group_query_attention": fields["num_query_groups"] is not None,
    }
