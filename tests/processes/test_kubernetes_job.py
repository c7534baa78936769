"""An indexed Job of Kubernetes, read from a server that answers as the API does."""

import http.server
import json
import pathlib
import ssl
import threading

import pytest

import zerojax as zj
from zerojax.processes import kubernetes_job, launchers

PEM = pathlib.Path(__file__).with_name("localhost.pem")  # a key and its certificate for 127.0.0.1
JOB = "/apis/batch/v1/namespaces/team/jobs/train"
PODS = "/api/v1/namespaces/team/pods?labelSelector=job-name%3Dtrain"
FORBIDDEN = ('jobs.batch "train" is forbidden: User "system:serviceaccount:team:default" cannot '
             'get resource "jobs" in API group "batch" in the namespace "team"')


def job(parallelism=2, completions=2, **pod):
    return {"metadata": {"name": "train"},
            "spec": {"parallelism": parallelism, "completions": completions,
                     "template": {"spec": pod}}}


def pod(index, phase, ip=None):
    name = "batch.kubernetes.io/job-completion-index"
    return {"metadata": {"annotations": {name: str(index)}},
            "status": {"phase": phase} | ({"podIP": ip} if ip else {})}


def refused(status, message):
    return status, {"kind": "Status", "message": message, "code": status}


class Handler(http.server.BaseHTTPRequestHandler):
    """Gives the next answer for a path; the last one again and again."""

    def do_GET(self):
        self.server.asked.append(self.path)
        answers = self.server.answers.get(self.path, [refused(404, f"no {self.path}")])
        status, value = answers.pop(0) if len(answers) > 1 else answers[0]
        if self.headers["Authorization"] != "Bearer secret":
            status, value = refused(401, "Unauthorized")
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A server, and a pod's folder with its account: the token, the namespace, the authority."""
    for name, text in {"token": "secret\n", "namespace": "team", "ca.crt": PEM.read_text()}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(kubernetes_job, "_ACCOUNT", tmp_path)
    monkeypatch.setattr(kubernetes_job, "_TICK", 0.01)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.answers, server.asked = {}, []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def variables(server, index=1):
    return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "JOB_COMPLETION_INDEX": str(index),
            "KUBERNETES_SERVICE_PORT": str(server.server_port), "HOSTNAME": f"train-{index}"}


def error_of(env):
    with pytest.raises(zj.ClusterError) as caught:
        launchers.detected(env)
    return str(caught.value)


@pytest.mark.parametrize("more, address", [
    ({}, f"train-0.pods:{launchers.PORT}"), ({"JAX_COORDINATOR_PORT": "7"}, "train-0.pods:7"),
    ({"JAX_COORDINATOR_ADDRESS": "a:7"}, "a:7")])
def test_a_job_with_a_headless_service(cluster, more, address):
    cluster.answers[JOB] = [(200, job(subdomain="pods"))]
    found = launchers.detected(variables(cluster) | more)
    assert str(found) == f"process 1 of 2, coordinator {address} (by the API of Kubernetes)"
    assert found.scheduled and cluster.asked == [JOB]


def test_pod_0_may_have_no_address_yet_and_may_have_failed_before(cluster):
    cluster.answers[JOB] = [(200, job())]
    others = [pod(1, "Running", "10.0.0.9"), pod(0, "Failed", "10.0.0.8")]
    cluster.answers[PODS] = [(200, {"items": pods}) for pods in (
        [], others, [*others, pod(0, "Pending")], [*others, pod(0, "Running", "10.0.0.7")])]
    assert launchers.detected(variables(cluster)).address == f"10.0.0.7:{launchers.PORT}"
    assert cluster.asked == [JOB, *[PODS] * 4]


def test_pod_0_has_no_address_in_time(cluster, monkeypatch):
    monkeypatch.setattr(kubernetes_job, "_PATIENCE", 0.05)
    cluster.answers[JOB] = [(200, job())]
    cluster.answers[PODS] = [(200, {"items": [pod(1, "Running", "10.0.0.9"), pod(0, "Pending")]})]
    assert error_of(variables(cluster)) == (
        "pod 0 of the Job train has had no IP address for 0.05 s; of its pods, pod 0 is Pending, "
        "pod 1 is Running. See `kubectl describe job train`.")


def test_a_job_of_one_pod_is_alone(cluster):
    cluster.answers[JOB] = [(200, job(1, 1))]
    assert launchers.detected(variables(cluster, 0)) is None


@pytest.mark.parametrize("answer, text", [
    (refused(403, FORBIDDEN), f"refuses with status 403: {FORBIDDEN}. Bind a role to the service "
                              "account of the pods that may get jobs and list pods; or set $JAX_"),
    (refused(404, 'jobs.batch "train" not found'), 'status 404: jobs.batch "train" not found. If'),
    ((200, job(2, 4)), "the Job train runs 2 of its 4 pods at a time"),
    ((200, job(1, 4)), "the Job train runs 1 of its 4 pods at a time"),
])
def test_what_the_api_refuses_and_what_cannot_train(cluster, answer, text):
    cluster.answers[JOB] = [answer]
    assert text in error_of(variables(cluster))


def test_an_account_that_may_read_jobs_but_no_pods(cluster):
    cluster.answers = {JOB: [(200, job())], PODS: [refused(403, "pods is forbidden")]}
    assert "status 403: pods is forbidden. Bind a role" in error_of(variables(cluster))


def test_a_server_without_the_certificate_of_the_cluster(cluster):
    env = variables(cluster) | {"KUBERNETES_SERVICE_HOST": "localhost"}  # the certificate has an IP
    assert "certificate verify failed" in error_of(env) and not cluster.asked


def test_a_pod_without_its_account(cluster):
    (kubernetes_job._ACCOUNT / "token").unlink()
    assert "No such file" in error_of(variables(cluster)) and not cluster.asked


def test_a_pod_with_the_host_name_of_its_node(cluster):
    text = error_of(variables(cluster) | {"HOSTNAME": "node7"})
    assert text.startswith("pod 1 of an indexed Job of Kubernetes: $HOSTNAME is 'node7', not the "
                           "name of the Job and -1, perhaps because of hostNetwork; set $JAX_")


def test_nobody_listens(cluster):
    env = variables(cluster) | {"KUBERNETES_SERVICE_PORT": "1"}
    assert "Kubernetes at 127.0.0.1:1 does not answer" in error_of(env)
