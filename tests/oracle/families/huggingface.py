"""Saves tiny models as people publish them, with transformers' own logits in `logits.pt`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tests.oracle.families.models import TinyModel

#: Of the tensors that no dtype of the model changes.
_ROUTER_BIAS = "e_score_correction_bias"
_INDEX = "model.safetensors.index.json"


def save(model: TinyModel, directory: Path) -> None:
    """Save a model with random weights, and token ids with the logits of transformers for them."""
    built = build(model)
    built.save_pretrained(directory, max_shard_size="300KB")
    if model.mtp_layers:
        add_prediction_layers(directory, model.mtp_layers)
    tokens = torch.randint(0, built.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = {"input_ids": tokens, "logits": built(tokens).logits}
    if model.mtp_layers:
        found["mtp_logits"] = prediction_logits(directory, tokens, model.mtp_layers)
    torch.save(found, directory / "logits.pt")


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory's safetensors files."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@torch.no_grad()
def build(model: TinyModel) -> PreTrainedModel:
    """A model in float32 whose every kind of weight shows in its logits."""
    torch.manual_seed(7)
    config = CONFIG_MAPPING[model.model_type](**model.config)
    built: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    biases = [(name, buffer) for name, buffer in built.named_buffers() if name.endswith(_ROUTER_BIAS)]
    for name, weight in [*built.named_parameters(), *biases]:
        if "norm" in name:
            weight.copy_((0 if model.model_type.startswith("gemma") else 1) + 0.2 * torch.randn_like(weight))
        elif name.endswith(_ROUTER_BIAS):
            weight.copy_(0.1 * torch.rand(weight.shape))
        elif name.endswith(("gate.weight", "router.weight")):
            weight.copy_(0.5 * torch.randn_like(weight))  # far from ties: both sides must choose the same experts
        elif "bias" in name or name.endswith("sinks"):
            weight.copy_(0.3 * torch.randn_like(weight))
        else:
            weight.copy_(0.08 * torch.randn_like(weight))
    return built


def add_prediction_layers(directory: Path, count: int) -> None:
    """Add what published DeepSeek-V3 and GLM-4.5 have one of: further layers, which predict tokens after the next."""
    config, index = (json.loads((directory / name).read_text()) for name in ("config.json", _INDEX))
    found, layers, hidden = tensors(directory), config["num_hidden_layers"], config["hidden_size"]
    last, generator = f"model.layers.{layers - 1}.", torch.Generator().manual_seed(11)
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    more: dict[str, torch.Tensor] = {}
    for at in (f"model.layers.{layers + number}." for number in range(count)):
        more |= {
            name.replace(last, at): (1 if "norm" in name else 0) + 0.1 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in found.items()
            if name.startswith(last)
        }
        for name in ("enorm", "hnorm", "shared_head.norm"):
            more[f"{at}{name}.weight"] = 1 + 0.2 * torch.randn(hidden, generator=generator)
        more[f"{at}eh_proj.weight"] = 0.08 * torch.randn(hidden, 2 * hidden, generator=generator)
        more[f"{at}embed_tokens.weight"] = found["model.embed_tokens.weight"].clone()
        more[f"{at}shared_head.head.weight"] = found[head].clone()
    save_file(more, directory / "model-mtp.safetensors", {"format": "pt"})
    index["weight_map"] |= dict.fromkeys(more, "model-mtp.safetensors")
    (directory / _INDEX).write_text(json.dumps(index, indent=2))
    (directory / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": count}, indent=2))


@torch.no_grad()
def prediction_logits(directory: Path, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Logits of each prediction layer, by the decoder layer of transformers and the published formula around it."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    config, stored = model.config, tensors(directory)
    rows, found = model.model(tokens).last_hidden_state, []
    for number in range(config.num_hidden_layers, config.num_hidden_layers + count):
        at = f"model.layers.{number}."
        own = {name.removeprefix(at): tensor for name, tensor in stored.items() if name.startswith(at)}
        tokens = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], 1)
        rows = _predicted(model, own, tokens, rows)
        found.append(rows @ own["shared_head.head.weight"].T)
    return torch.stack(found)


def _predicted(
    model: PreTrainedModel, own: dict[str, torch.Tensor], ahead: torch.Tensor, before: torch.Tensor
) -> torch.Tensor:
    """What a prediction layer makes of the rows before it and the tokens ahead, normed."""
    config = model.config
    layer = type(model.model.layers[-1])(config, config.num_hidden_layers - 1).eval()
    experts = [f"mlp.experts.{expert}" for expert in range(config.n_routed_experts)]
    gate_up = [[own[f"{expert}.{name}_proj.weight"] for name in ("gate", "up")] for expert in experts]
    own["mlp.experts.gate_up_proj"] = torch.stack([torch.cat(both) for both in gate_up])
    own["mlp.experts.down_proj"] = torch.stack([own[f"{expert}.down_proj.weight"] for expert in experts])
    layer.load_state_dict({name: tensor for name, tensor in own.items() if name in layer.state_dict()})

    def norm(rows: torch.Tensor, name: str) -> torch.Tensor:
        return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * own[name]

    length = ahead.shape[1]
    both = torch.cat([norm(own["embed_tokens.weight"][ahead], "enorm.weight"), norm(before, "hnorm.weight")], -1)
    rows = both @ own["eh_proj.weight"].T
    places = torch.arange(length)[None]
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    rows = layer(rows, position_embeddings=model.model.rotary_emb(rows, places), attention_mask=mask)
    return norm(rows[0] if isinstance(rows, tuple) else rows, "shared_head.norm.weight")
