"""Environments and paths that cannot work, or nearly: one error that is true, or the result where the work was done."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.attacks.unfinished import MODEL
from tests.checkpoints import Grid, make
from tests.distributed.launching import REPOSITORY
from tests.distributed_checkpoints import make_distributed
from tests.to_megatron import make_hf
from tests.warm import Process, Run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    make(root / "in", MODEL, Grid(tp=2))
    make_hf(root / "hf", MODEL)
    return root


def run(words: list[str], directory: Path, **environment: str) -> Run:
    """`dist_convert` with some words."""
    return Process(["-m", "dist_convert", *words], os.environ | environment, directory).finish()


def assert_one_error(found: Run, what: str, exit_code: int) -> None:
    assert "Traceback" not in found.stderr
    assert found.stderr.count("\n  remedy:") == 1, found.stderr
    assert what in found.stderr
    assert found.returncode == exit_code


@pytest.mark.parametrize(
    ("environment", "what"),
    [
        ({"RANK": "abc"}, "RANK is not a number of ranks\n  found:    'abc'\n"),
        ({"RANK": ""}, "RANK is not a number of ranks\n"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is not a number of ranks\n"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is not a number of ranks\n"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is not a number of ranks\n"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is not a number of ranks\n"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is not below WORLD_SIZE\n"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "abc"}, "MASTER_PORT is not a port\n"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "99999"}, "MASTER_PORT is not a port\n"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": ".x", "MASTER_PORT": "1"}, "MASTER_ADDR is not the name of "),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a\x1b[2Jb", "MASTER_PORT": "1"},
            "MASTER_ADDR has unreadable characters\n  found:    'a\\x1b[2Jb'\n",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "1", "GLOO_SOCKET_IFNAME": "a\nb"},
            "GLOO_SOCKET_IFNAME has unreadable characters\n",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "the address where the ranks meet is not set\n  found:    no MASTER_ADDR and no ",
        ),
    ],
)  # fmt: skip
def test_what_no_launcher_says_is_named(environment: dict[str, str], what: str, place: Path, tmp_path: Path) -> None:
    environment = {"MASTER_ADDR": "", "MASTER_PORT": ""} | environment
    found = run(["convert", str(place / "in"), "out", "--to", "huggingface"], tmp_path, **environment)
    assert_one_error(found, what, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("target", "what"), [("/", "1 to 246 bytes"), ("n" * 247, "found:    247 bytes")])
def test_a_target_that_can_have_no_name_is_refused(target: str, what: str, place: Path, tmp_path: Path) -> None:
    assert_one_error(run(["convert", str(place / "in"), target, "--to", "huggingface"], tmp_path), what, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_target_of_the_longest_name_is_made(place: Path, tmp_path: Path) -> None:
    assert run(["convert", str(place / "in"), "n" * 246, "--to", "huggingface"], tmp_path).returncode == 0
    assert (tmp_path / ("n" * 246) / "conversion.json").exists()


def test_no_path_is_no_target(place: Path, tmp_path: Path) -> None:
    assert_one_error(run(["convert", str(place / "in"), "", "--to", "huggingface"], tmp_path), "a path is empty", 2)
    assert list(tmp_path.iterdir()) == []


def test_an_iteration_that_no_reader_takes_is_refused(place: Path, tmp_path: Path) -> None:
    words = ["convert", str(place / "hf"), "out", "--to", "torch", "--iteration"]
    assert_one_error(run([*words, "1" * 19], tmp_path), "at most 18 digits", 2)
    assert list(tmp_path.iterdir()) == []
    assert run([*words, "1" * 18], tmp_path).returncode == 0
    assert run(["convert", "out", "again", "--to", "huggingface"], tmp_path).returncode == 0


@pytest.mark.parametrize("number", [True, -5, 10**18])
@pytest.mark.parametrize("kind", ["torch", "torch_dist"])
def test_an_iteration_of_a_source_that_no_reader_takes_is_refused(kind: str, number: int, tmp_path: Path) -> None:
    if kind == "torch":
        make(tmp_path / "in", MODEL)
        file = tmp_path / "in/iter_0000004/mp_rank_00/model_optim_rng.pt"
    else:
        make_distributed(tmp_path / "in", MODEL)
        file = tmp_path / "in/iter_0000004/common.pt"
    torch.save(torch.load(file, weights_only=False) | {"iteration": number}, file)
    words = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "torch"]
    assert_one_error(run(words, tmp_path), "found:    " + str(number), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert run([*words, "--iteration", "5"], tmp_path).returncode == 0


def test_a_hub_s_address_that_is_none_is_named(tmp_path: Path) -> None:
    endpoint = {"HF_ENDPOINT": "http://[bad", "HF_HUB_OFFLINE": "0"}
    found = run(["convert", "org/name", "out", "--to", "torch"], tmp_path, **endpoint)
    assert_one_error(found, "HF_ENDPOINT is not the address of a hub\n  found:    Invalid IPv6 URL\n", 2)


def test_where_no_file_may_have_a_byte_the_limit_is_named(place: Path, tmp_path: Path) -> None:
    words = ["convert", str(place / "in"), str(tmp_path / "out"), "--to", "huggingface"]
    code = (
        "import os, resource, sys; from dist_convert.__main__ import main; r, w = os.pipe(); os.dup2(w, 2);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY)); code = main({words!r});"
        "sys.exit(0 if code == 1 and b'(ulimit -f)' in os.read(r, 1 << 16) else 5)"
    )
    assert Process(["-c", code], os.environ, tmp_path).finish().returncode == 0
    assert not (tmp_path / "out").exists()
    assert run(words, tmp_path).returncode == 0


def in_ascii(words: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """`dist_convert` where standard output takes ASCII alone."""
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-m", "dist_convert", *words]
    return subprocess.run(words, cwd=directory, capture_output=True, encoding="ascii", check=False, env=env)


def test_a_name_that_standard_output_cannot_show_is_escaped(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "hf", tmp_path / "\u00e9\u4e2d")
    found = in_ascii(["inspect", "\u00e9\u4e2d"], tmp_path)
    assert found.returncode == 0, found.stderr
    assert "\\xe9\\u4e2d" in found.stdout


def test_a_job_file_is_printed_in_ascii_and_is_the_same_job(place: Path, tmp_path: Path) -> None:
    printed = in_ascii(["convert", str(place / "hf"), "\u00e9\u4e2d", "--to", "torch", "--print-config"], tmp_path)
    (tmp_path / "job.yaml").write_text(printed.stdout, encoding="ascii")
    assert run(["convert", "--config", "job.yaml"], tmp_path).returncode == 0
    assert (tmp_path / "\u00e9\u4e2d" / "iter_0000001").is_dir()


def test_a_current_directory_that_is_gone_is_told(place: Path, tmp_path: Path) -> None:
    words = ["convert", str(place / "in"), str(tmp_path / "out"), "--to", "huggingface"]
    code = (
        "import os, sys; from dist_convert.__main__ import main;"
        "os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone');"
        f"sys.exit(main({words!r}))"
    )
    found = Process(["-c", code], os.environ, tmp_path).finish()
    assert_one_error(found, "the current directory is gone", 1)
    assert not (tmp_path / "out").exists()


def test_a_process_may_have_a_name_of_any_bytes(place: Path, tmp_path: Path) -> None:
    words = ["convert", str(place / "in"), str(tmp_path / "out"), "--to", "huggingface"]
    code = (
        r"import sys; from dist_convert.__main__ import main; open('/proc/self/comm', 'wb').write(b'tra\xe4\xb8\n');"
        f"sys.exit(main({words!r}))"
    )
    assert Process(["-c", code], os.environ, tmp_path).finish().returncode == 0


def test_without_proc_nothing_of_a_replaced_target_is_left(place: Path, tmp_path: Path) -> None:
    words = ["convert", str(place / "in"), str(tmp_path / "out"), "--to", "huggingface"]
    assert run(words, tmp_path).returncode == 0
    command = [sys.executable, "-m", "dist_convert", *words, "--overwrite", "--target-params-dtype", "fp32"]
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    if os.geteuid() != 0 or subprocess.run([*hide, "true"], capture_output=True, check=False).returncode:
        pytest.skip("hiding /proc needs root")
    done = subprocess.run([*hide, *command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out" / ".journal").exists()
    assert sorted(os.listdir(tmp_path)) == ["out"]


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)], ids=str)
def test_a_conversion_with_closed_streams_does_its_work(closed: tuple[int, ...], place: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "dist_convert", "inspect", str(place / "in")]
    if closed == (0, 1, 2):
        job = ["convert", str(place / "in"), str(tmp_path / "out"), "--to", "huggingface", "--ranks", "2"]
        words = [*words[:3], *job]

    def close() -> None:
        for descriptor in closed:
            os.close(descriptor)

    done = subprocess.run(words, cwd=REPOSITORY, preexec_fn=close, capture_output=True, check=False)
    assert done.returncode == 0
    assert (tmp_path / "out" / "conversion.json").exists() == (closed == (0, 1, 2))
    assert not (tmp_path / "out.partial").exists()


def test_where_torch_has_no_room_the_limit_is_named(place: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "dist_convert", "convert", str(place / "in"), "out", "--to", "huggingface"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (400_000_000, resource.RLIM_INFINITY))

    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(words, cwd=tmp_path, preexec_fn=limit, capture_output=True, text=True, check=False, env=env)
    assert_one_error(Run(done.returncode, done.stdout, done.stderr), "(ulimit -v unlimited)", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("more", "what"), [(4 << 20, "cannot start another thread\n"), (13 << 20, "out of memory\n")])
def test_where_memory_or_threads_end_the_limit_is_named(more: int, what: str, place: Path, tmp_path: Path) -> None:
    code = (
        "import resource, sys, dist_convert.move.convert, dist_convert.compare.verify;"
        "from dist_convert.__main__ import main;"
        "used = next(int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('VmData:')) << 10;"
        f"resource.setrlimit(resource.RLIMIT_DATA, (used + {more}, resource.RLIM_INFINITY));"
        f"sys.exit(main({['convert', str(place / 'in'), 'out', '--to', 'huggingface']!r}))"
    )
    found = Process(["-c", code], os.environ, tmp_path).finish()
    assert_one_error(found, what, 1)
    assert "  found:    ulimit -d " in found.stderr
    assert not (tmp_path / "out").exists()


def test_the_current_directory_is_a_target_where_it_is_empty(place: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    found = run(["convert", str(place / "in"), ".", "--to", "huggingface"], tmp_path / "here")
    assert found.returncode == 0, found.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here"]
    assert (tmp_path / "here" / "conversion.json").is_file()


def test_a_directory_in_the_place_of_a_small_file_is_named_before_a_byte_is_written(
    place: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "target_megatron_args.json").mkdir(parents=True)
    found = run(["convert", str(place / "hf"), "out", "--to", "torch"], tmp_path)
    assert_one_error(found, "a file of the target exists already and was not made by a conversion", 1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["target_megatron_args.json"]


@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=str)
def test_a_pipe_in_the_place_of_a_manifest_is_no_conversion_and_nobody_waits_for_it(
    flags: list[str], place: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "conversion.json")
    found = run(["convert", str(place / "in"), "out", "--to", "huggingface", *flags], tmp_path)
    assert_one_error(found, "choose another target", 1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["conversion.json"]


def test_a_target_that_is_a_link_to_itself_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "out")
    found = run(["convert", str(place / "in"), "out", "--to", "huggingface"], tmp_path)
    assert_one_error(found, "the target is a file or a link", 1)


@pytest.mark.parametrize("key", ["target", "like", "tokenizer", "trace"])
def test_a_path_of_a_job_file_that_no_system_can_have_is_refused(key: str, place: Path, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(f'{key}: "t\\0x"\n')
    words = ["convert", str(place / "in"), "out", "--to", "huggingface", "--config", "job.yaml"]
    found = run(words if key != "target" else [*words[:2], *words[3:]], tmp_path)
    assert_one_error(found, "characters that no path can have", 2)
    assert "(expected )" not in found.stderr


def test_an_empty_name_of_an_iteration_is_told_as_one(place: Path, tmp_path: Path) -> None:
    words = ["convert", str(place / "in"), "out", "--to", "huggingface", "--ckpt-dir-name", ""]
    assert_one_error(run(words, tmp_path), "a name is empty: is a variable unset?", 2)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["inspect", "a/" * 2500], "5,000 bytes, and 1 between slashes"),
        (["verify", "{place}/in", "a/" * 2500], "5,000 bytes, and 1 between slashes"),
        (["convert", "é" * 128, "out", "--to", "huggingface"], "256 bytes, and 256 between slashes"),
        (["convert", "{place}/in", "out", "--to", "huggingface", "--like", "b" * 256], "and 256 between slashes"),
        (["convert", "{place}/in", "out", "--to", "huggingface", "--ckpt-dir-name", "b" * 256], "256 between slashes"),
        (["convert", "{place}/in", "b" * 256 + "/out", "--to", "huggingface"], "256 between slashes"),
        (["convert", "{place}/hf", "a/" * 1900, "--to", "torch"], "in a path of at most 3,584"),
        (["convert", "{place}/in", "a/" * 1900, "--to", "huggingface"], "in a path of at most 3,584"),
    ],
)  # fmt: skip
def test_a_path_that_is_too_long_is_told_with_what_helps(
    words: list[str], what: str, place: Path, tmp_path: Path
) -> None:
    found = run([word.replace("{place}", str(place)) for word in words], tmp_path)
    assert_one_error(found, what, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_target_below_more_directories_than_python_has_frames_is_made(place: Path, tmp_path: Path) -> None:
    directory = tmp_path / ("a/" * 1500)
    try:
        assert run(["convert", str(place / "in"), str(directory), "--to", "huggingface"], tmp_path).returncode == 0
        assert (directory / "conversion.json").exists()
    finally:
        subprocess.run(["rm", "-r", tmp_path / "a"], check=True)  # which pytest cannot


def test_a_conversion_whose_log_s_disk_is_full_does_its_work(place: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "dist_convert", "convert", str(place / "in"), "out", "--to", "huggingface"]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(words, cwd=tmp_path, stderr=full, check=False, env=env)
    assert done.returncode == 0
    assert (tmp_path / "out" / "conversion.json").exists()
