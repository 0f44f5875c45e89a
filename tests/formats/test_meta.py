"""Meta's files: every cut over files, what Meta's own code computes with them, and what cannot be such a model."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaForCausalLM

import dist_convert
from dist_convert.__main__ import main
from dist_convert.errors import ConversionError, UsageError
from dist_convert.formats.huggingface.lay_out import to_huggingface
from dist_convert.formats.meta.params import args_of_params
from dist_convert.formats.open import open_source
from dist_convert.options import Options
from dist_convert.plan.plan import divide
from dist_convert.plan.steps import steps_of
from dist_convert.ranks.collectives import alone
from dist_convert.records import DTYPE_BYTES, runs
from tests.checkpoints import Grid, Model
from tests.converting import assert_same, bytes_read, read_tensors
from tests.distributed.launching import on_two_nodes, run_ranks
from tests.meta_checkpoints import MODEL, POSITIONS, TOKENS, make_meta, metas, params_of, weights
from tests.to_megatron import assert_same_shards, expected_shards, load, read_shards
from tests.tokenizer.pieces import train

#: Files, groups and version: embeddings of version 2 are cut by columns.
CUTS = [(1, 8, "2"), (2, 8, "2"), (8, 8, "2"), (1, 4, "3"), (2, 2, "3"), (4, 4, "3.1"), (8, 8, "3.1")]


def config_in(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


@pytest.mark.parametrize(("files", "groups", "version"), CUTS)
def test_any_number_of_files_is_the_model(files: int, groups: int, version: str, tmp_path: Path) -> None:
    hf = make_meta(tmp_path / "in", files, version, replace(MODEL, groups=groups))
    dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface", verify="full")
    assert_same(read_tensors(tmp_path / "out"), hf)
    found = {name: config_in(tmp_path / "out")[name] for name in ("rope_theta", "max_position_embeddings")}
    expected = {"2": (10000.0, 4096), "3": (500000.0, 8192), "3.1": (500000.0, 131072)}
    assert tuple(found.values()) == (*expected[version][:1], expected[version][1])


@pytest.mark.parametrize(("files", "groups"), [(1, 2), (2, 2), (4, 4), (8, 8)])
def test_transformers_computes_what_metas_own_code_computes(files: int, groups: int, tmp_path: Path) -> None:
    make_meta(tmp_path / "in", files, "3.1", replace(MODEL, groups=groups))
    dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0, list(POSITIONS)]
    expected = torch.tensor(json.loads((Path(__file__).parent / "meta_logits.json").read_text())[str(groups)])
    assert (logits - expected).abs().max() < 1e-4 < expected.std()


def test_it_becomes_a_megatron_checkpoint_of_any_grid(tmp_path: Path) -> None:
    model = replace(MODEL, groups=4)
    hf = make_meta(tmp_path / "in", 4, "3", model)
    grid = Grid(tp=2, pp=2)
    dist_convert.convert(
        tmp_path / "in", tmp_path / "out", to="torch", verify="full", target_tensor_parallel_size=2,
        target_pipeline_parallel_size=2, make_vocab_size_divisible_by=8,
    )  # fmt: skip
    assert_same_shards(read_shards(tmp_path / "out"), expected_shards(model, hf, grid))
    dist_convert.convert(tmp_path / "out", tmp_path / "back", to="huggingface")
    assert_same(read_tensors(tmp_path / "back"), hf)


def test_two_ranks_gather_it(tmp_path: Path) -> None:
    hf = make_meta(tmp_path / "in", 2, "2")
    words = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "huggingface", "--placement", "gather"]
    assert run_ranks(2, *words, "--verify").returncode == 0
    assert_same(read_tensors(tmp_path / "out"), hf)


def test_nodes_with_different_params_are_refused(tmp_path: Path) -> None:
    make_meta(tmp_path / "in0", 2, norm_eps=1e-5)
    make_meta(tmp_path / "in1", 2, norm_eps=1e-6)
    runs = on_two_nodes(1, "convert", f"{tmp_path}/in{{node}}", str(tmp_path / "out"), "--to", "huggingface")
    assert [run.returncode for run in runs] == [1, 1]
    said = "".join(run.stderr for run in runs)
    assert "two ranks see different files under one name" in said
    assert "params.json" in said
    assert not (tmp_path / "out").exists()


def test_it_is_opened_inspected_and_verified_like_any_other(tmp_path: Path) -> None:
    hf = make_meta(tmp_path / "in", 2, "2")
    with dist_convert.open(tmp_path / "in") as weights_of:
        assert_same({name: weights_of.get_tensor(name) for name in weights_of.keys()}, hf)  # noqa: SIM118
        assert weights_of.config["architectures"] == ["LlamaForCausalLM"]
    found = dist_convert.inspect(tmp_path / "in")
    assert (found["kind"], found["files"], found["family"]) == ("meta", 2, "llama")
    assert found["parameters"] == sum(tensor.numel() for tensor in hf.values())
    assert "not_convertible" not in found
    dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface")
    assert dist_convert.verify(tmp_path / "in", tmp_path / "out").is_same


@pytest.mark.parametrize("files", [1, 4])
def test_every_byte_is_read_about_once_and_rows_of_heads_in_one_read(files: int, tmp_path: Path) -> None:
    hf = make_meta(tmp_path / "in", files, "2")
    job, world = Options("huggingface", str(tmp_path / "in"), tmp_path / "out"), alone()
    task = to_huggingface(job, open_source(job, world), world)
    plan = divide(task.content, task.source.found.visible, placement="direct", budget_bytes=10**9)
    views = [read.source for step in steps_of(plan, 0) for read in step.reads]
    fetched = [(runs(v.rows, v.columns, v.row_stride, v.column_stride), DTYPE_BYTES[v.dtype]) for v in views]
    read_bytes = sum(len(one.starts) * one.run_elements * item_bytes for one, item_bytes in fetched)
    assert read_bytes <= 1.05 * sum(tensor.nbytes for tensor in hf.values())
    rotated = [view for view in views if ".wq." in view.tensor or ".wk." in view.tensor]
    assert len(rotated) == 2 * 16  # of each layer 8 heads of queries and 8 of keys
    assert all(view.is_dense for view in rotated)


def test_norms_that_differ_are_the_first_files_with_a_warning(tmp_path: Path) -> None:
    hf = make_meta(tmp_path / "in", 2)
    path = tmp_path / "in/consolidated.01.pth"
    saved = torch.load(path)
    saved["layers.1.ffn_norm.weight"] = saved["layers.1.ffn_norm.weight"] + 0.0625
    torch.save(saved, path)
    report = dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface", verify="full")
    assert_same(read_tensors(tmp_path / "out"), hf)
    [warning] = [note for note in report.notes if note.startswith("warning")]
    assert "norms differ between files" in warning
    assert "layers.1.ffn_norm.weight" in warning
    assert "layers.0" not in warning


def test_a_head_that_is_the_embedding_is_tied_to_it(tmp_path: Path) -> None:
    """As in Llama 3.2's small models; transformers keeps their embedding once."""
    hf = weights()
    hf["lm_head.weight"] = hf["model.embed_tokens.weight"]
    make_meta(tmp_path / "in", 1, hf=hf)
    dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface")
    del hf["lm_head.weight"]
    assert config_in(tmp_path / "out")["tie_word_embeddings"] is True
    assert_same(read_tensors(tmp_path / "out"), hf)


def copied(root: Path) -> None:
    shutil.copyfile(root / "consolidated.00.pth", root / "consolidated.01.pth")


def without_the_first(root: Path) -> None:
    (root / "consolidated.00.pth").unlink()


def without_the_last(root: Path) -> None:
    (root / "consolidated.03.pth").unlink()


def without(name: str, root: Path) -> None:
    saved = torch.load(root / "consolidated.02.pth")
    del saved[name]
    torch.save(saved, root / "consolidated.02.pth")


def another(root: Path) -> None:
    saved = torch.load(root / "consolidated.02.pth")
    torch.save(saved | {"layers.0.attention.wq.bias": torch.ones(2)}, root / "consolidated.02.pth")


def reshaped(root: Path) -> None:
    saved = torch.load(root / "consolidated.02.pth")
    saved["layers.1.attention.wo.weight"] = saved["layers.1.attention.wo.weight"].T.contiguous()
    torch.save(saved, root / "consolidated.02.pth")


def of_params(**params: Any) -> Any:
    def change(root: Path) -> None:
        said = params_of(MODEL, "3") | params
        (root / "params.json").write_text(json.dumps({name: value for name, value in said.items() if value != "gone"}))

    return change


WRONG = {
    "a copy under another name": (copied, "two files hold the same weights"),
    "no first file": (without_the_first, "the files are not those of one model"),
    "no last file": (without_the_last, "a file is missing"),
    "no head in one file": (lambda root: without("output.weight", root), "the weights are not those of params.json"),
    "no norm in one file": (lambda root: without("norm.weight", root), "the pieces of a tensor do not fit each other"),
    "an unknown tensor": (another, "layers.0.attention.wq.bias"),
    "a matrix of another shape": (reshaped, "[64, 16], [64, 16], [16, 64], [64, 16]"),
    "another width": (of_params(ffn_dim_multiplier=1.3), "the weights are not those of params.json"),
    "another vocabulary": (of_params(vocab_size=65), "the weights are not those of params.json"),
    "more heads": (of_params(n_heads=16, head_dim=8), "the weights are not those of params.json"),
    "fewer keys": (of_params(n_kv_heads=4), "wrong shape for model.layers.0.self_attn.k_proj.weight"),
    "vision": (of_params(vision_chunk_size=448), "missing or unsupported vision_chunk_size"),
    "experts": (of_params(moe={"num_experts": 8}), "missing or unsupported moe"),
    "quantised": (of_params(quantization_args={"group_size": 32}), "missing or unsupported quantization_args"),
    "no layers": (of_params(n_layers="gone"), "missing or unsupported n_layers"),
    "a head for three keys": (of_params(n_kv_heads=3), "missing or unsupported n_kv_heads"),
    "odd heads": (of_params(n_heads=64, n_kv_heads=64, head_dim=1), "missing or unsupported head_dim"),
    "an endless factor": (of_params(ffn_dim_multiplier=1e299), "missing or unsupported ffn_dim_multiplier"),
    "a flag that is text": (of_params(use_scaled_rope="false"), "missing or unsupported use_scaled_rope"),
    "a size of null": (of_params(dim=None), "missing or unsupported dim"),
    "a size that is text": (of_params(dim="64"), "missing or unsupported dim"),
    "no theta": (of_params(use_scaled_rope=True, rope_theta="gone"), "missing or unsupported use_scaled_rope"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_such_model_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    change, what = WRONG[case]
    make_meta(tmp_path / "in", 4)
    change(tmp_path / "in")
    with pytest.raises(ConversionError) as caught:
        dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface")
    assert what in str(caught.value)
    assert str(tmp_path / "in") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_metas_16_files_of_the_405b_are_refused_until_they_are_understood() -> None:
    params = {"dim": 16384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 16, "ffn_dim_multiplier": 1.2,
              "multiple_of": 4096, "rope_theta": 500000.0, "use_scaled_rope": True}  # fmt: skip
    rows = {"layers.0.attention.wq.weight": 16384, "layers.0.feed_forward.w1.weight": 53248, "output.weight": 128256}
    with pytest.raises(ConversionError, match="missing or unsupported n_kv_heads"):
        args_of_params(params, rows, tied=False)
    _, args = args_of_params(params | {"n_kv_heads": 8}, rows, tied=False)
    assert (args["ffn_hidden_size"], args["max_position_embeddings"]) == (53248, 131072)


#: The sizes of published models, their params.json as published, and the width of their MLPs.
PUBLISHED = {
    "Llama 2 7B": ({"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5}, 11008, 4096),
    "Llama 2 70B": (
        {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80},
        28672, 4096,
    ),
    "Llama 3 8B": (
        {"dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "n_heads": 32, "n_kv_heads": 8, "n_layers": 32,
         "rope_theta": 500000.0}, 14336, 8192,
    ),
    "Code Llama 7B": (
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "rope_theta": 1000000}, 11008, 16384
    ),
    "Mistral 7B": (
        {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
         "rope_theta": 1000000.0}, 14336, 32768,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_width_and_the_positions_of_published_models_follow(name: str) -> None:
    params, ffn, positions = PUBLISHED[name]
    rows = {
        "layers.0.attention.wq.weight": params["dim"],
        "layers.0.feed_forward.w1.weight": ffn,
        "output.weight": 32000,
    }
    family, args = args_of_params(params, rows, tied=False)
    assert (args["max_position_embeddings"], family) == (positions, "mistral" if "Mistral" in name else "llama")


def test_the_factor_of_llama_3_2_has_to_be_said(tmp_path: Path) -> None:
    """Of the hidden size and layers of the 1B, which tell it, but with a narrow MLP and narrow heads."""
    model = Model(hidden=2048, ffn=64, heads=32, groups=8, head_dim=2, layers=16, vocab=64, padded_vocab=64)
    hf = weights(model)
    hf["lm_head.weight"] = hf["model.embed_tokens.weight"]
    make_meta(tmp_path / "in", 1, "3.1", model, hf, ffn_dim_multiplier=0.01, head_dim=2)
    with pytest.raises(ConversionError) as caught:
        dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface")
    assert "--rope-scaling-factor 32, or 8" in str(caught.value)
    assert str(tmp_path / "in/params.json") in str(caught.value)
    dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface", rope_scaling_factor=32)
    del hf["lm_head.weight"]
    assert_same(read_tensors(tmp_path / "out"), hf)
    found = config_in(tmp_path / "out")
    assert (found["rope_scaling"]["factor"], found["tie_word_embeddings"]) == (32, True)


def test_what_params_json_leaves_out_is_as_in_metas_own_code(tmp_path: Path) -> None:
    said = {"multiple_of": None, "norm_eps": None, "ffn_dim_multiplier": 0.5}  # half of 170, rounded up to 256
    hf = make_meta(tmp_path / "in", 2, "2", replace(MODEL, ffn=256), **said)
    report = dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface")
    assert_same(read_tensors(tmp_path / "out"), hf)
    assert config_in(tmp_path / "out")["rms_norm_eps"] == 1e-5
    assert report.left_behind == (("rotary frequencies", 2, 2 * 4 * 4),)


def test_params_json_may_have_all_below_model(tmp_path: Path) -> None:
    make_meta(tmp_path / "in", 1)
    params = {"model": params_of(MODEL, "3") | {"norm_eps": 1e-6}}
    (tmp_path / "in/params.json").write_text(json.dumps(params))
    dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface")
    assert config_in(tmp_path / "out")["rms_norm_eps"] == 1e-6


def test_flags_and_a_config_say_what_params_json_does_not(tmp_path: Path) -> None:
    make_meta(tmp_path / "in", 2, "3.1")
    dist_convert.convert(tmp_path / "in", tmp_path / "a", to="huggingface", rope_scaling_factor=32)
    assert config_in(tmp_path / "a")["rope_scaling"]["factor"] == 32
    like = config_in(tmp_path / "a") | {"max_position_embeddings": 100, "bos_token_id": 5}
    (tmp_path / "config.json").write_text(json.dumps(like))
    dist_convert.convert(tmp_path / "in", tmp_path / "b", to="huggingface", like=tmp_path / "config.json")
    found = config_in(tmp_path / "b")
    assert (found["max_position_embeddings"], found["rope_scaling"]["factor"]) == (100, 32)
    (tmp_path / "config.json").write_text(json.dumps(like | {"num_key_value_heads": 4}))
    with pytest.raises(ConversionError, match="it differs in num_key_value_heads"):
        dist_convert.convert(tmp_path / "in", tmp_path / "c", to="huggingface", like=tmp_path / "config.json")


@pytest.mark.parametrize("to", ["huggingface", "torch"])
def test_another_vocabulary_than_the_embeddings_is_refused(to: str, tmp_path: Path) -> None:
    make_meta(tmp_path / "in")
    with pytest.raises(UsageError, match="--true-vocab-size is not the model's"):
        dist_convert.convert(tmp_path / "in", tmp_path / "out", to=to, true_vocab_size=63)


def test_the_tokenizer_beside_the_files_goes_with_them(tmp_path: Path) -> None:
    """Llama 2's lies beside the directory, where Meta's download puts it."""
    train(tmp_path / "tokenizer.model", vocab_size=448)
    model = replace(MODEL, vocab=448, padded_vocab=448)
    make_meta(tmp_path / "in", 2, "2", model)
    dist_convert.convert(tmp_path / "in", tmp_path / "hf", to="huggingface")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("hello").input_ids[0] == 1
    assert config_in(tmp_path / "hf")["eos_token_id"] == 2
    report = dist_convert.convert(tmp_path / "in", tmp_path / "megatron", to="torch")
    assert [note for note in report.notes if "--tokenizer-model" in note] == []
    args = load(tmp_path / "megatron/iter_0000001/mp_rank_00/model_optim_rng.pt")["args"]
    assert (args.tokenizer_type, args.tokenizer_model) == ("Llama2Tokenizer", str(tmp_path / "tokenizer.model"))


def test_training_is_told_that_it_needs_a_tokenizer_where_none_can_be_named(tmp_path: Path) -> None:
    """Megatron reads no bare file of Llama 3's."""
    make_meta(tmp_path / "in", 2)
    lines = (b"".join(base64.b64encode(bytes([n])) + b" %d\n" % n for n in range(64))).decode()
    (tmp_path / "in/tokenizer.model").write_text(lines)
    report = dist_convert.convert(tmp_path / "in", tmp_path / "out", to="torch")
    needed = "training needs these flags, which --use-checkpoint-args does not restore: --tokenizer-model PATH"
    assert needed in report.notes


def test_the_old_command_line_takes_metas_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron-LM's docs/llama_mistral.md, but for the program's name."""
    train(tmp_path / "tokenizer.model", vocab_size=448)
    model = replace(MODEL, vocab=448, padded_vocab=448)
    hf = make_meta(tmp_path / "in", 2, "2", model)
    line = f"""--bf16 --model-type GPT --loader llama_mistral --saver core --target-tensor-parallel-size 2
        --checkpoint-type meta --model-size llama3 --load-dir {tmp_path}/in --save-dir {tmp_path}/out
        --tokenizer-model {tmp_path}/tokenizer.model --make-vocab-size-divisible-by 8"""
    assert main(["hf-to-megatron", *line.split()]) == 0
    assert_same_shards(read_shards(tmp_path / "out"), expected_shards(model, hf, Grid(tp=2)))
    assert "--checkpoint-type has no effect: the files tell" in capsys.readouterr().err


def test_mistrals_own_file_is_read_too(tmp_path: Path) -> None:
    model = replace(MODEL, groups=4)
    hf = weights(model)
    (tmp_path / "in").mkdir()
    save_file(metas(hf, model), tmp_path / "in/consolidated.safetensors")
    params = {"dim": 64, "n_layers": 2, "head_dim": 8, "hidden_dim": 176, "n_heads": 8, "n_kv_heads": 4,
              "norm_eps": 1e-5, "vocab_size": 64, "rope_theta": 1000000.0, "sliding_window": 4096}  # fmt: skip
    (tmp_path / "in/params.json").write_text(json.dumps(params))
    dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface", verify="full")
    assert_same(read_tensors(tmp_path / "out"), hf)
    found = {name: config_in(tmp_path / "out")[name] for name in ("model_type", "sliding_window", "rope_theta")}
    assert found == {"model_type": "mistral", "sliding_window": 4096, "rope_theta": 1000000.0}


def test_a_tensor_that_is_in_all_files_and_of_no_llama_is_refused(tmp_path: Path) -> None:
    make_meta(tmp_path / "in", 1)
    saved = torch.load(tmp_path / "in/consolidated.00.pth")
    torch.save(saved | {"layers.0.attention.wq.bias": torch.ones(64)}, tmp_path / "in/consolidated.00.pth")
    with pytest.raises(ConversionError, match=r"(?s)layers\.0\.attention\.wq\.bias.*a bias"):
        dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface")


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    make_meta(tmp_path / "in", 1)
    saved = torch.load(tmp_path / "in/consolidated.00.pth")
    torch.save(saved | {"model.norm.weight": torch.zeros(64).bfloat16()}, tmp_path / "in/consolidated.00.pth")
    with pytest.raises(ConversionError, match=r"(?s)model\.norm\.weight is stored twice.* norm\.weight") as caught:
        dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface")
    assert caught.value.file == str(tmp_path / "in/consolidated.00.pth")


def test_a_file_of_another_dtype_is_refused(tmp_path: Path) -> None:
    make_meta(tmp_path / "in", 2)
    saved = torch.load(tmp_path / "in/consolidated.01.pth")
    halves = {name: tensor.half() for name, tensor in saved.items()}
    torch.save(halves, tmp_path / "in/consolidated.01.pth")
    with pytest.raises(ConversionError, match="a weight of an unexpected dtype"):
        dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface")


@pytest.mark.parametrize(("to", "files"), [("dcp", 1), ("torch_dist", 2)])
def test_it_becomes_the_distributed_checkpoint_that_its_hugging_face_files_become(
    to: str, files: int, tmp_path: Path
) -> None:
    make_meta(tmp_path / "in", 2, "2")
    dist_convert.convert(tmp_path / "in", tmp_path / "hf", to="huggingface")
    grid = {} if to == "dcp" else {"target_tensor_parallel_size": 2}
    for source, target in (("in", "direct"), ("hf", "through hf")):
        dist_convert.convert(tmp_path / source, tmp_path / target, to=to, verify="full", **grid)
    first, second = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.suffix in (".distcp", "")
         and path.is_file()}
        for root in (tmp_path / "direct", tmp_path / "through hf")
    )  # fmt: skip
    assert [path.name for path in sorted(first)] == [".metadata", *(f"__{n}_0.distcp" for n in range(files))]
    assert first == second


def test_opening_and_comparing_read_every_byte_about_once(tmp_path: Path) -> None:
    model = replace(MODEL, hidden=256, ffn=688, heads=8, groups=8, head_dim=32, layers=4)
    hf = make_meta(tmp_path / "in", 1, "2", model)
    dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface")
    weights_bytes = sum(tensor.nbytes for tensor in hf.values())
    for _ in range(2):  # the first one imports, too
        before = bytes_read()
        with dist_convert.open(tmp_path / "in") as weights_of:
            found = {name: weights_of.get_tensor(name) for name in weights_of.keys()}  # noqa: SIM118
        opened = bytes_read()
        assert dist_convert.verify(tmp_path / "in", tmp_path / "out").is_same
        compared = bytes_read()
    assert_same(found, hf)
    assert opened - before <= 1.05 * weights_bytes
    assert compared - opened <= 1.05 * 2 * weights_bytes
