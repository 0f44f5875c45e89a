"""Layers of multi-token prediction: converted where the family has them, else refused; left out if the user says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

import dist_convert
from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, hf_tensors, megatron_shards, save, training_args
from tests.converting import assert_same, convert, read_tensors
from tests.to_megatron import make_hf, to_megatron

MODEL = Model(layers=2)
FURTHER = {"enorm.weight": (16,), "eh_proj.weight": (16, 32), "embed_tokens.weight": (29, 16)}


def test_a_hugging_face_model_with_further_layers_is_refused_with_the_flag_that_leaves_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    further = {f"model.layers.2.{name}": torch.ones(shape, dtype=torch.bfloat16) for name, shape in FURTHER.items()}
    make_hf(tmp_path / "hf", MODEL, hf_tensors(MODEL) | further)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron") == 1
    assert "--drop-mtp" in capsys.readouterr().err
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", "--drop-mtp") == 0
    assert "not converted: 3 x layers of multi-token prediction (--drop-mtp), 1.98 kB" in capsys.readouterr().err


def test_a_megatron_model_with_further_layers_is_refused_with_the_flag_that_leaves_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = hf_tensors(MODEL)
    shards = megatron_shards(MODEL, tensors, Grid(pp=2))
    [last] = shards[max(shards)]
    last["mtp.layers.0.enorm.weight"] = torch.ones(16, dtype=torch.bfloat16)
    last["embedding.word_embeddings.weight"] = torch.zeros(32, 16, dtype=torch.bfloat16)
    layout = {"pipeline_model_parallel_layout": "Et|tmL", "mtp_use_repeated_layer": True}
    save(tmp_path / "in", shards, training_args(MODEL, Grid(pp=2), mtp_num_layers=1, **layout))
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    assert "--drop-mtp" in capsys.readouterr().err
    assert convert(tmp_path / "in", tmp_path / "out", "--drop-mtp") == 0
    err = capsys.readouterr().err
    assert "1 x layers of multi-token prediction (--drop-mtp), 32 B" in err
    assert "1 x embedding (the copy that multi-token prediction reads), 1.02 kB" in err
    assert sorted(load_file(tmp_path / "out" / "model.safetensors")) == sorted(tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2
    target = ["convert", str(tmp_path / "in"), str(tmp_path / "again"), "--to", "torch", "--drop-mtp"]
    assert main(target) == 0
    again = torch.load(next((tmp_path / "again").rglob("mp_rank_00_000/*.pt")), weights_only=False)["args"]
    assert (again.mtp_num_layers, again.pipeline_model_parallel_layout) == (None, "Et|tL")


def test_a_copy_of_the_config_counts_no_further_layers(tmp_path: Path) -> None:
    further = {"model.layers.2.enorm.weight": torch.ones(16, dtype=torch.bfloat16)}
    make_hf(tmp_path / "hf", MODEL, hf_tensors(MODEL) | further, num_nextn_predict_layers=1)
    flags = ("--to", "huggingface", "--drop-mtp")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "out"), *flags]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert dist_convert.open(tmp_path / "hf", drop_mtp=True).config["num_nextn_predict_layers"] == 0


def test_layers_that_config_json_does_not_count_are_not_taken_for_multi_token_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", MODEL, hf_tensors(MODEL), num_hidden_layers=1)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", "--drop-mtp") == 1
    assert "model.layers.1.input_layernorm.weight has no place in a LlamaForCausalLM" in capsys.readouterr().err


# A GLM-4.5 of one layer without experts, one with them, and one that predicts the token after the next one.

GLM = {
    "model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "vocab_size": 128, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "attention_bias": False, "use_qk_norm": False, "n_routed_experts": 2, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "partial_rotary_factor": 0.5,
    "max_position_embeddings": 64, "num_nextn_predict_layers": 1,
}  # fmt: skip
ATTENTION = {
    "input_layernorm.weight": (16,), "post_attention_layernorm.weight": (16,), "self_attn.q_proj.weight": (16, 16),
    "self_attn.k_proj.weight": (8, 16), "self_attn.v_proj.weight": (8, 16), "self_attn.o_proj.weight": (16, 16),
}  # fmt: skip
EXPERTS = {
    "mlp.gate.weight": (2, 16), "mlp.gate.e_score_correction_bias": (2,),
    "mlp.experts.0.gate_proj.weight": (8, 16), "mlp.experts.0.up_proj.weight": (8, 16),
    "mlp.experts.0.down_proj.weight": (16, 8), "mlp.experts.1.gate_proj.weight": (8, 16),
    "mlp.experts.1.up_proj.weight": (8, 16), "mlp.experts.1.down_proj.weight": (16, 8),
    "mlp.shared_experts.gate_proj.weight": (8, 16), "mlp.shared_experts.up_proj.weight": (8, 16),
    "mlp.shared_experts.down_proj.weight": (16, 8),
}  # fmt: skip
DENSE = {"mlp.gate_proj.weight": (24, 16), "mlp.up_proj.weight": (24, 16), "mlp.down_proj.weight": (16, 24)}
PREDICTS = {"enorm.weight": (16,), "hnorm.weight": (16,), "eh_proj.weight": (16, 32), "shared_head.norm.weight": (16,)}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHAPES: dict[str, tuple[int, ...]] = {
    EMBEDDING: (128, 16), HEAD: (128, 16), "model.norm.weight": (16,),
    **{f"model.layers.0.{name}": shape for name, shape in (ATTENTION | DENSE).items()},
    **{f"model.layers.1.{name}": shape for name, shape in (ATTENTION | EXPERTS).items()},
    **{f"model.layers.2.{name}": shape for name, shape in (ATTENTION | EXPERTS | PREDICTS).items()},
}  # fmt: skip
LAST_STAGE = "mp_rank_00_001/model_optim_rng.pt"
BACK = ("--to", "huggingface", "--target-params-dtype", "keep")
TWO_STAGES = ("--to", "torch", "--target-pipeline-parallel-size", "2", "--make-vocab-size-divisible-by", "1")


def glm(directory: Path, without: str = "no layer", **more: object) -> dict[str, torch.Tensor]:
    """The tensors of a model, every element another number, that is saved in a directory."""
    generator = torch.Generator().manual_seed(3)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items() if without not in name}
    made["model.layers.2.embed_tokens.weight"] = made[EMBEDDING].clone()
    made["model.layers.2.shared_head.head.weight"] = made[HEAD].clone()
    made = {name: tensor for name, tensor in made.items() if without not in name}
    directory.mkdir()
    save_file(made, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(GLM | more))
    return made


def stage(root: Path) -> dict[str, torch.Tensor]:
    """What the last of two pipeline stages holds."""
    [file] = root.glob(f"*/{LAST_STAGE}")
    found: dict[str, torch.Tensor] = torch.load(file, weights_only=False)["model"]
    return found


def test_the_last_stage_holds_them_and_the_embedding_that_they_read(tmp_path: Path) -> None:
    made = glm(tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "megatron"), *TWO_STAGES, "--verify"]) == 0
    found, at = stage(tmp_path / "megatron"), "model.layers.2"
    assert torch.equal(found["embedding.word_embeddings.weight"], made[EMBEDDING])
    assert torch.equal(found["mtp.layers.0.eh_proj.weight"], made[f"{at}.eh_proj.weight"])
    assert torch.equal(found["mtp.layers.0.final_layernorm.weight"], made[f"{at}.shared_head.norm.weight"])
    inside = "mtp.layers.0.transformer_layer"
    assert torch.equal(found[f"{inside}.self_attention.linear_proj.weight"], made[f"{at}.self_attn.o_proj.weight"])
    expert = [made[f"{at}.mlp.experts.1.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(found[f"{inside}.mlp.experts.local_experts.1.linear_fc1.weight"], torch.cat(expert))


@pytest.mark.parametrize("name", ["transformer_layer", "mtp_model_layer"])
def test_either_name_of_the_layer_in_them_is_written_and_read(name: str, tmp_path: Path) -> None:
    made = glm(tmp_path / "hf")
    steps = [
        ("hf", "first", ["--to", "torch", "--mtp-layer-name", name]),
        ("first", "second", ["--to", "torch", "--target-pipeline-parallel-size", "2"]),
        ("second", "again", ["--to", "huggingface", "--target-params-dtype", "keep"]),
    ]
    for source, target, flags in steps:
        assert main(["convert", str(tmp_path / source), str(tmp_path / target), *flags]) == 0
    assert any(f"mtp.layers.0.{name}.mlp.router.weight" in key for key in stage(tmp_path / "second"))
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == made.keys()
    assert [key for key, tensor in made.items() if not torch.equal(found[key], tensor)] == []
    assert json.loads((tmp_path / "again" / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_torch_dist_has_one_name_of_the_layer_in_them_in_all_versions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    glm(tmp_path / "hf")
    name = ["--mtp-layer-name", "mtp_model_layer"]
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "torch"), "--to", "torch", *name]) == 0
    assert main(["convert", str(tmp_path / "torch"), str(tmp_path / "dist"), "--to", "torch_dist", "--verify"]) == 0
    keys = FileSystemReader(tmp_path / "dist" / "iter_0000001").read_metadata().state_dict_metadata
    assert {key.split(".")[3] for key in keys if ".router." in key and key.startswith("mtp.")} == {"transformer_layer"}
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "other"), "--to", "torch_dist", *name]) == 2
    assert "--mtp-layer-name" in capsys.readouterr().err


def test_a_config_that_counts_a_layer_of_which_there_is_nothing_is_not_believed(tmp_path: Path) -> None:
    made = glm(tmp_path / "hf", without="layers.2.")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "megatron"), *TWO_STAGES]) == 0
    assert not [name for name in stage(tmp_path / "megatron") if name.startswith("mtp.")]
    back = ["--to", "huggingface", "--target-params-dtype", "keep", "--like", str(tmp_path / "hf")]
    assert main(["convert", str(tmp_path / "megatron"), str(tmp_path / "again"), *back]) == 0
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == made.keys()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_one_without_copies_of_embedding_and_head_gets_them(tmp_path: Path) -> None:
    made = glm(tmp_path / "hf")
    del made["model.layers.2.embed_tokens.weight"], made["model.layers.2.shared_head.head.weight"]
    save_file(made, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "again"), "--to", "huggingface"]) == 0
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert torch.equal(found["model.layers.2.embed_tokens.weight"], made[EMBEDDING])
    assert torch.equal(found["model.layers.2.shared_head.head.weight"], made[HEAD])


def test_beside_tied_embeddings_they_are_written_for_one_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = glm(tmp_path / "hf", tie_word_embeddings=True)
    made = {name: tensor for name, tensor in made.items() if name != HEAD}
    made["model.layers.2.shared_head.head.weight"] = made[EMBEDDING].clone()
    save_file(made, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    command = ["convert", str(tmp_path / "hf"), str(tmp_path / "megatron")]
    assert main([*command, *TWO_STAGES]) == 2
    assert "expected: --pp 1, or --drop-mtp" in capsys.readouterr().err
    assert main([*command, "--to", "torch"]) == 0
    assert main(["convert", str(tmp_path / "megatron"), str(tmp_path / "again"), *BACK]) == 0
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == made.keys()
    assert [name for name, tensor in made.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
def test_a_copy_that_is_another_one_is_refused(copy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = glm(tmp_path / "hf")
    made[f"model.layers.2.{copy}.weight"][127, 15] += 1
    save_file(made, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    command = ["convert", str(tmp_path / "hf"), str(tmp_path / "megatron"), *TWO_STAGES]
    assert main(command) == 1
    assert "has an embedding or head that differs from the model's" in (error := capsys.readouterr().err)
    assert "found:    other values\n" in error
    assert main([*command, "--drop-mtp"]) == 0


def test_a_copy_of_the_embedding_that_differs_is_found_in_a_megatron_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    glm(tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "megatron"), *TWO_STAGES]) == 0
    [file] = (tmp_path / "megatron").glob(f"*/{LAST_STAGE}")
    content = torch.load(file, weights_only=False)
    content["model"]["embedding.word_embeddings.weight"][3] += 1
    torch.save(content, file)
    assert main(["convert", str(tmp_path / "megatron"), str(tmp_path / "again"), "--to", "huggingface"]) == 1
    assert "embedding.word_embeddings.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layout", "last_stage"),
    [
        ("Et|tmL", {"decoder.layers", "decoder.final_layernorm", "mtp.layers", "embedding", "output_layer"}),
        ("Ett|mL", {"mtp.layers", "embedding", "output_layer"}),
        ("Ettm|L", {"output_layer"}),
    ],
)
def test_a_layout_says_where_they_are_and_the_last_norm_is_behind_the_last_layer(
    layout: str, last_stage: set[str], tmp_path: Path
) -> None:
    made = glm(tmp_path / "hf")
    words = ("--pipeline-model-parallel-layout", layout, "--verify")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "megatron"), *TWO_STAGES, *words]) == 0
    ends = (".word_embeddings.weight", ".weight")
    found = {name.removesuffix(ends[0]).removesuffix(ends[1]) for name in stage(tmp_path / "megatron")}
    assert {".".join(name.split(".")[:2]) for name in found} == last_stage
    assert main(["convert", str(tmp_path / "megatron"), str(tmp_path / "back"), *BACK]) == 0
    assert_same(read_tensors(tmp_path / "back"), made)
