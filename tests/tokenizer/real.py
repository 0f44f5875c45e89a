"""Real tokenizer files out of Python packages, and a reader of converted tokenizers in either version of transformers.

`launch/test.sh` unpacks the packages and names their directory; none of their code is imported.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import environment
from tests.warm import Process

ROOT = Path(__file__).parents[2]
PACKAGES = Path(os.environ.get("DIST_CONVERT_REAL_TOKENIZERS", ROOT / ".cache" / "real-tokenizers"))
#: Meta's for Llama 3, in tiktoken's lines.
LLAMA3 = PACKAGES / "llama_models" / "llama3" / "tokenizer.model"
#: Mistral's for Mistral 7B and Mixtral 8x7B, a SentencePiece model of the same kind as Llama 2's.
MIXTRAL = PACKAGES / "mistral_common" / "data" / "tokenizer.model.v1"

VERSIONS = {"transformers 5": sys.executable, "transformers 4": os.environ.get("DIST_CONVERT_TRANSFORMERS_4_PYTHON")}

_PROGRAM = """
import json, sys
import transformers
from transformers import AutoTokenizer
wanted, found = json.load(sys.stdin), {"version": transformers.__version__, "tokenizers": {}}
for name, directory in wanted["directories"].items():
    t = AutoTokenizer.from_pretrained(directory)
    ids = t(wanted["lines"])["input_ids"]
    values = {"ids": ids, "decoded": t.batch_decode(ids, skip_special_tokens=True), "size": len(t)}
    values["pair"] = t("one", "two")["input_ids"]
    values["inputs"] = sorted(t("one").keys())
    values["special"] = [t.bos_token_id, t.eos_token_id, t.pad_token_id]
    values["tokens"] = t.convert_ids_to_tokens([i for i in wanted["numbers"] if i < len(t)])
    values["chats"] = []
    for chat in wanted["chats"] if t.chat_template else []:
        text = t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        values["chats"].append([text, t(text, add_special_tokens=False)["input_ids"]])
    values["as text"] = t(wanted["lines"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    found["tokenizers"][name] = values
json.dump(found, sys.stdout)
"""


def require_real_files() -> None:
    """Skip where the packages were never unpacked; fail where they were to be and are not."""
    missing = [str(path) for path in (LLAMA3, MIXTRAL) if not path.is_file()]
    if missing and "DIST_CONVERT_REAL_TOKENIZERS" in os.environ:
        pytest.fail(f"not there: {missing}")
    if missing:
        pytest.skip("launch/test.sh unpacks the real tokenizer files")


def load_and_encode(
    version: str,
    directories: Mapping[str, Path],
    lines: Sequence[str],
    *,
    chats: Sequence[Any] = (),
    numbers: Sequence[int] = (),
) -> dict[str, Any]:
    """What transformers makes of each directory: ids with and without special tokens in text, and more."""
    python = VERSIONS[version]
    if not python:
        pytest.skip("DIST_CONVERT_TRANSFORMERS_4_PYTHON names no Python with transformers 4")
    wanted = {"lines": lines, "chats": chats, "numbers": numbers}
    wanted["directories"] = {name: str(path) for name, path in directories.items()}
    done = Process(["-c", _PROGRAM], environment(), python=python, entered=json.dumps(wanted)).finish()
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["version"].startswith(version[-1] + ".")
    tokenizers: dict[str, Any] = found["tokenizers"]
    return tokenizers
