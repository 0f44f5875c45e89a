"""The jobs for Kubernetes fit the typed models of Kubeflow's own client, and start what they say."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_convert.cli.flags import options_from_flags, parse
from tests.distributed.launching import REPOSITORY

training = pytest.importorskip("kubeflow.training.models", reason="kubeflow-training is not installed")
kubernetes = pytest.importorskip("kubernetes.client.models", reason="kubernetes is not installed")

JOBS = {"kubernetes.yaml": "KubeflowOrgV1PyTorchJob", "gaudi-mpijob.yaml": "KubeflowOrgV1MPIJob"}
PLAIN_TYPES: dict[str, type] = {"int": int, "bool": bool, "str": str}


def job(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((REPOSITORY / "launch" / name).read_text())
    return found


def faults(kind: str, value: Any, path: str) -> Iterator[str]:
    """What does not fit a type of the clients' OpenAPI models, such as `V1Pod`, `list[str]` or `dict(str, str)`."""
    if inside := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            yield f"{path} is no list"
        else:
            for number, item in enumerate(value):
                yield from faults(inside[1], item, f"{path}[{number}]")
    elif inside := re.fullmatch(r"dict\(\w+, (.*)\)", kind):
        if not isinstance(value, dict):
            yield f"{path} is no map"
        else:
            for key, item in value.items():
                yield from faults(inside[1], item, f"{path}.{key}")
    elif kind in PLAIN_TYPES:
        if type(value) is not PLAIN_TYPES[kind]:
            yield f"{path}: {value!r} is no {kind}"
    elif model := getattr(training, kind, None) or getattr(kubernetes, kind, None):
        yield from faults_of_model(model, value, path)


def faults_of_model(model: Any, value: Any, path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path} is no {model.__name__}"
        return
    types = {key: model.openapi_types[name] for name, key in model.attribute_map.items()}
    for key, item in value.items():
        if key in types:
            yield from faults(types[key], item, f"{path}.{key}")
        else:
            yield f"{path}.{key} is no field of {model.__name__}"


@pytest.mark.parametrize("name", JOBS)
def test_a_job_has_only_fields_that_kubernetes_knows_of_the_right_types(name: str) -> None:
    assert list(faults(JOBS[name], job(name), name)) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spec": {"slotPerWorker": 1}}, "job.spec.slotPerWorker is no field of KubeflowOrgV1MPIJobSpec"),
        ({"spec": {"slotsPerWorker": "1"}}, "job.spec.slotsPerWorker: '1' is no int"),
    ],
)
def test_a_misspelt_field_or_a_wrong_type_is_found(change: dict[str, Any], fault: str) -> None:
    assert list(faults("KubeflowOrgV1MPIJob", change, "job")) == [fault]


def containers(name: str) -> list[dict[str, Any]]:
    spec = job(name)["spec"]
    replicas = spec.get("pytorchReplicaSpecs") or spec["mpiReplicaSpecs"]
    return [container for of in replicas.values() for container in of["template"]["spec"]["containers"]]


@pytest.mark.parametrize("name", JOBS)
def test_the_arguments_are_a_command_line_of_ours(name: str) -> None:
    arguments = [container["args"] for container in containers(name) if "args" in container]
    assert arguments
    for words in arguments:
        parsed = options_from_flags(parse(words))
        assert Path(parsed.source).is_relative_to("/shared")
        assert parsed.target.is_relative_to("/shared")


@pytest.mark.parametrize("name", JOBS)
def test_the_shell_starts_torchrun_with_those_arguments(name: str) -> None:
    for container in containers(name):
        if "command" in container:
            bash, dash_c, script, *names = container["command"]
            assert (bash, dash_c, len(names)) == ("bash", "-c", 1)
            assert subprocess.run(["bash", "-n", "-c", script], check=False).returncode == 0
            assert "exec torchrun --nnodes" in script
            assert '-m dist_convert "$@"' in script


def test_gaudi_workers_ask_for_cards_and_hugepages_and_the_launcher_for_none() -> None:
    launcher, worker = containers("gaudi-mpijob.yaml")
    assert worker["resources"]["limits"]["habana.ai/gaudi"] == "8"
    assert worker["resources"]["limits"]["hugepages-2Mi"].endswith("Mi")
    assert worker["resources"]["requests"] == worker["resources"]["limits"]  # which Kubernetes demands of hugepages
    assert "habana.ai/gaudi" not in launcher["resources"]["limits"]
    assert "--nproc-per-node 8" in launcher["command"][2]
