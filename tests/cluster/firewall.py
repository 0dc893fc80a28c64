"""The NetworkPolicies of `cluster/kubernetes`, as rules of nftables for hosts of their own."""

import subprocess
from typing import Any

from tests.cluster.manifests import Tree
from tests.cluster.network import Host

Labels = dict[str, str]


def is_selected(labels: Labels, selector: dict[str, Any]) -> bool:
    """Tell whether a selector of pods takes a pod with these labels."""
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )


def rules(
    policies: list[Tree], pods: dict[str, Labels], hosts: dict[str, Host]
) -> dict[str, str]:
    """Return the rules of each host: what reaches it, and what it may begin itself.

    Args:
        policies: All NetworkPolicies of the namespace.
        pods: The labels of the pod that each host stands for.
        hosts: The hosts, by the same names.
    """
    found = {}
    for name, labels in pods.items():
        specs = [p["spec"] for p in policies if is_selected(labels, p["spec"]["podSelector"])]
        lines = {"input": list[str](), "output": list[str]()}
        for rule in (rule for spec in specs for rule in spec.get("ingress", [])):
            sources = [
                hosts[other].address
                for other in pods
                if any(is_selected(pods[other], peer["podSelector"]) for peer in rule["from"])
            ]
            ports = [str(port["port"]) for port in rule.get("ports", [])]
            where = f"tcp dport {{ {', '.join(ports)} }} " if ports else ""
            if sources:
                lines["input"].append(f"ip saddr {{ {', '.join(sources)} }} {where}accept")
        kinds = {kind for spec in specs for kind in spec["policyTypes"]}
        chains: list[str] = []
        for chain, kind, loopback in (
            ("input", "Ingress", 'iif "lo" accept'),
            ("output", "Egress", 'oif "lo" accept'),
        ):
            policy = "drop" if kind in kinds else "accept"
            head = f"type filter hook {chain} priority 0; policy {policy};"
            body = [head, "ct state established,related accept", loopback, *lines[chain]]
            chains += [f"chain {chain} {{", *body, "}"]
        found[name] = "\n".join(["table inet policies {", *chains, "}\n"])
    return found


def apply(host: Host, text: str) -> None:
    """Put rules into force on a host."""
    command = [*host.prefix, "nft", "--file", "-"]
    subprocess.run(command, input=text, text=True, check=True, capture_output=True)
