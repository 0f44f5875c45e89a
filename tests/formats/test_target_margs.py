"""What is taken from the training arguments of an earlier run (`--source-margs-file`), and what overrules them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_convert.errors import CorruptFile, UnsupportedModel, UsageError
from dist_convert.formats.megatron.grid import Grid
from dist_convert.formats.megatron.target_args import describe_origins, read_training_args
from dist_convert.formats.pickles import Named
from tests.formats.test_target_args import MIXTRAL, make, read_back

AS_MARGS = ", as --source-margs-file says)"
MARGS = {
    "lr": 3e-4, "seq_length": 2048, "tokenizer_type": "GPTSentencePieceTokenizer", "main_grads_dtype": "torch.float32",
    "attention_backend": "AttnBackend.auto", "model_type": "ModelType.encoder_or_decoder",
    "cuda_graph_scope": ["CudaGraphScope.attn"], "exit_signal": "Signals.SIGTERM", "rerun": "<megatron.core.State>",
    "loss": "<function loss at 0x7f01>", "eod": "<|endoftext|>",
    "rotary_base": 10000, "hidden_size": 32, "norm_epsilon": 1e-6, "tensor_model_parallel_size": 8, "bf16": False,
    "params_dtype": "torch.float16", "padded_vocab_size": 63, "tokenizer_model": "/their/tokenizer",
    "use_distributed_optimizer": True, "consumed_train_samples": 9000, "load": "/theirs", "no_save_optim": None,
    "sequence_parallel": True, "attention_dropout": None, "iteration": 5000, "disable_bias_linear": False,
    "ckpt_format": "torch_dist", "window_size": None, "encoder_seq_length": 2048, "yaml_cfg": None,
}  # fmt: skip


def test_a_margs_file_says_how_training_went() -> None:
    args = make(margs=MARGS)
    expected = {"lr": 3e-4, "seq_length": 2048, "tokenizer_type": "GPTSentencePieceTokenizer", "eod": "<|endoftext|>"}
    assert {name: args.values[name] for name in expected} == expected
    assert {args.origins[name] for name in expected} == {"--source-margs-file"}


@pytest.mark.parametrize(
    ("name", "value", "origin"),
    [
        ("rotary_base", 500000, f"config.json (not 10000{AS_MARGS}"),
        ("hidden_size", 64, f"config.json (not 32{AS_MARGS}"),
        ("norm_epsilon", 1e-6, "config.json"),
        ("num_layers", 8, "config.json"),
        ("tensor_model_parallel_size", 2, "flag --target-tensor-parallel-size"),
        ("pipeline_model_parallel_size", 1, "default of --target-pipeline-parallel-size"),
        ("params_dtype", Named("torch", "bfloat16"), f"flag --target-params-dtype (not torch.float16{AS_MARGS}"),
        ("bf16", True, f"flag --target-params-dtype (not False{AS_MARGS}"),
        ("iteration", 7, f"default of --iteration (not 5000{AS_MARGS}"),
        ("ckpt_format", "torch", f"default (not torch_dist{AS_MARGS}"),
        ("tokenizer_model", "/hf/model", "the model's own"),
        ("attention_dropout", 0.0, "default"),
        ("main_grads_dtype", Named("torch", "float32"), "--source-margs-file"),
        ("sequence_parallel", False, "the parallel sizes"),
        ("consumed_train_samples", 0, "default"),
        ("padded_vocab_size", 256, f"default of --make-vocab-size-divisible-by (not 63{AS_MARGS}"),
    ],
)
def test_the_model_and_the_target_overrule_a_margs_file_and_the_origin_says_so(
    name: str, value: object, origin: str
) -> None:
    flags = {"target_tensor_parallel_size": 2, "target_params_dtype": "bf16"}
    args = make(grid=Grid(tensor=2, expert_tensor=2), margs=MARGS, flags=flags)
    assert (args.values[name], args.origins[name]) == (value, origin)


@pytest.mark.parametrize(
    "name", ["attention_backend", "model_type", "cuda_graph_scope", "exit_signal", "rerun", "loss"]
)
def test_text_that_stands_for_an_object_is_dropped_and_noted(name: str) -> None:
    args = make(margs=MARGS)
    assert name not in args.values
    assert args.origins[name].startswith("dropped: ")


@pytest.mark.parametrize("name", ["load", "use_distributed_optimizer", "disable_bias_linear"])
def test_arguments_of_the_run_that_is_over_are_not_taken(name: str) -> None:
    args = make(margs=MARGS)
    assert name not in args.values
    assert args.origins[name] == "not taken from --source-margs-file: it is of the run that saved the file"


@pytest.mark.parametrize(
    "name",
    [
        "encoder_num_layers", "encoder_seq_length", "start_weight_decay", "end_weight_decay", "main_grads_dtype",
        "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype",
    ],
)  # fmt: skip
def test_more_arguments_are_not_taken_of_a_mixtral_than_of_a_llama(name: str) -> None:
    assert make(margs={name: 3}).values[name] == 3
    assert name not in make(MIXTRAL, margs={name: 3}).values


def test_the_loss_that_balances_experts_is_the_one_of_training_where_a_margs_file_knows_it() -> None:
    assert make(MIXTRAL).origins["moe_aux_loss_coeff"] == "config.json"
    args = make(MIXTRAL, margs={"moe_aux_loss_coeff": [0.5, 0.1]})
    assert args.values["moe_aux_loss_coeff"] == [0.5, 0.1]


def test_a_margs_file_of_a_model_that_the_weights_are_not_of_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="softmax-type") as error:
        make(margs={"softmax_type": "learnable"})
    assert error.value.file == "--source-margs-file"


def test_the_arguments_of_a_converted_model_come_back_as_they_were(tmp_path: Path) -> None:
    first = read_back(make(MIXTRAL, Grid(2, 1, 1, 2, 2), margs={"lr": 0.1, "yaml_cfg": None}), tmp_path)
    (tmp_path / "source_megatron_args.json").write_text(json.dumps(first))
    margs = read_training_args(tmp_path / "source_megatron_args.json")
    assert read_back(make(MIXTRAL, Grid(2, 1, 1, 2, 2), margs=margs), tmp_path) == first


def test_a_margs_file_that_is_not_there_or_no_object_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist") as error:
        read_training_args(tmp_path / "margs.json")
    assert error.value.file == f"{tmp_path}/margs.json"
    (tmp_path / "margs.json").write_text("[]")
    with pytest.raises(CorruptFile, match="not a JSON object"):
        read_training_args(tmp_path / "margs.json")


def test_the_order_is_alphabetical_whatever_the_order_of_the_margs_file() -> None:
    forward, backward = make(margs=MARGS), make(margs=dict(reversed(MARGS.items())))
    assert list(forward.values.items()) == list(backward.values.items())
    assert list(forward.values) == sorted(forward.values)
    assert list(forward.origins) == sorted(forward.origins)


@pytest.mark.parametrize(
    ("flags", "origin"),
    [
        ({"target_virtual_pipeline_parallel_size": 2}, "flag --target-virtual-pipeline-parallel-size"),
        ({"num_layers_per_virtual_pipeline_stage": 2}, "flag --num-layers-per-virtual-pipeline-stage"),
        ({"pipeline_model_parallel_layout": "Ett|tt|tt|ttL"}, "flag --pipeline-model-parallel-layout"),
    ],
)
def test_of_three_flags_the_one_that_was_given_says_how_many_virtual_stages_there_are(
    flags: dict[str, Any], origin: str
) -> None:
    args = make(grid=Grid(pipeline=2, virtual_pipeline=2), flags=flags)
    assert args.origins["virtual_pipeline_model_parallel_size"] == origin


def test_parallel_sizes_that_no_flag_gives_are_those_of_the_margs_file() -> None:
    args = make(grid=Grid(pipeline=2), margs={"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 4})
    assert args.origins["pipeline_model_parallel_size"] == "--source-margs-file"
    assert args.origins["tensor_model_parallel_size"] == "default of --target-tensor-parallel-size"


def test_origins_are_printed_one_argument_a_line() -> None:
    lines = describe_origins(make(margs={"lr": 0.5, "model_type": "ModelType.encoder_or_decoder"}))
    words = [" ".join(line.split()) for line in lines]
    assert "lr 0.5 <- --source-margs-file" in words
    assert "hidden_size 64 <- config.json" in words
    assert "tensor_model_parallel_size 1 <- default of --target-tensor-parallel-size" in words
    dropped = "dropped: ModelType.encoder_or_decoder of --source-margs-file is an object that only Megatron can make"
    assert f"model_type {dropped}" in words
