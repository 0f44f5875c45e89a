"""What the headers show before the first byte moves: every parameter found, every stored tensor accounted for.

All that is wrong is collected and raised together: missing, unknown and misshapen tensors, with their files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dist_convert import dialects
from dist_convert.errors import (
    ConversionError,
    InconsistentShards,
    MissingTensor,
    PlanError,
    UnknownTensor,
    WrongShape,
    raise_together,
)
from dist_convert.other_dialects import describe_homeless
from dist_convert.plan.megatron import MegatronSide, parameters, replicas, stored_as
from dist_convert.read.megatron_shard import Shard
from dist_convert.records import FLOAT_DTYPES, View

#: Args that must be the same in every shard; they decide where bytes go.
_SAME_IN_ALL = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "padded_vocab_size", "num_experts", "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "expert_model_parallel_size", "expert_tensor_parallel_size", "rotary_base", "params_dtype", "vocab_size",
    "untie_embeddings_and_output_weights", "norm_epsilon", "use_rope_scaling", "moe_router_topk", "apply_layernorm_1p",
    "group_query_attention", "max_position_embeddings", "add_bias_linear", "add_qkv_bias", "moe_ffn_hidden_size",
)  # fmt: skip


def check_same_run(shards: Iterable[Shard]) -> None:
    """Refuse shards whose iteration or sizes differ.

    Raises:
        InconsistentShards: naming the first file and the one that differs from it.
    """
    listed = sorted(shards, key=lambda shard: shard.file)
    first = listed[0]
    problems = []
    for shard in listed[1:]:
        pairs = [("iteration", first.iteration, shard.iteration)]
        pairs += [(name, first.args.get(name), shard.args.get(name)) for name in _SAME_IN_ALL]
        pairs += [("number of models", len(first.chunks), len(shard.chunks))]
        problems += [
            InconsistentShards(
                f"two shards disagree about {name}",
                file=shard.file,
                expected=f"{expected!r} as in {first.file}",
                found=repr(found),
                remedy="shards of different runs or iterations were mixed; copy this one again",
            )
            for name, expected, found in pairs
            if expected != found
        ]
    raise_together(problems)


@dataclass(frozen=True)
class Survey:
    """What the headers showed: the dtype of every parameter, and what is dropped on purpose, by reason.

    `left_behind` holds (reason, tensors, bytes).
    """

    dtypes: Mapping[str, str]
    params_dtype: str
    left_behind: tuple[tuple[str, int, int], ...]


def survey(side: MegatronSide, shards: Mapping[str, Shard]) -> Survey:
    """Find every parameter in every shard and account for every stored tensor.

    Raises:
        Problems, or the one problem there is: MissingTensor, WrongShape, UnknownTensor, UnsupportedModel.
    """
    problems: list[ConversionError] = []
    dtypes: dict[str, str] = {}
    used: set[tuple[str, str]] = set()
    bytes_of: Counter[str] = Counter()
    for parameter in parameters(side):
        for shard in range(parameter.shards):
            try:
                found = replicas(side, parameter, shard)
            except (MissingTensor, WrongShape, InconsistentShards, PlanError) as problem:
                problems.append(problem)
                used |= stored_as(side, parameter, shard)
                continue
            for view in (view for replica in found for _, view in replica):
                used.add((view.file, view.tensor))
                problems += _dtype_problems(view, dtypes.setdefault(parameter.name, view.dtype))
            bytes_of[found[0][0][1].dtype] += sum(view.size_bytes for _, view in found[0])
    left_behind, unknown = _leftovers(side, shards, used)
    raise_together(problems + unknown)
    return Survey(dtypes, bytes_of.most_common(1)[0][0], left_behind)


def _dtype_problems(view: View, expected: str) -> list[ConversionError]:
    if view.dtype == expected and view.dtype in FLOAT_DTYPES:
        return []
    return [
        WrongShape(
            "a weight of an unexpected dtype",
            tensor=view.tensor,
            file=view.file,
            expected=f"{expected if expected in FLOAT_DTYPES else ' or '.join(FLOAT_DTYPES)} in every shard",
            found=view.dtype,
            remedy="quantised and mixed shards are not converted; save the checkpoint in bf16, fp16 or fp32",
        )
    ]


def _leftovers(
    side: MegatronSide, shards: Mapping[str, Shard], used: set[tuple[str, str]]
) -> tuple[tuple[tuple[str, int, int], ...], list[ConversionError]]:
    counts: Counter[str] = Counter()
    sizes_bytes: Counter[str] = Counter()
    unknown: list[ConversionError] = []
    for shard in shards.values():
        for chunk, opaque in zip(shard.chunks, shard.opaque, strict=True):
            unused = {name: tensor for name, tensor in chunk.items() if (shard.file, tensor.name) not in used}
            names = {name: tensor.size_bytes for name, tensor in unused.items()}
            for name, size_bytes in {**names, **dict.fromkeys(opaque, 0)}.items():
                reason = _reason_to_drop(side, dialects.normalise(name))
                if reason is None:
                    unknown.append(_unknown(side, shard.file, name, opaque.get(name)))
                else:
                    counts[reason] += 1
                    sizes_bytes[reason] += size_bytes
    return tuple((reason, counts[reason], sizes_bytes[reason]) for reason in sorted(counts)), unknown


def _reason_to_drop(side: MegatronSide, name: str) -> str | None:
    if dialects.CAPACITY_BINS in name:
        return "capacity bins (statistics of training)"
    if dialects.holds_no_weights(name):
        return "extra state (no weights)"
    if dialects.is_tied_copy(name) and side.architecture.tied and side.chunks[-1] != side.chunks[0]:
        return "output layer (equal to the embedding that it is tied to)"
    return None


def _unknown(side: MegatronSide, file: str, name: str, kind: str | None) -> ConversionError:
    what = f"an entry of class {kind}" if kind else describe_homeless(dialects.normalise(name))
    return UnknownTensor(
        f"{name} has no place in a {side.family.name} model",
        tensor=name,
        file=file,
        expected=f"only parameters of {side.family.hf_class}",
        found=what,
        remedy="nothing is dropped silently: convert with a family that has this parameter",
    )
