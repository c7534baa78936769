"""The job that a process is part of, read from the variables of its launcher."""

import pytest

import zerojax as zj
from zerojax.processes import launchers

TORCHRUN = {"MASTER_ADDR": "a", "MASTER_PORT": "5", "WORLD_SIZE": "4", "RANK": "3"}
TORCHRUN_PER_GPU = TORCHRUN | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
                               "TORCHELASTIC_USE_AGENT_STORE": "True"}
JAX = {"JAX_COORDINATOR_ADDRESS": "b:7", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
SKYPILOT = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n", "SKYPILOT_NODE_RANK": "1"}
SLURM = {"SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_NTASKS": "24",
         "SLURM_PROCID": "13", "SLURM_LOCALID": "5", "SLURM_NODEID": "1",
         "SLURM_STEP_TASKS_PER_NODE": "8(x3)"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
OF_MPIRUN = "1531576320.0;tcp://10.96.0.1,10.148.0.1,10.108.0.1:34911"


@pytest.mark.parametrize("variables, text", [
    (TORCHRUN, "process 3 of 4, coordinator a:5 (by torchrun's variables)"),
    (TORCHRUN_PER_GPU,
     "process 3 of 4, coordinator a:6, devices [1] of this host (by torchrun's variables)"),
    (TORCHRUN_PER_GPU | JAX, "process 0 of 2, coordinator b:7 (by JAX_COORDINATOR_ADDRESS)"),
    (SKYPILOT, f"process 1 of 2, coordinator 10.0.0.1:{launchers.PORT} (by SkyPilot's variables)"),
    (SLURM, "process 13 of 24, coordinator gpu07:61441, devices [5] of this host "
            "(by SLURM's variables)"),
    (SLURM | {"JAX_COORDINATOR_ADDRESS": "c:9"},
     "process 13 of 24, coordinator c:9, devices [5] of this host (by SLURM's variables)"),
    (SLURM | {"CUDA_VISIBLE_DEVICES": "0"},
     "process 13 of 24, coordinator gpu07:61441 (by SLURM's variables)"),
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x3)"},
     "process 13 of 24, coordinator gpu07:61441 (by SLURM's variables)"),
    (TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"} | SKYPILOT,  # torchrun within SkyPilot
     "process 3 of 4, coordinator a:5 (by torchrun's variables)"),
    (OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": "c:9"},
     "process 1 of 2, coordinator c:9 (by Open MPI's variables)"),
    (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": OF_MPIRUN},
     "process 1 of 2, coordinator 10.96.0.1:62624 (by Open MPI's variables)"),
    (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": OF_MPIRUN, "JAX_COORDINATOR_PORT": "7"},
     "process 1 of 2, coordinator 10.96.0.1:7 (by Open MPI's variables)"),
    (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:2,2620::2]:43370"},
     "process 1 of 2, coordinator [fe80::b9b:2]:62880 (by Open MPI's variables)"),
    (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "x", "JAX_COORDINATOR_ADDRESS": "c:9"},
     "process 1 of 2, coordinator c:9 (by Open MPI's variables)"),
])
def test_the_job_of_a_process(variables, text):
    assert str(launchers.detected(variables)) == text


@pytest.mark.parametrize("variables", [
    {}, {"SLURM_JOB_ID": "1"}, {"KUBERNETES_SERVICE_HOST": "x"},
    TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}])
def test_a_process_that_is_alone(variables):
    assert launchers.detected(variables) is None


@pytest.mark.parametrize("arguments, text", [
    (("a:1", 2), "initialize(address='a:1', processes=2): process missing; give all three"),
    (("a", 2, 0), "address 'a' (by arguments) is not host:port"),
    (("a:1", 2, 2), "process 2 of 2"),
])
def test_invalid_arguments(arguments, text):
    with pytest.raises(zj.ClusterError) as caught:
        zj.initialize(*arguments)
    assert text in str(caught.value)


@pytest.mark.parametrize("variables, text", [
    (OPEN_MPI, "process 1 of 2 of Open MPI 5, which does not say where"),
    (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "x"}, "$OMPI_MCA_orte_hnp_uri is 'x', which has no job"),
    ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "$JAX_NUM_PROCESSES and $JAX_PROCESS_ID missing"),
    ({"MASTER_ADDR": "a", "WORLD_SIZE": "two", "RANK": "0"}, "$WORLD_SIZE is 'two'"),
])
def test_invalid_variables(variables, text):
    with pytest.raises(zj.ClusterError) as caught:
        launchers.detected(variables)
    assert text in str(caught.value)
