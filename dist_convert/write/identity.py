"""What a half-made target is made from: by this a later run knows whether it may go on with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from dist_convert.units import human_bytes

FORMAT = 1
#: Flags that may change from one run to the next without a word, because no byte depends on them.
FREE_FLAGS = frozenset(
    {
        "device", "placement", "max_memory_per_rank_bytes", "dry_run", "overwrite", "verbose", "allow_overflow",
        "push_to_hub", "private", "timeout_seconds", "verify", "trace", "save_per_node",
    }
)  # fmt: skip
_SHOWN = 5


def identity(
    plan: str, source: Mapping[str, Any], settings: Mapping[str, Any], flags: Mapping[str, Any], version: str
) -> dict[str, Any]:
    """A record in JSON values.

    Args:
        plan: digest of the content.
        source: file -> [size in bytes, time of the last change in ns, digest of the header].
        settings: what else the bytes of weights files depend on.
        flags: as the user gave them; only to say what changed.
        version: of this package; only to say what changed.
    """
    return {
        "format": FORMAT,
        "plan": plan,
        "source": {file: list(fields) for file, fields in sorted(source.items())},
        "settings": dict(settings),
        "flags": {name: value for name, value in flags.items() if name not in FREE_FLAGS},
        "version": version,
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What keeps a run from going on where an earlier one stopped, for people; empty where nothing does."""
    if old.get("format") != new["format"]:
        return [f"format {old.get('format')} of the journal, {new['format']} now"]
    found = [*_source_differences(old["source"], new["source"])]
    if (old["plan"], old["settings"]) != (new["plan"], new["settings"]) and not found:
        found = [
            *_value_differences("--", old["flags"], new["flags"]),
            *_value_differences("argument ", old["settings"], new["settings"]),
        ] or [f"version {old['version']} of the converter, {new['version']} now, which plans otherwise"]
    return _first(found)


def differences_of_complete(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What keeps a complete target from being what a run would make, for people; both are facts of a manifest."""
    old_files, new_files = (
        {file: tuple(known.values()) for file, known in facts["source"]["files"].items()} for facts in (old, new)
    )
    found = [*_source_differences(old_files, new_files), *_value_differences("--", old["flags"], new["flags"])]
    if not found and (old["plan"], old["settings"]) != (new["plan"], new["settings"]):
        found = ["its files are planned otherwise, or its arguments are others"]
    return _first(found) or ["files that it had are gone or have other sizes"]


def _first(found: list[str]) -> list[str]:
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return [*found[:_SHOWN], *more]


def _source_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for file in sorted(old.keys() | new.keys()):
        if file not in new or file not in old:
            yield f"{file} is {'new' if file in new else 'gone'}"
            continue
        (old_bytes, old_ns, old_header), (new_bytes, new_ns, new_header) = old[file], new[file]
        if old_bytes != new_bytes:
            yield f"{file} had {human_bytes(old_bytes)} ({old_bytes} bytes), now {new_bytes}"
        elif old_ns != new_ns:
            yield f"{file} was last changed {_time(old_ns)}, now {_time(new_ns)}"
        elif old_header != new_header:
            yield f"{file} has another header"


def _value_differences(kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            label = kind + (name.removesuffix("_bytes").replace("_", "-") if kind == "--" else name)
            yield f"{label} was {old.get(name)}, now {new.get(name)}"


def _time(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds / 1e9).astimezone().isoformat(sep=" ", timespec="milliseconds")
