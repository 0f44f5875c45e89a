"""Uploads to a stand-in for the Hugging Face Hub on loopback, by the real huggingface_hub.

Every upload runs in a process of its own, because huggingface_hub reads its environment when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, make
from tests.converting import convert
from tests.hub_stand_in import Hub, Repository, pythons, serving
from tests.warm import REPOSITORY, Process, Run

TOKEN = "hf_of_alice"
ALICE = {"name": "alice", "type": "user", "orgs": [{"name": "org"}, {"name": "readers", "roleInOrg": "read"}]}
READ_ONLY = ALICE | {"auth": {"accessToken": {"displayName": "laptop", "role": "read"}}}
#: The checkpoint `in` as five files of weights.
CONVERT = ("megatron-to-hf", "--load-path", "in", "--save-path", "out", "--device", "cpu", "--max-shard-size", "3KB")
_CHECK = """
import sys
from pathlib import Path
from dist_convert.errors import ConversionError
from dist_convert.formats.huggingface.upload import check_upload
from dist_convert.options import Options

try:
    job = Options("huggingface", target=Path("out"), push_to_hub=sys.argv[1], private=True)
    check_upload(job, float(sys.argv[2]))
except ConversionError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@dataclass(frozen=True)
class Client:
    """Runs `dist_convert` in a directory that holds the checkpoint `in` and the converted model `model`."""

    place: Path
    hub: Hub

    def start(self, *words: str, python: str = sys.executable, token: str = TOKEN, **more: str) -> Process:
        given = {"HF_TOKEN": token} if token else {}
        env = self.hub.environment(self.place / "home", PYTHONPATH=str(REPOSITORY), **given, **more)
        return Process(words, env, self.place, python)

    def run(self, *arguments: str, **how: str) -> Run:
        return self.start("-m", "dist_convert", *arguments, **how).finish()

    def check(self, name: str, *, token: str = TOKEN, answer_seconds: float = 30, **more: str) -> str:
        """The message of a check that finds why a private upload of `out` would not start."""
        done = self.start("-c", _CHECK, name, str(answer_seconds), token=token, **more).finish()
        assert done.returncode == 1
        assert "UploadError: " in done.stderr, done.stderr
        return done.stderr

    def push(self, *arguments: str, **how: str) -> str:
        """What an upload that works prints."""
        done = self.run("push", "model", *arguments, "--keep-paths", **how)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        return done.stderr

    def refuse(self, *arguments: str, exit_code: int = 1, **how: str) -> str:
        """The message of a command that fails as it should, without a traceback."""
        done = self.run(*arguments, **how)
        assert (done.returncode, done.stdout) == (exit_code, ""), done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("converted")
    make(place / "in", Model(layers=2), Grid(tp=2))
    assert convert(place / "in", place / "model", "--max-shard-size", "3KB") == 0
    return place


@pytest.fixture
def client(converted: Path, tmp_path: Path) -> Iterator[Client]:
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    with serving(Hub(users={TOKEN: ALICE, "hf_read": READ_ONLY})) as hub:
        yield Client(tmp_path, hub)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("python", pythons())
def test_the_repository_holds_the_directory_byte_for_byte(client: Client, python: str) -> None:
    before = contents(client.place / "model")
    printed = client.push("org/name", python=python)
    assert client.hub.repositories["org/name"].files == before
    assert contents(client.place / "model") == before
    assert f"model: uploaded as {client.hub.url}/org/name/commit/" in printed


def test_of_paths_only_names_are_uploaded_unless_a_flag_keeps_them(client: Client) -> None:
    before = contents(client.place / "model")
    args = json.loads(before["source_megatron_args.json"])
    args |= {"save": "/home/alice/secret/run 7", "data_path": ["0.5", "/data/corpus_text"], "note": "see ~/plans/a.md"}
    (client.place / "model" / "source_megatron_args.json").write_text(json.dumps(args))
    config = json.loads(before["config.json"]) | {"_name_or_path": "/home/alice/models/llama"}
    (client.place / "model" / "config.json").write_text(json.dumps(config))
    assert client.run("push", "model", "org/name").returncode == 0
    files = client.hub.repositories["org/name"].files
    found = json.loads(files["source_megatron_args.json"])
    assert found == args | {"save": "run 7", "data_path": ["0.5", "corpus_text"], "note": "see a.md"}
    manifest = json.loads(files["conversion.json"])
    assert manifest["source"]["path"] == "iter_0000004"
    assert manifest["files"]["source_megatron_args.json"]["size_bytes"] == len(files["source_megatron_args.json"])
    assert str(client.place).encode() not in b"".join(files.values())
    assert json.loads(files["config.json"])["_name_or_path"] == "llama"
    others = set(before) - {"source_megatron_args.json", "conversion.json", "config.json"}
    assert {name: files[name] for name in others} == {name: before[name] for name in others}


@pytest.mark.parametrize("flags", [(), ("--keep-paths",)], ids=["names", "paths"])
def test_what_a_link_leads_to_elsewhere_is_not_uploaded(flags: tuple[str, ...], client: Client) -> None:
    (client.place / "private").write_text("secret")
    (client.place / "model" / "notes.txt").symlink_to(client.place / "private")
    printed = client.refuse("push", "model", "org/name", *flags)
    assert "notes.txt is a link to a file outside the directory" in printed
    assert client.hub.repositories == {}


def test_a_name_of_ones_own_needs_no_organisation(client: Client) -> None:
    client.push("alice/name")
    assert "config.json" in client.hub.repositories["alice/name"].files


@pytest.mark.parametrize("python", pythons())
@pytest.mark.parametrize("private", [False, True], ids=["public", "private"])
def test_the_repository_is_private_if_that_is_asked_for(client: Client, private: bool, python: str) -> None:
    client.push("org/name", *(["--private"] if private else []), python=python)
    assert client.hub.repositories["org/name"].private is private


@pytest.mark.parametrize("python", pythons())
def test_an_upload_that_broke_off_sends_only_what_is_missing(client: Client, python: str) -> None:
    weights = {sha256(path) for path in (client.place / "model").glob("*.safetensors")}
    refused = sha256(client.place / "model" / "model-00002-of-00004.safetensors")
    client.hub.faults[("PUT", f"/lfs/{refused}")] = 403
    message = client.refuse("push", "model", "org/name", python=python)
    assert "dist-convert push model org/name" in message
    assert client.hub.repositories["org/name"].files == {}
    first = set(client.hub.received())
    assert first
    assert refused not in first

    client.hub.faults.clear()
    client.hub.requests.clear()
    client.push("org/name", python=python)
    assert set(client.hub.received()) == weights - first
    assert client.hub.repositories["org/name"].files == contents(client.place / "model")


def test_weights_of_an_earlier_model_go_and_other_files_stay(client: Client) -> None:
    old = {"model.safetensors": b"old", "model-00009-of-00009.safetensors": b"old", "README.md": b"old"}
    client.hub.repositories["org/name"] = Repository(old | {"notes.txt": b"kept", "adapter_model.safetensors": b"kept"})
    client.push("org/name")
    kept = {"notes.txt": b"kept", "adapter_model.safetensors": b"kept"}
    assert client.hub.repositories["org/name"].files == contents(client.place / "model") | kept


#: What an earlier upload left of its weights and its tokenizer.
OLD_WEIGHTS = ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json")
OLD_TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json", "added_tokens.json", "vocab.json",
    "special_tokens_map.json", "chat_template.jinja", "additional_chat_templates/tools.jinja",
)  # fmt: skip


@pytest.mark.parametrize("python", pythons())
def test_nothing_of_an_earlier_tokenizer_stays_beside_a_new_one(client: Client, python: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (client.place / "model" / name).write_text('{"new": 1}')
    old = dict.fromkeys((*OLD_WEIGHTS, *OLD_TOKENIZER), b"old")
    client.hub.repositories["org/name"] = Repository(old | {"original/tokenizer.model": b"kept"})
    client.push("org/name", python=python)
    kept = {"original/tokenizer.model": b"kept"}
    assert client.hub.repositories["org/name"].files == contents(client.place / "model") | kept


def test_a_tokenizer_on_the_hub_stays_whole_where_the_model_has_none(client: Client) -> None:
    tokenizer = dict.fromkeys(OLD_TOKENIZER, b"kept")
    client.hub.repositories["org/name"] = Repository(dict.fromkeys(OLD_WEIGHTS, b"old") | tokenizer)
    client.push("org/name")
    assert client.hub.repositories["org/name"].files == contents(client.place / "model") | tokenizer


@pytest.mark.parametrize("python", pythons())
def test_hidden_files_are_not_uploaded(client: Client, python: str) -> None:
    expected = contents(client.place / "model")
    for name in (".nfs0000001", ".ipynb_checkpoints/config.json", "more/.DS_Store"):
        (client.place / "model" / name).parent.mkdir(exist_ok=True)
        (client.place / "model" / name).write_text("left by a file system or an editor")
    client.push("org/name", python=python)
    assert client.hub.repositories["org/name"].files == expected


@pytest.mark.parametrize("flags", [(), ("--instruct", "--source-model-type", "llama3")])
def test_the_last_line_says_how_to_add_the_tokenizer_that_the_upload_lacks(
    client: Client, flags: tuple[str, ...]
) -> None:
    done = client.run(*CONVERT, *flags, "--push-to-hub", "org/name")
    assert done.returncode == 0, done.stderr
    *before, last = done.stderr.splitlines()
    add = " ".join(["dist-convert tokenizer PATH", f"{client.place}/out", *flags])
    push = f"dist-convert push {client.place}/out org/name"
    assert last.endswith(f"with: {add}; then upload it with: {push}")
    assert not any("dist-convert tokenizer" in line for line in before)
    assert before[0] == f"asking {client.hub.url} whether the model can go to org/name"
    assert "warning: the model is uploaded without a tokenizer" in before


def test_a_directory_without_a_tokenizer_is_uploaded_with_a_warning(client: Client) -> None:
    printed = client.push("org/name").splitlines()
    assert "warning: model has no tokenizer and is uploaded without one" in printed
    assert printed[-1].endswith("with: dist-convert push model org/name --keep-paths")


def test_a_directory_with_a_tokenizer_is_uploaded_without_a_warning(client: Client) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (client.place / "model" / name).write_text("{}")
    printed = client.push("org/name")
    assert "no tokenizer" not in printed
    assert printed.splitlines()[-1].startswith("model: uploaded as ")


@pytest.mark.parametrize(
    "arguments", [("push", "model", "org/name"), (*CONVERT, "--push-to-hub", "org/name")], ids=["command", "flag"]
)
def test_ctrl_c_ends_an_upload_without_a_traceback(client: Client, arguments: tuple[str, ...]) -> None:
    client.hub.delays_seconds["create"] = 20
    with client.start("-m", "dist_convert", *arguments) as process:
        while "uploading" not in process.printed[1]:
            assert process.poll() is None, process.printed
            time.sleep(0.02)
        time.sleep(1)  # until the hub is waited for
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        printed = process.finish().stderr
    assert time.monotonic() - started < 10
    assert process.returncode == 130
    assert "Traceback" not in printed
    assert printed.endswith("stopped by SIGINT\n")
    assert "if it is interrupted, continue with: dist-convert push" in printed


def test_a_conversion_with_the_flag_uploads_what_it_has_made(client: Client) -> None:
    done = client.run(*CONVERT, "--push-to-hub", "org/name", "--private", "--keep-paths")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    repository = client.hub.repositories["org/name"]
    assert repository.private
    assert repository.files == contents(client.place / "out")
    assert f"the finished directory goes to {client.hub.url}/org/name, a new private repository" in done.stderr


def test_the_flag_uploads_what_is_complete_already(client: Client) -> None:
    assert client.run(*CONVERT).returncode == 0
    before = contents(client.place / "out")
    done = client.run(*CONVERT, "--push-to-hub", "org/name", "--keep-paths")
    assert done.returncode == 0, done.stderr
    assert "is complete already: an earlier run of this conversion has finished\n" in done.stderr
    assert client.hub.repositories["org/name"].files == contents(client.place / "out") == before


def test_a_job_file_may_ask_for_the_upload(client: Client) -> None:
    (client.place / "job.yaml").write_text("push-to-hub: org/name\nprivate: true\n")
    done = client.run(*CONVERT, "--config", "job.yaml")
    assert done.returncode == 0, done.stderr
    assert client.hub.repositories["org/name"].private


def test_a_dry_run_says_where_the_upload_would_go_and_leaves_no_trace(client: Client) -> None:
    done = client.run(*CONVERT, "--push-to-hub", "org/name", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"the finished directory goes to {client.hub.url}/org/name, a new repository" in done.stderr
    assert client.hub.repositories == {}
    assert {method for method, _, _ in client.hub.requests} == {"GET"}


#: What can be known before: name, token, environment, and what the message says.
EARLY = {
    "offline": ("org/name", TOKEN, {"HF_HUB_OFFLINE": "1"}, ("HF_HUB_OFFLINE forbids uploads", "unset it")),
    "no token": ("org/name", "", {}, ("no token for the hub", "set HF_TOKEN to a token of {url}/settings/tokens")),
    "wrong token": ("org/name", "hf_wrong", {}, ("does not accept the token", "set HF_TOKEN to a valid token")),
    "token that only reads": ("org/name", "hf_read", {}, ("can read but not write", "'laptop' of alice")),
    "not a member": ("other/name", TOKEN, {}, ("no permission to write to other", "one of alice, org\n")),
    "a member who only reads": ("readers/name", TOKEN, {}, ("no permission to write to readers", "another repository")),
    "public": ("org/public", TOKEN, {}, ("exists and is public", "make it private in its settings")),
    "unreachable": (
        "org/name",
        TOKEN,
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        ("the hub cannot be reached", "check the connection to http://127.0.0.1:9"),
    ),
}


@pytest.mark.parametrize("case", EARLY)
def test_what_would_keep_an_upload_from_starting_is_named_with_what_to_do(case: str, client: Client) -> None:
    name, token, environment, said = EARLY[case]
    client.hub.repositories["org/public"] = Repository({})
    message = client.check(name, token=token, **environment)
    for part in (*said, "or convert without --push-to-hub, and upload later with: dist-convert push out"):
        assert part.format(url=client.hub.url) in message
    assert {method for method, _, _ in client.hub.requests} <= {"GET"}


@pytest.mark.parametrize("silent", ["whoami-v2", "name"])
def test_a_hub_that_does_not_answer_is_not_waited_for_for_ever(silent: str, client: Client) -> None:
    client.hub.delays_seconds[silent] = 20
    started = time.monotonic()
    message = client.check("org/name", answer_seconds=0.5)
    assert time.monotonic() - started < 15
    assert message.startswith(f"asking {client.hub.url} whether the model can go to org/name\n")
    assert "UploadError: the hub does not answer" in message
    assert "found:    TimeoutError: no answer in 0.5 s" in message
    assert "or convert without --push-to-hub, and upload later with: dist-convert push out" in message


def test_it_is_named_before_anything_is_converted(client: Client) -> None:
    message = client.refuse(*CONVERT, "--push-to-hub", "other/name", "--private")
    assert "no permission to write to other" in message
    assert not list(client.place.glob("out*"))


@pytest.mark.parametrize("name", ["name", "a/b/c", "/name", "org/", "org/na me", "org/na--me", "https://hub/org/name"])
@pytest.mark.parametrize("arguments", [(*CONVERT, "--push-to-hub"), ("push", "model")], ids=["flag", "command"])
def test_an_impossible_name_is_wrong_usage(
    name: str, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, name]) == 2
    message = capsys.readouterr().err
    assert "not the name of a repository" in message
    assert "expected org/name" in message


def test_private_without_an_upload_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CONVERT, "--private"]) == 2
    assert "add --push-to-hub org/name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (("POST", "/api/repos/create"), "no permission to write to org/name"),
        (("POST", "/api/models/org/name/commit/main"), "no permission to write to org/name"),
    ],
    ids=["making the repository", "committing"],
)
def test_a_later_failure_says_that_the_directory_is_complete_and_how_to_upload_it(
    fault: tuple[str, str], said: str, client: Client
) -> None:
    client.hub.faults[fault] = 403
    message = client.refuse(*CONVERT, "--push-to-hub", "org/name", "--private", "--keep-paths")
    command = f"dist-convert push {client.place}/out org/name --private --keep-paths"
    assert f"{said}; the model in {client.place}/out is complete" in message
    assert f"then continue with: {command}" in message

    client.hub.faults.clear()
    done = client.run(*command.split()[1:])
    assert done.returncode == 0, done.stderr
    assert client.hub.repositories["org/name"].files == contents(client.place / "out")


@pytest.mark.parametrize(
    ("directory", "exit_code", "said"),
    [
        ("short", 1, "without model-00002-of-00004.safetensors"),
        ("model.partial", 1, "an unfinished conversion"),
        ("in", 2, "a Megatron checkpoint, not a Hugging Face directory"),
        ("nowhere", 2, "does not exist"),
        ("half a tokenizer", 1, "has unfinished files"),
    ],
)
def test_what_is_no_finished_model_is_not_uploaded(
    directory: str, exit_code: int, said: str, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    for copy in ("short", "model.partial", "half a tokenizer"):
        shutil.copytree(tmp_path / "model", tmp_path / copy)
    (tmp_path / "half a tokenizer" / ".tokenizer.partial").mkdir()
    (tmp_path / "short" / "model-00002-of-00004.safetensors").unlink()
    assert main(["push", str(tmp_path / directory), "org/name"]) == exit_code
    assert said in capsys.readouterr().err
