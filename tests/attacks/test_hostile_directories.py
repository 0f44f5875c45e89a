"""Whole checkpoints made to do harm, converted under watch: nothing runs, nothing outside is opened."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attacks.watched import Seen, Watcher, watcher
from tests.checkpoints import Model, hf_tensors, make, megatron_shards, save, training_args
from tests.to_megatron import make_hf

MOST_MEMORY_BYTES = 300 << 20
MOST_SECONDS = 20.0
SECRET = "the secret"


@pytest.fixture(scope="module")
def watched() -> Iterator[Watcher]:
    with watcher() as started:
        yield started


def run(watched: Watcher, direction: str, root: Path) -> Seen:
    """Convert `root`/source, watched."""
    paths = ("--load-path", "--save-path") if direction == "megatron-to-hf" else ("--load-dir", "--save-dir")
    target = root / "target" / "hf"
    return watched.run(direction, paths[0], str(root / "source"), paths[1], str(target), "--device", "cpu")


def assert_harmless(seen: Seen, root: Path) -> None:
    """Only the two directories were touched, at little cost, and nothing was started."""
    assert seen.exit_code >= 0, seen  # a signal is what a limit ends a process with
    assert seen.events == []
    inside = (f"{root}/source", f"{root}/target")
    assert [path for path in seen.opened if not path.startswith(inside)] == []
    assert seen.peak_bytes < MOST_MEMORY_BYTES
    assert seen.seconds < MOST_SECONDS
    assert not (root / "canary").exists()
    assert SECRET not in seen.printed
    for path in root.glob("target/**/*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


def assert_refused(seen: Seen, root: Path, shown: str) -> None:
    """The conversion failed with an error of ours that says this, and made nothing."""
    assert_harmless(seen, root)
    assert seen.exit_code == 1, seen
    assert "Traceback" not in seen.printed
    assert "internal error" not in seen.printed
    assert shown in seen.printed
    assert not (root / "target").exists()


def assert_shown_without_harm(seen: Seen, root: Path) -> None:
    """Looking at a checkpoint does no more than converting it, and answers or fails with an error of ours."""
    assert_harmless(seen, root)
    assert seen.exit_code in (0, 1), seen
    assert "Traceback" not in seen.printed


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Hugging Face directories ---------------------------------------------------------------------------------------------


def rewrite_header(source: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of the model's only file; a text or bytes are taken as they are."""
    path = source / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(changed or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first(header: dict[str, Any]) -> dict[str, Any]:
    """The entry of the tensor whose bytes come first."""
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    found: dict[str, Any] = min(entries, key=lambda entry: entry["data_offsets"])
    return found


def set_first(**values: Any) -> Callable[[Path], None]:
    return lambda source: rewrite_header(source, lambda header: first(header).update(values))


def claim_a_length(length: int) -> Callable[[Path], None]:
    def build(source: Path) -> None:
        with (source / "model.safetensors").open("r+b") as file:
            file.write(struct.pack("<Q", length))

    return build


def huge_real_header(source: Path) -> None:
    """A header of 200 MB that is there, as a hole."""
    with (source / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)


def duplicate_key(source: Path) -> None:
    rewrite_header(source, lambda header: b'{"a":{},' + json.dumps({"a": first(header)}).encode()[1:])


def deep_json(source: Path) -> None:
    rewrite_header(source, lambda _: b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}")


def long_number(source: Path) -> None:
    rewrite_header(source, lambda _: b'{"a":{"dtype":"F32","shape":[' + b"9" * 10**6 + b'],"data_offsets":[0,4]}}')


def index(*names: str) -> Callable[[Path], None]:
    """An index that says these files hold the weights."""

    def build(source: Path) -> None:
        (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
        names_of = dict.fromkeys(hf_tensors(Model()), "model-00001-of-00001.safetensors")
        names_of |= dict(zip(names_of, names, strict=False))
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names_of}))

    return build


def link(name: str, to: str) -> Callable[[Path], None]:
    """A link in the directory to a file outside."""

    def build(source: Path) -> None:
        outside = source.parent / "outside"
        outside.mkdir()
        (source / name).rename(outside / name) if (source / name).exists() else (outside / name).write_text(SECRET)
        (source / name).symlink_to(to.format(name=name, root=source.parent))

    return build


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda source: change_json(source / "config.json", **changes)


def config_text(text: str) -> Callable[[Path], None]:
    return lambda source: (source / "config.json").write_text(text) and None


ABSURD = 10**18
HUGGING_FACE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a header of 2^63 bytes": (claim_a_length(2**63), "no safetensors header"),
    "a header longer than the file": (claim_a_length(10**8), "no safetensors header"),
    "a header of 200 MB": (huge_real_header, "no safetensors header"),
    "a header nested a million deep": (deep_json, "damaged safetensors header"),
    "a number of a million digits": (long_number, "damaged safetensors header"),
    "a header that is no UTF-8": (lambda source: rewrite_header(source, lambda _: b'{"\xff\xfe":{}}'), "UnicodeDecode"),
    "a header with one name twice": (duplicate_key, "a name that stands twice"),
    "tensors that overlap": (
        lambda source: rewrite_header(source, lambda h: {name: first(h) for name in ("a", "b")}),
        "a tensor does not follow the one before it",
    ),
    "a tensor past the end": (set_first(shape=[2**40], data_offsets=[0, 2**41]), "or lies outside the file"),
    "a shape whose size overflows": (set_first(shape=[2**61, 2**61]), "damaged safetensors header"),
    "a negative shape": (set_first(shape=[-1, -1]), "damaged safetensors header"),
    "a tensor at a negative place": (set_first(data_offsets=[-8, 0]), "damaged safetensors header"),
    "an index to the parent": (index("../outside.safetensors"), "not the name of a weights file"),
    "an index to an absolute path": (index("/etc/passwd.safetensors"), "not the name of a weights file"),
    "an index to a device": (index("/dev/zero"), "not the name of a weights file"),
    "an index with a NUL": (index("a\0.safetensors"), "not the name of a weights file"),
    "weights that are a link out": (link("model.safetensors", "../outside/{name}"), "outside the directory"),
    "weights that link to all of memory": (link("model.safetensors", "/dev/zero"), "outside the directory"),
    "a config that is a link out": (link("config.json", "{root}/outside/{name}"), "outside the directory"),
    "10^18 layers": (config(num_hidden_layers=ABSURD), "num_hidden_layers"),
    "10^18 layers with biases": (config(num_hidden_layers=ABSURD, attention_bias=True), "num_hidden_layers"),
    "a vocabulary of 10^18": (config(vocab_size=ABSURD), ""),
    "a width of 10^30": (config(hidden_size=10**30, head_dim=10**29), ""),
    "10^18 heads": (config(num_attention_heads=ABSURD, num_key_value_heads=ABSURD), ""),
    "10^18 experts": (
        config(model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=ABSURD), ""),
    "sizes that are texts": (config(num_hidden_layers="8"), "num_hidden_layers is no size"),
    "sizes that are lists": (config(hidden_size=[16]), "hidden_size is no size"),
    "a negative size": (config(intermediate_size=-1), "intermediate_size is no size"),
    "a theta beyond floating point": (config(rope_parameters={"rope_theta": 10**400}), "rope_theta is no number"),
    "a theta that is no number": (config(rope_parameters={"rope_theta": float("nan")}), "rope_theta is no number"),
    "rotary parameters that are lists": (config(rope_parameters=[[]], rope_scaling=[1]), "rotary parameters"),
    "a rotation that is a list": (config(partial_rotary_factor=[[]]), "not rotated"),
    "classes that are a number": (config(architectures=1), "not a model that can be converted"),
    "a config nested a million deep": (config_text("[" * 10**6), "not valid JSON"),
    "a config that is a list": (config_text("[]"), "not a JSON object"),
    "a config in another encoding": (
        lambda source: (source / "config.json").write_bytes(b"\xff\xfe{"), "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("attack", HUGGING_FACE)
def test_a_hostile_hugging_face_directory_is_refused_at_little_cost(
    attack: str, watched: Watcher, tmp_path: Path
) -> None:
    build, shown = HUGGING_FACE[attack]
    make_hf(tmp_path / "source", Model())
    build(tmp_path / "source")
    assert_shown_without_harm(watched.run("inspect", str(tmp_path / "source")), tmp_path)
    assert_refused(run(watched, "hf-to-megatron", tmp_path), tmp_path, shown)


def test_remote_code_beside_a_model_is_neither_run_nor_copied(watched: Watcher, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_hf(source, Model())
    code = f"open({str(tmp_path / 'canary')!r}, 'w').close()\nclass Tokenizer: pass\nclass LlamaForCausalLM: pass\n"
    for name in ("tokenization_evil.py", "modeling_evil.py", "torch.py", "sitecustomize.py", "__init__.py"):
        (source / name).write_text(code)
    change_json(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.LlamaForCausalLM"})
    tokenizer = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["tokenization_evil.Tokenizer", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    seen = run(watched, "hf-to-megatron", tmp_path)
    assert_harmless(seen, tmp_path)
    assert seen.exit_code == 0, seen.printed
    assert [path for path in seen.opened if path.endswith("_evil.py")] == []
    assert list((tmp_path / "target").rglob("*.py")) == []


# Megatron checkpoints -------------------------------------------------------------------------------------------------

SHARD = "iter_0000004/mp_rank_00/model_optim_rng.pt"


def rewrite_zip(
    source: Path, change: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED
) -> None:
    """Write the file's records anew."""
    with zipfile.ZipFile(source / SHARD) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(source / SHARD, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def zip_of_zeros(source: Path) -> None:
    """Compressed: 400 MB of zeros as the pickle, in 400 kB."""
    with (
        zipfile.ZipFile(source / SHARD, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("archive/data.pkl", "w", force_zip64=True) as file,
    ):
        for _ in range(400):
            file.write(bytes(1 << 20))


def patch_all_sizes(source: Path, offset: int, value: int) -> None:
    """Overwrite a field of every entry of the zip's directory."""
    data = bytearray((source / SHARD).read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        struct.pack_into("<I", data, at + offset, value)
        at = data.find(b"PK\x01\x02", at + 4)
    (source / SHARD).write_bytes(data)


def args(**changes: Any) -> Callable[[Path], None]:
    def build(source: Path) -> None:
        model = Model()
        made = training_args(model)
        for name, value in changes.items():
            setattr(made, name, value)
        shutil.rmtree(source)
        save(source, megatron_shards(model, hf_tensors(model)), made)

    return build


MEGATRON: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a zip that unpacks to a thousand times its size": (zip_of_zeros, "is not one that torch writes"),
    "compressed records": (
        lambda source: rewrite_zip(source, lambda _: None, zipfile.ZIP_DEFLATED), "is not one that torch writes"),
    "records that all lie in one place": (
        lambda source: patch_all_sizes(source, 42, 0), "is not one that torch writes"),
    "records that say they are 4 GB": (
        lambda source: patch_all_sizes(source, 24, 0xFFFFFFF0), "is not one that torch writes"),
    "records that lie past the end": (lambda source: patch_all_sizes(source, 42, 0x7FFFFFFF), "torch"),
    "a record that leads out": (
        lambda source: rewrite_zip(source, lambda r: r.update({"archive/../../evil": b"x"})), ""),
    "10^18 layers": (args(num_layers=ABSURD), "num_layers"),
    "layers that are a text": (args(num_layers="4"), "num_layers"),
    "a grid of 10^18": (args(tensor_model_parallel_size=ABSURD), "impossible sizes"),
    "a pipeline of 10^18": (args(pipeline_model_parallel_size=ABSURD, num_layers=8), "impossible sizes"),
    "10000 layers of 10000 experts": (args(num_layers=10_000, num_experts=10_000), "impossible sizes"),
    "10^18 experts": (args(num_experts=ABSURD), "num_experts"),
    "a width of 10^30": (args(hidden_size=10**30), "hidden_size"),
    "a vocabulary of 10^18": (args(padded_vocab_size=ABSURD), ""),
    "a tracker of a gigabyte": (
        lambda source: os.truncate(source / "latest_checkpointed_iteration.txt", 1 << 30), "names no iteration"),
    "a tracker that leads out": (
        lambda source: (source / "latest_checkpointed_iteration.txt").write_text("../../outside"), "no iteration"),
}  # fmt: skip


@pytest.mark.parametrize("attack", MEGATRON)
def test_a_hostile_megatron_checkpoint_is_refused_at_little_cost(attack: str, watched: Watcher, tmp_path: Path) -> None:
    build, shown = MEGATRON[attack]
    make(tmp_path / "source", Model())
    build(tmp_path / "source")
    assert_shown_without_harm(watched.run("inspect", str(tmp_path / "source")), tmp_path)
    seen = run(watched, "megatron-to-hf", tmp_path)
    if attack == "a record that leads out":
        assert_harmless(seen, tmp_path)
        assert not (tmp_path / "evil").exists()
    else:
        assert_refused(seen, tmp_path, shown)


def test_a_pickle_that_imports_a_module_beside_it_does_not_find_it(watched: Watcher, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make(source, Model())
    (source / "canary_module.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()")
    saved = torch.load(source / SHARD, weights_only=False)
    torch.save(saved, source / SHARD)
    rewrite_zip(
        source,
        lambda records: records.update({name: b"ccanary_module\nrun\n." for name in records if "data.pkl" in name}),
    )
    assert_refused(run(watched, "megatron-to-hf", tmp_path), tmp_path, "canary_module.run")


# Tokenizers -----------------------------------------------------------------------------------------------------------


def tokenizer_of(source: Path) -> Path:
    """A tokenizer inside a checkpoint's directory, with code that it asks to be run."""
    directory = source / "tokenizer"
    directory.mkdir()
    code = f"open({str(source.parent / 'canary')!r}, 'w').close()\nclass Evil: pass\n"
    (directory / "tokenization_evil.py").write_text(code)
    model = {"type": "WordLevel", "vocab": {str(number): number for number in range(29)}, "unk_token": "0"}
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def convert_with_tokenizer(watched: Watcher, root: Path) -> Seen:
    paths = ["--load-path", str(root / "source"), "--tokenizer", str(root / "source" / "tokenizer")]
    return watched.run("megatron-to-hf", *paths, "--save-path", str(root / "target" / "hf"), "--device", "cpu")


def test_remote_code_of_a_tokenizer_is_neither_run_nor_copied(watched: Watcher, tmp_path: Path) -> None:
    make(tmp_path / "source", Model())
    tokenizer_of(tmp_path / "source")
    seen = convert_with_tokenizer(watched, tmp_path)
    assert_harmless(seen, tmp_path)
    assert seen.exit_code == 0, seen.printed
    assert (tmp_path / "target" / "hf" / "tokenizer.json").is_file()
    assert [path for path in seen.opened if path.endswith(".py")] == []
    assert list((tmp_path / "target").rglob("*.py")) == []


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "additional_chat_templates/a.jinja"])
def test_a_tokenizer_file_that_links_out_is_not_copied_into_the_target(
    name: str, watched: Watcher, tmp_path: Path
) -> None:
    make(tmp_path / "source", Model())
    file = tokenizer_of(tmp_path / "source") / name
    file.unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    (tmp_path / "private").write_text(json.dumps({"a": SECRET}))
    file.symlink_to(tmp_path / "private")
    assert_refused(convert_with_tokenizer(watched, tmp_path), tmp_path, "outside the directory")
