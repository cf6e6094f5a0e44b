"""What docs/deploy.md tells people to apply: manifests that are whole, with options that exist and probes that fit."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import yaml

from jaxserve.command_line import parse_args
from jaxserve.config import EngineConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
MANIFESTS = sorted((ROOT / "configs" / "kubernetes").glob("*.yaml"))


def pods(manifest: pathlib.Path) -> list[dict[str, Any]]:
    """The pod templates of a manifest, leaders before workers."""
    found: list[dict[str, Any]] = []
    for document in yaml.safe_load_all(manifest.read_text()):
        match document["kind"]:
            case "Deployment":
                found.append(document["spec"]["template"])
            case "LeaderWorkerSet":
                template = document["spec"]["leaderWorkerTemplate"]
                found += [template["leaderTemplate"], template["workerTemplate"]]
            case kind:
                assert kind == "Service", kind
    return found


def config_of(pod: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    monkeypatch.chdir(ROOT)
    (container,) = pod["spec"]["containers"]
    assert container["command"] == ["python", "-m", "jaxserve.serve"]
    return parse_args(container["args"])


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_manifest_starts_servers_that_can_start(manifest: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    templates = pods(manifest)
    configs = [config_of(pod, monkeypatch) for pod in templates]
    assert templates
    assert configs == configs[:1] * len(configs), "every host runs the same command"
    for pod in templates:
        (container,) = pod["spec"]["containers"]
        assert pod["spec"]["terminationGracePeriodSeconds"] > configs[0].server.drain_timeout_s
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["spec"]["volumes"]}
    (first,) = templates[0]["spec"]["containers"]
    assert first["ports"] == [{"containerPort": configs[0].server.port}]
    assert all(
        first[probe]["httpGet"] == {"path": "/health", "port": 8000} for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    )


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_mesh_has_the_devices_that_are_asked_for(manifest: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    templates, num_hosts = pods(manifest), 1
    for document in yaml.safe_load_all(manifest.read_text()):
        if document["kind"] == "LeaderWorkerSet":
            num_hosts = document["spec"]["leaderWorkerTemplate"]["size"]
    (amount,) = templates[0]["spec"]["containers"][0]["resources"]["limits"].values()
    assert config_of(templates[0], monkeypatch).parallel.axes == {"tensor": int(amount) * num_hosts}


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_service_finds_the_pods_that_answer(manifest: pathlib.Path) -> None:
    (service,) = (document for document in yaml.safe_load_all(manifest.read_text()) if document["kind"] == "Service")
    answering = [pod for pod in pods(manifest) if "ports" in pod["spec"]["containers"][0]]
    assert all(service["spec"]["selector"].items() <= pod["metadata"]["labels"].items() for pod in answering)
    assert answering
