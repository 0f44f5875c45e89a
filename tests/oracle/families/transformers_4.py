"""Reads converted models as another version of transformers does, in an environment that has it.

    python -m tests.oracle.families.transformers_4 '{"MODEL": ["CONVERTED DIRECTORY", "LOGITS FILE"]}'

prints a JSON object: the version, and of each model the values of its config that differ from those of its class with
the model's own arguments, the weights that were missing or superfluous, and the largest difference of the logits.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from tests.oracle.families.models import MODELS


def main(given: dict[str, tuple[str, str]]) -> None:
    """Read the directories."""
    found: dict[str, Any] = {"version": transformers.__version__}
    models = {model.name: model for model in MODELS}
    for name, (directory, logits) in given.items():
        config = AutoConfig.from_pretrained(directory)
        wanted = CONFIG_MAPPING[models[name].model_type](**_in_version_4(dict(models[name].config)))
        model, report = AutoModelForCausalLM.from_pretrained(
            directory, torch_dtype=torch.float32, output_loading_info=True
        )
        tied = ["lm_head.weight"] if config.tie_word_embeddings else []
        first = config.num_hidden_layers
        further = tuple(f"model.layers.{first + layer}." for layer in range(models[name].mtp_layers))
        expected = torch.load(logits)
        with torch.no_grad():
            difference = (model(expected["input_ids"]).logits - expected["logits"]).abs().max().item()
        found[name] = {
            "config": _differences(config.to_dict(), wanted.to_dict()),
            # Layers of multi-token prediction are superfluous, but for those of the published sizes.
            "faults": [w for kind in report.values() for w in kind if w not in tied and not w.startswith(further)],
            "logits": difference,
        }
    print(json.dumps(found))


def _in_version_4(config: dict[str, Any]) -> dict[str, Any]:
    rope = dict(config.pop("rope_parameters"))
    config |= {name: rope.pop(name) for name in ("partial_rotary_factor",) if name in rope}
    config["rope_theta"] = rope.pop("rope_theta")
    return config | {"rope_scaling": rope if rope["rope_type"] != "default" else None}


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, tuple[object, object]]:
    return {name: (found.get(name), wanted[name]) for name in wanted if found.get(name) != wanted[name]}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
