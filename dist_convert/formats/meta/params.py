"""params.json of Meta's and Mistral's own files, in the words of Megatron's training arguments.

It leaves open what the weights' shapes tell, and what the code that loads it has as constants. Facts: docs/formats.md,
"Meta's files".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_convert.errors import ConversionError, InconsistentShards, UnsupportedModel, raise_together
from dist_convert.formats.huggingface.read import CONFIG_FILE, WEIGHTS_KINDS
from dist_convert.formats.meta.names import GATE, HEAD, QUERY
from dist_convert.models.schema import is_number, is_size

PARAMS_FILE = "params.json"
_WEIGHTS = re.compile(r"consolidated\.(\d+\.pth|safetensors)")

_NEEDED, _SIZES = (
    ("dim", "n_layers", "n_heads"),
    ("n_kv_heads", "multiple_of", "head_dim", "hidden_dim", "sliding_window"),
)
_NUMBERS = ("norm_eps", "rope_theta", "ffn_dim_multiplier")
#: What decides the model in another way, or decides nothing.
_OTHERS = ("vocab_size", "use_scaled_rope", "max_seq_len", "max_batch_size")
_AGAIN = f"take {PARAMS_FILE} anew from where the model came from"
#: Hidden size and layers of Llama 3.2's 1B and 3B: their flag is that of Llama 3.1, their factor is 32 and not 8.
_LLAMA_32 = ((2048, 16), (3072, 28))
#: Hidden size of Llama 3.1 405B, of which Meta has published files with other key and value heads than it has.
_LLAMA_405B, _GROUPS_405B = 16384, 8


def weights_files(directory: Path) -> list[str]:
    """The names of the weights files in Meta's layout that are here, but for those beside another format's."""
    if not directory.is_dir() or not (directory / PARAMS_FILE).is_file():
        return []
    others = (CONFIG_FILE, *(name for kind in WEIGHTS_KINDS for name in kind))
    if (directory / others[0]).is_file() and any((directory / name).is_file() for name in others[1:]):
        return []
    return sorted(path.name for path in directory.iterdir() if _WEIGHTS.fullmatch(path.name))


def args_of_params(
    params: Mapping[str, Any], rows: Mapping[str, int], *, tied: bool, knows_positions: bool
) -> tuple[str, dict[str, Any]]:
    """The family of a model, and its training arguments.

    Args:
        params: the content of params.json.
        rows: of some tensors, by Meta's names, of all files together.
        tied: the head is the embedding.
        knows_positions: somebody else says how many positions the model has.

    Raises:
        UnsupportedModel, InconsistentShards: no model that is known, or another than the weights.
    """
    known = (*_NEEDED, *_SIZES, *_NUMBERS, *_OTHERS)
    wrong = [name for name, value in params.items() if name not in known and value is not None]
    wrong += [name for name in _NEEDED if not params.get(name)]
    wrong += [name for name in (*_NEEDED, *_SIZES) if not is_size(params.get(name)) or params.get(name) == 0]
    wrong += [name for name in _NUMBERS if params.get(name) is not None and not _is_usual(params[name])]
    wrong += ["use_scaled_rope"] if params.get("use_scaled_rope") not in (None, False, True) else []
    if not wrong:
        hidden, layers, heads = (params[name] for name in _NEEDED)
        groups, head_dim = params.get("n_kv_heads") or heads, params.get("head_dim") or hidden // heads
        wrong += (["n_kv_heads"] if heads % groups else []) + (["head_dim"] if head_dim % 2 else [])
    raise_together(
        [
            UnsupportedModel(
                f"{name} has no value of a Llama in {PARAMS_FILE}",
                file=PARAMS_FILE,
                expected=", ".join(known),
                found=f"{name}: {params.get(name)!r}"[:80],
                remedy="only Llama 2, 3, 3.1, 3.2 and Mistral are read, without vision, experts and quantisation",
            )
            for name in dict.fromkeys(wrong)
        ]
    )
    vocab, theta, is_scaled = (
        params.get("vocab_size", -1),
        params.get("rope_theta"),
        bool(params.get("use_scaled_rope")),
    )
    told = {QUERY: heads * head_dim, GATE: params.get("hidden_dim") or _ffn(hidden, params), HEAD: vocab}
    problems: list[ConversionError] = [
        InconsistentShards(
            f"the weights are not those of {PARAMS_FILE}",
            tensor=name,
            file=PARAMS_FILE,
            expected=f"{size} rows in all files together",
            found=rows[name],
            remedy=f"a file is missing, or of another model: copy all of them again; or {_AGAIN}",
        )
        for name, size in told.items()
        if rows[name] != size and (name, size) != (HEAD, -1)
    ]
    if hidden == _LLAMA_405B and groups != _GROUPS_405B:
        problems.append(
            UnsupportedModel(
                "Llama 3.1 405B with repeated key and value heads",
                file=PARAMS_FILE,
                expected=f"n_kv_heads {_GROUPS_405B}",
                found=groups,
                remedy="give the files of bf16-mp8",
            )
        )
    if is_scaled and not theta:
        problems.append(UnsupportedModel("use_scaled_rope without rope_theta", file=PARAMS_FILE, remedy=_AGAIN))
    raise_together(problems)
    args = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": rows[GATE],
        "num_attention_heads": heads,
        "group_query_attention": True,
        "num_query_groups": groups,
        "kv_channels": head_dim,
        "vocab_size": rows[HEAD],
        "padded_vocab_size": rows[HEAD],
        "norm_epsilon": params.get("norm_eps") or 1e-5,
        "rotary_base": theta or 10000.0,
        "use_rope_scaling": is_scaled,
        "untie_embeddings_and_output_weights": not tied,
    }
    if (hidden, layers) in _LLAMA_32 and is_scaled:
        args["rope_scaling_factor"] = 32.0
    if window := params.get("sliding_window"):
        args["window_size"] = [window - 1, 0]
    is_mistral = "hidden_dim" in params
    if not knows_positions:
        args["max_position_embeddings"] = _positions(params, is_mistral=is_mistral)
    return "mistral" if is_mistral else "llama", args


def _is_usual(value: object) -> bool:
    return is_number(value) and isinstance(value, int | float) and 0 < value < 1e12


def _ffn(hidden: int, params: Mapping[str, Any]) -> int:
    """The width of the MLP: two thirds of four times the hidden size, times a factor, rounded up."""
    multiple, factor = params.get("multiple_of") or 256, params.get("ffn_dim_multiplier")
    width = int(2 * (4 * hidden) / 3)
    width = width if factor is None else int(factor * width)
    return multiple * -(-width // multiple)


def _positions(params: Mapping[str, Any], *, is_mistral: bool) -> int:
    """What transformers' own scripts give such a model: Mistral, Llama 3.1, 2, 3, Code Llama."""
    theta = params.get("rope_theta") or 0
    if is_mistral:
        return 32768
    if params.get("use_scaled_rope"):
        return 131072
    return {0: 4096, 10000: 4096, 500000: 8192}.get(theta, 16384)
