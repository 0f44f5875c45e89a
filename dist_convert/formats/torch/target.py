"""A checkpoint of rank files that is to be made: each file before any data, and a `Target` of them all."""

import hashlib
import itertools
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_convert.errors import PlanError, UsageError
from dist_convert.formats.megatron.target import MegatronTarget
from dist_convert.formats.pickles import pickled
from dist_convert.formats.saved import Container, SavedTensor, common_content, lay_out_container
from dist_convert.formats.torch.capacity_bins import FILE as BINS_FILE
from dist_convert.formats.torch.capacity_bins import load_bins, packed, place_bins
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.formats.torch.shards import Shard, model_prefixes
from dist_convert.formats.torch.survey import files_of_headers, open_catalog
from dist_convert.formats.torch.target_shards import lay_out_shards
from dist_convert.options import Options
from dist_convert.records import JsonObject, StoredTensor, TargetFile, TensorSpec, local_name
from dist_convert.write.checksums import KnownRanges, write_record_checksums
from dist_convert.write.files import Beside, Directory, make_file, opened, writing
from dist_convert.write.task import Target


def lay_out_shard(
    args: Mapping[str, object], iteration: int, chunks: Sequence[Sequence[TensorSpec]], file: str
) -> tuple[Shard, Container]:
    """One rank's file before any data: what `read_shard` will find in it, and the file, without memory for its tensors.

    The bytes follow from the first three arguments alone.

    Args:
        args, iteration: see `common_content`.
        chunks: per virtual pipeline stage, the tensors (name, safetensors dtype, shape) in their order.
        file: how messages and the tensors' places name it.

    Raises:
        PlanError: see `common_content`, or two tensors of one name.
    """
    saved = common_content(args, iteration, file)
    keys = itertools.count()
    models: dict[str, OrderedDict[str, SavedTensor]] = {}
    prefixes = model_prefixes(len(chunks))
    for prefix, specs in zip(prefixes, chunks, strict=True):
        model = OrderedDict((name, SavedTensor(next(keys), dtype, tuple(shape))) for name, dtype, shape in specs)
        if len(model) < len(specs):
            [(repeated, _)] = Counter(name for name, _, _ in specs).most_common(1)
            raise PlanError("two tensors have one name", file, tensor=repeated)
        models[prefix.rstrip(".") or "model"] = model
    tensors = [tensor for model in models.values() for tensor in model.values()]
    for prefix, model in models.items():
        saved[prefix] = OrderedDict((name, tensor.rebuilt()) for name, tensor in model.items())
    container = lay_out_container(pickled(saved), [tensor.size_bytes for tensor in tensors])
    places = tuple(
        {
            name: StoredTensor(prefix + name, file, t.dtype, t.shape, t.strides, container.storages[t.key].start_bytes)
            for name, t in model.items()
        }
        for prefix, model in zip(prefixes, models.values(), strict=True)
    )
    opaque: tuple[dict[str, str], ...] = tuple({} for _ in places)
    return Shard(file, container.size_bytes, iteration, dict(args), places, opaque), container


#: Values that are in the target beside the weights: (file, name) -> bytes.
Extras = Mapping[tuple[str, str], bytes]


@dataclass(frozen=True)
class TorchTarget(Target):
    """A checkpoint of rank files that is to be made.

    Attributes:
        target: what is to be made.
        files: the tensors of each rank file, by virtual stage.
        extras: values that are in the target beside the weights.
    """

    target: MegatronTarget
    files: Mapping[str, tuple[tuple[TensorSpec, ...], ...]]
    extras: Extras

    @property
    def settings(self) -> JsonObject:
        bins = hashlib.sha256(repr(sorted(self.extras.items())).encode()).hexdigest()
        return self.target.fingerprint | ({BINS_FILE: bins} if self.extras else {})

    def laid_out(self, file: str) -> tuple[Shard, Container]:
        """See `lay_out_shard`, of a planned file (see `records.name_at`)."""
        iteration = self.target.settings.iteration or 0
        return lay_out_shard(self.target.args.values, iteration, self.files[local_name(file)], file)

    def make_files(self, partial: Directory, files: Sequence[TargetFile], *, is_first: bool) -> None:
        for file in files:
            _, container = self.laid_out(file.name)
            make_file(partial, local_name(file.name), container.pieces, container.size_bytes)

    def complete(self, partial: Directory, files: Sequence[TargetFile], known: KnownRanges, *, is_first: bool) -> None:
        """See `Target`: what is in the files beside the weights, and the checksums of all that is in them."""
        for file in files:
            name = local_name(file.name)
            tensors = {tensor.name: tensor for tensor in file.tensors}
            with writing(partial / name), opened(partial, name, os.O_WRONLY) as descriptor:
                for tensor, data in ((tensor, data) for (of, tensor), data in self.extras.items() if of == name):
                    os.pwrite(descriptor, data, tensors[tensor].offset_bytes)
            _, container = self.laid_out(file.name)
            write_record_checksums(partial, name, file.size_bytes, container.storages, known.get(file.name, ()))
        if is_first:
            self.target.write_carried(partial)

    def beside(self) -> Mapping[str, Beside]:
        return self.target.beside()


def lay_out_torch(job: Options, directory: Path, target: MegatronTarget) -> TorchTarget:
    """The tensors of each file of a target; `directory` is the source's, for its capacity bins."""
    architecture, settings, args = target.architecture, target.settings, target.args
    files = lay_out_shards(target)
    if not job.load_capacity_bins:
        return TorchTarget(target, files, {})
    if not architecture.experts or settings.dialect.experts == "habana-dynamic":
        what, expected = "the target has no place for capacity bins", "experts in a layout other than habana-dynamic"
        found = f"--expert-layout {settings.dialect.experts}" if architecture.experts else "a model without experts"
        raise UsageError(what, expected=expected, found=found, remedy="leave --load-capacity-bins out")
    bins = load_bins(directory / BINS_FILE)
    extras: dict[tuple[str, str], bytes] = {}
    for (file, virtual), tensors in place_bins(bins, settings.grid, settings.chunks).items():
        specs = tuple((name, dtype, (len(values),)) for name, (dtype, values) in sorted(tensors.items()))
        models = files[file]
        files[file] = (*models[:virtual], models[virtual] + specs, *models[virtual + 1 :])
        prefix = model_prefixes(len(models))[virtual]
        extras |= {(file, prefix + name): packed(dtype, values) for name, (dtype, values) in tensors.items()}
    lengths = [len(values) for *_, name, _, values in bins if name == "capacity_bins"]
    if lengths:  # without it training makes no buffers for the bins, and refuses the file
        args.values["moe_capacity_bins_num"] = lengths[0]
        args.origins["moe_capacity_bins_num"] = f"flag --load-capacity-bins ({BINS_FILE})"
    return TorchTarget(target, files, extras)


def catalog_of_target(target: TorchTarget, planned: Sequence[str]) -> tuple[TorchCatalog, tuple[TargetFile, ...]]:
    """The target as a catalog, and its planned files (see `records.name_at`)."""
    headers = {file: target.laid_out(file)[0] for file in planned}
    catalog, _ = open_catalog(headers, target.target.architecture, with_tied_copies=True)
    return catalog, files_of_headers(headers)
