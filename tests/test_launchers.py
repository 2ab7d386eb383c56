"""Launcher files: what can be said of them without a cloud, Kubernetes, Docker or Slurm at hand."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
LAUNCHERS = ["cloud/aws.yaml", "cloud/gcp.yaml", "onprem/onprem.yaml"]
KUBERAY = ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml"]

# Fields of the ray.io/v1 resources and what they hold: a dict of fields, a kind of value, or None for Kubernetes' own
# types. From ray-project/kuberay (Apache-2.0), ray-operator/apis/ray/v1/{raycluster,rayjob}_types.go at feeaf72.
HEAD: dict[str, Any] = {
    "template": None, "headService": None, "enableIngress": bool, "ingressOptions": None, "resources": dict,
    "labels": dict, "rayStartParams": dict, "serviceType": str,
}  # fmt: skip
WORKERS: dict[str, Any] = {
    "suspend": bool, "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int,
    "idleTimeoutSeconds": int, "priority": int, "resources": dict, "labels": dict, "rayStartParams": dict,
    "template": None, "scaleStrategy": None, "numOfHosts": int,
}  # fmt: skip
RAY_CLUSTER: dict[str, Any] = {
    "upgradeStrategy": None, "authOptions": {"enableK8sTokenAuth": bool, "secretName": str, "mode": str},
    "suspend": bool, "managedBy": str, "autoscalerOptions": None, "headServiceAnnotations": dict,
    "enableInTreeAutoscaling": bool, "gcsFaultToleranceOptions": None, "historyServerOptions": None,
    "networkPolicy": None, "tlsOptions": None, "headGroupSpec": HEAD, "rayVersion": str, "workerGroupSpecs": [WORKERS],
}  # fmt: skip
RAY_JOB: dict[str, Any] = {
    "activeDeadlineSeconds": int, "backoffLimit": int, "rayClusterSpec": RAY_CLUSTER, "submitterPodTemplate": None,
    "metadata": dict, "clusterSelector": dict, "submitterConfig": None, "managedBy": str, "deletionStrategy": None,
    "entrypoint": str, "runtimeEnvYAML": str, "jobId": str, "submissionMode": str, "entrypointResources": str,
    "entrypointNumCpus": float, "entrypointNumGpus": float, "ttlSecondsAfterFinished": int,
    "preRunningDeadlineSeconds": int, "shutdownAfterJobFinishes": bool, "suspend": bool,
}  # fmt: skip
REQUIRED = {
    id(RAY_CLUSTER): {"headGroupSpec"}, id(HEAD): {"template", "rayStartParams"},
    id(WORKERS): {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}  # fmt: skip


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return loaded


@pytest.mark.parametrize("name", LAUNCHERS)
def test_rays_launcher_takes_the_file(name: str) -> None:
    config = read(name)
    # As `ray up` does: with the provider's defaults, then against ray-schema.json.
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]
    assert "~/.ray/auth_token" in config["file_mounts"].values()
    for role in ("head", "worker"):
        assert "RAY_AUTH_MODE=token" in str(config[f"{role}_start_ray_commands"])


@pytest.mark.parametrize("name", ["cloud/aws.yaml", "cloud/gcp.yaml"])
def test_machines_start_at_the_locked_version_of_ray(name: str) -> None:
    locked = re.search(r"^ray==(.*)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked
    assert read(name)["docker"]["image"] == f"rayproject/ray:{locked[1]}-py311"


def test_a_launcher_file_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config({**read(LAUNCHERS[0]), "idle_timeout": 1}))


def check(value: Any, fields: Any, where: str) -> None:
    if isinstance(fields, dict):
        assert set(value) <= set(fields), where
        assert REQUIRED.get(id(fields), set()) <= set(value), where
        for key, inner in value.items():
            check(inner, fields[key], f"{where}.{key}")
    elif isinstance(fields, list):
        for index, inner in enumerate(value):
            check(inner, fields[0], f"{where}[{index}]")
    elif fields is not None:
        assert type(value) is fields, where
        if fields is dict:  # resources, labels, parameters of ray start: strings all
            assert all(isinstance(inner, str) for inner in value.values()), where


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_knows_every_field(name: str) -> None:
    resource = read(name)
    assert set(resource) == {"apiVersion", "kind", "metadata", "spec"}
    assert resource["apiVersion"] == "ray.io/v1"
    fields = {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB}[resource["kind"]]
    check(resource["spec"], fields, resource["kind"])
    cluster = resource["spec"].get("rayClusterSpec", resource["spec"])
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"\nray=={cluster['rayVersion']}\n" in (ROOT / "requirements.lock").read_text()
    claim = yaml.safe_load((CLUSTER / "kuberay" / "runs-claim.yaml").read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {"name": "runs", "mountPath": "/shared"} in container["volumeMounts"]
        claims = {volume["name"]: volume.get("persistentVolumeClaim") for volume in pod["volumes"]}
        assert claims["runs"] == {"claimName": claim["metadata"]["name"]}
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_both_kuberay_files_describe_the_same_cluster() -> None:
    assert read(KUBERAY[1])["spec"]["rayClusterSpec"] == read(KUBERAY[0])["spec"]


@pytest.mark.parametrize(
    "command",
    [
        ["shellcheck", "cluster/slurm/semcons.sbatch", ".ci/as_user", ".ci/install", ".ci/resolve", ".ci/run"],
        ["hadolint", "cluster/docker/Dockerfile"],
    ],
    ids=["shellcheck", "hadolint"],
)
def test_linters_have_nothing_to_say(command: list[str]) -> None:
    tool = Path(sys.executable).with_name(command[0])
    if not tool.is_file():
        pytest.skip(f"{command[0]} is not installed; it is in requirements-dev.lock")
    done = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_images_copy_what_there_is() -> None:
    text = (CLUSTER / "docker" / "Dockerfile").read_text()
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()}
    let_in = set(re.findall(r"^!(.*)$", (CLUSTER / "docker" / "Dockerfile.dockerignore").read_text(), re.MULTILINE))
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)


def test_no_file_holds_a_token() -> None:
    for path in CLUSTER.rglob("*"):
        if path.is_file():
            assert not re.search(r"[0-9a-f]{32,}", path.read_text()), path


def test_every_file_is_named_in_a_readme() -> None:
    readmes = "".join(path.read_text() for path in CLUSTER.rglob("README.md"))
    for path in CLUSTER.rglob("*"):
        if path.is_file() and path.name not in ("README.md", "Dockerfile.dockerignore"):
            assert str(path.relative_to(ROOT)) in readmes, path


SRUN = """#!/bin/bash
# Slurm's srun on one machine: options away, then the command.
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""


@pytest.mark.skipif(shutil.which("awk") is None, reason="needs awk")
@pytest.mark.parametrize("there", [False, True], ids=["new", "requeued"])
def test_the_slurm_script_starts_ray_waits_for_it_and_runs_or_resumes(tmp_path: Path, there: bool) -> None:
    """Commands are stand-ins that note how they were called: the order and the words are the script's."""
    stubs = tmp_path / ".venv" / "bin"
    stubs.mkdir(parents=True)
    note = f'#!/bin/bash\necho "$(basename "$0") $*" >> {tmp_path}/calls\n'
    for name, text in {
        "srun": SRUN,
        "scontrol": "#!/bin/bash\necho one\necho two\n",
        "hostname": "#!/bin/bash\necho 10.0.0.1\n",
        "ray": note,
        "semcons": note + f'echo "$RAY_AUTH_MODE ${{#RAY_AUTH_TOKEN}} $RAY_ADDRESS" >> {tmp_path}/calls\n',
        "python": f"""#!/bin/bash
if [[ $2 == *secrets* ]]; then printf "%064d" 0; exit; fi
until (( $(grep -c ^ray {tmp_path}/calls 2>/dev/null) == 2 )); do sleep 0.1; done  # both nodes have started
echo 2
""",
    }.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    out = tmp_path / "out"
    if there:
        out.mkdir()
        (out / "config.yaml").touch()
    subprocess.run(
        ["bash", CLUSTER / "slurm" / "semcons.sbatch", "a.yaml", str(out), "--seed", "1"],
        env={"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n[1-2]",
             "SLURM_JOB_ID": "123456", "SLURM_CPUS_PER_TASK": "4"},
        check=True, timeout=60,
    )  # fmt: skip
    calls = (tmp_path / "calls").read_text().splitlines()
    address = "10.0.0.1:23456"
    head, worker = sorted((call for call in calls if call.startswith("ray")), key=lambda call: "--head" not in call)
    assert "--port=23456" in head
    assert f"--address={address}" in worker
    assert all("--num-cpus=4 --num-gpus=0" in call for call in (head, worker))
    run = f"semcons run a.yaml --out {out} --resources.ray_address auto --seed 1"
    assert (f"semcons resume {out}" if there else run) in calls
    assert f"token 64 {address}" in calls
