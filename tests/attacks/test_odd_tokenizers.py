"""Tokenizers with values of any kind under every key that is read, and models that ask for much: one error of ours."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import import_protobuf

from dist_convert.errors import ConversionError, CorruptFile
from dist_convert.formats.tokenizer.find import named_tokenizer
from dist_convert.formats.tokenizer.huggingface import tokenizer_files
from dist_convert.formats.tokenizer.record import Style
from dist_convert.formats.tokenizer.record import Tokenizer as Record
from tests.checkpoints import Model, make
from tests.converting import convert
from tests.tokenizer.test_finding import tiktoken_lines

MOST_SECONDS = 10.0
STYLE = Style("llama2", instruct=False, max_positions=8)
LONE = "\ud800"  # which no UTF-8 file holds
VALUES = (None, True, 0, -1, 7, 1.5, float("nan"), 10**30, "", "nowhere", "<s>", LONE, [], ["<s>"], [[]], [LONE], {},
          {"content": 1}, {"content": "nowhere"}, {"content": LONE}, {"": 0}, {"0": {}}, {"x": {"content": "x"}},
          {"4294967296": {"content": "x"}}, {"29": {"content": "x", "special": 1}})  # fmt: skip
SETTINGS: dict[str, Any] = {
    "tokenizer_class": "LlamaTokenizer",
    "chat_template": "x",
    "auto_map": None,
    "extra_special_tokens": [],
    "legacy": True,
    "add_bos_token": True,
    "add_eos_token": False,
    "added_tokens_decoder": {"29": {"content": "<a>", "special": True, "lstrip": False}},
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<unk>",
    "unk_token": "<unk>",
}
SMALL = ["<unk>", "<s>", "</s>", "a", "b", "a:b", *(chr(0x100 + number) for number in range(23))]
FILES: dict[str, Any] = {
    "tokenizer_config.json": SETTINGS,
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<a>"},
    "added_tokens.json": {"<b>": 30},
}
FAST = {
    "tokenizer.json": {
        "model": {"type": "BPE", "vocab": {text: n for n, text in enumerate(SMALL)}, "merges": []},
        "added_tokens": [{"content": "<a>", "id": 29}],
    },
    **FILES,
}
WORDS = {"vocab.json": {text: n for n, text in enumerate(SMALL)}, **FILES}


def pieces(path: Path, texts: Sequence[Any], kinds: Sequence[int] = (2, 3, 3), **trainer: Any) -> Path:
    """A SentencePiece model; pieces without a kind are normal ones, of falling scores."""
    proto: Any = import_protobuf().ModelProto()  # type: ignore[no-untyped-call]
    for number, text in enumerate(texts):
        kind = kinds[number] if number < len(kinds) else 1
        proto.pieces.add(piece=text, score=-number, type=kind)
    proto.trainer_spec.model_type = 2
    for name, value in trainer.items():
        setattr(proto.trainer_spec, name, value)
    proto.normalizer_spec.add_dummy_prefix, proto.normalizer_spec.remove_extra_whitespaces = True, False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(proto.SerializeToString())
    return path


def put(directory: Path, contents: dict[str, Any]) -> None:
    directory.mkdir(exist_ok=True)
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content))
    if contents is not FAST and "vocab.json" in contents:
        (directory / "merges.txt").write_text("#version: 0.2\n")


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Where each value of a content stands; of a vocabulary, where its first does."""
    inner = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    inner = inner[:1] if "vocab" in path or len(inner) > 20 else inner
    return [(*path, key) for key, _ in inner] + [one for key, item in inner for one in places(item, (*path, key))]


def with_value(content: Any, path: Sequence[str | int], value: Any) -> Any:
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = with_value(content[path[0]], path[1:], value)
    return copy


def write(found: Tokenizer, target: Path) -> None:
    for name, content in tokenizer_files(found, STYLE):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(content)


def outcome(source: Path, target: Path) -> Record | ConversionError:
    """The tokenizer that was read and written, or the error of ours."""
    target.mkdir()
    try:
        found = named_tokenizer(source, "--tokenizer")
        write(found, target)
    except ConversionError as error:
        return error
    return found


KINDS = {"fast": FAST, "words": WORDS, "slow": FILES}


@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind, contents in KINDS.items() for file in contents])
def test_any_value_under_any_key_makes_a_tokenizer_or_an_error_that_names_file_and_key(
    kind: str, file: str, tmp_path: Path
) -> None:
    content, source, refused = KINDS[kind][file], tmp_path / "source", 0
    put(source, KINDS[kind])
    if kind == "slow":
        pieces(source / "tokenizer.model", SMALL)
    cases = [(place, value) for place in places(content) for value in VALUES]
    for number, (place, value) in enumerate(random.Random(0).sample(cases, min(len(cases), 150))):
        (source / file).write_text(json.dumps(with_value(content, place, value)))
        found, target = outcome(source, tmp_path / str(number)), tmp_path / str(number)
        if isinstance(found, ConversionError):
            refused += 1
            assert found.file.startswith(str(source)), (place, value)
            assert str(place[0]) in str(found) or "skip ids" in found.what, (place, value)
            continue
        assert isinstance(json.loads((target / "tokenizer_config.json").read_bytes()), dict)
        if kind == "slow":
            built = Tokenizer.from_file(str(target / "tokenizer.json"))
            assert built.get_vocab_size() == found.size, (place, value)
    assert refused > 0


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("bos_token", "nowhere", "bos_token: a token of the model, or an added one, without colons"),
        ("bos_token", 5, "bos_token: a text"),
        ("eos_token", "a:b", "eos_token: a token of the model, or an added one, without colons"),
        ("chat_template", LONE, "chat_template: characters"),
        (
            "added_tokens_decoder",
            {"29": {"content": "x", "lstrip": 1}},
            "added_tokens_decoder, 29, lstrip: true or false",
        ),
        ("legacy", "no", "legacy: true or false"),
    ],
)
def test_an_odd_tokenizer_that_nobody_asked_for_leaves_the_weights_alone(
    key: str, value: Any, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", Model(layers=1))
    put(tmp_path / "in" / "tokenizer", FILES | {"tokenizer_config.json": SETTINGS | {key: value}})
    pieces(tmp_path / "in" / "tokenizer" / "tokenizer.model", SMALL)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    printed = capsys.readouterr().err
    assert "no tokenizer files are written: a file of the tokenizer is damaged" in printed
    assert "tokenizer/tokenizer_config.json (" in printed
    asked = ("--tokenizer", str(tmp_path / "in" / "tokenizer"))
    assert convert(tmp_path / "in", tmp_path / "asked", *asked) == 1
    printed = capsys.readouterr().err
    assert f"file:     {tmp_path}/in/tokenizer/tokenizer_config.json\n  expected: {expected}\n" in printed
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_damaged_configs_beside_a_tokenizer_that_nobody_asked_for_leave_the_weights_alone(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", Model(layers=1))
    put(tmp_path / "in" / "tokenizer", FAST)
    (tmp_path / "in" / "tokenizer" / name).write_text("[]")
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert (
        f"no tokenizer files are written: not a JSON object: {tmp_path}/in/tokenizer/{name}" in capsys.readouterr().err
    )


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WRONG: dict[str, tuple[list[Any], list[int], dict[str, Any]]] = {
    "a piece twice": ([*SMALL, "a"], [2, 3, 3], {}),
    "a control piece twice": ([*SMALL, "<s>"], [2, 3, 3], {}),
    "a piece without text": ([*SMALL, ""], [2, 3, 3], {}),
    "a piece with a NUL": ([*SMALL, "a\0"], [2, 3, 3], {}),
    "nothing for what is unknown": (SMALL, [3, 3, 3], {}),
    "two for what is unknown": (SMALL, [2, 2, 3], {}),
    "bytes without a use": ([*SMALL, *BYTES], [2, 3, 3, *[1] * 26, *[6] * 256], {}),
    "a byte too few": ([*SMALL, *BYTES[1:]], [2, 3, 3, *[1] * 26, *[6] * 255], {"byte_fallback": True}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_model_that_sentencepiece_does_not_load_is_refused(kind: str, tmp_path: Path) -> None:
    texts, kinds, trainer = WRONG[kind]
    path = pieces(tmp_path / "m", texts, kinds, **trainer)
    with pytest.raises(RuntimeError):
        sentencepiece.SentencePieceProcessor(model_file=str(path))
    with pytest.raises(CorruptFile, match="not a SentencePiece model"):
        named_tokenizer(path, "SRC")


def test_pieces_that_are_no_utf_8_are_refused(tmp_path: Path) -> None:
    path = pieces(tmp_path / "m", [*SMALL, "zz"])
    path.write_bytes(path.read_bytes().replace(b"zz", b"\xff\xfe"))
    with pytest.raises(CorruptFile) as caught:
        named_tokenizer(path, "SRC")
    assert caught.value.found == r"piece 29 is not text: b'\xff\xfe'"


LONG: dict[str, list[str]] = {
    "one piece of 2 MB": [*SMALL, "a" * 2_000_000],
    "3,000 pieces of one letter": ["<unk>", "<s>", "</s>", *("a" * length for length in range(1, 3001))],
}


@pytest.mark.parametrize("kind", LONG)
def test_pieces_that_would_take_more_than_their_files_size_are_refused(kind: str, tmp_path: Path) -> None:
    path = pieces(tmp_path / "m", LONG[kind])
    started = time.process_time()
    with pytest.raises(CorruptFile, match="the tokens of the tokenizer are too long"):
        named_tokenizer(path, "SRC")
    assert time.process_time() - started < MOST_SECONDS


def test_a_line_of_tiktoken_that_would_take_more_than_its_files_size_is_refused(tmp_path: Path) -> None:
    path = tiktoken_lines(tmp_path / "m")
    lines = path.read_bytes().splitlines()
    lines[-1] = b"A" * 4_000_000 + b" 127999"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(CorruptFile, match="the tokens of the tokenizer are too long"):
        named_tokenizer(path, "SRC")


def test_runs_of_one_letter_as_long_as_real_ones_are_cut_as_sentencepiece_cuts_them(tmp_path: Path) -> None:
    texts = [*SMALL, *("a" * length for length in range(2, 65)), *(chr(0x200 + n) for n in range(9000))]
    path = pieces(tmp_path / "m", texts)
    witness = sentencepiece.SentencePieceProcessor(model_file=str(path))
    write(named_tokenizer(path, "SRC"), tmp_path)
    built = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for length in (1, 2, 7, 64, 65, 200):
        assert built.encode("a" * length, add_special_tokens=False).ids == witness.encode("a" * length)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"])
def test_a_file_whose_link_leads_nowhere_is_not_left_out_silently(name: str, tmp_path: Path) -> None:
    """As in a hub's cache of which a part was removed."""
    put(tmp_path / "source", FAST)
    (tmp_path / "source" / name).unlink(missing_ok=True)
    (tmp_path / "source" / name).symlink_to("gone")
    with pytest.raises(CorruptFile, match=f"{name} is not a plain file, or links to something else"):
        named_tokenizer(tmp_path / "source", "SRC")


def test_a_role_that_only_the_map_of_special_tokens_names_is_also_the_built_tokenizers(tmp_path: Path) -> None:
    config = {key: value for key, value in SETTINGS.items() if key != "eos_token"}
    put(
        tmp_path / "source", {**FILES, "tokenizer_config.json": config, "special_tokens_map.json": {"eos_token": "<a>"}}
    )
    pieces(tmp_path / "source" / "tokenizer.model", SMALL)
    found = outcome(tmp_path / "source", tmp_path / "target")
    assert isinstance(found, Record)
    written = json.loads((tmp_path / "target" / "tokenizer_config.json").read_text())
    assert (found.bos, found.eos, written["bos_token"], written["eos_token"]) == (1, 29, "<s>", "<a>")
