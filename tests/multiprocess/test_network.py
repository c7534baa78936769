"""Two hosts, which are network namespaces joined by a cable: what happens when it is cut, or a host is slow (fault 20)."""

import os
import re
import signal
import socket
import subprocess
import time

import pytest
from distributed_trainer import HEARTBEAT
from processes import Job
from test_ends import TRAINER, digests, notes

ADDRESSES = ["10.213.7.1", "10.213.7.2"]


def run(*command):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise OSError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")


@pytest.fixture
def hosts(tmp_path):
    """Names of two namespaces with a cable between them; the first one's end of it is "cable"."""
    names = [f"zerojax-{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                run("ip", "-n", name, "link", "set", link, "up")
            (tmp_path / f"hosts-{name}").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
        run("ip", "netns", "exec", names[0], "unshare", "-m", "true")
        yield names
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"this machine lets nobody make network namespaces with a cable between them: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def inside(tmp_path, name):
    """Runs a command there; gloo finds a host's address by its name."""
    own = f'mount --bind {tmp_path}/hosts-{name} /etc/hosts && exec "$@"'
    return ["ip", "netns", "exec", name, "unshare", "-m", "sh", "-c", own, "sh"]


def training(tmp_path, hosts):
    command = [TRAINER, tmp_path / "run", 10**6]
    return Job(tmp_path, command, 2, prefix=lambda i: inside(tmp_path, hosts[i]), host=ADDRESSES[0])


def test_a_cable_that_is_cut_ends_all(tmp_path, hosts):
    """Also those that could go on alone: nobody trains on with half of the gradients, and no half step is there."""
    with training(tmp_path, hosts) as job:
        for process in job:
            process.wait_for("step 4")
        run("ip", "-n", hosts[0], "link", "set", "cable", "down")
        statuses = job.wait(HEARTBEAT + 5)
        assert not {0, 75} & set(statuses)
        reached = [int(re.findall(r"^step (\d+)", p.out, re.MULTILINE)[-1]) for p in job]
    assert abs(reached[0] - reached[1]) <= 3
    assert 1 <= max(notes(tmp_path / "run")) <= min(reached)


def test_the_coordinator_listens_to_its_network_alone(tmp_path, hosts):
    """On the address that the others are told; loopback is another."""
    with training(tmp_path, hosts) as job:
        job[0].wait_for("step 1")
        listening = subprocess.run(["ip", "netns", "exec", hosts[0], "cat", "/proc/net/tcp", "/proc/net/tcp6"], capture_output=True,
                                   text=True, timeout=20).stdout
        at = re.findall(rf"^\s*\d+: ([0-9A-F]+):{job.port:04X} \S+ 0A", listening, re.MULTILINE)
        assert [a[-8:] for a in at] == ["0107D50A"]  # 10.213.7.1, and not 0.0.0.0


@pytest.mark.slow
def test_a_host_that_is_slow_does_no_harm(tmp_path):
    """For less than the heartbeat's time-out."""
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
