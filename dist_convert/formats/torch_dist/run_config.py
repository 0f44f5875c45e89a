"""What Megatron-Bridge says of a model, as training arguments: its checkpoints have `run_config.yaml` in place of args.

Its section `model` holds all fields of a TransformerConfig and of the class that builds the model, most of them under
the names of the arguments. Classes and functions in it are texts here; nothing is imported. Source, of 0.3.1:
https://github.com/NVIDIA-NeMo/Megatron-Bridge/blob/main/src/megatron/bridge/models/gpt_provider.py
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_convert.errors import MissingArguments
from dist_convert.read.yaml_file import read_yaml

RUN_CONFIG_FILE = "run_config.yaml"
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


def args_of_run_config(directory: Path) -> dict[str, Any]:
    """The training arguments that say what `run_config.yaml` says; sizes are compared with the tensors' later.

    Raises:
        CorruptFile: it is no YAML of plain values, or too large.
        MissingArguments: a field that decides the model is absent.
    """
    path = directory / RUN_CONFIG_FILE
    model = read_yaml(path, _MOST_BYTES, numbers=True).get("model")
    fields: Mapping[str, Any] = model if isinstance(model, Mapping) else {}
    absent = [name for name in _NEEDED if name not in fields]
    if absent:
        raise MissingArguments(
            "run_config.yaml does not say what the model is",
            file=str(path),
            expected="the fields of a GPT model in its section model",
            found=f"no {', '.join(absent)}",
            remedy="convert the checkpoint with the version of Megatron-Bridge that saved it",
        )
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
