"""What headers show to be wrong is told before any byte moves: all of it together, with tensors and files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_convert.errors import (
    ConversionError,
    InconsistentShards,
    MissingTensor,
    Problems,
    UnknownTensor,
    UnsupportedModel,
    WrongShape,
)
from dist_convert.formats.megatron.grid import Grid
from dist_convert.formats.torch.shards import Shard
from dist_convert.formats.torch.survey import check_same_run
from dist_convert.models.schema import Architecture
from dist_convert.plan.content import Content
from dist_convert.records import StoredTensor
from tests.plan.headers import architecture, plan_to_huggingface, row_major, shards

FIRST, SECOND = "mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"
TP2 = Grid(tensor=2, expert_tensor=2)
FC2 = "decoder.layers.1.mlp.linear_fc2.weight"
ROUTER = "decoder.layers.0.mlp.router.weight"
Headers = dict[str, Shard]


def planned(made: Headers, model: Architecture) -> Content:
    return plan_to_huggingface(made, model, target_dtype="F16", max_shard_size_bytes=1_000_000)


def refused(made: Headers, model: Architecture) -> list[ConversionError]:
    """All problems that planning raises."""
    with pytest.raises(ConversionError) as error:
        planned(made, model)
    return list(error.value.problems) if isinstance(error.value, Problems) else [error.value]


def bend(made: Headers, file: str, **tensors: StoredTensor | None) -> None:
    """Replace tensors of one file, or take them out."""
    chunk = dict(made[file].chunks[0])
    for name, tensor in tensors.items():
        if tensor is None:
            del chunk[name]
        else:
            chunk[name] = tensor
    made[file] = replace(made[file], chunks=(chunk,))


def stored(name: str, file: str, *shape: int, dtype: str = "BF16") -> StoredTensor:
    return StoredTensor(name, file, dtype, shape, row_major(shape), 1 << 20)


def test_all_problems_of_all_files_are_told_together_with_names_and_files() -> None:
    model = architecture(layers=2)
    made = shards(model, TP2)
    extra, other = (f"decoder.layers.{layer}.self_attention.q_layernorm.weight" for layer in range(2))
    norm = "decoder.layers.0.input_layernorm.weight"
    fc1 = "decoder.layers.0.mlp.linear_fc1.weight"
    bend(made, FIRST, **{FC2: None, extra: stored(extra, FIRST, 4), other: stored(other, FIRST, 4)})
    bend(made, SECOND, **{fc1: stored(fc1, SECOND, 23, 16), norm: stored(norm, SECOND, 16, dtype="F32")})
    found = {(type(problem), problem.tensor, problem.file) for problem in refused(made, model)}
    assert found == {
        (MissingTensor, FC2, FIRST),
        (UnknownTensor, extra, FIRST),
        (UnknownTensor, other, FIRST),
        (WrongShape, fc1, SECOND),
        (WrongShape, norm, SECOND),
    }


def test_the_message_of_several_problems_counts_them_and_lists_each() -> None:
    model = architecture(layers=2)
    made = shards(model, TP2)
    bend(made, FIRST, **{FC2: None})
    bend(made, SECOND, **{FC2: stored(FC2, SECOND, 12, 16)})
    with pytest.raises(Problems) as error:
        planned(made, model)
    assert str(error.value) == (
        "2 problems found; nothing was written\n"
        "no tensor for decoder.layers.1.mlp.linear_fc2.weight\n"
        f"  tensor:   {FC2}\n"
        f"  file:     {FIRST}\n"
        f"  expected: shape [16, 12], under one of {FC2}\n"
        "  found:    nothing\n"
        "  remedy:   the shard is incomplete or of another model; copy it again\n"
        "wrong shape for decoder.layers.1.mlp.linear_fc2.weight\n"
        f"  tensor:   {FC2}\n"
        f"  file:     {SECOND}\n"
        "  expected: [16, 12] from the args and TP2 PP1 VPP1 EP1 ETP2\n"
        "  found:    [12, 16]\n"
        "  remedy:   the shard is of another model, or the args are not those it was trained with"
    )


def test_norms_that_may_be_stored_as_gamma_minus_one_hide_no_other_problem() -> None:
    made = shards(architecture(layers=2), TP2)
    for shard in made.values():
        shard.args["apply_layernorm_1p"] = True
    (problem,) = refused(made, architecture(layers=2))
    assert str(problem).startswith("nothing says whether the norms are stored as gamma - 1")
    bend(made, FIRST, **{FC2: None})
    (problem,) = refused(made, architecture(layers=2))
    assert (type(problem), problem.tensor) == (MissingTensor, FC2)


def test_a_single_problem_is_raised_as_itself() -> None:
    made = shards(architecture(), TP2)
    bend(made, SECOND, **{FC2: None})
    with pytest.raises(MissingTensor):
        planned(made, architecture())


def test_a_copy_of_a_norm_that_only_one_of_several_equal_shards_lacks_is_missing() -> None:
    norm = "decoder.layers.1.pre_mlp_layernorm.weight"
    made = shards(architecture(), TP2)
    bend(made, SECOND, **{norm: None})
    assert [(p.tensor, p.file) for p in refused(made, architecture())] == [(norm, SECOND)]


def test_shards_of_one_parameter_with_different_dtypes_are_refused() -> None:
    made = shards(architecture(), TP2)
    bend(made, SECOND, **{FC2: stored(FC2, SECOND, 16, 12, dtype="F32")})
    (problem,) = refused(made, architecture())
    assert (problem.tensor, problem.file, problem.found) == (FC2, SECOND, "F32")
    assert problem.expected == "BF16 in every shard"


def test_quantised_weights_are_refused_in_every_shard() -> None:
    made = shards(architecture(), TP2, dtypes={FC2: "F8_E4M3"})
    found = refused(made, architecture())
    assert [(p.tensor, p.file, p.found) for p in found] == [(FC2, FIRST, "F8_E4M3"), (FC2, SECOND, "F8_E4M3")]


def test_a_parameter_of_another_dtype_in_all_shards_keeps_it() -> None:
    mixtral = architecture(experts=2)
    content = planned(shards(mixtral, TP2, dtypes={ROUTER: "F32"}), mixtral)
    assert content.ends.source.params_dtype == "BF16"
    dtypes = {tensor.name: tensor.dtype for file in content.files for tensor in file.tensors}
    assert dtypes.pop("model.layers.0.block_sparse_moe.gate.weight") == "F32"
    assert set(dtypes.values()) == {"F16"}


def test_a_parameter_that_is_stored_under_two_spellings_is_refused() -> None:
    fused = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    made = shards(architecture())
    bend(made, FIRST, **{fused: stored(fused, FIRST, 16)})
    (problem,) = refused(made, architecture())
    assert isinstance(problem, InconsistentShards)
    assert problem.file == FIRST
    assert problem.found == f"decoder.layers.0.input_layernorm.weight, {fused}"


def test_the_head_of_a_tied_model_is_left_behind_and_counted_by_name() -> None:
    tied = architecture(tied=True)
    content = planned(shards(tied, Grid(pipeline=2)), tied)
    (left,) = content.left_behind
    assert left == ("output layer (equal to the embedding that it is tied to)", 1, 32 * 16 * 2)
    assert "lm_head.weight" not in {tensor.name for file in content.files for tensor in file.tensors}


def test_a_second_head_of_a_model_that_is_not_tied_is_unknown() -> None:
    head, stage = "output_layer.weight", "mp_rank_00_000/model_optim_rng.pt"
    made = shards(architecture(), Grid(pipeline=2))
    bend(made, stage, **{head: stored(head, stage, 32, 16)})
    (problem,) = refused(made, architecture())
    assert (type(problem), problem.tensor, problem.file) == (UnknownTensor, head, stage)


def test_extra_state_and_capacity_bins_are_left_behind_and_counted() -> None:
    bins = "decoder.layers.0.mlp.router.capacity_bins.bins_usage"
    state = "decoder.layers.0.mlp.linear_fc1._extra_state"
    mixtral = architecture(experts=2)
    made = shards(mixtral)
    bend(made, FIRST, **{bins: stored(bins, FIRST, 10, dtype="I64")})
    made[FIRST] = replace(made[FIRST], opaque=({state: "NoneType", "output_layer._extra_state": "_io.BytesIO"},))
    assert planned(made, mixtral).left_behind == (
        ("capacity bins (statistics of training)", 1, 80),
        ("extra state (no weights)", 2, 0),
    )


def test_an_entry_that_is_no_tensor_is_told_with_its_class() -> None:
    made = shards(architecture())
    made[FIRST] = replace(made[FIRST], opaque=({"decoder.layers.0.mlp.linear_fc1.scale": "builtins.float"},))
    (problem,) = refused(made, architecture())
    assert isinstance(problem, UnsupportedModel)
    assert (problem.tensor, problem.file) == ("decoder.layers.0.mlp.linear_fc1.scale", FIRST)
    assert problem.what == "an object of class builtins.float, which is not imported, among the model's tensors"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("decoder.layers.0.self_attention.k_layernorm.weight", "key layernorm (--qk-layernorm)"),
        ("embedding.position_embeddings.weight", "learned position embeddings"),
        ("decoder.layers.0.input_layernorm.bias", "a LayerNorm bias"),
        ("decoder.layers.0.mlp.shared_experts.linear_fc1.weight", "shared experts (--moe-shared-expert-inter"),
        ("decoder.layers.9.mlp.something.weight", "a parameter that no table names"),
    ],
)
def test_a_parameter_without_a_place_is_told_by_what_it_is(name: str, what: str) -> None:
    made = shards(architecture(layers=10))
    bend(made, FIRST, **{name: stored(name, FIRST, 16)})
    (problem,) = refused(made, architecture(layers=10))
    assert (problem.tensor, problem.file) == (name, FIRST)
    assert problem.found.startswith(what)


def test_stages_with_another_number_of_layers_than_the_args_say_are_refused_with_the_count_of_each() -> None:
    model = architecture(layers=4)
    made = shards(replace(model, layers=3), Grid(pipeline=2), layers=(2, 1))
    (problem,) = refused(made, model)
    assert isinstance(problem, UnsupportedModel)
    assert problem.expected == "num_layers=4"
    assert problem.found == "3 (stage 0 model0: 2, stage 1 model0: 1)"


def another(**changes: Any) -> Callable[[Shard], Shard]:
    return lambda shard: replace(shard, **changes)


@pytest.mark.parametrize(
    ("change", "what", "found"),
    [
        (another(iteration=8), "iteration", "8"),
        (another(args={**shards(architecture(), TP2)[FIRST].args, "num_layers": 6}), "num_layers", "6"),
        (another(args={**shards(architecture(), TP2)[FIRST].args, "norm_epsilon": 0.5}), "norm_epsilon", "0.5"),
        (another(args={**shards(architecture(), TP2)[FIRST].args, "qk_layernorm": True}), "qk_layernorm", "True"),
        (another(chunks=({}, {}), opaque=({}, {})), "number of models", "2"),
    ],
)
def test_shards_of_different_runs_are_refused_naming_both_files(
    change: Callable[[Shard], Shard], what: str, found: str
) -> None:
    made = shards(architecture(), TP2)
    with pytest.raises(InconsistentShards, match=f"disagree about {what}") as error:
        check_same_run([made[FIRST], change(made[SECOND])], Path("in"))
    assert error.value.file == f"in/{SECOND}"
    assert error.value.expected.endswith(f"as in in/{FIRST}")
    assert error.value.found == found


def test_shards_of_one_run_agree() -> None:
    check_same_run(shards(architecture(), TP2).values(), Path("in"))
