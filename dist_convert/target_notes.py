"""What the user should know of a Megatron target before it is written, a line each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from dist_convert.job import ToMegatronJob
from dist_convert.megatron_target import MegatronTarget
from dist_convert.metadata.target_args import describe_origins
from dist_convert.metadata.target_tokenizer import is_hub_name
from dist_convert.plan.content import Content
from dist_convert.plan.node_local import local_name
from dist_convert.plan.stages import notes_on_target
from dist_convert.read.checkpoint import TRACKER_FILE
from dist_convert.report import human_notes

_PIPELINE_LAYOUT = (
    "virtual_pipeline_model_parallel_size", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
)  # fmt: skip
_EXPERT_GRID = ("expert_model_parallel_size", "expert_tensor_parallel_size")


def notes_to_megatron(
    job: ToMegatronJob,
    target: MegatronTarget,
    margs: Mapping[str, Any] | None,
    content: Content,
    places: Sequence[int],
    writable: Sequence[frozenset[str]],
) -> list[str]:
    """All notes on a target.

    Args:
        job: what was asked for.
        target, content: what will be written.
        margs: content of the margs file, if one was given.
        places, writable: for each rank, where its target lies, and the files that it can write.
    """
    notes = [*notes_on_target(target.architecture, target.grid), *_on_spelling(job, target)]
    sizes = {"tensor": (job.target_tensor_parallel_size, target.grid.tensor)}
    sizes["pipeline"] = job.target_pipeline_parallel_size, target.grid.pipeline
    taken = [f"{axis} {size}" for axis, (flag, size) in sizes.items() if flag is None and size > 1]
    if job.source_margs_file and taken:
        notes.append(f"parallel sizes of {job.source_margs_file.name}, as no flag gives them: {', '.join(taken)}")
    notes += _on_margs(job, target, margs or {})
    if job.iteration == 0:
        notes.append("iteration 0: Habana's Megatron and Megatron-Core up to 0.14 do not load it; use --iteration 1")
    notes += _on_tracker(job) + human_notes(content)
    if job.verbose:
        notes.append(describe_origins(target.args))
    return notes + _on_tokenizer(job) + _on_places(job, places, writable)


def _on_tracker(job: ToMegatronJob) -> list[str]:
    """What training loads from this root changes, where the tracker file names another iteration."""
    try:
        old = (job.save_dir / TRACKER_FILE).read_text(encoding="utf-8", errors="replace").strip()[:40]
    except OSError:
        return []
    new = "release" if job.iteration is None else str(job.iteration)
    return [f"warning: {job.save_dir / TRACKER_FILE} names {old!r}, and will name {new!r}"] if old != new else []


def _on_spelling(job: ToMegatronJob, target: MegatronTarget) -> list[str]:
    if not target.architecture.experts:
        given = {"--expert-layout": job.expert_layout != "sequential"}
        given["--target-expert-tensor-parallel-size"] = job.target_expert_tensor_parallel_size is not None
        return [f"{flag} has no effect: the model has no experts" for flag, is_given in given.items() if is_given]
    experts, norms = job.expert_layout, job.saver_transformer_impl
    if (experts, norms) in (("te-grouped", "local"), ("habana-dynamic", "transformer_engine")):
        return [
            f"warning: no version of Megatron has {experts} experts beside the norms of {norms}; te-grouped goes with "
            "--saver-transformer-impl transformer_engine, habana-dynamic with habana"
        ]
    return []


def _on_margs(job: ToMegatronJob, target: MegatronTarget, margs: Mapping[str, Any]) -> list[str]:
    """What a margs file says of the layout besides the two sizes that are taken from it, and the target does not have.

    The target's own args describe it as it is; a command line of the earlier training would not fit it.
    """
    is_taken = job.target_pipeline_parallel_size is None and target.grid.pipeline > 1
    names = (*(_PIPELINE_LAYOUT if is_taken else ()), *(_EXPERT_GRID if target.architecture.experts else ()))
    left = [
        f"{name} {margs[name]} ({target.args.values.get(name)} here)"
        for name in names
        if margs.get(name) and margs[name] != target.args.values.get(name)
    ]
    if not left:
        return []
    return [
        f"warning: the margs file's training had another layout, which only flags bring into the target: "
        f"{', '.join(left)}"
    ]


def _on_tokenizer(job: ToMegatronJob) -> list[str]:
    """The training may run on other machines, which have the tokenizer's path: no error."""
    asked = job.tokenizer_model
    if asked is None or os.path.lexists(asked) or is_hub_name(asked):
        return []
    return [
        f"warning: --tokenizer-model {asked} is not on this machine; the target's args name it as it is, and training "
        "must find it there"
    ]


def _on_places(job: ToMegatronJob, places: Sequence[int], writable: Sequence[frozenset[str]]) -> list[str]:
    if job.target_ranks_per_node is None:
        return []
    if not max(places):
        return ["--target-ranks-per-node has no effect: all ranks see one and the same --save-dir"]
    notes = []
    for place in range(max(places) + 1):
        ranks = [str(rank) for rank, of_rank in enumerate(places) if of_rank == place]
        files = sorted(local_name(file).partition("/")[0] for file in writable[places.index(place)])
        notes.append(f"own disk of {'ranks' if len(ranks) > 1 else 'rank'} {', '.join(ranks)}: {', '.join(files)}")
    return notes
