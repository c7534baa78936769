"""Two hosts, simulated by network namespaces: a cut cable, and a slow host."""

import os
import re
import signal
import socket
import subprocess
import time

import pytest
from distributed_trainer import HEARTBEAT
from processes import Job
from test_ends import TRAINER, digests, manifests

ADDRESSES = ["10.213.7.1", "10.213.7.2"]


def run(*command):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise OSError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")


def connect(names):
    """Creates two namespaces and a cable between them; each end of it is named "cable"."""
    for name in names:
        run("ip", "netns", "add", name)
    run("ip", "link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable",
        "netns", names[1])
    for name, address in zip(names, ADDRESSES, strict=True):
        run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "cable")
        for link in ("lo", "cable"):
            run("ip", "-n", name, "link", "set", link, "up")


@pytest.fixture
def hosts(tmp_path):
    """The names of two namespaces with a cable between them."""
    names = [f"zerojax-{os.getpid()}-{i}" for i in range(2)]
    try:
        connect(names)
        for name, address in zip(names, ADDRESSES, strict=True):
            lines = f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n"
            (tmp_path / f"hosts-{name}").write_text(lines)
        run("ip", "netns", "exec", names[0], "unshare", "-m", "true")
        yield names
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"network namespaces with a cable are not available here: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def inside(tmp_path, name):
    """Returns the prefix that runs a command in a namespace.

    gloo finds the address of a host by its name, so /etc/hosts must be that of the namespace.
    """
    script = f'mount --bind {tmp_path}/hosts-{name} /etc/hosts && exec "$@"'
    return ["ip", "netns", "exec", name, "unshare", "-m", "sh", "-c", script, "sh"]


def training(tmp_path, hosts):
    command = [TRAINER, tmp_path / "run", 10**6]
    return Job(tmp_path, command, 2, prefix=lambda i: inside(tmp_path, hosts[i]),
               host=ADDRESSES[0])


@pytest.mark.slow
def test_a_cut_cable_ends_all(tmp_path, hosts):
    """No process continues alone, with half of the gradients, and there is no partial step."""
    with training(tmp_path, hosts) as job:
        for process in job:
            process.wait_for("step 4")
        run("ip", "-n", hosts[0], "link", "set", "cable", "down")
        statuses = job.wait(HEARTBEAT + 5)
        assert not {0, 75} & set(statuses)
        steps = [re.findall(r"^step (\d+)", p.out, re.MULTILINE) for p in job]
    last = [int(numbers[-1]) for numbers in steps]
    assert abs(last[0] - last[1]) <= 3
    assert 1 <= max(manifests(tmp_path / "run")) <= min(last)


def test_the_coordinator_listens_on_its_network_only(tmp_path, hosts):
    """It listens on the address that the other processes use, and not on loopback."""
    with training(tmp_path, hosts) as job:
        job[0].wait_for("step 1")
        command = ["ip", "netns", "exec", hosts[0], "cat", "/proc/net/tcp", "/proc/net/tcp6"]
        sockets = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
        listening = rf"^\s*\d+: ([0-9A-F]+):{job.port:04X} \S+ 0A"
        addresses = re.findall(listening, sockets, re.MULTILINE)
    assert [address[-8:] for address in addresses] == ["0107D50A"]  # 10.213.7.1, not 0.0.0.0


@pytest.mark.slow
def test_a_slow_host_does_no_harm(tmp_path):
    """For less than the time limit of the heartbeat."""
    with Job(tmp_path, [TRAINER, tmp_path / "run", 12, 0.05], 2) as job:
        job[1].wait_for("step 5")
        job[1].signal(signal.SIGSTOP)
        time.sleep(HEARTBEAT / 2)
        job[1].signal(signal.SIGCONT)
        job[0].wait_for("evaluating")
        job[0].signal(signal.SIGTERM)
        assert job.wait(60) == [75, 75], [p.err[-2000:] for p in job]
    with Job(tmp_path, [TRAINER, tmp_path / "other", 12], 2, name="other") as job:
        assert job.wait(60) == [0, 0]
    assert digests(tmp_path / "run", 12) == digests(tmp_path / "other", 12)
