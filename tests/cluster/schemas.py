"""The schemas of what `cluster/kubernetes` declares, all offline and all strict.

Kubernetes' own are those of its OpenAPI, from the package kubernetes-validate. No package of a
registry has KubeRay's: below are the fields of its RayCluster and RayJob, written from the API
reference of KubeRay 1.7; what is Kubernetes' in them (pods, services, resources) is checked
with Kubernetes' schemas, to the last field. The folder that the environment variable
KUBERAY_CRDS names (KubeRay's `ray-operator/config/crd/bases`) is used beside them, if given.
"""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

SCHEMAS = "kubernetes-json-schema/v1.37.0-local-strict"

TEXT = {"type": "string"}
FLAG = {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
NUMBER = {"type": "number"}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def one_of(*values: str) -> dict[str, Any]:
    """Describe a choice."""
    return {"enum": list(values)}


def a_list(items: dict[str, Any]) -> dict[str, Any]:
    """Describe a list."""
    return {"type": "array", "items": items}


def kubernetes(name: str) -> dict[str, Any]:
    """Refer to a definition of Kubernetes."""
    return {"$ref": f"/api/_definitions.json#/$defs/io.k8s.{name}"}


def fields(*required: str, **properties: dict[str, Any]) -> dict[str, Any]:
    """Describe an object that has no other fields."""
    return {
        "type": "object",
        "required": list(required),
        "properties": properties,
        "additionalProperties": False,
    }


POD = kubernetes("api.core.v1.PodTemplateSpec")
RESOURCES = kubernetes("api.core.v1.ResourceRequirements")
ENVIRONMENT = a_list(kubernetes("api.core.v1.EnvVar"))
PULL_POLICY = one_of("Always", "IfNotPresent", "Never")
RULES = {
    "ingressRules": a_list(kubernetes("api.networking.v1.NetworkPolicyIngressRule")),
    "egressRules": a_list(kubernetes("api.networking.v1.NetworkPolicyEgressRule")),
}
CREDENTIAL = fields(value=TEXT, valueFrom=kubernetes("api.core.v1.EnvVarSource"))

RAY_CLUSTER = fields(
    "headGroupSpec",
    upgradeStrategy=fields(type=one_of("Recreate", "None")),
    authOptions=fields(
        enableK8sTokenAuth=FLAG, secretName=TEXT, mode=one_of("disabled", "token")
    ),
    suspend=FLAG,
    managedBy=TEXT,
    autoscalerOptions=fields(
        resources=RESOURCES,
        image=TEXT,
        imagePullPolicy=PULL_POLICY,
        securityContext=kubernetes("api.core.v1.SecurityContext"),
        idleTimeoutSeconds=COUNT,
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        version=one_of("v1", "v2"),
        env=ENVIRONMENT,
        envFrom=a_list(kubernetes("api.core.v1.EnvFromSource")),
        volumeMounts=a_list(kubernetes("api.core.v1.VolumeMount")),
        command=a_list(TEXT),
        args=a_list(TEXT),
    ),
    headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=fields(
        backend=one_of("redis", "rocksdb"),
        redisUsername=CREDENTIAL,
        redisPassword=CREDENTIAL,
        externalStorageNamespace=TEXT,
        redisAddress=TEXT,
        storage=fields(
            claimName=TEXT,
            size={"type": ["string", "integer"]},
            storageClassName=TEXT,
            accessModes=a_list(TEXT),
            subPath=TEXT,
            deletionPolicy=one_of("DeleteWithCluster", "Retain"),
        ),
    ),
    historyServerOptions=fields(
        collectorOptions=fields(
            image=TEXT, imagePullPolicy=PULL_POLICY, resources=RESOURCES, env=ENVIRONMENT
        )
    ),
    networkPolicy=fields(
        mode=one_of("DenyAll", "DenyAllIngress", "DenyAllEgress"),
        head=fields(**RULES),
        worker=fields(**RULES),
        workerGroups=a_list(fields("groupName", groupName=TEXT, **RULES)),
    ),
    tlsOptions=fields(enabled=FLAG),
    headGroupSpec=fields(
        "template",
        template=POD,
        headService=kubernetes("api.core.v1.Service"),
        enableIngress=FLAG,
        ingressOptions=fields(
            host=TEXT,
            path=TEXT,
            pathType=one_of("Exact", "Prefix", "ImplementationSpecific"),
            tls=a_list(kubernetes("api.networking.v1.IngressTLS")),
        ),
        resources=TEXTS,
        labels=TEXTS,
        rayStartParams=TEXTS,
        serviceType=TEXT,
    ),
    rayVersion=TEXT,
    workerGroupSpecs=a_list(
        fields(
            "groupName",
            "minReplicas",
            "maxReplicas",
            "template",
            suspend=FLAG,
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            idleTimeoutSeconds=COUNT,
            priority={"type": "integer"},
            resources=TEXTS,
            labels=TEXTS,
            rayStartParams=TEXTS,
            template=POD,
            scaleStrategy=fields(workersToDelete=a_list(TEXT)),
            numOfHosts=COUNT,
        )
    ),
)
DELETION = one_of("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone")
RAY_JOB = fields(
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    rayClusterSpec=RAY_CLUSTER,
    submitterPodTemplate=POD,
    metadata=TEXTS,
    clusterSelector=TEXTS,
    submitterConfig=fields(backoffLimit=COUNT),
    managedBy=TEXT,
    deletionStrategy=fields(
        onSuccess=fields(policy=DELETION),
        onFailure=fields(policy=DELETION),
        deletionRules=a_list(
            fields(
                "policy",
                "condition",
                policy=DELETION,
                condition=fields(
                    jobStatus=one_of("SUCCEEDED", "FAILED"),
                    jobDeploymentStatus=one_of("Failed"),
                    ttlSeconds=COUNT,
                ),
            )
        ),
    ),
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    entrypointResources=TEXT,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    ttlSecondsAfterFinished=COUNT,
    preRunningDeadlineSeconds=COUNT,
    shutdownAfterJobFinishes=FLAG,
    suspend=FLAG,
)
KUBERAY = {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB}


@cache
def definitions() -> Registry[Any]:
    """Return the definitions that the schemas refer to."""
    return (
        Resource.from_contents(schema_contents(f"{SCHEMAS}/_definitions.json", "")) @ Registry()
    )


@cache
def validators(api_version: str, kind: str) -> list[Draft202012Validator]:
    """Return the validators of a kind: one, and for KubeRay's its CRD's if there is one."""
    if api_version != "ray.io/v1":
        name = f"{kind}-{re.sub(r'[.][^/]*/|/', '-', api_version)}".lower()
        schema = schema_contents(f"{SCHEMAS}/{name}.json", "")
        return [Draft202012Validator(schema, registry=definitions())]
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"https://kubernetes.io/api/{kind.lower()}/ray",
        **fields(
            "apiVersion",
            "kind",
            "metadata",
            "spec",
            apiVersion=one_of("ray.io/v1"),
            kind=one_of(kind),
            metadata=kubernetes("apimachinery.pkg.apis.meta.v1.ObjectMeta"),
            spec=KUBERAY[kind],
        ),
    }
    found = [Draft202012Validator(schema, registry=definitions())]
    if folder := os.environ.get("KUBERAY_CRDS"):
        crd = yaml.safe_load(Path(folder, f"ray.io_{kind.lower()}s.yaml").read_text())
        versions = {version["name"]: version for version in crd["spec"]["versions"]}
        found.append(Draft202012Validator(strict(versions["v1"]["schema"]["openAPIV3Schema"])))
    return found


def strict(schema: Any) -> Any:
    """Return a schema of an API server, which drops unknown fields, so that it refuses them."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {name: strict(part) for name, part in schema.items()}
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
        parts["additionalProperties"] = False
    return parts


def validate(resource: dict[str, Any]) -> None:
    """Raise jsonschema's ValidationError if a resource is not of its kind's schema."""
    for validator in validators(resource["apiVersion"], resource["kind"]):
        validator.validate(resource)
