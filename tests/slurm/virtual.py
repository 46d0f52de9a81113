"""A real SLURM on this machine: munged, slurmctld and one slurmd per virtual node, all in one folder."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from cluster.launched import PATIENCE_SECONDS, environment, wait_for

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
NODES = ("n1", "n2", "n3")

CONFIGURATION = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1,requeue_setup_env_fail
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=15
JobRequeue=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class VirtualCluster:
    """Nodes that can be lost and come back, and jobs on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**environment(), "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def conf(self) -> str:
        """For ``-f``; absolute, since slurmd hands it on to jobs."""
        return str(self.folder / "slurm.conf")

    def start(self) -> None:
        """Write the configuration and start all daemons."""
        self.folder.chmod(0o755)  # for munge's socket
        for name in ("munge", "state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge/key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        host, ports = socket.gethostname(), _free_ports(1 + len(NODES))
        nodes = "".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN\n"
            for node, port in zip(NODES, ports[1:], strict=True)
        )
        text = CONFIGURATION.format(host=host, port=ports[0], folder=self.folder).replace(
            "PartitionName", f"{nodes}PartitionName"
        )
        (self.folder / "slurm.conf").write_text(text)
        files = {name: self.folder / "munge" / name for name in ("socket", "pid", "log", "seed")}
        options = [f"--{option}={files[name]}" for option, name in OPTIONS.items()]
        self._run("munged", "munged", "--force", "--foreground", f"--key-file={key}", *options)
        wait_for(files["socket"].exists)
        self._run("slurmctld", "slurmctld", "-D", "-c", "-f", self.conf)
        for node in NODES:
            self.bring_back(node)
        wait_for(lambda: self.ask("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * len(NODES), told=self.describe)

    def stop(self) -> None:
        """End what was started, jobs first."""
        with suppress(subprocess.SubprocessError):
            self.ask("scancel", "--user=root")
            time.sleep(1)
        for name in [*NODES, "slurmctld", "munged"]:
            self.lose(name)

    def lose(self, name: str) -> None:
        """A node vanishes: its daemon and everything that runs on it."""
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        if name in NODES:
            daemon.kill()  # before it can tell the controller of its jobs
            lost = _processes_on(name, self.conf)
            # All at one moment, as when a machine loses its power: what outlived the others by a millisecond would tell
            # of their end (an srun's own child kills the whole step, on all nodes, when that srun dies).
            for act in (psutil.Process.suspend, psutil.Process.kill):
                for process in lost:
                    with suppress(psutil.Error):
                        act(process)
        else:
            daemon.terminate()
        daemon.wait()

    def bring_back(self, node: str) -> None:
        """Start a node's daemon."""
        self._run(node, "slurmd", "-D", "-N", node, "-f", self.conf)

    def ask(self, *command: str) -> str:
        """Output of one of SLURM's commands."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *arguments: str | Path) -> str:
        """``sbatch``; the number of the job."""
        return self.ask("sbatch", "--parsable", *map(str, arguments)).strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED ..."""
        return re.findall(r"JobState=(\S+)", self.ask("scontrol", "show", "job", job, "-o"))[0]

    def field(self, job: str, name: str) -> str:
        """A field of ``scontrol show job``."""
        return re.findall(rf" {name}=(\S+)", self.ask("scontrol", "show", "job", job, "-o"))[0]

    def requeued(self, job: str, times: int) -> None:
        """Wait for a job to be back in the queue, and spare it SLURM's two minutes of waiting there."""
        wait_for(lambda: self.field(job, "Restarts") == str(times), told=self.describe)
        wait_for(lambda: self.state(job) in ("PENDING", "RUNNING"), told=self.describe)
        time.sleep(3)  # a job that starts in the second in which it was ended has its credential revoked
        if self.state(job) == "PENDING":
            self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")

    def describe(self) -> str:
        """For messages of tests that fail."""
        logs = "".join(path.read_text(errors="replace")[-1500:] for path in self.folder.glob("*.out"))
        return self.ask("squeue") + self.ask("sinfo", "-N") + logs

    def _run(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("a") as output:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )


OPTIONS = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


@contextmanager
def virtual_cluster(folder: Path) -> Iterator[VirtualCluster]:
    """A cluster that is gone afterwards."""
    cluster = VirtualCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def why_not() -> str:
    """Why there can be no virtual cluster here; empty where there can."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"SLURM is not installed ({', '.join(missing)} missing): apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "SLURM's daemons have to be started by root"


def _processes_on(node: str, conf: str) -> set[psutil.Process]:
    """What SLURM started on a virtual node, and SLURM's own processes above that."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            own = process.environ()
            if own.get("SLURMD_NODENAME") == node and own.get("SLURM_CONF") == conf:
                found |= {process, *(p for p in process.parents() if p.name().startswith("slurmstepd"))}
    return found


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
