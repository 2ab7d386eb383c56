"""A Slurm of two nodes on this machine, each with a network, a host name and a /tmp of its own."""

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare")
NODES = ("client-0", "client-1")
START_SECONDS = 60.0

CONF = """
ClusterName=test
SlurmctldHost=head({head})
SlurmUser=root
AuthInfo=socket={folder}/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
KillWait=10
{nodes}
PartitionName=all Nodes=ALL Default=YES
"""
INSIDE = """
hostname $NAME
mount -t tmpfs tmpfs /dev/shm
mount --bind $FOLDER/hosts-$NAME /etc/hosts
mount --bind $FOLDER /mnt
mount -t tmpfs tmpfs /tmp
mkdir -p $FOLDER
mount --move /mnt $FOLDER
exec "$@"
"""


def missing() -> str:
    """What this machine lacks; empty if nothing."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge iproute2"
    if subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True).returncode:
        return "network namespaces need root"
    return ""


class Slurm:
    """For the time in which `network` is there, a `links.Network` of two clients.

    Args:
        network: The network; its head has the controller, its clients are the nodes.
        folder: The folder that all machines see, also for Slurm's own files; its path must be short, for sockets.
    """

    def __init__(self, network: Any, folder: Path) -> None:
        self._network, self._folder = network, folder
        self._env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        rows = [f"NodeName={name} NodeAddr={network.address(name)} CPUs=2 RealMemory=8000" for name in NODES]
        conf = CONF.format(folder=folder, head=network.address("head"), nodes="\n".join(rows))
        (folder / "slurm.conf").write_text(conf)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # named, or slurmd looks for it; not used
        (folder / "key").write_bytes(secrets.token_bytes(64))
        (folder / "key").chmod(0o400)
        munge = [f"--{word}-file={folder}/munge.{word}" for word in ("pid", "log", "seed")]
        self._start("head", "munged", "--foreground", "--force", f"--key-file={folder}/key",
                    f"--socket={folder}/munge", *munge)  # fmt: skip
        self.until((folder / "munge").exists, START_SECONDS, folder / "head-munged.said")
        self._start("head", "slurmctld", "-D")
        for name in NODES:
            (folder / f"spool-{name}").mkdir()
            self._start(name, "slurmd", "-D", "-N", name)
        idle = ["sinfo", "--noheader", "--format=%T %D"]
        self.until(lambda: self.ask(*idle, check=False).split() == ["idle", "2"], START_SECONDS, folder / "slurm.conf")

    def ask(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        """What one of Slurm's commands says."""
        inside = ["ip", "netns", "exec", "semcons-net-head", *command]
        done = subprocess.run(inside, env=self._env, cwd=cwd, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        return dict(word.partition("=")[::2] for word in self.ask("scontrol", "show", "job", job).split())

    def until(self, there: Callable[[], bool], seconds: float, log: Path) -> None:
        """Wait; a failure shows a log, and what Slurm's daemons said."""
        deadline = time.monotonic() + seconds
        while not there():
            said = [path for path in (log, *self._folder.glob("*.said")) if path.exists()]
            assert time.monotonic() < deadline, "\n".join(f"{path.name}:\n{path.read_text()}" for path in said)
            time.sleep(0.2)

    def _start(self, name: str, *command: str) -> None:
        """Start a daemon on a machine, whose own name is in its /etc/hosts as Debian writes it there."""
        others = {other: self._network.address(other) for other in ("head", *NODES) if other != name}
        lines = {"localhost": "127.0.0.1", name: "127.0.1.1", **others}
        hosts = self._folder / f"hosts-{name}"
        hosts.write_text("".join(f"{address} {other}\n" for other, address in lines.items()))
        inside = ["unshare", "--mount", "--uts", "sh", "-ec", INSIDE, "sh", *command]
        env = {**self._env, "NAME": name, "FOLDER": str(self._folder)}
        self._network.start(name, inside, self._folder / f"{name}-{command[0]}.said", env)
