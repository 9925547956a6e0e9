import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.platform.launch.slurm import first_host, read_slurm_node

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_NNODES": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NODEID": "3",
    "SLURM_JOB_NODELIST": "gpu[007-009,012]",
    "SLURM_GPUS_ON_NODE": "8",
}


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("login1", "login1"),
        ("node7,node8", "node7"),
        ("gpu[007-009,012]", "gpu007"),
        ("gpu[12]", "gpu12"),
        ("gpu[3,5-9],fat[1-2]", "gpu3"),
        ("rack[2-3]n[04-06,9]", "rack2n04"),
        ("a-b[1-2].cluster.org,c", "a-b1.cluster.org"),
        (" gpu[1-2]\n", "gpu1"),
    ],
)
def test_first_host_is_the_first_of_the_first_range(node_list, host):
    assert first_host(node_list) == host


@pytest.mark.parametrize("node_list", ["", "[", "gpu[", "gpu]", "gpu[1-2,[3-4]]", "gpu[]", "gpu[1-2]]", ",a", "a b"])
def test_first_host_refuses_what_is_no_host_list(node_list):
    with pytest.raises(ConfigError, match="is not a SLURM host list"):
        first_host(node_list)


def test_outside_slurm_there_is_no_node():
    assert read_slurm_node({"PATH": "/bin"}) is None


def test_node_of_a_step_is_read_from_its_variables():
    node = read_slurm_node(STEP)
    assert (node.num_nodes, node.node_rank, node.master_address, node.num_gpus) == (4, 3, "gpu007", 8)


def test_all_nodes_of_a_step_agree_on_address_port_and_launch():
    nodes = [read_slurm_node({**STEP, "SLURM_NODEID": str(rank)}) for rank in range(4)]
    assert len({(node.master_address, node.master_port, node.launch_id) for node in nodes}) == 1


def test_jobs_and_steps_get_ports_of_their_own_below_the_ephemeral_ones():
    nodes = [
        read_slurm_node({**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        for job in range(10_000, 10_050)
        for step in range(5)
    ]
    ports = [port for node in nodes for port in (node.master_port, node.launcher_port)]
    assert len(set(ports)) == len(ports)
    assert all(1024 < port < 32768 for port in ports)


def test_requeued_job_is_another_launch():
    assert read_slurm_node(STEP).launch_id != read_slurm_node({**STEP, "SLURM_RESTART_COUNT": "1"}).launch_id


def test_starts_in_one_allocation_of_a_node_are_told_apart(monkeypatch):
    first = read_slurm_node({"SLURM_JOB_ID": "1"})
    monkeypatch.setattr("os.getpid", lambda: 1)
    assert first.launch_id != read_slurm_node({"SLURM_JOB_ID": "1"}).launch_id


def test_several_nodes_without_srun_are_refused():
    with pytest.raises(ConfigError, match=r"has 2 nodes, but srun did not start this launcher.*--ntasks-per-node=1"):
        read_slurm_node({"SLURM_JOB_ID": "1", "SLURM_NNODES": "2", "SLURM_NODEID": "0"})


def test_step_goes_before_the_allocation():
    node = read_slurm_node({**STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"})
    assert (node.num_nodes, node.master_address) == (1, "127.0.0.1")


def test_allocation_alone_is_enough_on_one_node():
    node = read_slurm_node({"SLURM_JOB_ID": "1"})
    assert (node.num_nodes, node.node_rank, node.num_gpus) == (1, 0, None)


def test_several_tasks_on_a_node_are_refused():
    with pytest.raises(ConfigError, match=r"srun started 32 tasks on 4 nodes.*--ntasks-per-node=1"):
        read_slurm_node({**STEP, "SLURM_STEP_NUM_TASKS": "32"})


@pytest.mark.parametrize(("name", "value"), [("SLURM_NODEID", "x"), ("SLURM_JOB_ID", "-1"), ("SLURM_STEP_ID", "")])
def test_variable_that_is_no_number_is_named(name, value):
    with pytest.raises(ConfigError, match=f"{name}=.*is not a number"):
        read_slurm_node({**STEP, name: value})


@pytest.mark.parametrize("name", ["SLURM_NODEID", "SLURM_JOB_NODELIST"])
def test_variable_that_is_missing_is_named(name):
    environment = {key: value for key, value in STEP.items() if key != name}
    with pytest.raises(ConfigError, match=f"{name} is not set"):
        read_slurm_node(environment)
