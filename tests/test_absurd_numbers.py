"""Every flag with a number refuses what can be none of its values, by its name, before any file is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import dist_convert
from dist_convert.__main__ import main
from dist_convert.cli.commands import COMMANDS
from dist_convert.cli.flags import Parser, build_parser
from dist_convert.errors import UsageError
from dist_convert.options import Kind, kind_of, options_of, plain_name

#: Kinds of values that are numbers, and of absurd ones those that a flag of this kind can have.
SOUND: dict[Kind, tuple[str, ...]] = {
    "count": (),
    "seconds": (),
    "share": (),
    "number": (),
    "size": (str(10**13),),
    "iteration": ("0", str(10**13)),
}
#: The last is a Fraction with a billion digits.
ABSURD = ("0", "-1", str(10**13), str(10**30), "1e400", "nan", "many", "", "9" * 5000, "1e-999999999")


def numbers() -> Iterator[tuple[str, str, Kind]]:
    """Command, flag and kind."""
    for command in COMMANDS:
        if command in ("convert", "megatron-to-hf", "hf-to-megatron", "verify", "tokenizer"):
            for one, _ in options_of(command):
                if (kind := kind_of(one)) in SOUND:
                    yield command, plain_name(one.name), kind


@pytest.fixture(scope="module")
def parsers() -> dict[str, Parser]:
    return build_parser()[1]


@pytest.mark.parametrize(("command", "name", "kind"), [*numbers()])
def test_a_flag_refuses_absurd_numbers_by_its_name(
    command: str, name: str, kind: Kind, parsers: dict[str, Parser]
) -> None:
    flag = f"--{name.replace('_', '-')}"
    for value in ABSURD:
        if value in SOUND[kind]:
            parsers[command].parse_known_args([f"{flag}={value}"])
            continue
        with pytest.raises(UsageError, match=rf"^dist-convert {command}: argument [^:]*{flag}"):
            parsers[command].parse_known_args([f"{flag}={value}"])


def test_an_absurd_number_is_all_that_is_said_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    absurd = ("--make-vocab-size-divisible-by", "9999999999999")
    assert main(["convert", "org/name", "/out", "--to", "torch", *absurd]) == 2
    assert capsys.readouterr().err == (
        "dist-convert convert: argument --make-vocab-size-divisible-by: not a whole number from 1 to 10000000: "
        "'9999999999999'\n"
        "  remedy:   see dist-convert convert --help\n"
    )


@pytest.mark.parametrize("name", sorted({name for command, name, _ in numbers() if command == "convert"}))
@pytest.mark.parametrize("value", [-1, 10**30, float("nan"), "many", [1]], ids=repr)
def test_a_function_refuses_absurd_numbers_by_the_options_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        dist_convert.convert("/none", "/out", to="torch", **{name: value})
    assert plain_name(str(caught.value).split()[0]) == name
