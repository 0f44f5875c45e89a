"""What FSDP2 and torchtitan save becomes the Hugging Face files of the same model, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dist_convert
from dist_convert.__main__ import main
from tests.checkpoints import Model, hf_tensors
from tests.converting import assert_same, bytes_read, read_tensors
from tests.distributed.launching import run_ranks
from tests.distributed_checkpoints import Box, Files
from tests.to_megatron import config_of

LLAMA = Model(layers=2)


def convert(source: Path, target: Path, *flags: str, to: str = "huggingface") -> int:
    """Convert with one rank; returns the exit code."""
    return main(["convert", str(source), str(target), "--to", to, *flags])


def rows_of(tensor: torch.Tensor, *borders: int) -> list[Box]:
    """A tensor in boxes of rows, each in a file of its own."""
    ends = [*borders, tensor.shape[0]]
    zeros = (0,) * (tensor.dim() - 1)
    return [
        ((first, *zeros), tensor[first:end], n) for n, (first, end) in enumerate(zip([0, *borders], ends, strict=True))
    ]


def save_plain(directory: Path, tensors: dict[str, torch.Tensor], model: Model = LLAMA) -> None:
    """A checkpoint of tensors in two boxes of rows each, beside the config.json of their model."""
    directory.mkdir()
    files = Files(directory)
    for key, tensor in tensors.items():
        files.tensor(key, tuple(tensor.shape), rows_of(tensor, max(1, tensor.shape[0] // 3)))
    files.finish()
    config_of(model).save_pretrained(directory)


@pytest.mark.parametrize(
    "kind", ["plain", "safetensors", "shards", "fsdp2/pytorch_model_fsdp_0", "fsdp1/pytorch_model_fsdp_0"]
)
def test_what_three_ranks_have_saved_becomes_the_model(kind: str, trained: Path, tmp_path: Path) -> None:
    report = dist_convert.convert(trained / kind, tmp_path / "hf", "huggingface", like=trained / "hf", verify="full")
    tensors = load_file(trained / "hf/model.safetensors")
    assert_same(read_tensors(tmp_path / "hf"), tensors)
    assert report.read_bytes <= 1.05 * sum(tensor.nbytes for tensor in tensors.values())
    beside = {reason: count for reason, count, _ in report.left_behind}
    assert beside == ({"numbers (no weights)": 1, "objects of step": 1, "optimizer": 99} if kind == "plain" else {})


def test_every_byte_of_the_weights_is_read_about_once(tmp_path: Path) -> None:
    model = Model(hidden=1024, ffn=2816, heads=8, groups=4, head_dim=128, layers=1, vocab=4000, padded_vocab=4000)
    for name, one in (("imported", LLAMA), ("counted", model)):
        hf = hf_tensors(one)
        save_plain(tmp_path / name, hf, one)
        before = bytes_read()
        assert convert(tmp_path / name, tmp_path / f"{name}-hf") == 0
    assert bytes_read() - before <= 1.05 * sum(tensor.nbytes for tensor in hf.values())


def test_several_ranks_write_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "plain", tmp_path / "dcp")
    shutil.copy(trained / "hf/config.json", tmp_path / "dcp")
    assert convert(tmp_path / "dcp", tmp_path / "hf") == 0
    flags = ["--to", "huggingface", "--placement", "gather"]
    run = run_ranks(2, "convert", str(tmp_path / "dcp"), str(tmp_path / "of two"), *flags)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "of two/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()


def test_it_becomes_what_the_model_itself_becomes_in_megatron(trained: Path, tmp_path: Path) -> None:
    for source in ("plain", "hf"):
        like = ["--like", str(trained / "hf")] if source == "plain" else []
        assert convert(trained / source, tmp_path / source, "--tp", "2", *like, to="torch") == 0
    files = [path.relative_to(tmp_path / "hf") for path in sorted((tmp_path / "hf").rglob("model_optim_rng.pt"))]
    assert len(files) == 2
    saved = [
        [torch.load(tmp_path / source / file, weights_only=False)["model"] for file in files]
        for source in ("plain", "hf")
    ]
    for found, expected in zip(*saved, strict=True):
        assert_same(found, expected)


def test_inspect_says_what_is_there(trained: Path) -> None:
    found = dist_convert.inspect(trained / "plain")
    facts = ("kind", "format", "parameters", "chunks", "files", "missing_shards")
    elements = sum(tensor.numel() for tensor in load_file(trained / "hf/model.safetensors").values())
    assert [found[name] for name in facts] == ["distributed", "dcp", elements, 85, 3, []]
    assert "does not say what its model is" in found["not_convertible"]


def test_like_tells_every_command_what_a_checkpoint_without_a_config_is(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    like, hf = trained / "hf", load_file(trained / "hf/model.safetensors")
    assert main(["inspect", str(trained / "safetensors"), "--like", str(like)]) == 0
    screen = capsys.readouterr().out
    assert "\nfamily             mixtral\n" in screen
    assert "\nleft behind        none\n" in screen
    with dist_convert.open(trained / "plain", like=like / "config.json") as opened:
        assert_same({name: opened.get_tensor(name) for name in opened.keys()}, hf)  # noqa: SIM118
    assert main(["verify", str(trained / "plain"), str(like), "--like", str(like)]) == 0


@pytest.mark.parametrize("prefix", ["", "model.", "module._orig_mod.", "state.model."])
def test_names_are_found_behind_any_path(prefix: str, tmp_path: Path) -> None:
    hf = hf_tensors(LLAMA)
    save_plain(tmp_path / "dcp", {f"{prefix}{name}": tensor for name, tensor in hf.items()})
    assert convert(tmp_path / "dcp", tmp_path / "hf") == 0
    assert_same(read_tensors(tmp_path / "hf"), hf)


def test_experts_of_a_layer_in_one_tensor_are_cut_wherever_its_boxes_end(tmp_path: Path) -> None:
    model = Model(layers=1, experts=5)
    hf = hf_tensors(model)
    at = "model.layers.0.block_sparse_moe."
    halves = [torch.stack([hf.pop(f"{at}experts.{e}.{w}.weight") for e in range(5)]) for w in ("w1", "w3", "w2")]
    fused = {"gate_up_proj": torch.cat(halves[:2], 1), "down_proj": halves[2]}
    router = {"model.layers.0.mlp.gate.weight": hf.pop(f"{at}gate.weight")}
    stacked = {f"model.layers.0.mlp.experts.{name}": tensor for name, tensor in fused.items()}
    save_plain(tmp_path / "dcp", hf | router | stacked, model)
    assert convert(tmp_path / "dcp", tmp_path / "hf") == 0
    assert_same(read_tensors(tmp_path / "hf"), hf_tensors(model))


def as_torchtitan(hf: dict[str, torch.Tensor], heads: dict[str, int], *, early: bool) -> dict[str, torch.Tensor]:
    """A Llama under torchtitan's names, by its own adapter's formula for the rows of heads (`_reverse_permute`)."""
    attention = {f"self_attn.{one}_proj": f"attention.{'' if early else 'qkv_linear.'}w{one}" for one in "qkv"}
    names = attention | {
        "embed_tokens": "tok_embeddings", "self_attn.o_proj": "attention.wo", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2", "lm_head": "output" if early else "lm_head",
    }  # fmt: skip
    found = {}
    for name, tensor in hf.items():
        for one, count in heads.items():
            if f".{one}_proj." in name:
                rows, columns = tensor.shape
                tensor = tensor.view(count, 2, rows // count // 2, columns).transpose(1, 2).reshape(rows, columns)
        titan = name.removeprefix("model.")
        for theirs, ours in names.items():
            titan = titan.replace(f"{theirs}.weight", f"{ours}.weight")
        found[titan] = tensor.contiguous()
    return found


@pytest.mark.parametrize("early", [True, False])
def test_torchtitans_heads_are_put_into_the_order_of_transformers(early: bool, tmp_path: Path) -> None:
    hf = hf_tensors(LLAMA)
    save_plain(tmp_path / "dcp", as_torchtitan(hf, {"q": LLAMA.heads, "k": LLAMA.groups}, early=early))
    report = dist_convert.convert(tmp_path / "dcp", tmp_path / "hf", "huggingface", verify="full")
    assert_same(read_tensors(tmp_path / "hf"), hf)
    assert report.read_bytes <= 1.05 * sum(tensor.nbytes for tensor in hf.values())


QWEN = {
    "model_type": "qwen3_moe", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "num_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 6, "norm_topk_prob": True, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
#: torchtitan's name in version 0.3 -> that of transformers, and the shape, as its adapter has them.
OF_QWEN = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", (11, 8)),
    "layers.0.attention.qkv_linear.wq.weight": ("model.layers.0.self_attn.q_proj.weight", (8, 8)),
    "layers.0.attention.qkv_linear.wk.weight": ("model.layers.0.self_attn.k_proj.weight", (4, 8)),
    "layers.0.attention.qkv_linear.wv.weight": ("model.layers.0.self_attn.v_proj.weight", (4, 8)),
    "layers.0.attention.wo.weight": ("model.layers.0.self_attn.o_proj.weight", (8, 8)),
    "layers.0.attention.q_norm.weight": ("model.layers.0.self_attn.q_norm.weight", (4,)),
    "layers.0.attention.k_norm.weight": ("model.layers.0.self_attn.k_norm.weight", (4,)),
    "layers.0.attention_norm.weight": ("model.layers.0.input_layernorm.weight", (8,)),
    "layers.0.ffn_norm.weight": ("model.layers.0.post_attention_layernorm.weight", (8,)),
    "layers.0.moe.router.gate.weight": ("model.layers.0.mlp.gate.weight", (5, 8)),
    "layers.0.moe.routed_experts.inner_experts.w1_EFD": ("model.layers.0.mlp.experts.{}.gate_proj.weight", (5, 6, 8)),
    "layers.0.moe.routed_experts.inner_experts.w3_EFD": ("model.layers.0.mlp.experts.{}.up_proj.weight", (5, 6, 8)),
    "layers.0.moe.routed_experts.inner_experts.w2_EDF": ("model.layers.0.mlp.experts.{}.down_proj.weight", (5, 8, 6)),
    "norm.weight": ("model.norm.weight", (8,)),
    "lm_head.weight": ("lm_head.weight", (11, 8)),
}


def save_qwen(directory: Path, experts: int) -> dict[str, torch.Tensor]:
    """A Qwen3 of five experts under torchtitan's names beside a config of so many; returns the model's tensors."""
    titan = {name: torch.randn(shape).bfloat16() for name, (_, shape) in OF_QWEN.items()}
    save_plain(directory, titan)
    (directory / "config.json").write_text(json.dumps({**QWEN, "num_experts": experts}))
    hf = {OF_QWEN[name][0]: tensor for name, tensor in titan.items()}
    stacked = {name: hf.pop(name) for name in [*hf] if "{}" in name}
    return hf | {name.format(e): one for name, tensor in stacked.items() for e, one in enumerate(tensor)}


def test_torchtitans_experts_are_taken_apart_and_heads_with_norms_kept_in_their_order(tmp_path: Path) -> None:
    hf = save_qwen(tmp_path / "dcp", 5)
    assert convert(tmp_path / "dcp", tmp_path / "hf") == 0
    assert_same(read_tensors(tmp_path / "hf"), hf)


def test_experts_that_the_config_does_not_count_are_not_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_qwen(tmp_path / "dcp", 4)
    assert convert(tmp_path / "dcp", tmp_path / "hf") == 1
    error = capsys.readouterr().err
    assert "layers.0.moe.routed_experts.inner_experts.w1_EFD has no place in a Qwen3MoeForCausalLM" in error


def test_a_tied_head_is_compared_with_the_embedding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(layers=1, tied=True)
    hf = hf_tensors(model)
    embedding = hf["model.embed_tokens.weight"]
    save_plain(tmp_path / "same", hf | {"lm_head.weight": embedding.clone()}, model)
    assert convert(tmp_path / "same", tmp_path / "hf") == 0
    assert_same(read_tensors(tmp_path / "hf"), hf)
    other = embedding.clone()
    other[11, 3] += 1
    save_plain(tmp_path / "other", hf | {"lm_head.weight": other}, model)
    assert convert(tmp_path / "other", tmp_path / "refused") == 1
    assert "found:    other values\n" in capsys.readouterr().err


def test_the_config_beside_it_is_taken_over_with_the_tokenizer(tmp_path: Path) -> None:
    save_plain(tmp_path / "dcp", hf_tensors(LLAMA))
    (tmp_path / "dcp/tokenizer.json").write_text("{}")
    assert convert(tmp_path / "dcp", tmp_path / "hf") == 0
    assert (tmp_path / "hf/tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "hf/config.json").read_text())["num_hidden_layers"] == 2
