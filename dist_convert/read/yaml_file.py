"""YAML files of plain values, read in time and memory that follow from their size."""

from pathlib import Path
from typing import Any

from dist_convert.errors import CorruptFile
from dist_convert.read.source import read_small_file
from dist_convert.records import JsonObject

_WORDS = {"yes": True, "no": False, "true": True, "false": False, "on": True, "off": False}
_MOST_BITS = 64


def read_yaml(path: Path, most_bytes: int, *, numbers: bool) -> JsonObject:
    """A mapping from a YAML file: of texts, true, false, null, and lists and mappings of them.

    Dates and numbers in base 60 are texts, as in YAML 1.2.

    Args:
        numbers: whether numbers become int and float; else they, too, are the texts that stand there.

    Raises:
        CorruptFile: it is no such mapping, or too large, or has aliases, other tags, or a key twice.
        SourceError: it cannot be read.
    """
    import yaml  # only here: most runs have no such file

    content = read_small_file(path, most_bytes)
    try:
        root = yaml.compose(content.decode("utf-8"), yaml.SafeLoader)
        values = None if root is None else _value(root, set(), numbers)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise CorruptFile("not valid YAML", path, found=error) from error
    if isinstance(values, dict):
        return values
    raise CorruptFile("not a mapping in YAML", path, expected="name: value on each line", found=type(values).__name__)


def _value(node: Any, seen: set[int], numbers: bool) -> object:
    """What a node says. No node is visited twice: aliases may make far more of a file than it has bytes."""
    line, content = f"line {node.start_mark.line + 1}", node.value
    if id(node) in seen:
        raise ValueError(f"{line}: an alias, which is not supported")
    seen.add(id(node))
    match node.id, node.tag.removeprefix("tag:yaml.org,2002:"):
        case "mapping", "map":
            found = {}
            for key, value in content:
                if key.id != "scalar" or key.value in found:
                    raise ValueError(f"line {key.start_mark.line + 1}: a key that is repeated or is not text")
                found[key.value] = _value(value, seen, numbers)
            return found
        case "sequence", "seq":
            return [_value(item, seen, numbers) for item in content]
        case "scalar", "null":
            return None
        case "scalar", "bool" if content.lower() in _WORDS:
            return _WORDS[content.lower()]
        case "scalar", "int" | "float" as kind if numbers and ":" not in content:
            return _number(kind, content)
        case "scalar", "str" | "int" | "float" | "timestamp" | "merge" | "value":
            return content
    raise ValueError(f"{line}: an unsupported kind of value, {node.tag}")


def _number(kind: str, text: str) -> int | float:
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    number = int(text, base=0)
    if number.bit_length() > _MOST_BITS:
        raise ValueError(f"a number with more than {_MOST_BITS} bits")
    return number
