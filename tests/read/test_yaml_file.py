"""YAML files are read as plain values, in time and memory that follow from their size."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
import yaml

from dist_convert.errors import CorruptFile
from dist_convert.read.yaml_file import read_yaml

WRITTEN = Path(__file__).parents[1] / "torch_dist" / "run_config.yaml"
MOST_BYTES, MOST_SECONDS = 100_000, 10.0


def test_what_megatron_bridge_writes_has_the_values_that_pyyaml_reads() -> None:
    values = read_yaml(WRITTEN, MOST_BYTES, numbers=True)
    assert values == yaml.safe_load(WRITTEN.read_text())
    assert len(values["model"]) > 100


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8), ("-8", -8), ("0x1f", 31), ("1_000", 1000), ("1.5", 1.5), ("1.0e-05", 1e-05), (".inf", float("inf")),
        ("true", True), ("off", False), ("~", None), ("", None), ("'8'", "8"), ("a b", "a b"),
        ("[1, a]", [1, "a"]), ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)  # fmt: skip
def test_plain_values_are_those_of_pyyaml(text: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "f").write_text(f"a: {text}\n")
    assert read_yaml(tmp_path / "f", MOST_BYTES, numbers=True) == {"a": value} == yaml.safe_load(f"a: {text}\n")


@pytest.mark.parametrize("text", ["1:30", "1:30:15.5", "2026-01-02", "2026-1-2 10:00:00", "=", "<<"])
def test_what_only_yaml_1_1_reads_otherwise_is_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text(f"a: {text}\n{text}: b\n")
    assert read_yaml(tmp_path / "f", MOST_BYTES, numbers=True) == {"a": text, text: "b"}


@pytest.mark.parametrize("text", ["8", "0777", "0x1f", "1_000", "1.50", ".inf", "1:30"])
def test_numbers_stay_the_texts_that_they_are_where_nobody_asks_for_them(text: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text(f"a: {text}\nb: true\n")
    assert read_yaml(tmp_path / "f", MOST_BYTES, numbers=False) == {"a": text, "b": True}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: 1\na: 2", "line 2: a key that is repeated or is not text"),
        ("? [a]\n: 1", "line 1: a key that is repeated or is not text"),
        ("a: &x b\nc: *x", "line 1: an alias"),
        ("a: &x [*x]", "line 1: an alias"),
        ("a: *x", "found undefined alias"),
        ("a: 0777", "invalid literal for int()"),
        ("a: !!int b", "invalid literal for int()"),
        ("a: !!float ''", "could not convert"),
        ("a: !!bool b", "an unsupported kind of value, tag:yaml.org,2002:bool"),
        ("a: !!map b", "an unsupported kind of value, tag:yaml.org,2002:map"),
        ("a: !!set {b}", "an unsupported kind of value, tag:yaml.org,2002:set"),
        ("a: !!binary aaaa", "an unsupported kind of value, tag:yaml.org,2002:binary"),
        ("a: !b c", "an unsupported kind of value, !b"),
        ("a: 1\n--- 2", "expected a single document"),
        (f"a: 0x{'f' * 17}", "a number with more than 64 bits"),
    ],
)
def test_what_is_no_plain_value_is_an_error(text: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text(text)
    with pytest.raises(CorruptFile) as caught:
        read_yaml(tmp_path / "f", MOST_BYTES, numbers=True)
    assert caught.value.file == str(tmp_path / "f")
    assert found in caught.value.found


BOMBS = {
    "a number in base 60": "a: " + "1:" * 49_000 + "1",
    "a float in base 60": "a: " + "1:" * 49_000 + "1.5",
    "a number of many digits": "a: " + "9" * 99_000,
    "a number of many bits": "a: 0x" + "f" * 99_000,
    "merged mappings": "a0: &a0 {k: v}\n"
    + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9)),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_no_text_takes_more_time_than_its_size_tells(kind: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text(BOMBS[kind])
    started = time.process_time()
    with contextlib.suppress(CorruptFile):
        read_yaml(tmp_path / "f", MOST_BYTES, numbers=True)
    assert time.process_time() - started < MOST_SECONDS
