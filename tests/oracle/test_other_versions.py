"""Other versions of Megatron-Core, each in an environment of its own: what they save converts, and they load ours.

pip fetches the versions; the scripts, and what they must show, are those of the version that is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dist_convert.__main__ import main
from tests.checkpoints import Grid
from tests.oracle.cases import CASES
from tests.oracle.conftest import FSDP_CASES, IMPORTED, Ranks, einops, kept, run_scripts
from tests.oracle.families.cases import FULL_CASES
from tests.oracle.families.huggingface import save, tensors

VERSIONS = ("0.13.1", "0.14.0", "0.15.3", "0.17.1", "0.18.2", "0.19.2")
KNOWN = {case.name: case for case in CASES}
KEEP = ("--target-params-dtype", "keep")
LLAMA, TIED, MIXTRAL = "llama-tp2-pp2-vpp2", "llama-tied-tp2-pp2", "mixtral-tp2-ep2"

#: What is written, and at which other grids it is loaded: tensor, pipeline, virtual, expert, expert tensor parallel.
LOADED = {
    LLAMA: {"as-saved": (2, 2, 2, 1, 2), "tp1": (1, 1, 1, 1, 1), "tp2-pp2": (2, 2, 1, 1, 2), "pp4": (1, 4, 1, 1, 1)},
    TIED: {"as-saved": (2, 2, 1, 1, 2), "pp2-vpp2": (1, 2, 2, 1, 1)},
    MIXTRAL: {"as-saved": (2, 1, 1, 2, 2), "ep4-pp2": (1, 2, 1, 4, 1), "etp1": (2, 1, 1, 2, 1)},
}


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def ranks(version: str) -> Ranks:
    """See `conftest.ranks`, with this version."""

    def install(directory: Path) -> None:
        flags = ["--quiet", "--no-deps", "--ignore-requires-python", "--target", str(directory)]
        subprocess.run([sys.executable, "-m", "pip", "install", *flags, f"megatron-core=={version}"], check=True)

    core = kept(f"megatron-core-{version}", "", install)
    return partial(run_scripts, (f"{core}/", einops(), "tests.oracle.without_compilers", *IMPORTED))


@pytest.fixture(scope="module")
def saved(version: str, ranks: Ranks) -> Path:
    """What this version saves, as in `conftest.oracle`."""
    return kept(f"saved-{version}", "", lambda directory: ranks("megatron_writer", 8, directory, *LOADED))


def _logits(hf: Path, input_ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(input_ids).logits


def _names() -> Iterator[tuple[str, str]]:
    yield from ((case, grid) for case, grids in LOADED.items() for grid in grids)


@pytest.fixture(scope="module")
def loaded(saved: Path, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with CASE-hf and CASE-dist, which are ours, and CASE-GRID/output.pt by this version."""
    directory = tmp_path_factory.mktemp("loaded")
    for case in LOADED:
        source, hf, dist = str(saved / case / "distributed"), str(directory / f"{case}-hf"), directory / f"{case}-dist"
        assert main(["convert", source, hf, "--to", "huggingface", *KEEP]) == 0
        assert main(["convert", hf, str(dist), "--to", "torch_dist", *KEEP, *_flags(case)]) == 0
    for case, grid in _names():
        name = directory / f"{case}-{grid}"
        name.mkdir()
        (name / "megatron").symlink_to(directory / f"{case}-dist")
        (name / "args.json").write_text(json.dumps(_grid_args(*LOADED[case][grid])))
        torch.save({**torch.load(saved / case / "oracle.pt"), "new_tokens": 0}, name / "input.pt")
    ranks("megatron_reader", 8, directory, *(f"{case}-{grid}" for case, grid in _names()))
    return directory


def _flags(case: str) -> list[str]:
    tensor, pipeline, virtual, expert, _ = LOADED[case]["as-saved"]
    sizes = {"tensor": tensor, "pipeline": pipeline, "virtual-pipeline": virtual, "expert": expert}
    flags = [word for axis, size in sizes.items() for word in (f"--target-{axis}-parallel-size", str(size))]
    padding = ["--make-vocab-size-divisible-by", str(KNOWN[case].make_vocab_size_divisible_by)]
    return [*flags, *padding, "--saver-transformer-impl", "local"]


def _grid_args(tensor: int, pipeline: int, virtual: int, expert: int, expert_tensor: int) -> dict[str, int | None]:
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        "expert_model_parallel_size": expert,
        "expert_tensor_parallel_size": expert_tensor,
    }


@pytest.mark.parametrize("case", LOADED)
def test_what_it_saves_gives_its_logits_in_transformers(case: str, saved: Path, loaded: Path) -> None:
    expected = torch.load(saved / case / "oracle.pt")
    logits = _logits(loaded / f"{case}-hf", expected["input_ids"])
    torch.testing.assert_close(logits, expected["logits"][..., : KNOWN[case].vocab], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("case", "grid"), [*_names()])
def test_it_loads_what_we_write_strictly_at_any_grid_and_gives_the_same_logits(
    case: str, grid: str, saved: Path, loaded: Path
) -> None:
    found = torch.load(loaded / f"{case}-{grid}" / "output.pt")
    assert found["problems"] == []
    expected = torch.load(saved / case / "oracle.pt")["logits"]
    vocab = KNOWN[case].vocab
    torch.testing.assert_close(found["logits"][..., :vocab], expected[..., :vocab], rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", ["torch", "torch_dist"])
@pytest.mark.parametrize("model", ["glm45-mtp", "glm45-two-mtp"])
def test_layers_of_prediction_go_both_ways_by_the_name_that_it_gives_them(
    model: str, format: str, version: str, ranks: Ranks, tmp_path: Path
) -> None:
    if version < "0.17":
        pytest.skip("this version has the name that the installed one has")
    case = next(
        one
        for one in FULL_CASES
        if (one.model.name, one.format, one.spelling, one.grid) == (model, format, "local", Grid(tp=2, pp=2))
    )
    hf, made = tmp_path / "hf" / case.model.name, tmp_path / case.name
    save(case.model, hf)
    ranks("tests.oracle.families.program", 4, "make", tmp_path, case.name)
    assert main(["convert", str(made), str(tmp_path / "back"), "--to", "huggingface", *KEEP]) == 0
    expected, found = tensors(hf), tensors(tmp_path / "back")
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    flags = [*case.flags, *KEEP, *(("--mtp-layer-name", "mtp_model_layer") if format == "torch" else ())]
    assert main(["convert", str(hf), str(made / "megatron"), "--to", format, *flags]) == 0
    ranks("tests.oracle.families.program", 4, "check", tmp_path, case.name)
    output, logits = torch.load(made / "output.pt"), torch.load(hf / "logits.pt")
    assert output["problems"] == []
    torch.testing.assert_close(output["logits"], logits["logits"], rtol=0, atol=1e-5)
    for ahead in range(case.model.mtp_layers):  # what comes after the last tokens is not known
        found_ahead, expected_ahead = (one["mtp_logits"][ahead, :, : -1 - ahead] for one in (output, logits))
        torch.testing.assert_close(found_ahead, expected_ahead, rtol=0, atol=1e-5)


#: What args do not tell training, which its user says again.
TRAINING_FLAGS = {TIED: (), MIXTRAL: ("--moe-token-dispatcher-type", "allgather", "--moe-aux-loss-coeff", "0.01")}


@pytest.mark.parametrize("case", TRAINING_FLAGS)
def test_the_training_that_it_brings_loads_what_we_write_and_what_it_saves_converts_to_the_same_files(
    case: str, version: str, loaded: Path, ranks: Ranks, tmp_path: Path
) -> None:
    if version < "0.17":
        pytest.skip("the package of this version has no megatron/training")
    ranks("megatron_training", 4, loaded / f"{case}-dist", tmp_path / "saved", *TRAINING_FLAGS[case])
    assert main(["convert", str(tmp_path / "saved"), str(tmp_path / "hf"), "--to", "huggingface", *KEEP]) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (loaded / f"{case}-hf" / name).read_bytes()


#: But for the one of more tokens than the tokenizer of the training here has.
OF_256_TOKENS = [case for case in FSDP_CASES if KNOWN[case.partition(":")[2]].vocab == 256]


@pytest.mark.parametrize("case", OF_256_TOKENS)
def test_what_the_training_that_it_brings_saves_with_fsdp_becomes_the_same_files(
    case: str, version: str, fsdp: Path, ranks: Ranks, tmp_path: Path
) -> None:
    if version < "0.17":
        pytest.skip("the package of this version has no megatron/training")
    format, _, name = case.partition(":")
    source, flags = fsdp / format / name / "torch", ("--to", "torch_dist", "--saver-transformer-impl", "local")
    assert main(["convert", str(source), str(tmp_path / "dist"), *flags]) == 0
    more = TRAINING_FLAGS[MIXTRAL] if KNOWN[name].experts else ()
    ranks("tests.oracle.fsdp.training", 4, format, name, tmp_path / "dist", tmp_path / "saved", *more)
    for path, target in ((tmp_path / "saved", "hf"), (source, "twin")):
        how = ("--to", "huggingface", "--target-params-dtype", "fp32")
        assert main(["convert", str(path), str(tmp_path / target), *how]) == 0
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf" / file).read_bytes() == (tmp_path / "twin" / file).read_bytes()
