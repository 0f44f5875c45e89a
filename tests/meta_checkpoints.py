"""Small checkpoints in Meta's layout, made without the package: by transformers' own formula, backwards, and chunks.

`python tests/meta_checkpoints.py` makes `tests/formats/meta_logits.json` in an environment with llama-models:
what Meta's own code computes with these weights. It needs no fairscale, which only cuts layers over processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import Model, hf_shapes

State = dict[str, torch.Tensor]
#: The tensors of a layer, and those around all layers: Meta's name -> transformers'.
LAYER = {
    "attention_norm": "input_layernorm", "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip
AROUND = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
MODEL = Model(hidden=64, ffn=176, heads=8, groups=8, head_dim=8, layers=2, vocab=64, padded_vocab=64)
#: What `ffn` of `MODEL` follows from.
MULTIPLE = 16


def weights(model: Model = MODEL) -> State:
    """Weights under transformers' names that are the same with every version of torch."""
    found, number = {}, 0
    for name, shape in hf_shapes(model).items():
        count = torch.Size(shape).numel()
        mixed = (torch.arange(number, number + count) * 2654435761 + 12345) * 40503 % 65521
        values = (mixed.double() / 65521 - 0.5) * 0.25
        found[name] = (values + (1 if len(shape) == 1 else 0)).reshape(shape).to(model.dtype)
        number += count
    return found


def metas(hf: Mapping[str, torch.Tensor], model: Model = MODEL) -> State:
    """The same under Meta's names, with the rows of queries and keys in Meta's order."""
    found = {}
    for layer in range(model.layers):
        for theirs, name in LAYER.items():
            tensor = hf[f"model.layers.{layer}.{name}.weight"]
            if theirs in ("attention.wq", "attention.wk"):
                heads = tensor.shape[0] // model.head_dim
                halves = tensor.view(heads, 2, model.head_dim // 2, tensor.shape[1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
            found[f"layers.{layer}.{theirs}.weight"] = tensor
    return found | {f"{theirs}.weight": hf[f"{name}.weight"] for theirs, name in AROUND.items()}


def cut(state: State, files: int, *, embedding_by_columns: bool) -> list[State]:
    """What each file holds."""
    parts: list[State] = [{} for _ in range(files)]
    for name, tensor in state.items():
        by_columns = name.endswith(BY_COLUMNS) or (embedding_by_columns and name == "tok_embeddings.weight")
        pieces = [tensor] * files if tensor.dim() == 1 else tensor.chunk(files, dim=1 if by_columns else 0)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.contiguous()
    return parts


def params_of(model: Model, version: str) -> dict[str, Any]:
    """params.json as Meta publishes it with Llama 2, 3 or 3.1."""
    params: dict[str, Any] = {
        "dim": model.hidden, "n_layers": model.layers, "n_heads": model.heads, "multiple_of": MULTIPLE,
        "norm_eps": 1e-5, "vocab_size": -1,
    }  # fmt: skip
    if version != "2":
        params |= {"n_kv_heads": model.groups, "vocab_size": model.vocab, "rope_theta": 500000.0}
    return params | ({"use_scaled_rope": True} if version == "3.1" else {})


def make_meta(
    directory: Path,
    files: int = 2,
    version: str = "3",
    model: Model = MODEL,
    hf: Mapping[str, torch.Tensor] | None = None,
    **params: Any,
) -> State:
    """Save such a checkpoint; returns the tensors under transformers' names."""
    directory.mkdir(parents=True, exist_ok=True)
    expected = dict(weights(model) if hf is None else hf)
    for number, part in enumerate(cut(metas(expected, model), files, embedding_by_columns=version == "2")):
        if version == "2":
            part["rope.freqs"] = torch.ones(model.head_dim // 2)
        for layer in range(model.layers):  # as Llama 2's files have them: views of one storage
            names = [name for name in part if name.startswith(f"layers.{layer}.")]
            flat = torch.cat([part[name].flatten() for name in names])
            views = flat.split([part[name].numel() for name in names])
            part |= {name: view.view(part[name].shape) for name, view in zip(names, views, strict=True)}
        torch.save(part, directory / f"consolidated.{number:02d}.pth")
    (directory / "params.json").write_text(json.dumps(params_of(model, version) | params))
    return expected


#: Positions whose logits are kept.
POSITIONS = (0, 7, 31)
TOKENS = [(7 * n + 3) % MODEL.vocab for n in range(32)]


def _metas_logits(groups: int) -> torch.Tensor:
    """What Meta's own code computes in fp32, with the whole model in one process."""
    import sys
    import types
    from dataclasses import replace

    class Linear(torch.nn.Linear):
        def __init__(self, inputs: int, outputs: int, bias: bool = True, **_: Any) -> None:
            super().__init__(inputs, outputs, bias=bias)

    class Embedding(torch.nn.Embedding):
        def __init__(self, rows: int, columns: int, **_: Any) -> None:
            super().__init__(rows, columns)

    class Stub(types.ModuleType):
        ColumnParallelLinear = RowParallelLinear = Linear
        VocabParallelEmbedding = Embedding

        @staticmethod
        def get_model_parallel_world_size() -> int:
            return 1

    base = "fairscale.nn.model_parallel"
    for name in ("fairscale", "fairscale.nn", base, f"{base}.initialize", f"{base}.layers"):
        sys.modules[name] = Stub(name)
    sys.modules[base].initialize = sys.modules[f"{base}.initialize"]  # type: ignore[attr-defined]
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.model import Transformer

    model = replace(MODEL, groups=groups)
    theirs = Transformer(ModelArgs(**params_of(model, "3.1"), max_batch_size=1, max_seq_len=64)).float()
    theirs.load_state_dict({name: tensor.float() for name, tensor in metas(weights(model), model).items()})
    logits: torch.Tensor = theirs.forward(torch.tensor([TOKENS]), 0)[0, list(POSITIONS)]
    return logits.contiguous()


if __name__ == "__main__":
    with torch.no_grad():
        made = {n: [[round(one, 6) for one in row] for row in _metas_logits(n).tolist()] for n in (8, 4, 2)}
    rows = ",\n".join(
        f'"{groups}": [\n' + ",\n".join(map(json.dumps, logits)) + "\n]" for groups, logits in made.items()
    )
    (Path(__file__).parent / "formats/meta_logits.json").write_text("{\n" + rows + "\n}\n")
