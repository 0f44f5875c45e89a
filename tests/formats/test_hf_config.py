"""config.json holds the numbers of the checkpoint's args, and transformers 4 and 5 both read them so."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from dist_convert.formats.huggingface.config import special_token_ids
from dist_convert.formats.tokenizer.record import Tokenizer
from tests.checkpoints import Grid, Model, make
from tests.converting import assert_same, convert, read_tensors
from tests.distributed.launching import environment
from tests.warm import Process

TRANSFORMERS_4 = os.environ.get("DIST_CONVERT_TRANSFORMERS_4_PYTHON")
LONG = {"max_position_embeddings": 131072, "norm_epsilon": 1e-6}

#: Name -> model, args, and what a reader must find.
CASES: dict[str, tuple[Model, dict[str, Any], dict[str, Any]]] = {
    "llama": (
        Model(layers=1, head_dim=8),
        LONG,
        {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 29, "hidden_size": 16,
            "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 8, "hidden_act": "silu", "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1,
            "eos_token_id": 2, "theta": 500000.0, "scaling": None, "dtype": "torch.bfloat16", "left_out": [],
        },
    ),
    "llama3.1": (
        Model(layers=1, head_dim=8, dtype=torch.float16),
        LONG | {"use_rope_scaling": True, "rope_scaling_factor": 8.0},
        {
            "theta": 500000.0, "dtype": "torch.float16", "left_out": [],
            "scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "factor without scaling": (
        Model(layers=1), {"use_rope_scaling": False, "rope_scaling_factor": 32.0}, {"scaling": None}
    ),
    "no query groups": (
        Model(layers=1, groups=4), {}, {"num_key_value_heads": 4, "num_attention_heads": 4, "head_dim": 4}
    ),
    "llama2": (
        Model(layers=1, dtype=torch.float32),
        {"rotary_base": 10000, "max_position_embeddings": 4096},
        {"theta": 10000.0, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "dtype": "torch.float32"},
    ),
    "tied": (Model(layers=1, tied=True), {}, {"tie_word_embeddings": True, "left_out": ["lm_head.weight"]}),
    "qwen2": (
        Model(layers=1, qkv_bias=True),
        {"norm_epsilon": 1e-6},
        {"model_type": "qwen2", "use_sliding_window": False, "rms_norm_eps": 1e-6, "left_out": []},
    ),
    "biases": (Model(layers=1, linear_bias=True), {}, {"attention_bias": True, "mlp_bias": True}),
    "mixtral": (
        Model(layers=1, head_dim=8, experts=4),
        {"rotary_base": 1000000, "moe_router_topk": 3, "moe_aux_loss_coeff": 0.02},
        {
            "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4,
            "num_experts_per_tok": 3, "router_aux_loss_coef": 0.02, "intermediate_size": 24, "head_dim": 8,
            "sliding_window": None, "theta": 1000000.0, "scaling": None, "rms_norm_eps": 1e-5, "left_out": [],
        },
    ),
    "window": (Model(layers=1, experts=2), {"window_size": (4095, 0)}, {"sliding_window": 4096}),
}  # fmt: skip

#: Reads each directory as transformers of any version does; `left_out` lists tied weights, which some versions count.
PROBE = """
import json, sys, torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM
found = {"version": transformers.__version__}
for name, path in json.loads(sys.argv[1]).items():
    config = AutoConfig.from_pretrained(path)
    model, report = AutoModelForCausalLM.from_pretrained(path, torch_dtype="auto", output_loading_info=True)
    values = {k: v for k, v in config.to_dict().items() if isinstance(v, (int, float, str, list, type(None)))}
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    faults = [k for kind in report.values() for k in kind if k not in tied]
    logits = model.float()(torch.tensor([[1, 2, 3, 4]])).logits.tolist()
    values |= {"theta": config.rope_theta, "scaling": config.rope_scaling, "dtype": str(config.torch_dtype)}
    found[name] = {"values": values, "faults": faults, "logits": logits, "left_out": tied,
                   "frequencies": model.model.rotary_emb.inv_freq.tolist()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("converted")
    targets = {}
    for name, (model, args, _) in CASES.items():
        make(directory / name, model, Grid(tp=2), **args)
        targets[name] = directory / f"{name} of HF"
        assert convert(directory / name, targets[name]) == 0
    return targets


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_numbers_of_the_args(name: str, converted: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(converted[name])
    rope = dict(config.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope["rope_type"]
    found = config.to_dict() | {"theta": theta, "scaling": rope if kind != "default" else None}
    found |= {"dtype": str(config.dtype), "left_out": ["lm_head.weight"] if config.tie_word_embeddings else []}
    expected = CASES[name][2]
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize("name", CASES)
def test_transformers_finds_every_weight_and_no_other(name: str, converted: dict[str, Path]) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(converted[name], output_loading_info=True, dtype="auto")
    assert {kind: list(names) for kind, names in report.items() if names} == {}
    assert model.dtype == CASES[name][0].dtype


@pytest.mark.parametrize("name", ["llama", "llama3.1", "mixtral"])
def test_the_rotary_frequencies_are_those_of_megatron(name: str, converted: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted[name])
    theta = CASES[name][2]["theta"]
    expected = [theta ** (-pair / 4) for pair in range(4)]
    if name == "llama3.1":
        # Waves of 6, 167, 4443 and 118142 positions: two stay, one is mixed, one is stretched by 8.
        mixed = (8192 / (2 * math.pi / expected[2]) - 1) / (4 - 1)
        expected[2] = (1 - mixed) * expected[2] / 8 + mixed * expected[2]
        expected[3] /= 8
    assert model.model.rotary_emb.inv_freq.tolist() == pytest.approx(expected, rel=1e-5)


def test_transformers_4_reads_the_same_model(converted: dict[str, Path]) -> None:
    if not TRANSFORMERS_4:
        pytest.skip("DIST_CONVERT_TRANSFORMERS_4_PYTHON names no Python with transformers 4")
    paths = json.dumps({name: str(path) for name, path in converted.items()})
    done = Process(["-c", PROBE, paths], environment(), python=TRANSFORMERS_4).finish()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].startswith("4.")
    for name, (_, _, expected) in CASES.items():
        values = found[name]["values"] | {"left_out": found[name]["left_out"]}
        assert {key: values.get(key) for key in expected} == expected, name
        assert found[name]["faults"] == [], name
        model = AutoModelForCausalLM.from_pretrained(converted[name]).float()
        assert found[name]["frequencies"] == pytest.approx(model.model.rotary_emb.inv_freq.tolist(), rel=1e-6), name
        logits = model(torch.tensor([[1, 2, 3, 4]])).logits
        torch.testing.assert_close(torch.tensor(found[name]["logits"]), logits.detach(), atol=1e-5, rtol=1e-5)


def test_an_output_bias_of_zeros_is_added_where_the_model_is_said_to_be_a_llama_and_only_qkv_have_biases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(layers=2, qkv_bias=True)
    expected = make(tmp_path / "in", model, Grid(tp=2))
    like = {"model_type": "llama", "vocab_size": 29, "attention_bias": True, "hidden_size": 16, "intermediate_size": 24}
    like |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    (tmp_path / "like.json").write_text(json.dumps(like | {"rms_norm_eps": 1e-5, "head_dim": 4}))
    assert convert(tmp_path / "in", tmp_path / "out", "--like", str(tmp_path / "like.json")) == 0
    zeros = {f"model.layers.{n}.self_attn.o_proj.bias": torch.zeros(16, dtype=torch.bfloat16) for n in range(2)}
    assert_same(read_tensors(tmp_path / "out"), expected | zeros)
    note = "all zeros, because Megatron has no such parameter: model.layers.0.self_attn.o_proj.bias"
    assert note in capsys.readouterr().err


def test_linear_biases_all_come_from_the_checkpoint(tmp_path: Path) -> None:
    expected = make(tmp_path / "in", Model(layers=2, linear_bias=True), Grid(tp=2, pp=2))
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert_same(read_tensors(tmp_path / "out"), expected)


def test_qkv_biases_of_a_mixtral_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in", Model(layers=1, experts=2, qkv_bias=True))
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    assert "--add-qkv-bias has a value that the target cannot express" in capsys.readouterr().err


#: A vocabulary of Llama 3's size, which others have, too.
TINY_LLAMA_3 = Model(layers=1, hidden=4, ffn=4, heads=2, groups=2, head_dim=2, vocab=128256, padded_vocab=128256)


@pytest.mark.parametrize(
    ("model", "flags", "expected"),
    [
        (Model(layers=1), (), (1, 2, None, None, None)),
        (Model(layers=1), ("--instruct",), (1, 2, None, None, None)),
        (Model(layers=1, experts=2), ("--instruct",), (1, 2, None, None, None)),
        (TINY_LLAMA_3, (), (None, None, None, None, None)),
        (TINY_LLAMA_3, ("--instruct",), (None, None, None, None, None)),
    ],
    ids=["llama2", "llama2 instruct", "mixtral instruct", "llama3", "llama3 instruct"],
)
def test_without_a_tokenizer_generation_ends_where_the_family_ends_and_a_larger_vocabulary_says_nothing(
    model: Model, flags: tuple[str, ...], expected: tuple[Any, ...], tmp_path: Path
) -> None:
    make(tmp_path / "in", model)
    assert convert(tmp_path / "in", tmp_path / "out", *flags) == 0
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    loaded = GenerationConfig.from_pretrained(tmp_path / "out")
    names = ("bos_token_id", "eos_token_id", "do_sample", "temperature", "top_p")
    assert tuple(written.get(name) for name in names) == expected
    assert tuple(getattr(loaded, name) for name in names[:2]) == expected[:2]
    assert bool(loaded.do_sample) is bool(expected[2])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == expected[:2]


@pytest.mark.parametrize("is_file", [True, False], ids=["config.json", "directory"])
def test_a_model_like_this_one_gives_its_special_ids_and_its_whole_generation_config(
    is_file: bool, tmp_path: Path
) -> None:
    make(tmp_path / "in", Model(layers=1))
    like = tmp_path / "like"
    assert convert(tmp_path / "in", like) == 0
    config = json.loads((like / "config.json").read_text()) | {"eos_token_id": [27, 28], "bos_token_id": 3}
    (like / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [27, 28], "temperature": 0.7, "do_sample": True, "repetition_penalty": 1.1}
    (like / "generation_config.json").write_text(json.dumps(generation))
    path = like / "config.json" if is_file else like
    assert convert(tmp_path / "in", tmp_path / "out", "--like", str(path)) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (3, [27, 28])
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == generation


NOT_FOUND = Tokenizer("none")
OF_LLAMA_3 = Tokenizer("huggingface", bos=128000, eos=128009, is_llama3=True)
ENDS = [128001, 128008, 128009]


@pytest.mark.parametrize(
    ("vocab", "tokenizer", "instruct", "expected"),
    [
        (128256, NOT_FOUND, True, (None, None)),
        (128256, NOT_FOUND, False, (None, None)),
        (32000, NOT_FOUND, True, (1, 2)),
        (2, NOT_FOUND, False, (1, None)),
        (128256, OF_LLAMA_3, True, (128000, ENDS)),
        (128258, replace(OF_LLAMA_3, eos=128257), True, (128000, [*ENDS, 128257])),
        (128256, replace(OF_LLAMA_3, eos=128257), True, (128000, ENDS)),
        (128256, OF_LLAMA_3, False, (128000, 128009)),
        (151936, Tokenizer("huggingface", bos=151643, eos=151645), True, (151643, 151645)),
        (151936, Tokenizer("huggingface", bos=None, eos=151645), True, (None, 151645)),
        (32000, Tokenizer("huggingface"), False, (None, None)),
        (32000, Tokenizer("huggingface", bos=1, eos=32000), True, (1, None)),
    ],
)
def test_special_ids_are_the_tokenizers_or_without_one_the_familys_if_they_have_rows(
    vocab: int, tokenizer: Tokenizer, instruct: bool, expected: tuple[Any, Any]
) -> None:
    assert special_token_ids("llama", vocab, tokenizer, instruct=instruct) == expected
