"""What a run does when a process hangs, and runs over several machines, which are two launchers on this one."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from paddlemix.examples.internvl2.cli import ROOT
from paddlemix.parallel.groups import free_port
from tests.conftest import REFERENCE
from tests.datasets.helpers import write_meta
from tests.training.helpers import RECORDS, flags, run
from tests.training.test_distributed import run_two
from tests.training.test_finetune import losses
from tests.training.test_tensor_parallel import ranks_of

pytestmark = pytest.mark.slow

HUNG = """
import time
from paddlemix.errors import command_main
from paddlemix.training import trainer
from paddlemix.training.arguments import parse
step = trainer.Trainer.step
def hanging(self, number, batches):
    if number == 2 and self.processes.everybody.rank == 1:
        time.sleep(600)
    return step(self, number, batches)
trainer.Trainer.step = hanging
command_main(lambda: trainer.finetune(*parse({flags!r})))()
"""


@pytest.mark.parametrize(
    "more, call, name",
    [
        ((), "all_reduce", "all processes"),
        (("--sharding", "stage3"), "all_reduce", "all processes"),
        (("--tensor_parallel_degree", "2"), "all_reduce", "all processes"),
    ],
    ids=["data", "stage3", "tensor"],
)
def test_a_collective_that_hangs_ends_the_run_with_step_and_name(tmp_path, more, call, name):
    """The other process sleeps at the beginning of the third step: gloo gives up after 30 seconds."""
    script = tmp_path / "hung.py"
    script.write_text(HUNG.format(flags=flags(tmp_path, *more)))
    began = time.monotonic()
    run_two(tmp_path, script=str(script), fails=True)
    assert time.monotonic() - began < 100
    (told,) = [line for line in (tmp_path / "logs" / "workerlog.0").read_text().splitlines() if line.startswith("error: ")]
    assert re.fullmatch(rf"error: step 3: {call} among {name} timed out after 3\d seconds: another rank hangs, .*", told), told


SCRIPT = ROOT / "examples/internvl2/shell/internvl2.0/2nd_finetune/internvl2_1b_qwen2_0_5b_dynamic_res_2nd_finetune_full.sh"
COMMON = ("--max_steps", "8", "--learning_rate", "1e-4", "--warmup_ratio", "0", "--lr_scheduler_type", "linear")
PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def by_script(folder, rows, *more):
    """(command, environment) of a run by its shell script, of two samples a step on two processes."""
    given = flags(folder, *COMMON, "--per_device_train_batch_size", str(rows), "--weight_decay", "0")
    given = given[given.index("--force_image_size") :]
    given += ["--output_dir", str(folder / "out"), "--dataloader_num_workers", "0", "--drop_path_rate", "0"]
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("PADDLE_")},
        **{"DEVICE": "cpu", "GPUS": "2", "BATCH_SIZE": "2", "PER_DEVICE_BATCH_SIZE": str(rows), "OMP_NUM_THREADS": "1"},
        **{"MODEL": str(REFERENCE / "qwen2" / "checkpoint"), "META": str(write_meta(folder, RECORDS))},
        **{"OUTPUT_DIR": str(folder / "out"), "PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(sys.path)},
    }
    return ["sh", str(SCRIPT), *given, "--recompute", "False", *more], environment


def assert_same_losses(folder):
    found, expected = losses(folder, "out"), losses(folder, "one")
    assert len(found) == 8 and list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5)


@pytest.mark.parametrize("tensor", [1, 2])
def test_two_machines_train_as_one(tmp_path, tensor):
    """By the shell script on each, which know each other's address alone."""
    run(tmp_path, *COMMON, output="one")
    command, environment = by_script(tmp_path, tensor)
    environment |= {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "PORT": str(free_port()), "TENSOR_PARALLEL": str(tensor)}
    machines = []
    try:
        for number in range(2):
            machines.append(subprocess.Popen(command, env={**environment, "NODE_RANK": str(number)}, **PIPES))
        said = [machine.communicate(timeout=300)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert_same_losses(tmp_path)
    logs = sorted(str(path.relative_to(tmp_path / "out" / "launch_logs")) for path in (tmp_path / "out").rglob("workerlog.*"))
    assert logs == ["node0/workerlog.0", "node1/workerlog.0"]


# Of Slurm what scripts use of it: a task on each of two nodes, which know their number.
SRUN = """#!/bin/sh
while :; do case $1 in -p) shift 2 ;; -*) echo "$1"; shift ;; *) break ;; esac; done
SLURM_NODEID=1 "$@" &
SLURM_NODEID=0 "$@"
status=$?
wait $! && exit $status
"""


@pytest.mark.parametrize("form", ["partition", "allocation"])
def test_two_machines_of_a_slurm_job_train_as_one(tmp_path, form):
    """By the script itself with PARTITION, and by slurm.sh within an allocation."""
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1\n")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    run(tmp_path, *COMMON, output="one")
    command, environment = by_script(tmp_path, 1)
    environment |= {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PORT": str(free_port()), "SLURM_JOB_NODELIST": "here[0-1]"}
    if form == "partition":
        environment |= {"PARTITION": "cards", "GPUS_PER_NODE": "1"}
    else:
        environment |= {"SLURM_JOB_NUM_NODES": "2"}
        command = [command[0], str(SCRIPT.parents[2] / "slurm.sh"), *command[1:]]
    done = subprocess.run(command, env=environment, timeout=300, **PIPES)
    assert done.returncode == 0, done.stdout
    assert ("--nodes=2" in done.stdout) == (form == "partition")
    assert_same_losses(tmp_path)
    logs = sorted(str(path.relative_to(tmp_path / "out" / "launch_logs")) for path in (tmp_path / "out").rglob("workerlog.*"))
    assert logs == ["node0/workerlog.0", "node1/workerlog.0"]


def test_a_script_goes_on_by_itself_after_a_rank_is_killed(tmp_path):
    """With MAX_RESTARTS, from the last checkpoint, to the losses of a run that was left alone."""
    run(tmp_path, *COMMON, output="one")
    command, environment = by_script(tmp_path, 1, "--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "9")
    process = subprocess.Popen(command, env={**environment, "MAX_RESTARTS": "1"}, **PIPES)
    try:
        deadline, ranks = time.monotonic() + 200, {}
        while len(ranks) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
            ranks = ranks_of(tmp_path / "out")
        while not (tmp_path / "out" / "checkpoint-3").is_dir() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(ranks[1], signal.SIGKILL)
        said, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0 and said.count("start 1 of 1 again, from the last checkpoint") == 1, said
    assert_same_losses(tmp_path)
