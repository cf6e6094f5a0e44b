"""What docs/deploy.md tells people to apply: manifests that Kubernetes takes, with options that exist and probes that fit."""

from __future__ import annotations

import copy
import json
import pathlib
import re
import shlex
from collections.abc import Callable
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from jaxserve.command_line import parse_args
from jaxserve.config import EngineConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
MANIFESTS = sorted((ROOT / "configs" / "kubernetes").glob("*.yaml"))
DOCS = (ROOT / "docs" / "deploy.md").read_text("utf-8")
KUBERNETES = "1.33"
LEADER_WORKER_SET = json.loads((pathlib.Path(__file__).parent / "leaderworkerset.json").read_text("utf-8"))


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


def check(document: dict[str, Any]) -> None:
    """Raises: jsonschema.ValidationError if Kubernetes would refuse it, or leave out a field that it does not know."""
    if document["kind"] != "LeaderWorkerSet":
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    jsonschema.validate(document, LEADER_WORKER_SET)
    template = document["spec"]["leaderWorkerTemplate"]
    for name in {"leaderTemplate", "workerTemplate"} & template.keys():
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": document["metadata"], "template": template[name]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_manifest_is_of_the_schemas_of_kubernetes(manifest: pathlib.Path) -> None:
    for document in yaml.safe_load_all(manifest.read_text("utf-8")):
        check(document)


BREAKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "Deployment": lambda spec: spec["template"]["spec"]["containers"][0].update(livenessprobe={}),
    "Service": lambda spec: spec["ports"][0].update(port="http"),
    "LeaderWorkerSet": lambda spec: spec["leaderWorkerTemplate"].update(restartPolicy="Always"),
    "LeaderWorkerSet, its pods": lambda spec: spec["leaderWorkerTemplate"]["workerTemplate"]["spec"].update(containers=None),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_manifest_that_kubernetes_would_refuse_is_noticed(kind: str) -> None:
    documents = [document for manifest in MANIFESTS for document in yaml.safe_load_all(manifest.read_text("utf-8"))]
    broken = copy.deepcopy(next(document for document in documents if document["kind"] == kind.partition(",")[0]))
    BREAKS[kind](broken["spec"])
    with pytest.raises(jsonschema.ValidationError):
        check(broken)


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


def commands() -> list[list[str]]:
    """Arguments of every `python -m jaxserve.serve` on the page, lines that go on joined."""
    text = DOCS.replace("\\\n", " ")
    found = re.findall(r"python -m jaxserve\.serve ([^'\n>]*)", text)
    return [shlex.split(arguments, comments=True) for arguments in found]


def test_every_command_of_the_page_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert len(commands()) >= 3
    for arguments in commands():
        assert parse_args(arguments).model.model


def test_every_file_and_option_of_the_page_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files = [ROOT / "docs" / name for name in re.findall(r"\]\((\w+\.md)\)", DOCS)] + [
        ROOT / name for name in re.findall(r"configs/[\w/-]+\.\w+", DOCS)
    ]
    assert all(file.is_file() for file in files), files
    (options,) = re.findall(r"^OPTIONS=(.*)$", DOCS, re.MULTILINE)
    parse_args(shlex.split(options))
    unit = (ROOT / "configs" / "systemd" / "jaxserve.service").read_text("utf-8")
    config = parse_args([])
    (stop_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(stop_s) > config.server.drain_timeout_s
    for name in set(re.findall(r"\$\{?([A-Z]+)", unit)):
        assert re.search(rf"^{name}=", DOCS, re.MULTILINE), name


def test_every_preset_is_on_the_page() -> None:
    rows = [line for line in DOCS.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`([\w-]+\.toml)`", row)}
    assert listed == {path.name for path in (ROOT / "configs").glob("*.toml")}
