"""An indexed Job of Kubernetes, read from the API of its cluster.

Its pods have their index in a variable, but neither the number of pods nor the address of pod 0.
Needs no jax, and no package: the API is JSON over HTTPS.
"""

import contextlib
import http.client
import json
import pathlib
import ssl
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

from zerojax.errors import ClusterError

_ACCOUNT = pathlib.Path("/var/run/secrets/kubernetes.io/serviceaccount")  # in every pod
_TIMEOUT = 10  # seconds for one request
_PATIENCE = 300.0  # seconds until pod 0 must have an address
_TICK = 1.0  # seconds between requests
_INSTEAD = ("set $JAX_COORDINATOR_ADDRESS, $JAX_NUM_PROCESSES and $JAX_PROCESS_ID, as "
            "examples/kubernetes/jobset.yaml does.")


def name_of_job(env: Mapping[str, str]) -> str:
    """Returns the name of the Job of this pod, whose host name is "<job>-<index>".

    Raises:
      ClusterError: the host name is another, as in a pod that uses the network of its node.

    >>> name_of_job({"HOSTNAME": "train-1", "JOB_COMPLETION_INDEX": "1"})
    'train'
    """
    host, index = env.get("HOSTNAME", ""), env["JOB_COMPLETION_INDEX"]
    name = host.removesuffix(f"-{index}")
    if not name or name == host:
        raise ClusterError(f"pod {index} of an indexed Job of Kubernetes: $HOSTNAME is {host!r}, "
                           f"not the name of the Job and -{index}, perhaps because of "
                           f"hostNetwork; {_INSTEAD}")
    return name


def processes(job: Mapping[str, Any]) -> int:
    """Returns the number of pods of a Job that run at the same time.

    Raises:
      ClusterError: the Job has more pods than that.
    """
    name, spec = job["metadata"]["name"], job["spec"]
    at_once = spec.get("parallelism", 1)
    if spec.get("completions", at_once) != at_once:
        raise ClusterError(f"the Job {name} runs {at_once} of its {spec['completions']} pods at "
                           "a time, and they cannot train together; write the same number as "
                           "parallelism and completions. If each pod trains alone, write "
                           "zj.initialize(processes=1).")
    return at_once


def job_of(env: Mapping[str, str]) -> dict[str, Any]:
    """Returns the Job of this pod, as the API describes it.

    Raises:
      ClusterError: the API cannot be reached, or does not show the Job.
    """
    return _get(env, "/apis/batch/v1/namespaces/{}/jobs/" + name_of_job(env))


def host_of_first(env: Mapping[str, str], job: Mapping[str, Any]) -> str:
    """Returns the host name of pod 0, or its IP address if the Job has no headless service.

    Waits until pod 0 has an address.

    Raises:
      ClusterError: it has none in time, or the API does not show it.
    """
    name = job["metadata"]["name"]
    subdomain = job["spec"]["template"]["spec"].get("subdomain")
    return f"{name}-0.{subdomain}" if subdomain else _ip_of_first(env, name)


def _ip_of_first(env: Mapping[str, str], name: str) -> str:
    selector = urllib.parse.quote(f"job-name={name}")
    deadline = time.monotonic() + _PATIENCE
    while True:
        pods = _get(env, "/api/v1/namespaces/{}/pods?labelSelector=" + selector)["items"]
        found = [pod["status"]["podIP"] for pod in pods if _is_first(pod)]
        if found:
            return found[0]
        if time.monotonic() > deadline:
            raise ClusterError(f"pod 0 of the Job {name} has had no IP address for "
                               f"{_PATIENCE:g} s; {_seen(pods)}. See `kubectl describe job "
                               f"{name}`.")
        time.sleep(_TICK)


def _is_first(pod: Mapping[str, Any]) -> bool:
    """Whether a pod has the index 0 and an address, and has not ended, like one before a retry."""
    status = pod["status"]
    ended = status.get("phase") in ("Failed", "Succeeded")
    return _index(pod) == "0" and bool(status.get("podIP")) and not ended


def _index(pod: Mapping[str, Any]) -> str | None:
    annotations = pod["metadata"].get("annotations", {})
    return annotations.get("batch.kubernetes.io/job-completion-index")


def _seen(pods: list[Mapping[str, Any]]) -> str:
    texts = [f"pod {_index(pod)} is {pod['status'].get('phase')}" for pod in pods]
    return f"of its pods, {', '.join(sorted(texts)[:10])}" if texts else "the API shows no pods"


def _get(env: Mapping[str, str], path: str) -> Any:
    """Returns the JSON value at a path of the API, in the namespace of this pod ("{}")."""
    host = env["KUBERNETES_SERVICE_HOST"]
    port = int(env.get("KUBERNETES_SERVICE_PORT", 443))
    try:
        path = path.format((_ACCOUNT / "namespace").read_text().strip())
        headers = {"Authorization": f"Bearer {(_ACCOUNT / 'token').read_text().strip()}"}
        trusted = ssl.create_default_context(cafile=str(_ACCOUNT / "ca.crt"))
        # clusters have authorities of their own, which Python 3.13's stricter rules would refuse
        trusted.verify_flags &= ~ssl.VERIFY_X509_STRICT
        connection = http.client.HTTPSConnection(host, port, timeout=_TIMEOUT, context=trusted)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            value = json.loads(answer.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ClusterError(f"the API of Kubernetes at {host}:{port} does not answer, which an "
                           f"indexed Job needs: {error}. Let the pod have its service account's "
                           f"token, and reach the API; or {_INSTEAD}") from None
    if answer.status != 200:
        raise ClusterError(_refusal(answer.status, value))
    return value


def _refusal(status: int, value: Mapping[str, Any]) -> str:
    text = f"the API of Kubernetes refuses with status {status}: {value.get('message', value)}"
    if status in (401, 403):
        return (f"{text}. Bind a role to the service account of the pods that may get jobs and "
                f"list pods; or {_INSTEAD}")
    return f"{text}. If this pod's Job has another name or namespace, {_INSTEAD}"
