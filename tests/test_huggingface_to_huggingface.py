"""`convert --to huggingface` of a Hugging Face directory: another dtype or size of files, all else as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralForCausalLM

import dist_convert
from dist_convert.__main__ import main
from dist_convert.errors import UsageError
from tests.checkpoints import Model, hf_tensors
from tests.converting import assert_same, read_tensors
from tests.to_megatron import config_of, make_hf


def rewrite(source: Path, target: Path, *flags: str) -> int:
    return main(["convert", str(source), str(target), "--to", "huggingface", "--device", "cpu", *flags])


def config(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


def test_every_tensor_stays_as_it_is_while_the_size_of_files_changes(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "source")
    assert rewrite(tmp_path / "source", tmp_path / "target", "--max-shard-size", "4KB", "--verify") == 0
    assert len(list((tmp_path / "target").glob("*.safetensors"))) > 3
    assert_same(read_tensors(tmp_path / "target"), hf)


def test_the_dtype_that_is_asked_for_is_the_one_of_the_files_and_of_the_config(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "source", Model(dtype=torch.float32))
    assert rewrite(tmp_path / "source", tmp_path / "target", "--target-params-dtype", "bf16", "--verify") == 0
    assert_same(read_tensors(tmp_path / "target"), {name: tensor.bfloat16() for name, tensor in hf.items()})
    assert (config(tmp_path / "target")["torch_dtype"], config(tmp_path / "target")["dtype"]) == ("bfloat16",) * 2


def test_pickled_weights_become_safetensors(tmp_path: Path) -> None:
    hf = hf_tensors(Model())
    (tmp_path / "source").mkdir()
    torch.save(hf, tmp_path / "source" / "pytorch_model.bin")
    config_of(Model()).save_pretrained(tmp_path / "source")
    assert rewrite(tmp_path / "source", tmp_path / "target", "--verify") == 0
    assert_same(read_tensors(tmp_path / "target"), hf)
    assert not (tmp_path / "target" / "pytorch_model.bin").exists()


def test_fused_experts_become_one_tensor_for_each(tmp_path: Path) -> None:
    model = Model(experts=4)
    made = config_of(model)
    torch.manual_seed(0)
    MixtralForCausalLM(made).to(torch.bfloat16).save_pretrained(tmp_path / "fused", save_original_format=False)
    assert rewrite(tmp_path / "fused", tmp_path / "target", "--verify") == 0
    found = read_tensors(tmp_path / "target")
    assert sorted(found) == sorted(hf_tensors(model))
    fused = read_tensors(tmp_path / "fused")["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(found["model.layers.1.block_sparse_moe.experts.3.w3.weight"], fused[3, model.ffn :])
    ids = torch.arange(8)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(ids).logits
        for name in ("fused", "target")
    ]
    assert torch.equal(*logits)


def test_a_bias_that_megatron_has_no_place_for_stays(tmp_path: Path) -> None:
    model = Model(qkv_bias=True)
    tensors = hf_tensors(model)
    biases = {f"model.layers.{n}.self_attn.o_proj.bias": torch.ones(16, dtype=torch.bfloat16) for n in range(4)}
    make_hf(tmp_path / "source", model, {**tensors, **biases}, attention_bias=True)
    assert rewrite(tmp_path / "source", tmp_path / "target", "--verify") == 0
    assert_same(read_tensors(tmp_path / "target"), {**tensors, **biases})


def test_all_that_lies_beside_the_weights_is_copied_and_what_is_not_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "source")
    texts = {
        "generation_config.json": '{"eos_token_id": 7}', "README.md": "# model\n", "LICENSE": "free",
        "tokenizer_config.json": '{"tokenizer_class": "X"}', "chat_template.jinja": "{{ x }}", "code.py": "pass\n",
        "additional_chat_templates/tools.jinja": "{{ y }}",
    }  # fmt: skip
    (tmp_path / "source" / "additional_chat_templates").mkdir()
    for name, text in texts.items():
        (tmp_path / "source" / name).write_text(text)
    (tmp_path / "source" / "model.gguf").write_bytes(b"x")
    (tmp_path / "source" / "original").mkdir()
    (tmp_path / "source" / "resumable").write_text("what an unfinished conversion calls its mark")
    assert rewrite(tmp_path / "source", tmp_path / "target") == 0
    assert {name: (tmp_path / "target" / name).read_text() for name in texts} == texts
    assert (
        "not converted: files that are not part of the model: model.gguf, original, resumable"
        in capsys.readouterr().err
    )


def test_the_config_keeps_what_it_says_and_both_versions_of_transformers_find_the_rotary_base(tmp_path: Path) -> None:
    make_hf(tmp_path / "source")
    before = config(tmp_path / "source") | {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    before.pop("rope_theta", None)
    before["bos_token_id"] = 11
    (tmp_path / "source" / "config.json").write_text(json.dumps(before))
    assert rewrite(tmp_path / "source", tmp_path / "target") == 0
    after = config(tmp_path / "target")
    before.pop("dtype", None)
    assert {name: after[name] for name in before} == before
    assert after["rope_theta"] == 500000.0


def test_a_link_out_of_the_directory_is_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(tmp_path / "source")
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "source" / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    assert rewrite(tmp_path / "source", tmp_path / "target") == 1
    assert "is a link to a file outside the directory" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("to", ["huggingface", "dcp", "torch"])
def test_another_vocabulary_than_the_config_says_is_refused_and_not_passed_over(to: str, tmp_path: Path) -> None:
    make_hf(tmp_path / "source")
    with pytest.raises(UsageError, match="--true-vocab-size is not the model's"):
        dist_convert.convert(tmp_path / "source", tmp_path / "target", to=to, true_vocab_size=20)
    with pytest.raises(UsageError, match="--true-vocab-size is not the model's"):
        dist_convert.open(tmp_path / "source", true_vocab_size=20)


def test_a_tied_head_that_is_not_the_embedding_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = hf_tensors(Model(tied=True))
    other = tensors["model.embed_tokens.weight"] + 1
    make_hf(tmp_path / "source", Model(tied=True), {**tensors, "lm_head.weight": other})
    assert rewrite(tmp_path / "source", tmp_path / "target") == 1
    assert "a head that differs" in capsys.readouterr().err
