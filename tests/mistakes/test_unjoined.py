"""A launcher has started several processes, but the program does not call `zj.initialize`.

Each process would train a copy of the model on its own.
"""

import threading

import jax
import pytest
import small
from jax.sharding import AbstractMesh, AxisType

import zerojax as zj
from zerojax.processes import joining

STEP = {"SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
SEVERAL = {
    "srun": (STEP, "$SLURM_PROCID is 1, $SLURM_NTASKS is 2"),
    "zerojax launch": ({"JAX_COORDINATOR_ADDRESS": "a:7", "JAX_NUM_PROCESSES": "2",
                        "JAX_PROCESS_ID": "0", "ZEROJAX_LAUNCH": "1"},
                       "$JAX_PROCESS_ID is 0, $JAX_NUM_PROCESSES is 2"),
    "torchrun": ({"MASTER_ADDR": "a", "MASTER_PORT": "5", "WORLD_SIZE": "4", "RANK": "3"},
                 "$RANK is 3, $WORLD_SIZE is 4"),
    "SkyPilot": ({"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n", "SKYPILOT_NODE_RANK": "1"},
                 "$SKYPILOT_NODE_RANK is 1, $SKYPILOT_NODE_IPS is 10.0.0.1 10.0.0.2"),
    "Open MPI 4": ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1",
                    "OMPI_MCA_orte_hnp_uri": "x"},
                   "$OMPI_COMM_WORLD_RANK is 1, $OMPI_COMM_WORLD_SIZE is 2"),
    "Open MPI 5": ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
                   "$OMPI_COMM_WORLD_RANK is 1, $OMPI_COMM_WORLD_SIZE is 2"),
}
ONE = {
    "nothing": {},
    "a shell of salloc": {"SLURM_JOB_ID": "4097", "SLURM_NTASKS": "2"},
    "a batch script": {name: STEP[name] for name in STEP if name != "SLURM_STEP_NODELIST"},
    "an interactive step": STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    "a shell of srun --pty": STEP | {"SLURM_PTY_PORT": "40823"},
    "one task": STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    "a stray variable": {"JAX_COORDINATOR_ADDRESS": "a:7"},
    "no number": {"MASTER_ADDR": "a", "WORLD_SIZE": "two", "RANK": "0"},
    "pods of an indexed Job": {"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "1"},
}


@pytest.fixture
def started(monkeypatch):
    """Sets the variables of a launcher; `initialize` has not been called."""
    monkeypatch.setattr(joining, "_alone", threading.Event())

    def with_variables(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return with_variables


@pytest.mark.parametrize("name", SEVERAL)
def test_the_error_has_the_variables_and_the_line_to_write(name, started):
    variables, text = SEVERAL[name]
    started(variables)
    with pytest.raises(zj.ClusterError) as caught:
        small.zero()
    words = [f"({text})", f"jax sees {jax.device_count()} devices", "Write zj.initialize() as the",
             "zj.initialize(processes=1)"]
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize("name", ONE)
def test_a_process_that_a_person_started_is_no_mistake(name, started):
    started(ONE[name])
    assert small.zero().parts == 8


def test_a_process_that_says_that_it_is_alone(started):
    started(STEP)
    assert zj.initialize(processes=1) is None
    assert small.zero().parts == 8


def test_a_process_that_has_joined(started, monkeypatch):
    started(STEP)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert small.zero().parts == 8


def test_simulated_gpus_need_no_other_process(started):
    started(STEP)
    assert zj.Zero(AbstractMesh((8,), ("data",), (AxisType.Auto,))).parts == 8
