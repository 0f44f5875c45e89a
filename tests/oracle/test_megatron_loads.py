"""Megatron-Core loads what conversions write, strictly on every rank, and computes what transformers computes.

The models are those of `cases.py`: Megatron's own checkpoints, and Hugging Face directories that were made of them; so
the checkpoint that Megatron itself wrote at a target's grid says what every one of its tensors must be.
"""

from __future__ import annotations

import json
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dist_convert.__main__ import main
from tests.oracle.cases import CASES, LOSSY_CASES, OracleCase
from tests.oracle.conftest import Ranks

KNOWN = {case.name: case for case in CASES + LOSSY_CASES}


@dataclass(frozen=True)
class Target:
    """A checkpoint to be written: at a case's grid, of the model in `source`, with more flags.

    `resharded` is the Megatron checkpoint that it is made of: the oracle's own, or another target's name. Without one
    it is made of the Hugging Face directory.
    """

    name: str
    case: OracleCase
    source: str
    flags: tuple[str, ...] = ()
    pipeline: tuple[str, ...] | None = None  # instead of the case's own virtual and uneven stages
    resharded: str = ""
    to: str = "torch"

    def command(self, directory: Path, oracle: Path) -> list[str]:
        """The command line that writes it."""
        case, pipeline = self.case, self.pipeline
        if pipeline is None:
            pipeline = ("--target-virtual-pipeline-parallel-size", str(case.virtual_pipeline_parallel))
            if case.first_stage_layers:
                pipeline += ("--decoder-first-pipeline-num-layers", str(case.first_stage_layers))
                pipeline += ("--decoder-last-pipeline-num-layers", str(case.last_stage_layers))
        target = str(directory / self.name / "megatron")
        words = ["hf-to-megatron", "--load-dir", str(directory / f"{self.source}-hf"), "--save-dir", target]
        words += ["--saver-transformer-impl", "local"]
        if self.resharded:
            is_own = (oracle / self.resharded).is_dir()
            source = oracle / self.resharded if is_own else directory / self.resharded / "megatron"
            words = ["convert", str(source), target, "--to", self.to, "--saver-transformer-impl", "local"]
        return [
            *words,
            *("--device", "cpu"),
            *("--target-tensor-parallel-size", str(case.tensor_parallel)),
            *("--target-pipeline-parallel-size", str(case.pipeline_parallel)),
            *("--target-expert-parallel-size", str(case.expert_parallel)),
            *("--target-expert-tensor-parallel-size", str(case.etp)),
            *("--make-vocab-size-divisible-by", str(case.make_vocab_size_divisible_by)),
            *("--expert-layout", "grouped" if case.grouped_gemm else "sequential"),
            *pipeline,
            *self.flags,
        ]


SAME_GRID = [Target(case.name, case, case.name) for case in CASES if not case.qk_layernorm]
LAYOUT = "--pipeline-model-parallel-layout"
OTHERS = [
    Target("llama-release", KNOWN["llama-mha"], "llama-mha", ("--release",)),
    Target("llama-pp4-layout", KNOWN["llama-pp4-uneven"], "llama-pp4-uneven", pipeline=(LAYOUT, "Et|tt|tt|tttL")),
    # Tensor ranks that Megatron-Core 0.16 itself would not have saved, but loads. The model is that of all Mixtrals.
    *(Target(case.name, case, "mixtral-tp1") for case in LOSSY_CASES),
]
#: No checkpoint of Megatron's own has these stages.
OTHER_STAGES = [
    Target("llama-vpp2-layout", KNOWN["llama-pp2-vpp2"], "llama-pp2-vpp2", pipeline=(LAYOUT, "Et|(tt|)*2t*3L")),
    Target("llama-lone-ends", KNOWN["llama-pp4-uneven"], "llama-pp4-uneven", pipeline=(LAYOUT, "E|t*6|t*2|L")),
]
RESHARDED = [
    Target(f"{source}-to-{target}", KNOWN[target], target, resharded=source)
    for source, target in (
        ("llama-tp2-pp2", "llama-tp4"), ("llama-tp4", "llama-tp2-pp2"), ("llama-tp2-pp2", "llama-tp2-pp2-vpp2"),
        ("llama-tp2-pp2-vpp2", "llama-tp1"), ("llama-tp2-pp2-flat-storage", "llama-tp4"),
        ("llama-pp2-vpp2", "llama-pp4-uneven"), ("llama-pp4-uneven", "llama-pp2-vpp2"),
        ("llama-tied-tp2-pp2", "llama-tied"), ("llama-tied", "llama-tied-tp2-pp2"),
        ("mixtral-tp2-ep2", "mixtral-tp2-ep2-etp1"), ("mixtral-tp2-ep2-etp1", "mixtral-tp2-pp2-ep2"),
        ("mixtral-tp2-pp2-ep2", "mixtral-grouped-tp2-ep2"), ("mixtral-grouped-tp2-ep2", "mixtral-tp1"),
    )
]  # fmt: skip
_MIXTRAL = KNOWN["mixtral-tp1"]
_PADDED = KNOWN["llama-padded-vocab-tp4"]
#: Grids at which Megatron itself has written none of these; the last is made of one of ours.
OTHER_GRIDS = [
    Target("padded-vocab-tp2", replace(_PADDED, tensor_parallel=2), _PADDED.name, resharded=_PADDED.name),
    Target(
        "mixtral-ep4-etp1", replace(_MIXTRAL, tensor_parallel=2, expert_parallel=4, expert_tensor_parallel=1),
        "mixtral-tp1", resharded="mixtral-tp2-ep2",
    ),
    Target("mixtral-tp4", replace(_MIXTRAL, tensor_parallel=4), "mixtral-tp1", resharded="mixtral-ep4-etp1"),
]  # fmt: skip
#: In torch_dist, made of Megatron's own `torch` and torch_dist.
DISTRIBUTED = [
    Target(f"{source}-dist-{target}".replace("/", "-"), KNOWN[target], target, resharded=source, to="torch_dist")
    for source, target in (
        ("llama-tp4", "llama-tp2-pp2"), ("llama-tp2-pp2/distributed", "llama-tp2-pp2-vpp2"),
        ("llama-pp2-vpp2", "llama-pp4-uneven"), ("llama-tied-tp2-pp2/distributed", "llama-tied"),
        ("mixtral-tp2-ep2", "mixtral-tp2-ep2-etp1"), ("mixtral-grouped-tp2-ep2/distributed", "mixtral-tp2-pp2-ep2"),
        ("mixtral-tp1", "mixtral-grouped-tp2-ep2"),
    )
]  # fmt: skip
_GRID_ARGS = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size", "expert_tensor_parallel_size", "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)  # fmt: skip
#: Those, at grids whose ranks want other boxes than the chunks that lie there.
ELSEWHERE = {
    replace(target, name=f"{target.name}-elsewhere"): (target, dict(zip(_GRID_ARGS, (*grid, None, None), strict=True)))
    for target, grid in zip(
        DISTRIBUTED,
        [(1, 1, None, 1, 1), (1, 4, None, 1, 1), (2, 2, None, 1, 2), (1, 2, 2, 1, 1), (1, 2, None, 4, 1),
         (1, 1, None, 1, 1), (2, 1, None, 2, 1)],
        strict=True,
    )
}  # fmt: skip
WRITTEN_BY_MEGATRON = [*SAME_GRID, *OTHERS, *RESHARDED]
TARGETS = [*WRITTEN_BY_MEGATRON, *OTHER_STAGES, *OTHER_GRIDS]
LOADED = [*TARGETS, *DISTRIBUTED, *ELSEWHERE]

#: What decides which model Megatron-LM builds and what it computes (docs/formats.md). The biases of Q, K and V need no
#: --add-qkv-bias beside --add-bias-linear; whether the model has them, loading shows.
# fmt: off
DECIDING_ARGS = [
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "group_query_attention", "kv_channels",
    "max_position_embeddings", "position_embedding_type", "rotary_base", "rotary_percent", "rotary_interleaved",
    "rotary_seq_len_interpolation_factor", "use_rope_scaling", "rope_scaling_factor", "normalization", "norm_epsilon",
    "apply_layernorm_1p", "qk_layernorm", "swiglu", "squared_relu", "add_bias_linear", "window_size", "vocab_size",
    "padded_vocab_size", "make_vocab_size_divisible_by", "untie_embeddings_and_output_weights", "num_experts",
    "moe_ffn_hidden_size", "multi_latent_attention", "mtp_num_layers", "params_dtype", "bf16", "fp16",
    "transformer_impl", "ckpt_format", "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "expert_model_parallel_size", "expert_tensor_parallel_size",
]
DECIDING_EXPERT_ARGS = [
    "moe_layer_freq", "moe_router_topk", "moe_router_pre_softmax", "moe_router_score_function",
    "moe_router_topk_scaling_factor", "moe_router_enable_expert_bias", "moe_shared_expert_intermediate_size",
    "moe_grouped_gemm",
]
DECIDING_STAGE_ARGS = [
    "virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage", "pipeline_model_parallel_layout",
    "num_virtual_stages_per_pipeline_rank", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
]
# fmt: on


@pytest.fixture(scope="module")
def written(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with SOURCE-hf for every source and NAME/megatron for every target."""
    directory = tmp_path_factory.mktemp("written")
    for source in {target.source for target in [*TARGETS, *DISTRIBUTED]}:
        paths = ["--load-path", str(oracle / source), "--save-path", str(directory / f"{source}-hf")]
        assert main(["megatron-to-hf", *paths, "--target-params-dtype", "keep", "--device", "cpu"]) == 0
    for target in [*TARGETS, *DISTRIBUTED]:
        assert main(target.command(directory, oracle)) == 0, target
    return directory


@pytest.fixture(scope="module")
def loaded(oracle: Path, written: Path, ranks: Ranks) -> Path:
    """The directory of `written`, with NAME/output.pt by megatron-core for every target."""
    for elsewhere, (target, grid) in ELSEWHERE.items():
        (written / elsewhere.name).mkdir()
        (written / elsewhere.name / "megatron").symlink_to(written / target.name / "megatron")
        (written / elsewhere.name / "args.json").write_text(json.dumps(grid))
    for target in LOADED:
        input_ids = torch.load(oracle / target.case.name / "oracle.pt")["input_ids"]
        torch.save({"input_ids": input_ids, "new_tokens": 0}, written / target.name / "input.pt")
    ranks("megatron_reader", 8, written, *(target.name for target in LOADED))
    return written


def _files(root: Path) -> list[Path]:
    found = sorted(root.glob("*/mp_rank_*/model_optim_rng.pt"))
    assert found
    return found


def _load(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """A file's content by a torch.load that makes nothing but tensors, plain Python values and one Namespace."""
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, weights_only=True, mmap=mmap)


def _weights(content: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for key in sorted(key for key in content if key.startswith("model")):
        yield from ((f"{key}.{name}", tensor) for name, tensor in content[key].items() if "_extra_state" not in name)


@pytest.mark.parametrize("target", LOADED, ids=lambda target: target.name)
def test_megatron_loads_every_rank_strictly_and_gives_the_logits_of_transformers(target: Target, loaded: Path) -> None:
    found = torch.load(loaded / target.name / "output.pt")
    assert found["problems"] == []
    model = AutoModelForCausalLM.from_pretrained(
        loaded / f"{target.source}-hf", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = model(found["input_ids"]).logits
    megatron = found["logits"][..., : target.case.vocab]
    assert megatron.shape == expected.shape == (2, target.case.sequence_length, target.case.vocab)
    torch.testing.assert_close(megatron, expected, rtol=0, atol=1e-5)
    assert torch.equal(megatron.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("target", WRITTEN_BY_MEGATRON, ids=lambda target: target.name)
def test_every_tensor_is_bit_for_bit_the_one_that_megatron_wrote_itself(
    target: Target, oracle: Path, written: Path
) -> None:
    case = target.case
    (hf,) = [load_file(path) for path in (written / f"{target.source}-hf").glob("*.safetensors")]
    last_row = {"embedding.word_embeddings.weight": hf["model.embed_tokens.weight"][-1]}
    last_row["output_layer.weight"] = hf.get("lm_head.weight", hf["model.embed_tokens.weight"])[-1]
    (directory,) = {path.parents[1] for path in _files(written / target.name / "megatron")}
    originals = _files(oracle / case.name)
    if case not in LOSSY_CASES:
        assert {path.parent.name for path in originals} == {path.name for path in directory.glob("mp_rank_*")}
    for original in originals:
        tensor_rank = int(original.parent.name.split("_")[2])
        expected = dict(_weights(torch.load(original, weights_only=False)))
        found = dict(_weights(_load(directory / original.parent.name / original.name)))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            padding = last_row.get(name.partition(".")[2])
            if padding is not None:
                real_rows = max(0, case.vocab - tensor_rank * len(tensor))
                tensor[real_rows:] = padding
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("target", WRITTEN_BY_MEGATRON, ids=lambda target: target.name)
def test_the_args_describe_the_model_and_the_grid_as_megatron_did(target: Target, oracle: Path, written: Path) -> None:
    original = vars(torch.load(_files(oracle / target.case.name)[0], weights_only=False)["args"])
    names = [*DECIDING_ARGS, *(DECIDING_EXPERT_ARGS if target.case.experts else ())]
    names += ["num_query_groups"] if original["group_query_attention"] else []
    names += DECIDING_STAGE_ARGS if target.pipeline is None else []
    expected = {name: original[name] for name in names}
    for path in _files(written / target.name / "megatron"):
        found = vars(_load(path)["args"])
        assert {name: found[name] for name in names} == expected


def test_the_args_hold_the_layout_and_how_many_virtual_stages_it_has(written: Path) -> None:
    args = _load(_files(written / "llama-vpp2-layout/megatron")[0])["args"]
    assert args.pipeline_model_parallel_layout == "Et|(tt|)*2t*3L"
    assert args.virtual_pipeline_model_parallel_size == 2


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_file_is_a_sound_container_that_torch_reads_with_weights_only_and_mapped(
    target: Target, written: Path
) -> None:
    for path in _files(written / target.name / "megatron"):
        with zipfile.ZipFile(path) as container:
            assert container.testzip() is None
        read, mapped = _load(path), _load(path, mmap=True)
        assert dict(_weights(read)).keys() == dict(_weights(mapped)).keys()
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(_weights(read), _weights(mapped), strict=True))
        assert read["checkpoint_version"] == 3.0
        iteration = 4 if target.resharded else 0 if target.name == "llama-release" else 1
        assert read["iteration"] == mapped["iteration"] == iteration
