"""Models by name: local directories, and models fetched from a stand-in for the Hugging Face Hub on loopback.

Every fetch runs in a process of its own, because huggingface_hub reads its environment when it is imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_convert.errors import CheckpointNotFound
from dist_convert.formats.huggingface.hub import local_directory
from tests.hub_stand_in import Hub, Repository, pythons, serving
from tests.warm import REPOSITORY, Process, Run

_PROGRAM = """
import sys
from dist_convert.errors import ConversionError
from dist_convert.formats.huggingface.hub import local_directory

try:
    print(local_directory(sys.argv[1]))
except ConversionError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def index(*files: str) -> bytes:
    return json.dumps({"weight_map": {f"tensor of {file}": file for file in files}}).encode()


#: Like models on the hub: one set of weights in each of three formats, and things that no conversion needs.
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "tokenizer.model": b"pieces",
    "README.md": b"# a model card",
    "model-00001-of-00002.safetensors": b"first half",
    "model-00002-of-00002.safetensors": b"second half",
    "model.safetensors.index.json": index("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    "pytorch_model.bin": b"the same, pickled",
    "consolidated.safetensors": b"the same, by another name",
    "original/consolidated.00.pth": b"the same, in Meta's layout",
}
NOT_FETCHED = ("README.md", "pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth")
FETCHED = {name: content for name, content in FILES.items() if name not in NOT_FETCHED}
SINGLE = {"config.json": b"{}", "model.safetensors": b"all weights"}


@dataclass(frozen=True)
class Client:
    """Asks for models with a cache of its own."""

    home: Path
    hub: Hub

    def ask(self, name: str, *, python: str = sys.executable, **more: str) -> Run:
        env = self.hub.environment(self.home, PYTHONPATH=str(REPOSITORY), **more)
        return Process(["-c", _PROGRAM, name], env, python=python).finish()

    def fetch(self, name: str, *, python: str = sys.executable, **more: str) -> Path:
        done = self.ask(name, python=python, **more)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    def refuse(self, name: str, **more: str) -> str:
        """The message of a request that fails as it should, without a traceback."""
        done = self.ask(name, **more)
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with serving(Hub({"org/model": Repository(dict(FILES))})) as hub:
        yield Client(tmp_path / "cache", hub)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_a_directory_is_returned_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_directory("org/model") == Path("org/model")
    assert local_directory(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["missing", "/missing/model", "./missing", "../missing", "a/b/c", "org/", "~/model"])
def test_a_missing_path_that_is_no_hub_id_is_not_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFound, match=r"directory does not exist(?s:.*)check the path on every node"):
        local_directory(name)


def test_a_file_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    Path("org/model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointNotFound) as caught:
        local_directory("org/model.safetensors")
    assert caught.value.what == "a file, not a checkpoint directory"


@pytest.mark.parametrize("python", pythons())
def test_only_config_tokenizer_and_one_kind_of_weights_are_fetched(client: Client, python: str) -> None:
    directory = client.fetch("org/model", python=python)
    assert contents(directory) == FETCHED
    assert client.hub.downloaded() == sorted(FETCHED)


def test_fetching_is_quiet_where_there_is_no_terminal(client: Client) -> None:
    done = client.ask("org/model")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("python", pythons())
def test_the_cache_is_below_hf_home_and_serves_the_second_request(client: Client, python: str) -> None:
    first = client.fetch("org/model", python=python)
    assert first.is_relative_to(client.home)
    client.hub.requests.clear()
    assert client.fetch("org/model", python=python) == first
    assert client.hub.downloaded() == []


@pytest.mark.parametrize("python", pythons())
def test_offline_a_cached_model_is_found_without_a_request(client: Client, python: str) -> None:
    first = client.fetch("org/model", python=python)
    client.hub.requests.clear()
    assert client.fetch("org/model", python=python, HF_HUB_OFFLINE="1") == first
    assert client.hub.requests == []


def test_safetensors_without_an_index_are_fetched(client: Client) -> None:
    client.hub.repositories["org/model"] = Repository(SINGLE | {"pytorch_model.bin": b"the same, pickled"})
    assert contents(client.fetch("org/model")) == SINGLE


def test_pickled_weights_are_fetched_where_there_are_no_safetensors(client: Client) -> None:
    pickled = {
        "config.json": b"{}",
        "pytorch_model.bin.index.json": index("pytorch_model-00001-of-00001.bin"),
        "pytorch_model-00001-of-00001.bin": b"pickled weights",
    }
    client.hub.repositories["org/model"] = Repository(pickled | {"flax_model.msgpack": b"the same"})
    assert contents(client.fetch("org/model")) == pickled


def test_a_revision_follows_an_at_sign(client: Client) -> None:
    commit = client.hub.repositories["org/model"].commit
    assert client.fetch(f"org/model@{commit}").name == commit
    assert client.fetch("org/model@main").name == commit


def test_hf_token_opens_a_private_model(client: Client) -> None:
    client.hub.repositories["org/private"] = Repository(SINGLE, token="secret")
    assert contents(client.fetch("org/private", HF_TOKEN="secret")) == SINGLE


@pytest.mark.parametrize(
    ("name", "environment", "what", "remedy"),
    [
        ("org/none", {}, "neither a directory here nor a model on the", "check the spelling; a private model needs"),
        ("org/private", {}, "neither a directory here nor a model on the", "a private model needs HF_TOKEN"),
        (
            "org/private",
            {"HF_TOKEN": "wrong"},
            "neither a directory here nor a model",
            "a private model needs HF_TOKEN",
        ),
        ("org/gated", {}, "no access to the model", "accept its terms at {url}/org/gated, then set HF_TOKEN"),
        ("org/model@v9", {}, "the model has no such revision", "name a branch, a tag or a whole commit hash"),
        ("org/model@../x", {}, "the checkpoint directory does not exist", "check the path on every node"),
        ("org/model@/x", {}, "the checkpoint directory does not exist", "check the path on every node"),
        ("org/mo--del", {}, "neither a directory here nor a model", "check the spelling"),
        ("org/model", {"HF_HUB_OFFLINE": "1"}, "not in the cache, and HF_HUB_OFFLINE forbids", "unset HF_HUB_OFFLINE"),
        ("org/model", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be fetched, and the cache", "http://127.0.0.1:9;"),
        ("org/empty", {}, "no weights in the Hugging Face directory", "the directory that save_pretrained made"),
        ("org/partial", {}, "the cache holds only a part of the model", "copy its HF_HOME here"),
        ("org/hostile", {}, "not the name of a weights file", "download it again"),
    ],
    ids=[
        "unknown",
        "private",
        "wrong token",
        "gated",
        "revision",
        "revision that leads away",
        "revision that is a path",
        "impossible name",
        "offline",
        "unreachable",
        "no weights",
        "a file short",
        "index leads out",
    ],
)
def test_a_model_that_cannot_be_had_is_named_with_what_to_do(
    client: Client, name: str, environment: dict[str, str], what: str, remedy: str
) -> None:
    hidden = {"model.safetensors.index.json": index("model-00001-of-00001.safetensors"), "config.json": b"{}"}
    client.hub.repositories |= {
        "org/private": Repository(SINGLE, token="secret"),
        "org/gated": Repository(SINGLE, token="secret", gated=True),
        "org/empty": Repository({"config.json": b"{}", "consolidated.00.pth": b"Meta's"}),
        "org/partial": Repository(hidden),
        "org/hostile": Repository({"model.safetensors.index.json": index("../../../../../.bashrc")}),
    }
    message = client.refuse(name, **environment)
    assert what in message
    assert remedy.format(url=client.hub.url) in message


def test_offline_a_cached_revision_without_its_weights_is_refused(client: Client) -> None:
    directory = client.fetch("org/model")
    (directory / "model-00002-of-00002.safetensors").unlink()
    message = client.refuse("org/model", HF_HUB_OFFLINE="1")
    assert "model-00002-of-00002.safetensors" in message
    assert "unset HF_HUB_OFFLINE" in message


def test_a_cache_that_cannot_be_written_is_named(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    message = client.refuse("org/model", HF_HOME=str(tmp_path / "file"))
    assert message.startswith("NotFetched")
    assert str(tmp_path / "file") in message
    assert "set HF_HOME to a directory that this user can write to" in message


def test_a_full_file_system_is_named_with_what_to_do(client: Client, make_disk: Callable[[str], Path]) -> None:
    client.hub.repositories["org/large"] = Repository(SINGLE | {"model.safetensors": b"x" * 300_000})
    message = client.refuse("org/large", HF_HOME=str(make_disk("size=128k")))
    assert "NotEnoughSpace: no space for the hub's cache" in message
    assert "set HF_HOME to a larger file system" in message
