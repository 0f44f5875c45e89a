"""Small Megatron checkpoints made without Megatron, by plain reshapes and chunks that share nothing with the package.

`tests/oracle` shows that this is how the real Megatron-Core lays its parameters out; here the same layouts are made in
milliseconds, in every dialect, and bent in every way that a test needs.
"""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

State = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama, or of a Mixtral where `experts` > 0. `padded_vocab` must suit the tensor parallel size."""

    hidden: int = 16
    ffn: int = 24
    heads: int = 4
    groups: int = 2
    head_dim: int = 4
    layers: int = 4
    vocab: int = 29
    padded_vocab: int = 32
    experts: int = 0
    tied: bool = False
    qkv_bias: bool = False
    linear_bias: bool = False
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Grid:
    """Parallel sizes. `etp` None means that experts are split like all else."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None


def hf_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights, under transformers' names."""
    m, query, key = model, model.heads * model.head_dim, model.groups * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (m.vocab, m.hidden)}
    for layer in range(m.layers):
        at = f"model.layers.{layer}."
        shapes[at + "input_layernorm.weight"] = (m.hidden,)
        for name, rows in (("q", query), ("k", key), ("v", key)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, m.hidden)
            if m.qkv_bias or m.linear_bias:
                shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        shapes[at + "self_attn.o_proj.weight"] = (m.hidden, query)
        shapes[at + "post_attention_layernorm.weight"] = (m.hidden,)
        if m.experts:
            shapes[at + "block_sparse_moe.gate.weight"] = (m.experts, m.hidden)
            for expert in range(m.experts):
                inside = f"{at}block_sparse_moe.experts.{expert}."
                shapes |= {inside + "w1.weight": (m.ffn, m.hidden), inside + "w3.weight": (m.ffn, m.hidden)}
                shapes[inside + "w2.weight"] = (m.hidden, m.ffn)
        else:
            shapes |= {f"{at}mlp.{name}_proj.weight": (m.ffn, m.hidden) for name in ("gate", "up")}
            shapes[at + "mlp.down_proj.weight"] = (m.hidden, m.ffn)
        if m.linear_bias:
            shapes |= {f"{at}mlp.{name}_proj.bias": (m.ffn,) for name in ("gate", "up")}
            shapes |= {at + "mlp.down_proj.bias": (m.hidden,), at + "self_attn.o_proj.bias": (m.hidden,)}
    shapes["model.norm.weight"] = (m.hidden,)
    if not m.tied:
        shapes["lm_head.weight"] = (m.vocab, m.hidden)
    return shapes


def hf_tensors(model: Model, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under transformers' names, every one different."""
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random).to(model.dtype) for name, shape in hf_shapes(model).items()}


def megatron_shards(
    model: Model, hf: dict[str, torch.Tensor], grid: Grid = Grid(), *, norms: str = "local", experts: str = "sequential"
) -> dict[str, list[State]]:
    """Rank directory -> one state dict per virtual stage.

    Args:
        model, hf, grid: what is cut, and into what.
        norms: "local", "te" or "habana-fused".
        experts: "sequential", "te-grouped", "te-single", "grouped", "dynamic", "dynamic-transposed",
            "dynamic-unfused", "dynamic-transposed-unfused".
    """
    etp = grid.etp or grid.tp
    per_chunk = model.layers // (grid.pp * grid.vpp)
    shards: dict[str, list[State]] = {}
    for pp in range(grid.pp):
        for tp in range(grid.tp):
            for ep in range(grid.ep):
                if (tp, ep) not in _written_pairs(grid, etp):
                    continue
                name = (
                    f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if grid.pp > 1 else "") + (f"_{ep:03d}" if grid.ep > 1 else "")
                )
                shards[name] = [
                    _chunk(model, hf, grid, (tp, pp, vpp, ep, etp), per_chunk, norms, experts)
                    for vpp in range(grid.vpp)
                ]
    return shards


def _written_pairs(grid: Grid, etp: int) -> set[tuple[int, int]]:
    """(tensor, expert) ranks that occur in one pipeline stage: both count up with the rank in the stage."""
    return {(rank % grid.tp, rank // etp % grid.ep) for rank in range(math.lcm(grid.tp, etp * grid.ep))}


def _chunk(
    model: Model,
    hf: dict[str, torch.Tensor],
    grid: Grid,
    rank: tuple[int, int, int, int, int],
    layers: int,
    norms: str,
    experts: str,
) -> State:
    tp, pp, vpp, *_ = rank
    state: State = {}
    is_first, is_last = (pp, vpp) == (0, 0), (pp, vpp) == (grid.pp - 1, grid.vpp - 1)
    if is_first:
        state["embedding.word_embeddings.weight"] = _vocab_rows(model, hf["model.embed_tokens.weight"], grid.tp, tp)
    first = (vpp * grid.pp + pp) * layers
    for local in range(layers):
        state |= _layer(
            model, hf, f"model.layers.{first + local}.", f"decoder.layers.{local}.", grid, rank, norms, experts
        )
    if is_last:
        state["decoder.final_layernorm.weight"] = hf["model.norm.weight"].clone()
        if not model.tied:
            state["output_layer.weight"] = _vocab_rows(model, hf["lm_head.weight"], grid.tp, tp)
        elif grid.pp > 1:
            state["output_layer.weight"] = _vocab_rows(model, hf["model.embed_tokens.weight"], grid.tp, tp)
        state["output_layer._extra_state"] = None
    return state


def _vocab_rows(model: Model, weight: torch.Tensor, parts: int, part: int) -> torch.Tensor:
    garbage = torch.full((model.padded_vocab - model.vocab, model.hidden), 7.0).to(weight.dtype)
    return torch.cat([weight, garbage]).chunk(parts)[part].clone()


def _layer(
    model: Model,
    hf: dict[str, torch.Tensor],
    at: str,
    to: str,
    grid: Grid,
    rank: tuple[int, int, int, int, int],
    norms: str,
    experts: str,
) -> State:
    tp, _, _, ep, etp = rank
    linear = ".linear" if norms == "habana-fused" else ""
    attention_norm, mlp_norm = {
        "local": ("input_layernorm.weight", "pre_mlp_layernorm.weight"),
        "te": ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"),
        "habana-fused": ("self_attention.linear_qkv.norm.weight", "mlp.linear_fc1.norm.weight"),
    }[norms]
    if model.experts:
        mlp_norm = "pre_mlp_layernorm.weight"
    state: State = {
        to + attention_norm: hf[at + "input_layernorm.weight"].clone(),
        to + mlp_norm: hf[at + "post_attention_layernorm.weight"].clone(),
        f"{to}self_attention.linear_qkv{linear}.weight": _stack_qkv(model, hf, at, "weight").chunk(grid.tp)[tp].clone(),
        to + "self_attention.linear_proj.weight": hf[at + "self_attn.o_proj.weight"].chunk(grid.tp, 1)[tp].clone(),
        to + "self_attention.linear_proj._extra_state": None,
    }
    if model.qkv_bias or model.linear_bias:
        state[to + "self_attention.linear_qkv.bias"] = _stack_qkv(model, hf, at, "bias").chunk(grid.tp)[tp].clone()
    if model.linear_bias:
        state[to + "self_attention.linear_proj.bias"] = hf[at + "self_attn.o_proj.bias"].clone()
        state[to + "mlp.linear_fc2.bias"] = hf[at + "mlp.down_proj.bias"].clone()
        state[to + "mlp.linear_fc1.bias"] = _gate_up(
            hf, at + "mlp.gate_proj.bias", at + "mlp.up_proj.bias", grid.tp, tp
        )
    if not model.experts:
        gate, up = at + "mlp.gate_proj.weight", at + "mlp.up_proj.weight"
        state[f"{to}mlp.linear_fc1{linear}.weight"] = _gate_up(hf, gate, up, grid.tp, tp)
        state[to + "mlp.linear_fc2.weight"] = hf[at + "mlp.down_proj.weight"].chunk(grid.tp, 1)[tp].clone()
        return state
    moe = at + "block_sparse_moe."
    state[to + "mlp.router.weight"] = hf[moe + "gate.weight"].clone()
    owned = range(ep * model.experts // grid.ep, (ep + 1) * model.experts // grid.ep)
    fc1 = [_gate_up(hf, f"{moe}experts.{e}.w1.weight", f"{moe}experts.{e}.w3.weight", etp, tp % etp) for e in owned]
    fc2 = [hf[f"{moe}experts.{e}.w2.weight"].chunk(etp, 1)[tp % etp].clone() for e in owned]
    return state | _experts(to + "mlp.experts.", list(owned), fc1, fc2, experts)


def _stack_qkv(model: Model, hf: dict[str, torch.Tensor], at: str, kind: str) -> torch.Tensor:
    q, k, v = (hf[f"{at}self_attn.{name}_proj.{kind}"] for name in "qkv")
    groups, rest = model.groups, q.shape[1:]
    stacked = [x.reshape(groups, -1, model.head_dim, *rest) for x in (q, k, v)]
    return torch.cat(stacked, 1).reshape(-1, *rest)


def _gate_up(hf: dict[str, torch.Tensor], gate: str, up: str, parts: int, part: int) -> torch.Tensor:
    return torch.cat([hf[gate].chunk(parts)[part], hf[up].chunk(parts)[part]])


def _experts(to: str, owned: list[int], fc1: list[torch.Tensor], fc2: list[torch.Tensor], layout: str) -> State:
    both = {"linear_fc1": fc1, "linear_fc2": fc2}
    if layout == "grouped":
        # The parameter's declared shape is another view of memory [expert][column][row].
        (hidden, ffn), count = (fc2[0].shape[0], fc2[0].shape[1]), len(owned)
        return {
            to + "weight1": torch.stack([w.T for w in fc1]).contiguous().view(hidden, count * 2 * ffn),
            to + "weight2": torch.stack([w.T for w in fc2]).contiguous().view(count * ffn, hidden),
        }
    if layout == "te-single":
        return {f"{to}{name}.weight": torch.stack(weights) for name, weights in both.items()}
    state: State = {}
    for local, expert in enumerate(owned):
        for name, weights in both.items():
            weight = weights[local]
            if layout == "sequential":
                state[f"{to}local_experts.{local}.{name}.weight"] = weight
                state[f"{to}local_experts.{local}.{name}._extra_state"] = None
            elif layout == "te-grouped":
                state[f"{to}{name}.weight{local}"] = weight
            else:
                pieces = {f"{name}_weight": weight}
                if name == "linear_fc1" and layout.endswith("unfused"):
                    pieces = {"linear_fc11_weight": weight.chunk(2)[0], "linear_fc12_weight": weight.chunk(2)[1]}
                for piece, values in pieces.items():
                    stored = values.T.contiguous() if "transposed" in layout else values.clone()
                    state[f"{to}local_expert_{expert}_{piece}"] = stored
    return state


def training_args(model: Model, grid: Grid = Grid(), **more: Any) -> Namespace:
    """The args that training leaves in a checkpoint, as far as they decide the model."""
    values: dict[str, Any] = {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn,
        "num_attention_heads": model.heads,
        "group_query_attention": model.groups != model.heads,
        "num_query_groups": model.groups if model.groups != model.heads else 1,
        "kv_channels": model.head_dim,
        "max_position_embeddings": 64,
        "position_embedding_type": "rope",
        "rotary_base": 500000,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": False,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-5,
        "swiglu": True,
        "add_bias_linear": model.linear_bias,
        "add_qkv_bias": model.qkv_bias,
        "untie_embeddings_and_output_weights": not model.tied,
        "vocab_size": model.vocab,
        "padded_vocab_size": model.padded_vocab,
        "params_dtype": model.dtype,
        "tensor_model_parallel_size": grid.tp,
        "pipeline_model_parallel_size": grid.pp,
        "virtual_pipeline_model_parallel_size": grid.vpp if grid.vpp > 1 else None,
        "expert_model_parallel_size": grid.ep,
        "expert_tensor_parallel_size": grid.etp or grid.tp,
        "num_experts": model.experts or None,
        "moe_router_topk": min(2, model.experts) or 2,
        "moe_router_pre_softmax": False,
        "moe_ffn_hidden_size": model.ffn if model.experts else None,
        "tokenizer_model": None,
    }
    return Namespace(**(values | more))


def save(
    root: Path, shards: dict[str, list[State]], args: Namespace | None, *, iteration: int = 4, **extra: Any
) -> Path:
    """Write the rank directories and the tracker file; returns the checkpoint's root.

    Args:
        root: to be made.
        shards: of `megatron_shards`.
        args: None leaves them out.
        iteration: number of the directory.
        extra: more keys of every file, such as optimizer=...
    """
    for name, chunks in shards.items():
        directory = root / f"iter_{iteration:07d}" / name
        directory.mkdir(parents=True)
        models = {"model": chunks[0]} if len(chunks) == 1 else {f"model{n}": chunk for n, chunk in enumerate(chunks)}
        saved = {"checkpoint_version": 3.0, "iteration": iteration, **models, **extra}
        torch.save(saved if args is None else {"args": args, **saved}, directory / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return root


def make(
    root: Path,
    model: Model = Model(),
    grid: Grid = Grid(),
    *,
    norms: str = "local",
    experts: str = "sequential",
    seed: int = 0,
    **args: Any,
) -> dict[str, torch.Tensor]:
    """Make a checkpoint below `root` and return the Hugging Face tensors that it must convert to."""
    hf = hf_tensors(model, seed)
    save(root, megatron_shards(model, hf, grid, norms=norms, experts=experts), training_args(model, grid, **args))
    return hf
