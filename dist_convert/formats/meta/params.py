"""params.json of Meta's and Mistral's own files, in the words of Megatron's training arguments.

It leaves open what the weights' shapes tell, and what the code that loads it has as constants. Facts: docs/formats.md,
"Meta's files".
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_convert.errors import ConversionError, InconsistentShards, UnsupportedModel, raise_together
from dist_convert.formats.huggingface.read import CONFIG_FILE
from dist_convert.formats.meta.names import GATE, HEAD, QUERY
from dist_convert.models.schema import is_number, is_size
from dist_convert.records import JsonObject

PARAMS_FILE = "params.json"
_WEIGHTS = re.compile(r"consolidated\.(\d+\.pth|safetensors)")

_NEEDED = ("dim", "n_layers", "n_heads")
_SIZES = (*_NEEDED, "n_kv_heads", "multiple_of", "head_dim", "hidden_dim", "sliding_window")
_NUMBERS, _FLAG = ("norm_eps", "rope_theta", "ffn_dim_multiplier"), "use_scaled_rope"
_KNOWN = (*_SIZES, *_NUMBERS, _FLAG, "vocab_size", "max_seq_len", "max_batch_size")
#: Hidden size and layers of Llama 3.2's 1B and 3B: their flag is that of Llama 3.1, their factor is 32 and not 8.
_LLAMA_32 = ((2048, 16), (3072, 28))
#: Hidden size of Llama 3.1 405B, of which Meta has published files with other key and value heads than it has.
_LLAMA_405B, _GROUPS_405B = 16384, 8


def weights_files(directory: Path) -> list[str]:
    """The names of the weights files in Meta's layout that are here; beside a config.json that is another format's."""
    if not (directory / PARAMS_FILE).is_file() or (directory / CONFIG_FILE).exists():
        return []
    return sorted(path.name for path in directory.iterdir() if _WEIGHTS.fullmatch(path.name))


def args_of_params(params: JsonObject, rows: Mapping[str, int], *, tied: bool) -> tuple[str, dict[str, Any]]:
    """The family of a model, and its training arguments, of the content of params.json.

    `rows` are those of some tensors, by Meta's names, of all files together; `tied`: the head is the embedding.

    Raises:
        UnsupportedModel, InconsistentShards: no model that is known, or another than the weights.
    """
    wrong = [name for name, value in params.items() if name not in _KNOWN and value is not None]
    wrong += [name for name in _NEEDED if params.get(name) is None]
    wrong += [name for name in _SIZES if not is_size(params.get(name)) or params.get(name) == 0]
    given = {name: params[name] for name in _NUMBERS if params.get(name) is not None}
    wrong += [name for name, value in given.items() if not (is_number(value) and 0 < value < 1e12)]
    is_scaled, theta, is_mistral = params.get(_FLAG), given.get("rope_theta"), "hidden_dim" in params
    wrong += [_FLAG] if is_scaled not in (None, False, True) or (is_scaled and not theta) else []
    if not wrong:
        hidden, layers, heads = (params[name] for name in _NEEDED)
        groups, head_dim = params.get("n_kv_heads") or heads, params.get("head_dim") or hidden // heads
        is_repeated = hidden == _LLAMA_405B and groups != _GROUPS_405B
        wrong += (["n_kv_heads"] if heads % groups or is_repeated else []) + (["head_dim"] if head_dim % 2 else [])
    remedy = "only Llama 2, 3, 3.1, 3.2 and Mistral are read, without vision, experts and quantisation; 405B "
    remedy += f"with {_GROUPS_405B} key and value heads; if this is one of them, copy {PARAMS_FILE} again"
    problems: list[ConversionError] = []
    for name in dict.fromkeys(wrong):
        what = f"{PARAMS_FILE} is not a Llama's: missing or unsupported {name}"
        problems.append(UnsupportedModel(what, PARAMS_FILE, found=f"{name}: {params.get(name)!r}"[:80], remedy=remedy))
    raise_together(problems)
    # The width of the MLP: two thirds of four times the hidden size, times a factor, rounded up.
    multiple, width = params.get("multiple_of") or 256, int(given.get("ffn_dim_multiplier", 1) * int(8 * hidden / 3))
    ffn, vocab = params.get("hidden_dim") or multiple * -(-width // multiple), params.get("vocab_size", -1)
    told = {QUERY: heads * head_dim, GATE: ffn, HEAD: rows[HEAD] if vocab == -1 else vocab}
    what = f"the weights are not those of {PARAMS_FILE}"
    remedy = "a file is missing or of another model: copy all again"
    for name, size in told.items():
        if rows[name] != size:
            expected = f"{size} rows in all files together"
            problems.append(
                InconsistentShards(what, PARAMS_FILE, expected, tensor=name, found=rows[name], remedy=remedy)
            )
    raise_together(problems)
    # What transformers' scripts give Llama 2, 3 and, with another theta, Code Llama.
    positions = {None: 4096, 10000: 4096, 500000: 8192}.get(theta, 16384)
    args = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "group_query_attention": True,
        "num_query_groups": groups,
        "kv_channels": head_dim,
        "vocab_size": rows[HEAD],
        "padded_vocab_size": rows[HEAD],
        "max_position_embeddings": 32768 if is_mistral else 131072 if is_scaled else positions,
        "norm_epsilon": given.get("norm_eps", 1e-5),
        "rotary_base": theta or 10000.0,
        "use_rope_scaling": bool(is_scaled),
        "rope_scaling_factor": 32.0 if (hidden, layers) in _LLAMA_32 else 8.0,
        "untie_embeddings_and_output_weights": not tied,
        "window_size": [params["sliding_window"] - 1, 0] if params.get("sliding_window") else None,
    }
    return "mistral" if is_mistral else "llama", args
