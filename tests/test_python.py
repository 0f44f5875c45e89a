"""`import dist_convert`: the commands as functions, which leave the program that calls them as it is."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, LlamaConfig

import dist_convert
from dist_convert.errors import Cancelled, MissingShard, TargetExists, UsageError
from tests.checkpoints import Grid, Model, make
from tests.converting import assert_same, read_tensors
from tests.distributed.launching import environment, run_ranks
from tests.meta_checkpoints import make_meta
from tests.to_megatron import make_hf, read_shards
from tests.tokenizer.test_huggingface_directory import make_tokenizer
from tests.warm import Process

ROOT = Path(__file__).parents[1]
LLAMA = Model(heads=4, groups=4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A Megatron checkpoint, and its tensors under their published names."""
    root = tmp_path_factory.mktemp("llama")
    return root / "megatron", make(root / "megatron", LLAMA, Grid(tp=2, pp=2), make_vocab_size_divisible_by=4)


Made = tuple[Path, dict[str, torch.Tensor]]


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, dist_convert; print([n for n in ('torch', 'numpy', 'transformers', 'yaml') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_conversion_says_what_it_did_and_prints_nothing(
    llama: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    progress: list[tuple[int, int]] = []
    report = dist_convert.convert(
        str(llama[0]),
        tmp_path / "hf",
        to="huggingface",
        target_params_dtype="keep",
        max_shard_size="1MB",
        verify="full",
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert_same(read_tensors(tmp_path / "hf"), llama[1])
    assert (report.source_format, report.target_format, report.was_complete) == ("torch", "huggingface", False)
    assert report.target == tmp_path / "hf"
    assert report.written_bytes == sum(tensor.nbytes for tensor in llama[1].values())
    assert (report.written_bytes, report.written_bytes) in progress
    assert any("vocabulary: 29 tokens" in note for note in report.notes)
    assert capfd.readouterr() == ("", "")


def test_ranks_are_processes_of_their_own_and_give_the_same_bytes(
    llama: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = dist_convert.convert(llama[0], tmp_path / "one", to="torch", target_tensor_parallel_size=1)
    two = dist_convert.convert(llama[0], tmp_path / "two", to="torch", target_tensor_parallel_size=1, ranks=2)
    files = [sorted(path.read_bytes() for path in (tmp_path / name).glob("*/mp_rank_*/*")) for name in ("one", "two")]
    assert files[0] == files[1]
    assert len(two.profiles) == 2
    assert (one.written_bytes, one.left_behind, one.notes) == (two.written_bytes, two.left_behind, two.notes)
    assert capfd.readouterr() == ("", "")


def test_ranks_import_nothing_from_the_current_directory(
    llama: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("yaml", "torch", "runpy", "contextlib"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    dist_convert.convert(llama[0], "hf", to="huggingface", ranks=2)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("ranks", [None, 2])
def test_an_error_is_the_exception_that_it_is_on_the_command_line(
    ranks: int | None, llama: Made, tmp_path: Path
) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").write_text("x")
    with pytest.raises(TargetExists, match="not empty") as raised:
        dist_convert.convert(llama[0], tmp_path / "hf", to="huggingface", ranks=ranks)
    assert raised.value.file == str(tmp_path / "hf")
    assert "choose another target" in raised.value.remedy


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_params_dtype": "int8"}, "target_params_dtype"),
        ({"target_tensor_parallel_size": 0}, "target_tensor_parallel_size"),
        ({"iteration": -1}, "iteration"),
        ({"overwrite": "yes"}, "overwrite"),
        ({"max_shard_size": "5XB"}, "max_shard_size_bytes has a wrong value"),
        ({"private": True}, "nothing is uploaded"),
        ({"ranks": 0}, "ranks has a wrong value"),
        ({"ranks": -1}, "ranks has a wrong value"),
        ({"ranks": "2"}, "ranks has a wrong value"),
        ({"ranks": True}, "ranks has a wrong value"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_read(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        dist_convert.convert("/nowhere", tmp_path / "out", to="torch", **options)


def test_an_option_that_does_not_exist_is_a_type_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="target_tensor_paralel_size"):
        dist_convert.convert("/nowhere", tmp_path / "out", to="torch", target_tensor_paralel_size=2)
    with pytest.raises(UsageError, match="no such format"):
        dist_convert.convert("/nowhere", tmp_path / "out", to="pytorch")


@pytest.mark.parametrize("name", ["{rank}", "{local_rank}", "{node}"])
def test_a_path_that_ranks_would_see_otherwise_is_refused(llama: Made, name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="numbers in braces") as raised:
        dist_convert.convert(llama[0], tmp_path / name, "huggingface", ranks=2)
    assert (raised.value.file, raised.value.found) == (f"{tmp_path}/{name}", f"{tmp_path}/0")
    dist_convert.convert(llama[0], tmp_path / name, "huggingface")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["tp", "tensor_model_parallel_size", "target_tensor_parallel_size"])
def test_an_option_has_the_names_of_its_flag(name: str, llama: Made, tmp_path: Path) -> None:
    report = dist_convert.convert(llama[0], tmp_path / "out", to="torch", dry_run=True, **{name: 1})
    assert "TP1 PP2" in report.plan
    with pytest.raises(TypeError, match="and another name of the same option"):
        dist_convert.convert(llama[0], tmp_path / "out", to="torch", pp=1, **{name: 1}, pipeline_model_parallel_size=2)


def test_what_is_cancelled_goes_on_with_the_same_call(llama: Made, tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        dist_convert.convert(llama[0], tmp_path / "hf", to="huggingface", cancel=lambda: True)
    assert (tmp_path / "hf.partial").is_dir()
    assert not (tmp_path / "hf").exists()
    dist_convert.convert(llama[0], tmp_path / "hf", to="huggingface")
    assert dist_convert.convert(llama[0], tmp_path / "hf", to="huggingface").was_complete
    assert dist_convert.verify(llama[0], tmp_path / "hf").is_same


@pytest.mark.parametrize("sample", ["1/0", float("inf"), float("nan"), 0, "x"])
def test_what_is_no_share_of_a_comparison_is_refused(sample: Any, llama: Made) -> None:
    with pytest.raises(UsageError, match="sample has a wrong value"):
        dist_convert.verify(llama[0], llama[0], sample=sample)


#: In place of the command with its ranks: works on for half a second after it was told to end, and says much.
STUBBORN = """
import json, os, signal, sys, time

def end(*_):
    os.write(2, b"x" * 200_000)  # sys.stderr may be about to write the line below, and is not to be entered twice
    time.sleep(0.5)
    open(os.environ["SAYS_THAT_IT_ENDED"], "w").close()
    sys.exit(143)

signal.signal(signal.SIGTERM, end)
os.write(2, json.dumps({"event": "progress", "done_bytes": 1, "total_bytes": 2}).encode() + b"\\n")
time.sleep(20)
"""


@pytest.mark.parametrize("raised", [KeyboardInterrupt, ZeroDivisionError])
def test_no_rank_works_any_more_when_what_a_callback_raises_arrives(
    raised: type[BaseException], llama: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(done_bytes: int, total_bytes: int) -> None:
        raise raised

    monkeypatch.setattr("dist_convert.cli.child._PROGRAM", STUBBORN)
    monkeypatch.setenv("SAYS_THAT_IT_ENDED", str(tmp_path / "ended"))
    with pytest.raises(raised):
        dist_convert.convert(llama[0], tmp_path / "hf", to="huggingface", ranks=2, on_progress=fail)
    assert (tmp_path / "ended").exists()


def test_what_cancel_raises_ends_the_ranks_and_arrives(
    llama: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> bool:
        raise ZeroDivisionError("of the program")

    with pytest.raises(ZeroDivisionError, match="of the program"):
        dist_convert.convert(llama[0], tmp_path / "hf", to="huggingface", ranks=2, cancel=fail)
    assert capfd.readouterr() == ("", "")


def test_the_programs_handlers_threads_and_settings_stay(llama: Made, tmp_path: Path) -> None:
    def handler(*_: object) -> None: ...

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        threads, torch_threads = set(threading.enumerate()), torch.get_num_threads()
        dist_convert.convert(llama[0], tmp_path / "hf", to="huggingface")
        assert {signal.getsignal(number) for number in before} == {handler}
        assert set(threading.enumerate()) == threads
        assert torch.get_num_threads() == torch_threads
    finally:
        for number, old in before.items():
            signal.signal(number, old)


IMPATIENT = """
import os, signal, sys, threading, time
import dist_convert

write, writing = os.pwrite, []

def slow(*arguments):
    if threading.current_thread().name.startswith("mover"):
        writing.append(None)
        time.sleep(0.1)
        writing.pop()
    return write(*arguments)

def press():
    while not writing:
        time.sleep(0.01)
    for _ in range(4):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)

os.pwrite = slow
threading.Thread(target=press).start()
try:
    dist_convert.convert(sys.argv[1], sys.argv[2], to="huggingface")
except KeyboardInterrupt:
    print("threads that write after Ctrl-C:", len(writing))
os.pwrite = write
print("done:", dist_convert.convert(sys.argv[1], sys.argv[2], to="huggingface").files)
"""


def test_no_thread_writes_any_more_however_often_ctrl_c_is_pressed(llama: Made, tmp_path: Path) -> None:
    found = Process(["-c", IMPATIENT, str(llama[0]), str(tmp_path / "hf")], os.environ).finish()
    assert found.stdout == "threads that write after Ctrl-C: 0\ndone: 1\n", found.stderr


def test_a_dry_run_answers_with_its_plan(llama: Made, tmp_path: Path) -> None:
    report = dist_convert.convert(llama[0], tmp_path / "hf", to="huggingface", dry_run=True)
    assert "dry run: the conversion would start; nothing was written" in report.plan
    assert not (tmp_path / "hf").exists()


GROUP = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
import dist_convert

dist.init_process_group("gloo")
rank, source, out = dist.get_rank(), sys.argv[1], Path(sys.argv[2])
members = [1, 2]
group = dist.new_group(members)
if rank in members:
    first = dist_convert.convert(source, out / "hf", "huggingface", group=group, placement="gather")
    second = dist_convert.convert(out / "hf", out / "megatron", "torch", group=group, target_tensor_parallel_size=2)
    again = dist_convert.convert(source, out / "hf", "huggingface", group=group)
    assert again.was_complete
    try:
        dist_convert.convert(source, out / "hf", "huggingface", group=group, max_shard_size=4096)
    except dist_convert.errors.TargetExists:
        pass
    refused = []

    def convert_another(done_bytes, total_bytes):
        try:
            dist_convert.convert(source, out / "other", "huggingface", group=group)
        except dist_convert.errors.UsageError as error:
            refused.append(error.what)

    dist_convert.convert(source, out / "dcp", "dcp", group=group, on_progress=convert_another)
    assert set(refused) == {"this process is already converting within a process group"}
    assert not (out / "other").exists()
total = torch.ones(1)
dist.all_reduce(total)  # the program goes on
if rank in members:
    (out / f"{rank}.json").write_text(json.dumps([total.item(), first.written_bytes, second.written_bytes]))
dist.destroy_process_group()
"""


def test_a_program_converts_within_a_process_group_of_its_own_and_goes_on(llama: Made, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(GROUP)
    env = environment(PYTHONPATH=f"{tmp_path}:{ROOT}")
    done = run_ranks(3, str(llama[0]), str(tmp_path), module="program", env=env)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (1, 2)]
    assert found[0] == found[1]
    assert found[0][0] == 3
    assert dist_convert.verify(llama[0], tmp_path / "hf").is_same
    assert dist_convert.verify(llama[0], tmp_path / "megatron").is_same
    assert sorted(read_shards(tmp_path / "megatron")) == ["mp_rank_00", "mp_rank_01"]


INTERRUPTED_GROUP = """
import json, sys
from pathlib import Path
import torch.distributed as dist
import dist_convert

source, out = Path(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo")
rank = dist.get_rank()

def press(done_bytes, total_bytes):
    raise {raised}

found = []
for on_progress in (press if rank == 1 else None, None):
    try:
        how = {{"group": dist.group.WORLD, "on_progress": on_progress}}
        found.append(dist_convert.convert(source, out / "hf", "huggingface", **how).files)
    except BaseException as error:
        found.append(type(error).__name__)
(out / f"{{rank}}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("raised", "on_others"), [("KeyboardInterrupt", "Interrupted"), ("SystemExit", "ConversionError")]
)
def test_what_ends_one_rank_of_a_group_ends_all_and_the_next_call_is_in_step(
    raised: str, on_others: str, llama: Made, tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(INTERRUPTED_GROUP.format(raised=raised))
    env = environment(PYTHONPATH=f"{tmp_path}:{ROOT}")
    done = run_ranks(2, str(llama[0]), str(tmp_path), module="program", env=env)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found == [[on_others, 1], [raised, 1]]


@pytest.mark.parametrize("reuse", [False, True])
def test_an_open_checkpoint_gives_every_tensor_as_it_is_published(llama: Made, reuse: bool) -> None:
    with dist_convert.open(str(llama[0])) as model:
        assert model.keys() == list(model.config and llama[1])
        assert_same({name: model.get_tensor(name) for name in model.keys()}, llama[1])  # noqa: SIM118
        streamed = {name: tensor.clone() for name, tensor in model.tensors(max_memory="1MB", reuse=reuse)}
    assert_same(streamed, llama[1])


def test_a_slice_is_that_of_the_whole_tensor(llama: Made) -> None:
    name, vector = "model.layers.3.mlp.down_proj.weight", "model.norm.weight"
    with dist_convert.open(llama[0]) as model:
        part, whole = model.get_slice(name), llama[1][name]
        assert part.get_shape() == list(whole.shape)
        for index in (slice(3, 7), 5, -1, slice(None, None, 3), (slice(2, 9), slice(1, 20, 4)), (0, 3), (slice(4, 4),)):
            assert torch.equal(part[index], whole[index]), index
        assert torch.equal(part[::2][1:], whole[::2][1:])
        assert torch.equal(model.get_slice(vector)[4:9], llama[1][vector][4:9])
        with pytest.raises(IndexError):
            part[1, 2, 3]
        for index in (slice(None, None, -1), (slice(None), slice(9, None, -2))):
            with pytest.raises(ValueError, match="steps of a slice"):
                part[index]
        with pytest.raises(KeyError):
            model.get_slice("no such tensor")


def test_a_dtype_is_that_of_all_tensors(llama: Made) -> None:
    with dist_convert.open(llama[0], dtype=torch.float32) as model:
        assert_same(dict(model.tensors()), {name: tensor.float() for name, tensor in llama[1].items()})
    with pytest.raises(UsageError, match="not a dtype of weights"):
        dist_convert.open(llama[0], dtype="int8")


def test_transformers_takes_what_is_read_and_its_config(llama: Made) -> None:
    with dist_convert.open(llama[0], dtype="float32") as model:
        theirs = AutoModelForCausalLM.from_config(LlamaConfig(**model.config))
        theirs.load_state_dict(dict(model.tensors()), strict=True)
    assert torch.equal(theirs.state_dict()["model.norm.weight"], llama[1]["model.norm.weight"].float())


class Rows(Dataset[torch.Tensor]):
    """The first rows of every tensor, from a checkpoint that was opened in another process."""

    def __init__(self, model: Any) -> None:
        self.model, self.names = model, model.keys()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> torch.Tensor:
        row: torch.Tensor = self.model.get_slice(self.names[number])[:1].float().sum()
        return row


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_it_works_in_the_workers_of_a_data_loader(start: str, llama: Made) -> None:
    with dist_convert.open(llama[0]) as model:
        model.get_tensor("model.norm.weight")
        loader = DataLoader(Rows(model), batch_size=None, num_workers=2, multiprocessing_context=start)
        found = torch.stack(list(loader))
    expected = torch.stack([tensor[:1].float().sum() for tensor in llama[1].values()])
    assert torch.equal(found, expected)


def test_it_stays_the_same_when_the_program_changes_its_directory(
    llama: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llama[0].parent)
    with dist_convert.open("megatron") as model:
        monkeypatch.chdir(tmp_path)
        assert torch.equal(model.get_tensor("lm_head.weight"), llama[1]["lm_head.weight"])


@pytest.mark.parametrize("of", ["the files", "the checksums"])
def test_a_fork_reads_though_another_thread_held_a_lock_when_it_came(llama: Made, of: str) -> None:
    with dist_convert.open(llama[0]) as model:
        own = model._own
        with own.lock if of == "the files" else own.checks._lock:
            process = os.fork()
            if process == 0:
                signal.alarm(60)
                try:
                    found = dict(model.tensors())["lm_head.weight"], model.get_tensor("lm_head.weight")
                    model.close()
                    os._exit(0 if all(torch.equal(one, llama[1]["lm_head.weight"]) for one in found) else 1)
                finally:
                    os._exit(2)
            assert os.waitpid(process, 0)[1] == 0


def test_it_pickles(llama: Made) -> None:
    with dist_convert.open(llama[0]) as model:
        copy = pickle.loads(pickle.dumps(model))
        assert torch.equal(copy.get_tensor("lm_head.weight"), llama[1]["lm_head.weight"])


def test_a_hugging_face_directory_opens_alike(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    with dist_convert.open(tmp_path / "hf") as model, safe_open(tmp_path / "hf" / "model.safetensors", "pt") as theirs:
        assert sorted(model.keys()) == sorted(theirs.keys()) == sorted(hf)
        for name in hf:
            assert torch.equal(model.get_tensor(name), theirs.get_tensor(name))


def test_an_open_checkpoint_has_the_options_of_a_source_alone(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf")
    for option in ("max_shard_size", "target_tensor_parallel_size", "source_margs_file", "instruct"):
        with pytest.raises(TypeError, match=f"no option '{option}'; it has ckpt_dir_name, true_vocab_size"):
            dist_convert.open(tmp_path / "hf", **{option: 1})
    with pytest.raises(UsageError, match="rope_theta has a wrong value"):
        dist_convert.open(tmp_path / "hf", rope_theta=-1)
    with pytest.raises(UsageError, match="--rope-theta: no effect in a conversion from huggingface"):
        dist_convert.open(tmp_path / "hf", rope_theta=10000.0)


def _of_hugging_face(root: Path) -> dict[str, Any]:
    make_hf(root / "in")
    return {}


def _of_meta(root: Path) -> dict[str, Any]:
    make_meta(root / "in")
    return {}


def _of_a_tokenizer(root: Path) -> dict[str, Any]:
    """Whose makers' special ids and sampling lie beside it."""
    make(root / "in", LLAMA)
    make_tokenizer(root / "tokenizer")
    (root / "tokenizer" / "config.json").write_text('{"eos_token_id": [27, 28], "pad_token_id": 3}')
    (root / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": [27, 28]}')
    return {"tokenizer": root / "tokenizer"}


def _of_carried(root: Path) -> dict[str, Any]:
    make_hf(root / "hf")
    config = json.loads((root / "hf" / "config.json").read_text())
    (root / "hf" / "config.json").write_text(json.dumps(config | {"eos_token_id": [8, 9], "attention_dropout": 0.25}))
    dist_convert.convert(root / "hf", root / "in", to="torch")
    return {}


def _like(root: Path) -> dict[str, Any]:
    options = _of_a_tokenizer(root)
    dist_convert.convert(root / "in", root / "like", to="huggingface")
    config = json.loads((root / "like" / "config.json").read_text()) | {"eos_token_id": 5, "use_cache": False}
    (root / "like" / "config.json").write_text(json.dumps(config))
    return options | {"like": root / "like"}


@pytest.mark.parametrize("kind", [_of_hugging_face, _of_meta, _of_a_tokenizer, _of_carried, _like])
def test_the_config_is_the_one_that_a_conversion_writes(kind: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    options = kind(tmp_path)
    dist_convert.convert(tmp_path / "in", tmp_path / "out", to="huggingface", **options)
    with dist_convert.open(tmp_path / "in", **options) as model:
        assert model.config == json.loads((tmp_path / "out" / "config.json").read_text())


def test_an_incomplete_checkpoint_names_the_shard_that_is_missing(tmp_path: Path) -> None:
    make(tmp_path / "megatron", LLAMA, Grid(tp=2))
    file = tmp_path / "megatron" / "iter_0000004" / "mp_rank_01" / "model_optim_rng.pt"
    file.unlink()
    with pytest.raises(MissingShard, match="mp_rank_01"):
        dist_convert.open(tmp_path / "megatron")


def test_inspect_and_verify_answer_as_the_commands_do(llama: Made, tmp_path: Path) -> None:
    assert dist_convert.inspect(str(llama[0]))["grid"]["TP"] == 2
    make(tmp_path / "other", LLAMA, seed=1)
    found = dist_convert.verify(llama[0], tmp_path / "other", sample=0.5)
    assert not found.is_same
    assert found.values[0].tensor in llama[1]
    for wrong in (float("nan"), float("inf"), 0, 2, "all"):
        with pytest.raises(UsageError, match="sample has a wrong value"):
            dist_convert.verify(llama[0], tmp_path / "other", sample=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no option 'jobs'"):
        dist_convert.verify(llama[0], tmp_path / "other", jobs=2)
