"""`verify` finds what differs: one bit anywhere, exchanged tensors, a foreign shard, another config; and names it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, State, make
from tests.to_megatron import make_hf
from tests.verify import edit_args, edit_config, edit_hf, edit_shard, flip, swap, verify

LLAMA = Model()
TIED = Model(tied=True)
MIXTRAL = Model(experts=4, groups=4, layers=2)

#: The Megatron checkpoint of each pair, and another of the same model at another grid.
GRIDS = {
    "llama": (LLAMA, Grid(tp=2, pp=2), Grid(tp=4)),
    "tied": (TIED, Grid(tp=2, pp=2), Grid()),
    "mixtral": (MIXTRAL, Grid(tp=2, ep=2), Grid(pp=2, ep=4)),
}
FC1 = "decoder.layers.{}.mlp.experts.local_experts.{}.linear_fc1.weight"
FC2 = "decoder.layers.{}.mlp.experts.local_experts.{}.linear_fc2.weight"
W = "model.layers.{}.block_sparse_moe.experts.{}.w{}.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """NAME/megatron, NAME/other grid and NAME/hf of every model."""
    root = tmp_path_factory.mktemp("models")
    for name, (model, grid, other) in GRIDS.items():
        tensors = make(root / name / "megatron", model, grid)
        make(root / name / "other grid", model, other, norms="te")
        make_hf(root / name / "hf", model, tensors)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def pair(models: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies of a model's checkpoints, to be edited."""
    return lambda name: Path(shutil.copytree(models / name, tmp_path / name))


@dataclass(frozen=True)
class Flip:
    """A bit of a Megatron shard, and where the report must find it."""

    model: str
    rank: str
    name: str
    index: tuple[int, ...]
    bit: int
    tensor: str
    at: list[int]
    between: str = "A and B"


QKV, COPIES = "self_attention.linear_qkv.weight", "two copies in A"
EMBEDDING, ATTENTION = "model.embed_tokens.weight", "model.layers.{}.self_attn.{}_proj.weight"
FLIPS = {
    "in the embedding": Flip(
        "llama", "mp_rank_00_000", "embedding.word_embeddings.weight", (3, 2), 6, EMBEDDING, [3, 2]
    ),
    "in the last real row of the vocabulary": Flip(
        "llama", "mp_rank_01_000", "embedding.word_embeddings.weight", (12, 15), 0, EMBEDDING, [28, 15]
    ),
    "in a query": Flip(  # a rank holds one group: 8 rows of queries, 4 of keys, 4 of values
        "llama", "mp_rank_01_001", f"decoder.layers.0.{QKV}", (7, 1), 3, ATTENTION.format(2, "q"), [15, 1]
    ),
    "in a key": Flip(
        "llama", "mp_rank_01_001", f"decoder.layers.0.{QKV}", (9, 5), 3, ATTENTION.format(2, "k"), [5, 5]
    ),
    "in a value": Flip(
        "llama", "mp_rank_00_001", f"decoder.layers.1.{QKV}", (15, 0), 15, ATTENTION.format(3, "v"), [3, 0]
    ),
    "in the second copy of a norm": Flip(
        "llama", "mp_rank_01_000", "decoder.layers.1.input_layernorm.weight", (5,), 0,
        "model.layers.1.input_layernorm.weight", [5], COPIES,
    ),
    "in columns that the second rank holds": Flip(
        "llama", "mp_rank_01_000", "decoder.layers.0.self_attention.linear_proj.weight", (2, 3), 9,
        "model.layers.0.self_attn.o_proj.weight", [2, 11],
    ),
    "in the last byte of a tensor": Flip(
        "llama", "mp_rank_01_001", "decoder.layers.1.mlp.linear_fc2.weight", (15, 11), 15,
        "model.layers.3.mlp.down_proj.weight", [15, 23],
    ),
    "in the head": Flip(
        "llama", "mp_rank_01_001", "output_layer.weight", (0, 0), 1, "lm_head.weight", [16, 0]
    ),
    "in the last stage's copy of a tied embedding": Flip(
        "tied", "mp_rank_01_001", "output_layer.weight", (1, 4), 1, EMBEDDING, [17, 4], COPIES
    ),
    "in one of four copies of a router": Flip(
        "mixtral", "mp_rank_01_001", "decoder.layers.1.mlp.router.weight", (3, 15), 2,
        "model.layers.1.block_sparse_moe.gate.weight", [3, 15], COPIES,
    ),
    "in a copy of the attention that the second expert rank holds": Flip(
        "mixtral", "mp_rank_00_001", f"decoder.layers.0.{QKV}", (0, 0), 2,
        ATTENTION.format(0, "q"), [0, 0], COPIES,
    ),
    "in the last expert": Flip(
        "mixtral", "mp_rank_01_001", FC2.format(1, 1), (15, 11), 7, W.format(1, 3, 2), [15, 23]
    ),
    "in the up rows of an expert": Flip(  # a rank holds 12 rows of gate, then 12 of up
        "mixtral", "mp_rank_01_000", FC1.format(0, 1), (12, 6), 7, W.format(0, 1, 3), [12, 6]
    ),
}  # fmt: skip


@pytest.mark.parametrize("other", ["hf", "other grid"])
@pytest.mark.parametrize("name", FLIPS)
def test_one_flipped_bit_of_a_shard_is_found(
    name: str, other: str, pair: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    case = FLIPS[name]
    root = pair(case.model)
    edit_shard(root / "megatron", case.rank, flip(case.name, case.index, case.bit))
    code, report = verify(root / "megatron", root / other, capsys)
    assert code == 1
    assert not report["same"]
    [found] = report["values"]
    assert (found["tensor"], found["index"], found["elements"], found["between"]) == (
        case.tensor, case.at, 1, case.between,
    )  # fmt: skip
    assert f"{case.rank}/model_optim_rng.pt" in found["files"]


def test_a_flipped_bit_of_the_copy_that_is_compared_with_the_other_side_is_found_twice(
    pair: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = pair("llama")
    norm = "decoder.layers.1.input_layernorm.weight"
    edit_shard(root / "megatron", "mp_rank_00_000", flip(norm, (5,)))
    code, report = verify(root / "megatron", root / "hf", capsys)
    assert code == 1
    assert [(found["between"], found["index"]) for found in report["values"]] == [("A and B", [5]), (COPIES, [5])]


@pytest.mark.parametrize(
    ("model", "tensor", "index", "bit"),
    [
        ("llama", "model.embed_tokens.weight", (28, 15), 0),
        ("llama", "model.layers.3.self_attn.q_proj.weight", (0, 0), 15),
        ("llama", "model.layers.0.mlp.gate_proj.weight", (4, 7), 14),
        ("llama", "model.norm.weight", (15,), 0),
        ("mixtral", W.format(1, 3, 2), (15, 23), 8),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_one_flipped_bit_of_a_hugging_face_file_is_found_on_either_side(
    model: str,
    tensor: str,
    index: tuple[int, ...],
    bit: int,
    order: int,
    pair: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = pair(model)
    edit_hf(root / "hf", flip(tensor, index, bit))
    code, report = verify(*[root / "hf", root / "megatron"][::order], capsys)
    assert code == 1
    assert [(f["tensor"], f["index"], f["elements"]) for f in report["values"]] == [(tensor, list(index), 1)]


def test_the_sign_of_a_zero_is_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = make_hf(tmp_path / "a")
    for name, zero in (("a", 0.0), ("b", -0.0)):
        tensors["model.layers.2.mlp.up_proj.weight"][3, 1] = zero
        make_hf(tmp_path / name, LLAMA, tensors)
    code, report = verify(tmp_path / "a", tmp_path / "b", capsys)
    assert code == 1
    [found] = report["values"]
    assert (found["index"], found["values"]) == ([3, 1], ["0 (0x0000)", "-0 (0x8000)"])


def test_a_bit_of_a_nan_is_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = make_hf(tmp_path / "a")
    for name, bits in (("a", 0x7FC0), ("b", 0x7FC1)):
        tensors["model.norm.weight"].view(torch.int16)[2] = bits
        make_hf(tmp_path / name, LLAMA, tensors)
    assert verify(tmp_path / "a", tmp_path / "b", capsys)[0] == 1
    assert verify(tmp_path / "a", tmp_path / "a", capsys)[0] == 0


def test_two_swapped_experts_are_found_in_a_shard(
    pair: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = pair("mixtral")
    for rank in ("mp_rank_00_001", "mp_rank_01_001"):
        pairs = [(fc.format(1, 0), fc.format(1, 1)) for fc in (FC1, FC2)]
        edit_shard(root / "megatron", rank, swap(*pairs))
    code, report = verify(root / "megatron", root / "hf", capsys)
    assert code == 1
    assert [f["tensor"] for f in report["values"]] == [W.format(1, e, w) for e in (2, 3) for w in (1, 3, 2)]


def test_two_swapped_experts_are_found_in_a_hugging_face_file(
    pair: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = pair("mixtral")
    edit_hf(root / "hf", swap(*((W.format(0, 0, w), W.format(0, 3, w)) for w in (1, 2, 3))))
    code, report = verify(root / "other grid", root / "hf", capsys)
    assert code == 1
    assert [f["tensor"] for f in report["values"]] == [W.format(0, e, w) for e in (0, 3) for w in (1, 3, 2)]


def exchange_halves(name: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[name] = torch.cat(state[name].chunk(2)[::-1])

    return change


@pytest.mark.parametrize("where", ["hf", "megatron"])
def test_gate_and_up_exchanged_are_found(
    where: str, pair: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = pair("llama")
    gate, up = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
    if where == "hf":
        edit_hf(root / "hf", swap((gate, up)))
    else:
        for rank in ("mp_rank_00_000", "mp_rank_01_000"):
            edit_shard(root / "megatron", rank, exchange_halves("decoder.layers.1.mlp.linear_fc1.weight"))
    code, report = verify(root / "megatron", root / "hf", capsys)
    assert code == 1
    assert [f["tensor"] for f in report["values"]] == [gate, up]


def test_a_shard_of_another_run_is_found(
    pair: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = pair("llama")
    make(tmp_path / "another", LLAMA, Grid(tp=2, pp=2), seed=1)
    rank = Path("iter_0000004") / "mp_rank_01_000" / "model_optim_rng.pt"
    shutil.copyfile(tmp_path / "another" / rank, root / "megatron" / rank)
    code, report = verify(root / "megatron", root / "hf", capsys)
    assert code == 1
    q = "model.layers.0.self_attn.q_proj.weight"
    [found] = [f for f in report["values"] if f["tensor"] == q]
    assert found["index"][0] == 8  # the rows of the second rank
    norms = [f["tensor"] for f in report["values"] if f["between"] == "two copies in A"]
    assert norms == [
        f"model.layers.{n}.{norm}_layernorm.weight" for n in (0, 1) for norm in ("input", "post_attention")
    ]
    assert not [f for f in report["values"] if ".layers.2." in f["tensor"] or ".layers.3." in f["tensor"]]


def test_a_shard_of_another_iteration_is_refused_by_name(
    pair: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = pair("llama")
    make(tmp_path / "another", LLAMA, Grid(tp=2, pp=2))
    rank = Path("iter_0000004") / "mp_rank_01_000" / "model_optim_rng.pt"
    saved = torch.load(tmp_path / "another" / rank, weights_only=False)
    torch.save(saved | {"iteration": 3}, root / "megatron" / rank)
    assert main(["verify", str(root / "hf"), str(root / "megatron")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"B ({root / 'megatron'}): two shards disagree about iteration")
    assert "mp_rank_01_000" in error


@pytest.mark.parametrize(
    ("args", "config"),
    [
        ({"rotary_base": 10000}, {"rope_theta": [10000.0, 500000.0]}),
        ({"norm_epsilon": 1e-6}, {"norm_epsilon": [1e-6, 1e-5]}),
        ({"max_position_embeddings": 128}, {"max_positions": [128, 64]}),
        ({"moe_router_topk": 1}, {"experts_per_token": [1, 2]}),
        ({"window_size": (7, 0)}, {"sliding_window": [8, None]}),
        (
            {"use_rope_scaling": True},
            {
                "rope_scaling": [
                    {
                        "factor": 8.0,
                        "low_frequency_factor": 1.0,
                        "high_frequency_factor": 4.0,
                        "original_max_positions": 8192,
                    },
                    None,
                ]
            },
        ),
    ],
)
def test_another_config_is_found_though_every_tensor_is_the_same(
    args: dict[str, object],
    config: dict[str, list[object]],
    pair: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = pair("mixtral")
    edit_args(root / "megatron", **args)
    code, report = verify(root / "megatron", root / "hf", capsys)
    assert code == 1
    assert report["values"] == []
    assert {name: [both["a"], both["b"]] for name, both in report["config"].items()} == config


@pytest.mark.parametrize("style", [4, 5])
def test_a_wrong_rope_theta_is_found_in_the_config_of_either_version_of_transformers(
    style: int, pair: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = pair("llama")
    rope = {"rope_theta": 10000.0}
    config = {"rope_theta": 10000.0, "rope_parameters": None} if style == 4 else {"rope_parameters": rope}
    edit_config(root / "hf", **config)
    code, report = verify(root / "other grid", root / "hf", capsys)
    assert code == 1
    assert report["config"] == {"rope_theta": {"a": 500000.0, "b": 10000.0}}


def test_another_scaling_of_rotary_frequencies_is_a_difference(
    pair: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = pair("llama")
    llama32 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama32 |= {"original_max_position_embeddings": 8192, "rope_type": "llama3", "rope_theta": 500000.0}
    edit_config(root / "hf", rope_parameters=llama32)
    assert main(["verify", str(root / "megatron"), str(root / "hf")]) == 1
    assert "RopeScaling(factor=32.0" in capsys.readouterr().out


def test_another_vocabulary_is_found_by_size_and_shape(
    pair: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = pair("llama")
    edit_args(root / "megatron", vocab_size=28)
    code, report = verify(root / "megatron", root / "hf", capsys)
    assert code == 1
    assert report["config"] == {"vocab": {"a": 28, "b": 29}}
    assert report["shapes"] == {
        name: {"a": [28, 16], "b": [29, 16]} for name in ("model.embed_tokens.weight", "lm_head.weight")
    }


def test_tensors_that_only_one_of_them_has_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(tmp_path / "three", Model(layers=3))
    make(tmp_path / "four", Model(layers=4))
    code, report = verify(tmp_path / "three", tmp_path / "four", capsys)
    assert code == 1
    assert report["config"] == {"layers": {"a": 3, "b": 4}}
    assert report["only_in_a"] == []
    assert {name.split(".")[2] for name in report["only_in_b"]} == {"3"}
    assert len(report["only_in_b"]) == 9


def test_the_report_for_people_shows_the_first_twenty_differences(
    pair: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = pair("llama")
    make(tmp_path / "another", LLAMA, seed=1, rotary_base=10000)
    assert main(["verify", str(root / "hf"), str(tmp_path / "another")]) == 1
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("DIFFERENT: 40 differences")
    assert lines[first + 1] == "  rope_theta: 500000.0 in A, 10000.0 in B"
    assert lines[first + 2].startswith("  model.embed_tokens.weight: A and B differ in ")
    assert lines[-1] == "  ... and 20 more (--json shows all)"
    assert len(lines) == first + 22
