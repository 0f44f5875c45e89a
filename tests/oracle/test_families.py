"""Every family, both ways: transformers' own tiny models, and Megatron-Core's own models of the same weights.

By default each model is converted once in either direction, at the grids, formats and spellings of `families/cases.py`;
`-m oracle_full` converts all models at all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dist_convert.__main__ import main
from tests.distributed.launching import REPOSITORY, environment
from tests.formats.test_hf_config import TRANSFORMERS_4
from tests.oracle.conftest import FAMILY_RANKS, FEW, Ranks, family_cases, kept
from tests.oracle.families import huggingface
from tests.oracle.families.cases import FILE, FULL_CASES, SAID, TO_HUGGINGFACE, TO_MEGATRON, Case
from tests.oracle.families.training_args import MAKE_VOCAB_SIZE_DIVISIBLE_BY, training_args
from tests.warm import Process

#: The last version 4, which knows all families.
NEWEST_4 = "4.57.6"
#: It does not scale the scores of a DeepSeek-V2 by mscale_all_dim, as version 5 and the publisher's own code do.
WRONG_IN_4 = {"deepseek-v2-lite"}
#: Families that transformers 4.49 knows.
OF_TRANSFORMERS_4 = {"llama", "qwen2", "mistral", "mixtral", "qwen2_moe"}
MTP = "num_nextn_predict_layers"
#: What no training argument tells: how a model was initialised, runs and ends, and who wrote the file; and a layer of
#: prediction that the class says and the tensors do not.
NOT_IN_ARGS = {
    "transformers_version", "initializer_range", "use_cache", "dtype", "torch_dtype", "bos_token_id", "eos_token_id",
    "pad_token_id", "router_aux_loss_coef", "_name_or_path", MTP,
}  # fmt: skip


def _rows(few: Sequence[Case]) -> list[Any]:
    """Cases with the set in which they are made and converted together."""
    full = [case for case in FULL_CASES if case not in few]
    return [
        *(pytest.param(FEW, case, id=case.name) for case in few),
        *(pytest.param(case.model.name, case, id=case.name, marks=pytest.mark.oracle_full) for case in full),
    ]


@pytest.mark.parametrize("few", [TO_MEGATRON, TO_HUGGINGFACE], ids=["to Megatron", "to Hugging Face"])
@pytest.mark.parametrize("has_experts", [False, True], ids=["dense", "experts"])
def test_every_pair_of_grid_format_and_modules_is_converted_by_default(few: Sequence[Case], has_experts: bool) -> None:
    converted, possible = (
        {
            pair
            for case in cases
            if case.model.has_experts == has_experts
            for pair in combinations((case.grid, case.format, (case.spelling, case.experts)), 2)
        }
        for cases in (few, FULL_CASES)
    )
    assert len(possible) == (26 if has_experts else 12)
    assert possible - converted == set()


@pytest.fixture(scope="module")
def loaded(
    made: Callable[[str], Path], ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Set of cases -> directory with CASE/megatron by this converter, and what Megatron-Core makes of it."""

    @cache
    def of(which: str) -> Path:
        directory, cases = tmp_path_factory.mktemp(which), family_cases(which, TO_MEGATRON)
        (directory / "hf").symlink_to(made(which) / "hf")
        for case in cases:
            paths = [str(directory / "hf" / case.model.name), str(directory / case.name / "megatron")]
            padding = ["--make-vocab-size-divisible-by", str(MAKE_VOCAB_SIZE_DIVISIBLE_BY)]
            command = ["convert", *paths, "--to", case.format, *case.flags, *padding, "--device", "cpu"]
            assert main(command) == 0, case.name
        ranks("tests.oracle.families.program", FAMILY_RANKS, "check", directory, *(case.name for case in cases))
        return directory

    return of


@pytest.fixture(scope="module")
def converted(made: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Case], Path]:
    """A Hugging Face directory that was made of Megatron-Core's own checkpoint of a case."""

    @cache
    def of(which: str, case: Case) -> Path:
        target = tmp_path_factory.mktemp(case.name) / "hf"
        source = made(which) / "hf" / case.model.name
        said = [word.format(hf=source) for word in SAID.get(case.model.name, ())]
        command = ["convert", str(made(which) / case.name), str(target), "--to", "huggingface", *said]
        assert main([*command, "--target-params-dtype", "keep", "--device", "cpu"]) == 0
        return target

    return of


@pytest.mark.parametrize(("which", "case"), _rows(TO_MEGATRON))
def test_megatron_loads_what_is_written_strictly_and_gives_the_logits_of_transformers(
    which: str, case: Case, loaded: Callable[[str], Path]
) -> None:
    found = torch.load(loaded(which) / case.name / "output.pt")
    assert found.pop("problems") == []
    expected = torch.load(loaded(which) / "hf" / case.model.name / "logits.pt")
    _assert_close(found["logits"], expected["logits"], case)
    for ahead in range(case.model.mtp_layers):  # what comes after the last tokens is not known
        _assert_close(*(one["mtp_logits"][ahead, :, : -1 - ahead] for one in (found, expected)), case)


def _assert_close(found: torch.Tensor, expected: torch.Tensor, case: Case) -> None:
    most = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=case.model.tolerance * most)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


#: Arguments of one run that decide nothing of the model.
OF_THE_RUN = {
    "attention_dropout", "hidden_dropout", "seq_length", "iteration", "tokenizer_type", "tokenizer_model",
    "moe_token_dispatcher_type", "moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_router_dtype",
}  # fmt: skip


#: Megatron's, of arguments that are not written where they add nothing.
DEFAULTS = {
    "quick_geglu": False, "glu_linear_offset": 0.0, "softmax_type": "vanilla", "rope_scaling_factor": 8.0,
    "moe_shared_expert_gate": False, "moe_grouped_gemm": False,
}  # fmt: skip
#: Of latent attention, which has no use for them, and of YaRN.
NOT_OF_LATENT_ATTENTION = {"num_query_groups", "kv_channels"}
OF_YARN = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "original_max_position_embeddings"}


@pytest.mark.parametrize(("which", "case"), _rows(TO_MEGATRON))
def test_the_args_that_are_written_are_those_of_a_training(
    which: str, case: Case, loaded: Callable[[str], Path]
) -> None:
    config = json.loads((loaded(which) / "hf" / case.model.name / "config.json").read_text())
    written = vars(_args(loaded(which) / case.name / "megatron"))
    trained = training_args(config, case)
    ignored = OF_THE_RUN | (NOT_OF_LATENT_ATTENTION if trained.multi_latent_attention else set())
    ignored |= OF_YARN if getattr(trained, "rope_type", "") == "rope" else set()
    wanted = {name: value for name, value in vars(trained).items() if name not in ignored}
    found = {name: written.get(name, DEFAULTS.get(name)) for name in wanted}
    assert {name: value for name, value in found.items() if value != wanted[name]} == {}


def _args(root: Path) -> Namespace:
    (directory,) = root.glob("iter_*")
    file = directory / "common.pt" if (directory / "common.pt").exists() else next(directory.glob(f"*/{FILE}"))
    found: Namespace = torch.load(file, weights_only=False)["args"]
    return found


@pytest.mark.parametrize(("which", "case"), _rows(TO_HUGGINGFACE))
def test_megatrons_own_checkpoint_is_the_model_it_was_made_of(
    which: str, case: Case, made: Callable[[str], Path], converted: Callable[[str, Case], Path]
) -> None:
    source, target = made(which) / "hf" / case.model.name, converted(which, case)
    own = torch.load(made(which) / case.name / "output.pt")
    expected = torch.load(source / "logits.pt")
    _assert_close(own["logits"], expected["logits"], case)
    tensors, found = huggingface.tensors(source), huggingface.tensors(target)
    assert found.keys() == tensors.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(found[name], tensor)] == []
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: tensor.dtype for n, tensor in tensors.items()}
    model, report = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, output_loading_info=True)
    # It takes layers of multi-token prediction for superfluous, but for those of the published sizes.
    layers = model.config.num_hidden_layers
    further = tuple(f"model.layers.{layers + number}." for number in range(case.model.mtp_layers))
    report = {kind: [name for name in names if not name.startswith(further)] for kind, names in report.items()}
    assert {kind: names for kind, names in report.items() if names} == {}
    with torch.no_grad():
        _assert_close(model(expected["input_ids"]).logits, expected["logits"], case)


@pytest.mark.parametrize(("which", "case"), _rows(TO_HUGGINGFACE))
def test_its_config_is_that_of_the_class_of_transformers(
    which: str, case: Case, made: Callable[[str], Path], converted: Callable[[str, Case], Path]
) -> None:
    configs = [made(which) / "hf" / case.model.name, converted(which, case)]
    expected, found = (AutoConfig.from_pretrained(path).to_dict() for path in configs)
    if expected.get("head_dim", 0) is None:  # says the same
        expected["head_dim"] = expected["hidden_size"] // expected["num_attention_heads"]
    names = expected.keys() - (NOT_IN_ARGS - {MTP} if case.model.mtp_layers else NOT_IN_ARGS)
    assert {name: found.get(name) for name in names} == {name: expected[name] for name in names}


def test_transformers_4_reads_the_same_models(
    made: Callable[[str], Path], converted: Callable[[str, Case], Path]
) -> None:
    if not TRANSFORMERS_4:
        pytest.skip("DIST_CONVERT_TRANSFORMERS_4_PYTHON names no Python with transformers 4")
    cases = {case.model.name: case for case in TO_HUGGINGFACE if case.model.model_type in OF_TRANSFORMERS_4}
    done = Process(_reader(cases, made, converted), environment(), python=TRANSFORMERS_4).finish()
    assert done.returncode == 0, done.stderr
    _assert_the_same(cases, done.stdout, "4.49")


@pytest.mark.oracle_full
def test_the_newest_transformers_4_reads_the_same_models_of_all_families(
    made: Callable[[str], Path], converted: Callable[[str, Case], Path]
) -> None:
    def install(directory: Path) -> None:
        flags = ["--quiet", "--no-deps", "--target", str(directory)]
        packages = (f"transformers=={NEWEST_4}", "tokenizers<0.23", "huggingface_hub<1")
        subprocess.run([sys.executable, "-m", "pip", "install", *flags, *packages], check=True)

    packages = kept(f"transformers-{NEWEST_4}", "", install)
    env = environment(PYTHONPATH=os.pathsep.join((str(packages), str(REPOSITORY))))
    cases = {case.model.name: case for case in TO_HUGGINGFACE}
    words = [sys.executable, *_reader(cases, made, converted)]
    done = subprocess.run(words, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    _assert_the_same(cases, done.stdout, NEWEST_4)


def _reader(
    cases: Mapping[str, Case], made: Callable[[str], Path], converted: Callable[[str, Case], Path]
) -> list[str]:
    given = {
        name: (str(converted(FEW, case)), str(made(FEW) / "hf" / name / "logits.pt")) for name, case in cases.items()
    }
    return ["-m", "tests.oracle.families.transformers_4", json.dumps(given)]


def _assert_the_same(cases: Mapping[str, Case], output: str, version: str) -> None:
    found = json.loads(output.splitlines()[-1])
    assert found.pop("version").startswith(version)
    for name, case in cases.items():
        differing = found[name]["config"].items()
        config = {key: both for key, both in differing if key not in {*NOT_IN_ARGS, "architectures"}}
        if config.get("head_dim", (0, 0))[1] is None:  # says the same
            del config["head_dim"]
        assert (config, found[name]["faults"]) == ({}, []), name
        assert found[name]["logits"] <= case.model.tolerance or name in WRONG_IN_4, name
