"""What the files of `cluster/` name exists: in the code, in the image, and in each other.

A schema accepts any text as a command, a variable, a port or a host. Here each is looked up
where it comes from, so that none can be renamed in one place alone.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest
import ray
import ray.scripts.scripts
import torch
from ray._private import ray_constants

from cluster.make_secrets import FILES
from tests.cluster.manifests import (
    CLUSTER,
    OVERLAYS,
    ROOT,
    Tree,
    compose,
    containers,
    hook,
    nodes,
    pods,
    ray_up,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

RAY = Path(ray.__file__).parent
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
OWN_IMAGE = "upreid-ray:"
# KubeRay's default of `ray start --metrics-export-port`.
RAY_PORTS = {"6379", "8265", "8080"}
# Programs of Debian's base system; all others come from the lock or from `apt-get install`.
BASE_PROGRAMS = {"bash", "sh", "sleep", "grep", "break", "for", "do", "done", "exec"}
# What programs of other images read, from their documents.
FOREIGN = {
    *("POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD", "PGDATA"),
    *("MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD", "NVIDIA_DRIVER_CAPABILITIES"),
    *(
        "PATH",
        "XDG_CACHE_HOME",
        "MPLCONFIGDIR",
        "TRITON_HOME",
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONUNBUFFERED",
    ),
}
GIGABYTES = {"Gi": 1.0, "Mi": 2.0**-10, "gb": 1.0, "g": 1.0}
PROPORTION = ray_constants.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION
NEVER_CAPPED_BELOW = ray_constants.REQUIRE_SHM_SIZE_THRESHOLD / 2**30


def source(package: str, *files: str) -> str:
    """Return the text of files of a package, whose import would take seconds."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return "".join((Path(spec.origin).parent / file).read_text() for file in files)


def commands(words: list[str]) -> Iterator[list[str]]:
    """Yield the commands of a container, those in the text of a shell one by one."""
    if words[0].rpartition("/")[2] in ("bash", "sh") and "-c" in words[:-1]:
        text = words[-1].replace("\\\n", " ")
        for line in re.split(r"\n|;|&&|\|\|", text):
            if found := shlex.split(line, posix=True):
                yield found
    else:
        yield words


def check_command(words: list[str]) -> None:
    """Check that a command's program is in the image, and that it knows the options."""
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    if words[0] in ("exec", "do"):
        words = words[1:]
    if not words or words[0] in BASE_PROGRAMS:
        return
    program, *rest = words
    if program == "python":
        option, script = rest
        assert option == "-c"
        compile(script, "the script", "exec")
        return
    if program == "wget":
        assert re.search(rf"apt-get install .* {program}\b", DOCKERFILE)
        return
    assert program in distribution(program).entry_points.select(group="console_scripts").names
    name, *options = rest
    if program == "mlflow":
        known = source("mlflow", "cli/__init__.py", "utils/cli_args.py")
        assert f"\ndef {name}(" in known
        assert all(f'"{option.split("=")[0]}' in known for option in options), options
        return
    assert program == "ray"
    ray_cli = ray.scripts.scripts.cli
    # It refuses options that it does not know, and values of another type.
    with click.Context(ray_cli) as parent:
        ray_cli.commands[name].make_context(name, options, parent=parent)


def kubernetes_commands(pod: Tree) -> Iterator[list[str]]:
    """Yield the commands of the containers of our own image."""
    for container in containers(pod):
        if OWN_IMAGE in container["image"]:
            hooks = container.get("lifecycle", {}).values()
            for words in [container.get("command"), *(h["exec"]["command"] for h in hooks)]:
                yield from commands(words) if words else ()


def test_every_command_is_one_of_the_image_with_options_that_it_has(
    rendered: dict[str, list[Tree]],
) -> None:
    found: list[list[str]] = []
    for overlay in OVERLAYS:
        for _, pod in pods(rendered[overlay]):
            found += kubernetes_commands(pod)
    for service in compose()["services"].values():
        if OWN_IMAGE in service["image"]:
            found += commands(service["command"])
            found += [service["healthcheck"]["test"][1:]] if "healthcheck" in service else []
    found += [
        shlex.split(line)
        for name in ("head_start_ray_commands", "worker_start_ray_commands")
        for line in ray_up()[name]
    ]
    for words in found:
        check_command(words)
    assert {words[0] for words in found} >= {"ray", "python", "wget"}


def test_kuberay_starts_ray_with_options_that_it_has(rendered: dict[str, list[Tree]]) -> None:
    options = {
        name.removeprefix("--")
        for parameter in ray.scripts.scripts.cli.commands["start"].params
        for name in parameter.opts
    }
    for overlay in OVERLAYS:
        spec = next(r for r in rendered[overlay] if r["kind"] == "RayCluster")["spec"]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert group["rayStartParams"].keys() <= options


def is_read(variable: str) -> bool:
    """Tell whether something reads an environment variable: our code, or a library's."""
    if variable in FOREIGN:
        return True
    if variable.startswith("AWS_"):
        return f"'{variable}'" in source("botocore", "configprovider.py", "credentials.py")
    if variable.startswith("MLFLOW_"):
        return f'"{variable}"' in source(
            "mlflow", "environment_variables.py", "server/__init__.py"
        )
    folders = {"RAY_": RAY, "UPREID_": ROOT / "upreid_ray"}
    folder = folders[variable[: variable.index("_") + 1]]
    in_ray = ("_private/authentication", "_common/usage", "_private/runtime_env")
    files = [
        file
        for place in (in_ray if variable.startswith("RAY_") else ("",))
        for file in (folder / place).rglob("*.py")
    ]
    # In quotes, as where it is read; what a comment says of it does not count.
    return any(f'"{variable}"' in file.read_text() for file in files)


def settings(entries: dict[str, str] | list[str]) -> dict[str, str]:
    """Return the variables of a service of Docker Compose, however they are written."""
    return entries if isinstance(entries, dict) else dict(e.split("=", 1) for e in entries)


def in_secrets(file: str) -> set[str]:
    """Return the variables of a file of passwords."""
    return {line.split("=")[0] for line in FILES[Path(file).name].split()}


def test_every_environment_variable_is_read_by_something(
    rendered: dict[str, list[Tree]],
) -> None:
    named = set(re.findall(r"^(?:ENV|   ) ([A-Z_]+)=\S", DOCKERFILE, re.MULTILINE))
    for _, pod in pods(rendered["gpu"]):
        named |= {v["name"] for c in containers(pod) for v in c.get("env", [])}
    for resource in rendered["gpu"]:
        if resource["metadata"]["name"] == "upreid-environment":
            named |= resource["data"].keys()
    for service in compose()["services"].values():
        named |= settings(service.get("environment", {})).keys()
        named |= set(re.findall(r"\b([A-Z_]{5,})=", " ".join(service.get("command", []))))
    for file in FILES:
        named |= in_secrets(file) - {"auth_token"}  # which KubeRay reads
    assert len(named) > 15
    assert not {name for name in named if not is_read(name)}


def test_compose_and_kubernetes_tell_the_jobs_the_same(rendered: dict[str, list[Tree]]) -> None:
    (environment,) = (
        r["data"] for r in rendered["gpu"] if r["metadata"]["name"] == "upreid-environment"
    )
    for name in ("head", "worker", "gpu-worker"):
        assert settings(compose()["services"][name]["environment"]) == environment
    # What `ray up`'s own file has to hold.
    comment = (CLUSTER / "ray-up.yaml").read_text().split("cluster_name")[0]
    assert set(re.findall(r"[A-Z]+_[A-Z_]+", comment)) < {*environment, "GPU"}


def test_a_variable_in_a_command_is_given_to_its_container(
    rendered: dict[str, list[Tree]],
) -> None:
    for name, pod in pods(rendered["gpu"]):
        for container in containers(pod):
            given = {v["name"] for v in container.get("env", [])}
            texts = [v.get("value", "") for v in container.get("env", [])]
            used = re.findall(r"\$\((\w+)\)", " ".join([*texts, *container.get("command", [])]))
            assert set(used) <= given, name
    for name, service in compose()["services"].items():
        given = {*settings(service.get("environment", {}))}
        for file in service["env_file"]:
            given |= in_secrets(file)
        words = [*service.get("command", []), *service.get("entrypoint", [])]
        assert set(re.findall(r"\$\$(\w+)", " ".join(words))) <= given, name


def ports_of(words: list[str]) -> set[str]:
    """Return the ports that a program of the image listens on."""
    if words[0] == "ray":
        return RAY_PORTS
    return set(re.findall(r"--port=(\d+)", " ".join(words)))


def hosts_in(tree: Any) -> set[tuple[str, str]]:
    """Return all `host:port` that stand in the texts of a tree, but for those of this host."""
    texts = " ".join(value for _, value in nodes(tree) if isinstance(value, str))
    found = re.findall(r"(?:\b|//|@)([a-z][a-z0-9-]*):(\d{4,5})\b", texts)
    return {(host, port) for host, port in found if host != "localhost"}


def test_every_address_is_a_service_on_a_port_on_which_its_pod_listens(
    rendered: dict[str, list[Tree]],
) -> None:
    for overlay in OVERLAYS:
        resources = rendered[overlay]
        served = set()
        for service in (r for r in resources if r["kind"] == "Service"):
            selector = service["spec"]["selector"].items()
            (pod,) = (
                r["spec"]["template"]["spec"]
                for r in resources
                if r["kind"] in ("Deployment", "StatefulSet")
                and selector <= r["spec"]["template"]["metadata"]["labels"].items()
            )
            (container,) = pod["containers"]
            offered = {port["containerPort"] for port in container["ports"]}
            for port in service["spec"]["ports"]:
                assert port.get("targetPort", port["port"]) in offered, service["metadata"]
                served.add((service["metadata"]["name"], str(port["port"])))
            if OWN_IMAGE in container["image"]:
                assert {str(port) for port in offered} == ports_of(container["command"])
        assert hosts_in(resources) == served


def test_probes_ask_a_port_and_a_path_that_are_served(rendered: dict[str, list[Tree]]) -> None:
    for name, pod in pods(rendered["gpu"]):
        for container in containers(pod):
            names = {port["name"] for port in container.get("ports", [])}
            for kind in ("readinessProbe", "livenessProbe", "startupProbe"):
                if get := container.get(kind, {}).get("httpGet"):
                    assert get["port"] in names, name
                    if OWN_IMAGE in container["image"]:
                        assert f'"{get["path"]}"' in source("mlflow", "server/__init__.py"), (
                            name
                        )
    (url,) = re.findall(r":8265(/[\w/]+)", str(compose()["services"]["head"]["healthcheck"]))
    dashboard = source("ray", "dashboard/modules/reporter/reporter_head.py")
    assert f'get("{url}")' in dashboard


def test_ray_has_one_port_for_metrics_everywhere(rendered: dict[str, list[Tree]]) -> None:
    spec = next(r for r in rendered["gpu"] if r["kind"] == "RayCluster")["spec"]
    ports = {
        port["name"]: port["containerPort"]
        for port in spec["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    }
    assert {str(port) for port in ports.values()} == RAY_PORTS
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        scraped = group["template"]["metadata"]["annotations"]["prometheus.io/port"]
        assert scraped == str(ports["metrics"])
    for name in ("head", "worker", "gpu-worker"):
        command = compose()["services"][name]["command"]
        assert f"--metrics-export-port={ports['metrics']}" in command
    (policy,) = (
        r
        for r in rendered["gpu"]
        if (r["kind"], r["metadata"]["name"]) == ("NetworkPolicy", "ray")
    )
    open_to = {p["port"] for rule in policy["spec"]["ingress"] for p in rule.get("ports", [])}
    assert open_to == {ports["metrics"], ports["dashboard"]}


def test_the_pod_of_a_worker_waits_for_training_to_end_and_not_for_its_own_shell(
    rendered: dict[str, list[Tree]], tmp_path: Path
) -> None:
    command, processes = hook(rendered["gpu"]), tmp_path / "proc"
    for pid, title in (("1", "\0".join(command)), ("2", "ray::RayTrainWorker")):
        (processes / pid).mkdir(parents=True)
        (processes / pid / "cmdline").write_text(title)
    programs = {
        "ray": f"echo $* >> {tmp_path}/told",
        "sleep": f"rm {processes}/2/cmdline; echo slept >> {tmp_path}/told",
    }
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    *shell, script = command
    subprocess.run(
        [*shell, script.replace("/proc", str(processes))],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        timeout=60,
        check=True,
        capture_output=True,
    )

    told, *slept = (tmp_path / "told").read_text().splitlines()
    assert told.startswith("drain-node")
    assert slept == ["slept"]


def test_compose_names_services_and_ports_that_it_has() -> None:
    tree = compose()
    own = {
        name: ports_of([word for words in commands(service["command"]) for word in words])
        for name, service in tree["services"].items()
        if OWN_IMAGE in service["image"]
    }
    listens = own | {"postgres": {"5432"}, "s3": {"9000"}}
    for host, port in hosts_in(tree["services"]):
        assert port in listens[host], (host, port)
    for name, service in tree["services"].items():
        for published in service.get("ports", []):
            assert published.split(":")[-1] in listens[name], name
        assert set(service.get("depends_on", [])) <= tree["services"].keys()
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in tree["volumes"], name
    used = {v.split(":")[0] for s in tree["services"].values() for v in s.get("volumes", [])}
    assert used == tree["volumes"].keys()


def test_the_documents_name_the_driver_that_cuda_needs() -> None:
    # The table that the document links to.
    driver = {"12": 525, "13": 580}[str(torch.version.cuda).partition(".")[0]]
    text = " ".join((ROOT / "docs/operations.md").read_text().split())

    assert (
        f"has CUDA {torch.version.cuda}, which needs NVIDIA's driver {driver} or newer" in text
    )


def test_every_volume_of_a_pod_is_mounted_and_every_mount_has_one(
    rendered: dict[str, list[Tree]],
) -> None:
    for overlay in OVERLAYS:
        for resource in rendered[overlay]:
            claims = resource.get("spec", {}).get("volumeClaimTemplates", [])
            volumes = {claim["metadata"]["name"] for claim in claims}
            for name, pod in pods([resource]):
                declared = volumes | {volume["name"] for volume in pod.get("volumes", [])}
                mounts = {m["name"] for c in containers(pod) for m in c["volumeMounts"]}
                assert mounts == declared, name


def test_what_the_image_copies_reaches_the_build_and_stands_where_jobs_look(
    rendered: dict[str, list[Tree]],
) -> None:
    reaches = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().split()
        if line.startswith("!")
    }
    copied = set()
    for sources in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE):
        copied |= set(sources.split())
    copied |= set(re.findall(r"bind,source=([^,\s]+)", DOCKERFILE))
    assert copied == reaches
    assert all((ROOT / name).exists() for name in copied)
    (folder,) = re.findall(r"^WORKDIR (/home\S+)$", DOCKERFILE, re.MULTILINE)
    assert f"COPY jobs {folder}/jobs" in DOCKERFILE
    for file in (CLUSTER / "kubernetes" / "jobs").glob("*.yaml"):
        assert f"python {folder}/jobs/" in file.read_text()


def size(text: str) -> float:
    """Return a size in GiB."""
    number = text.rstrip("BGMbgi")
    return float(number) * GIGABYTES[text.removeprefix(number)]


def store_fits(memory: float, shared: float) -> bool:
    """Tell whether Ray keeps its objects in /dev/shm, whose size is `shared` GiB.

    Its rule: 30% of the memory, but at most 95% of /dev/shm or 10 GB, whichever is larger. What
    does not fit goes to /tmp, with a warning.
    """
    return min(PROPORTION * memory, max(NEVER_CAPPED_BELOW, 0.95 * shared)) <= shared


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_keeps_its_objects_in_shared_memory(
    rendered: dict[str, list[Tree]], overlay: str
) -> None:
    spec = next(r for r in rendered[overlay] if r["kind"] == "RayCluster")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        memory = size(pod["containers"][0]["resources"]["limits"]["memory"])
        (shm,) = (v["emptyDir"]["sizeLimit"] for v in pod["volumes"] if v["name"] == "shm")
        assert store_fits(memory, size(shm)), (memory, shm)
    for name in ("head", "worker", "gpu-worker"):
        service = compose()["services"][name]
        memory = size(service.get("mem_limit", "100000g"))
        assert store_fits(memory, size(service["shm_size"])), name


def test_the_local_overlay_fits_the_machine_that_it_names(
    rendered: dict[str, list[Tree]],
) -> None:
    """With as many workers as it allows, beside KubeRay and what Kubernetes itself needs."""
    text = (CLUSTER / "kubernetes/overlays/local/kustomization.yaml").read_text()
    cores, memory = re.findall(r"with (\d+) cores and (\d+) GB", text)[0]
    needed = {"cpu": 1.0, "memory": 1.5}
    for resource in rendered["local"]:
        spec = resource.get("spec", {})
        bounds = [c["resources"] for _, p in pods([resource]) for c in p["containers"]]
        if resource["kind"] == "RayCluster":
            (group,) = spec["workerGroupSpecs"]
            (worker,) = group["template"]["spec"]["containers"]
            bounds += [worker["resources"]] * (group["maxReplicas"] - 1)
            bounds.append(spec["autoscalerOptions"]["resources"])
        for bound in bounds:
            cpu, needs = bound["requests"]["cpu"], bound["requests"]["memory"]
            needed["cpu"] += float(cpu[:-1]) / 1000 if cpu.endswith("m") else float(cpu)
            needed["memory"] += size(needs)
    assert needed["cpu"] <= float(cores)
    assert needed["memory"] * 2**30 <= float(memory) * 1e9, needed
