"""Hugging Face directories made to do harm, converted under watch: nothing runs, nothing outside is opened."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.harmless import (
    ABSURD,
    SECRET,
    assert_harmless,
    assert_refused,
    assert_shown_without_harm,
    change_json,
    run,
)
from tests.attacks.watched import Watcher
from tests.checkpoints import Model, hf_tensors
from tests.to_megatron import make_hf


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


def index_text(count: int, entry: str) -> Callable[[Path], None]:
    """An index of many entries: names of tensors and of files."""

    def build(source: Path) -> None:
        (source / "model.safetensors").rename(source / "a.safetensors")
        entries = ",".join(entry.format(number=number) for number in range(count))
        (source / "model.safetensors.index.json").write_text(f'{{"weight_map":{{{entries}}}}}')

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


HUGGING_FACE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a header of 2^63 bytes": (claim_a_length(2**63), "no safetensors header"),
    "a header longer than the file": (claim_a_length(10**8), "no safetensors header"),
    "a header of 200 MB": (huge_real_header, "no safetensors header"),
    "a header nested a million deep": (deep_json, "damaged safetensors header"),
    "a number of a million digits": (long_number, "damaged safetensors header"),
    "a header that is no UTF-8": (lambda source: rewrite_header(source, lambda _: b'{"\xff\xfe":{}}'), "UnicodeDecode"),
    "a header with one name twice": (duplicate_key, "a name that occurs twice"),
    "tensors that overlap": (
        lambda source: rewrite_header(source, lambda h: {name: first(h) for name in ("a", "b")}),
        "a tensor does not follow the one before it",
    ),
    "a tensor past the end": (set_first(shape=[2**40], data_offsets=[0, 2**41]), "or lies outside the file"),
    "a shape whose size overflows": (set_first(shape=[2**61, 2**61]), "damaged safetensors header"),
    "a shape of 300,000 dimensions": (set_first(shape=[2**61] * 300_000), "damaged safetensors header"),
    "a negative shape": (set_first(shape=[-1, -1]), "damaged safetensors header"),
    "a tensor at a negative place": (set_first(data_offsets=[-8, 0]), "damaged safetensors header"),
    "an index to the parent": (index("../outside.safetensors"), "not the name of a weights file"),
    "an index to an absolute path": (index("/etc/passwd.safetensors"), "not the name of a weights file"),
    "an index to a device": (index("/dev/zero"), "not the name of a weights file"),
    "an index with a NUL": (index("a\0.safetensors"), "not the name of a weights file"),
    "an index of a million tensors": (
        index_text(10**6, '"{number}":"a.safetensors"'), "10000 problems found; nothing was written"),
    "an index of a million files": (index_text(10**6, '"{number}":"{number}.bin"'), "the index names too many files"),
    "weights that are a link out": (link("model.safetensors", "../outside/{name}"), "outside the directory"),
    "weights that link to all of memory": (link("model.safetensors", "/dev/zero"), "outside the directory"),
    "a config that is a link out": (link("config.json", "{root}/outside/{name}"), "outside the directory"),
    "10^18 layers": (config(num_hidden_layers=ABSURD), "num_hidden_layers"),
    "10^18 layers with biases": (config(num_hidden_layers=ABSURD, attention_bias=True), "num_hidden_layers"),
    "10^12 layers, some without experts": (
        config(model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], num_hidden_layers=10**12,
               num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8), "num_hidden_layers is not a size"),
    "10^12 layers, all without experts": (
        config(model_type="glm4_moe", architectures=["Glm4MoeForCausalLM"], num_hidden_layers=10**12,
               first_k_dense_replace=10**12), "num_hidden_layers is not a size"),
    "10^12 layers, some without positions": (
        config(model_type="smollm3", architectures=["SmolLM3ForCausalLM"], num_hidden_layers=10**12),
        "num_hidden_layers is not a size"),
    "1,500,000 layers without experts, listed": (
        config(model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], num_hidden_layers=10**4,
               num_experts=2, mlp_only_layers=[-1] * 1_500_000), ""),
    "a vocabulary of 10^18": (config(vocab_size=ABSURD), ""),
    "a width of 10^30": (config(hidden_size=10**30, head_dim=10**29), ""),
    "10^18 heads": (config(num_attention_heads=ABSURD, num_key_value_heads=ABSURD), ""),
    "10^18 experts": (
        config(model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=ABSURD), ""),
    "sizes that are texts": (config(num_hidden_layers="8"), "num_hidden_layers is not a size"),
    "sizes that are lists": (config(hidden_size=[16]), "hidden_size is not a size"),
    "a negative size": (config(intermediate_size=-1), "intermediate_size is not a size"),
    "a theta beyond floating point": (config(rope_parameters={"rope_theta": 10**400}), "rope_theta is not a number"),
    "a theta that is no number": (config(rope_parameters={"rope_theta": float("nan")}), "rope_theta is not a number"),
    "rotary parameters that are lists": (config(rope_parameters=[[]], rope_scaling=[1]), "rotary parameters"),
    "a rotation that is a list": (config(partial_rotary_factor=[[]]), "is rotated"),
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
