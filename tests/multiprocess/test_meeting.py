"""Processes that can't come together (fault 16), or differ in what they would run (18): Python errors, before they compile."""

import json
import re
import signal
import socket
import sys
import threading

import pytest
from processes import HERE, Job, Process, environment, free_port

import zerojax as zj
from zerojax.processes import launchers, rendezvous


def alone(tmp_path, name="one", **keywords):
    """One process that is told to be one of two."""
    return Process([sys.executable, HERE / "meets.py", json.dumps(keywords)], environment(), tmp_path / f"{name}.out",
                   tmp_path / f"{name}.err")


def told(process, limit=30):
    """The error that a process printed, after so many seconds within initialize."""
    process.popen.wait(limit)
    seconds, text = re.search(r"^(\S+) s: ((?:.|\n)*)", process.out, re.MULTILINE).groups()
    assert process.status == 3
    return float(seconds), text.strip()


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid", "192.0.2.1"])
def test_a_coordinator_that_can_not_be_reached(tmp_path, host):
    """Nobody listens; no such name; no answer (an address that is nobody's)."""
    address = f"{host}:{free_port()}"
    seconds, text = told(alone(tmp_path, address=address, processes=2, process=1))
    assert seconds < 9 and text.startswith(f"no process 0 at {address} within 5 s: ")
    assert "initialize(connect_timeout=...)" in text


def test_a_port_that_is_taken(tmp_path):
    """Process 0 says so; the other finds somebody there who is not process 0."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        first = alone(tmp_path, "first", address=address, processes=2, process=0)
        second = alone(tmp_path, "second", address=address, processes=2, process=1)
        seconds, text = told(first)
        assert seconds < 5 and text.startswith(f"process 0 can't listen at {address}: Address already in use")
        seconds, text = told(second)
        assert seconds < 9 and text.startswith(f"no process 0 at {address} within 5 s: what listens there is not zerojax's")


def test_a_host_that_is_another(tmp_path):
    """Process 0 is told an address that is not its own, or a name that nobody knows."""
    _, text = told(alone(tmp_path, address="192.0.2.1:1234", processes=2, process=0))
    assert text.startswith("process 0 can't listen at 192.0.2.1:1234: Cannot assign") and 'bind_address="0.0.0.0"' in text
    _, text = told(alone(tmp_path, "two", address="no-such-host.invalid:1234", processes=2, process=0))
    assert text.startswith("the coordinator's host 'no-such-host.invalid' (port 1234) has no address")


def test_processes_that_do_not_come(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    waits = [alone(tmp_path, str(i), address=address, processes=4, process=i, initialization_timeout=4) for i in (0, 2)]
    texts = [told(p)[1] for p in waits]
    assert texts == [f"processes [1, 3] did not come to {address} in time: 2 of 4 are missing; see their logs."] * 2


def test_processes_of_one_number_and_of_another_count(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    numbers = {"0": (3, 0), "a": (3, 1), "b": (3, 1)}
    all_of_them = [alone(tmp_path, name, address=address, processes=n, process=i, connect_timeout=30) for name, (n, i) in numbers.items()]
    assert {told(p)[1] for p in all_of_them} == {"two processes say that they are process 1 of 3; number them 0 to 2."}
    address = f"127.0.0.1:{free_port()}"
    both = [alone(tmp_path, f"{n}", address=address, processes=n, process=i, connect_timeout=30) for n, i in ((2, 0), (4, 3))]
    assert {told(p)[1] for p in both} == {
        "process 3 says that there are 4 processes, process 0 says 2; start all with the same number."}


def test_one_that_ended_while_it_waited_may_come_again(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    told_alike = {"address": address, "processes": 3, "connect_timeout": 30}
    first, second = (alone(tmp_path, str(i), process=i, **told_alike) for i in (0, 1))
    second.wait_for("meeting")
    threading.Event().wait(2)  # it has come
    second.signal(signal.SIGKILL)
    second.popen.wait(10)
    all_of_them = [first, *(alone(tmp_path, f"{i} again", process=i, **told_alike) for i in (1, 2))]
    for process in all_of_them:
        process.popen.wait(60)
        assert "joined" in process.out, process.err[-2000:]


def test_once_is_enough_and_not_too_late(tmp_path):
    """A second call without arguments, or with the same; with others; one after jax has its devices."""
    address = f"127.0.0.1:{free_port()}"
    asked = {"address": address, "processes": 2, "connect_timeout": 30, "heartbeat_timeout": 20, "again": True}
    both = [alone(tmp_path, str(i), process=i, **asked) for i in (0, 1)]
    for i, process in enumerate(both):
        process.popen.wait(60)
        assert f"joined {i} 2" in process.out and "again: same, same" in process.out, process.err[-2000:]
        assert "again: initialize was called before, with other arguments: heartbeat_timeout was 20, is 5." in process.out
        assert f"zerojax: process {i} of 2, coordinator {address} (by arguments)" in process.err
    _, text = told(alone(tmp_path, "late", address=address, processes=2, process=1, late=True))
    assert text.startswith("initialize came too late: jax has looked for its devices already")


@pytest.mark.parametrize("odd, words", [
    ({"config": {"lr": 0.1, "seed": 7}}, "config.seed: 0 on process 0; 7 on process 1"),
    ({"versions": {"jax": "0.9"}}, r"versions\.jax: 0\.1\S+ on process 0; 0\.9 on process 1"),
], ids=["config", "version"])
def test_processes_that_differ_before_they_join(tmp_path, odd, words):
    address, config = f"127.0.0.1:{free_port()}", {"config": {"lr": 0.1, "seed": 0}}
    both = [alone(tmp_path, str(i), address=address, processes=2, process=i, connect_timeout=30, **said)
            for i, said in enumerate((config, config | odd))]
    for process in both:
        assert re.search(words, told(process)[1])


def test_whoever_is_no_process_is_sent_off(tmp_path):
    """A scanner of ports, or a browser, does not keep the processes from meeting."""
    address = f"127.0.0.1:{free_port()}"
    first = alone(tmp_path, "0", address=address, processes=2, process=0)
    for said in (b"GET / HTTP/1.1\r\n\r\n\n", b"\x00" * 100 + b"\n", b'{"process": "x"}\n', b""):
        connection = _connected(address)
        assert connection.recv(100).startswith(b"zerojax")
        connection.sendall(said)
    second = alone(tmp_path, "1", address=address, processes=2, process=1, connect_timeout=30)
    for i, process in enumerate((first, second)):
        process.popen.wait(60)
        assert f"joined {i} 2" in process.out, process.err[-2000:]


def _connected(address, tries=300):
    for _ in range(tries):
        try:
            return socket.create_connection(rendezvous.split(address), timeout=5)
        except OSError:
            threading.Event().wait(0.1)
    raise AssertionError(f"nobody at {address}")


DIFFER = {
    "stage": r"zero\.init: .* policy\.stage: 3 on process 0; 1 on process 1",
    "seed": r"zero\.init: .* arguments\.0: key<fry>\[\] \w+ on process 0; key<fry>\[\] \w+ on process 1",
    "model": r"zero\.init: .* state\.params/w: float32\[4, 16\] \S+ 'data'\) on process 0; float32\[4, 32\] \S+ 'data'\)",
    "precision": r"policy\.precision\.compute: None on process 0; bfloat16 on process 1",
    "mesh": r"mesh\.axes\.data: 8 on process 0; 4 on process 1 .*policy\.replica_axis",
    "optimizer": r"state\.opt_state/0/count: nothing on process 0; int32\[\] P\(\) on process 1",
    "accumulate": r"train_step: .* accumulate: 1 on process 0; 2 on process 1 program",
    "loss": r"train_step: .* loss_fn: loss \w+ on process 0; other_loss \w+ on process 1 program: \d+ operations, \w+ on process 0",
    "code": r"train_step: the processes differ, and would not run the same program: program: \d+ operations, \w+ on process 0; \d+",
    "rate": r"train_step: the processes differ, and would not run the same program: program: \d+ operations",
    "loop": r"program: \d+ operations, \w+ on process 0; \d+ operations, \w+ on process 1",
    "evaluation": r"eval_step: .* loss_fn: loss \w+ on process 0; other_loss \w+ on process 1",
    "devices": r"zero\.init: .* mesh\.devices: 0:0 0:1 \S+ .* on process 0; 1:\S+",
    "init fails": r"process 1 of 2 failed; process 1 says: KeyError: 'wide'|^compiled \[\]: KeyError: 'wide'",
    "loss fails": r"process 1 of 2 failed; process 1 says: KeyError: 'v'|^compiled \[\]: KeyError: 'v'",
    "call": r"call: zero\.init on process 0",
}


def test_what_differs_is_named_on_every_process_before_it_is_compiled(tmp_path):
    with Job(tmp_path, [HERE / "differ.py"], 2, 4) as job:
        assert job.wait(120) == [0, 0], [p.err[-2000:] for p in job]
        for process in job:
            said = dict(line.split(": ", 1) for line in process.out.splitlines() if line.split(":")[0] in DIFFER)
            assert said.keys() == DIFFER.keys(), process.out
            for name, words in DIFFER.items():
                assert said[name].startswith("compiled []: ") and re.search(words, said[name]), (name, said[name])


def test_what_started_the_process():
    found = lambda **env: str(launchers.detected(env))
    both = {"MASTER_ADDR": "a", "MASTER_PORT": "5", "WORLD_SIZE": "4", "RANK": "3"}
    assert found(**both) == "process 3 of 4, coordinator a:5 (by torchrun's variables)"
    several = both | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert found(**several) == "process 3 of 4, coordinator a:6, devices [1] of this host (by torchrun's variables)"
    jax_first = several | {"JAX_COORDINATOR_ADDRESS": "b:7", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    assert found(**jax_first) == "process 0 of 2, coordinator b:7 (by JAX_COORDINATOR_ADDRESS)"
    assert found(SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2\n", SKYPILOT_NODE_RANK="1") == (
        f"process 1 of 2, coordinator 10.0.0.1:{launchers.PORT} (by SkyPilot's variables)")
    slurm = {"SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_NTASKS": "24", "SLURM_PROCID": "13",
             "SLURM_LOCALID": "5", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x3)"}
    assert found(**slurm) == "process 13 of 24, coordinator gpu07:61441, devices [5] of this host (by SLURM's variables)"
    assert "devices" not in found(**slurm | {"CUDA_VISIBLE_DEVICES": "0"}) + found(**slurm | {"SLURM_STEP_TASKS_PER_NODE": "1(x3)"})
    inner = {"TORCHELASTIC_RUN_ID": "x", "SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NODE_RANK": "0"}
    assert found(**both, **inner) == found(**both)
    assert found(**slurm | {"JAX_COORDINATOR_ADDRESS": "c:9"}).startswith("process 13 of 24, coordinator c:9, devices [5]")
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    assert found(**mpi, JAX_COORDINATOR_ADDRESS="c:9") == "process 1 of 2, coordinator c:9 (by Open MPI's variables)"
    assert found(OMPI_MCA_orte_hnp_uri="x", OMPI_COMM_WORLD_SIZE="2") == "what jax detects itself (Open MPI)"
    assert found(KUBERNETES_SERVICE_HOST="x", JOB_COMPLETION_INDEX="0").startswith("what jax detects itself (Kubernetes")
    alone = ({}, {"SLURM_JOB_ID": "1"}, {"KUBERNETES_SERVICE_HOST": "x"}, both | {"WORLD_SIZE": "1", "RANK": "0"})
    assert [launchers.detected(env) for env in alone] == [None] * 4


@pytest.mark.parametrize("say, words", [
    (lambda: zj.initialize("a:1", 2), "process missing; give all three"),
    (lambda: zj.initialize("a", 2, 0), "address 'a' (by arguments) is not host:port"),
    (lambda: zj.initialize("a:1", 2, 2), "process 2 of 2"),
    (lambda: launchers.detected({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}), "Open MPI 5, which does not say where"),
    (lambda: launchers.detected({"JAX_COORDINATOR_ADDRESS": "a:1"}), "$JAX_NUM_PROCESSES and $JAX_PROCESS_ID missing"),
    (lambda: launchers.detected({"MASTER_ADDR": "a", "WORLD_SIZE": "two", "RANK": "0"}), "$WORLD_SIZE is 'two'"),
], ids=["some", "address", "number", "open mpi 5", "address alone", "text"])
def test_what_can_not_be(say, words):
    with pytest.raises(zj.ClusterError) as caught:
        say()
    assert words in str(caught.value)
