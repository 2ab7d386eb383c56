"""Launcher files: what can be said of them without a cloud, Kubernetes, Docker or Slurm at hand."""

import functools
import json
import operator
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
LAUNCHERS = ["cloud/aws.yaml", "cloud/gcp.yaml", "onprem/onprem.yaml"]
SCRIPTS = ["as_user", "image", "install", "resolve", "run"]
CLAIM = "kuberay/runs-claim.yaml"
KUBERAY = ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml"]

# What KubeRay 1.5.1, the oldest that will do, takes as a RayJob's `spec`; tests/kuberay/reduce.py says how it was made.
SCHEMA: dict[str, Any] = json.loads((ROOT / "tests" / "kuberay" / "rayjob-1.5.1.json").read_text())
RAY_JOB = jsonschema.Draft202012Validator(SCHEMA)


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


def ray_job(name: str) -> dict[str, Any]:
    """The `spec` of a RayJob, or of one with this RayCluster."""
    resource = read(name)
    assert set(resource) == {"apiVersion", "kind", "metadata", "spec"}
    assert resource["apiVersion"] == "ray.io/v1"
    spec: dict[str, Any] = resource["spec"]
    return {"RayJob": spec, "RayCluster": {"rayClusterSpec": spec}}[resource["kind"]]


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_takes_the_file(name: str) -> None:
    job = ray_job(name)
    RAY_JOB.validate(job)
    cluster = job["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"\nray=={cluster['rayVersion']}\n" in (ROOT / "requirements.lock").read_text()
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {"name": "runs", "mountPath": "/shared"} in container["volumeMounts"]
        claims = {volume["name"]: volume.get("persistentVolumeClaim") for volume in pod["volumes"]}
        assert claims["runs"] == {"claimName": read(CLAIM)["metadata"]["name"]}
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_kubernetes_takes_the_claim_to_a_folder_that_pods_share() -> None:
    job, claim = ray_job(KUBERAY[0]), read(CLAIM)
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    # Pods may have claims in them, so the schema knows what belongs into one.
    volumes = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    volumes.append({"name": "claim", "ephemeral": {"volumeClaimTemplate": {"spec": claim["spec"]}}})
    RAY_JOB.validate(job)
    claim["spec"]["accessMode"] = claim["spec"].pop("accessModes")
    assert not RAY_JOB.is_valid(job)


def fields(value: Any, *above: Any) -> Iterator[tuple[Any, ...]]:
    """Where each field is; resources may have any name."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield (*above, name)
            if name not in ("limits", "requests"):
                yield from fields(inner, *above, name)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from fields(inner, *above, index)


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_refuses_each_field_if_it_is_misspelt_or_holds_something_else(name: str) -> None:
    job = ray_job(name)
    every = list(fields(job))
    assert ("rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "image") in every
    for *above, field in every:
        place = functools.reduce(operator.getitem, above, job)
        held = place.pop(field)
        place[f"{field}s"] = held
        assert not RAY_JOB.is_valid(job), (*above, field)
        del place[f"{field}s"]
        place[field] = [[]]
        assert not RAY_JOB.is_valid(job), (*above, field)
        place[field] = held
    assert RAY_JOB.is_valid(job)


def test_both_kuberay_files_describe_the_same_cluster() -> None:
    assert read(KUBERAY[1])["spec"]["rayClusterSpec"] == read(KUBERAY[0])["spec"]


@pytest.mark.parametrize(
    "command",
    [
        ["shellcheck", "cluster/slurm/semcons.sbatch", *(f".ci/{name}" for name in SCRIPTS)],
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


@pytest.mark.parametrize("there", [False, True], ids=["new", "requeued"])
def test_the_slurm_script_starts_ray_waits_for_it_and_runs_or_resumes(tmp_path: Path, there: bool) -> None:
    """Commands are stand-ins that note how they were called: the order and the words are the script's."""
    stubs = tmp_path / ".venv" / "bin"
    stubs.mkdir(parents=True)
    note = f'#!/bin/bash\necho "$(basename "$0") $*" >> {tmp_path}/calls\n'
    for name, text in {
        "srun": SRUN,
        "scontrol": "#!/bin/bash\necho one\necho two\n",
        "ray": f'#!/bin/bash\necho "ray $* with $SRUN_CPUS_PER_TASK" >> {tmp_path}/calls\n',
        "semcons": note + f'echo "$RAY_AUTH_MODE ${{#RAY_AUTH_TOKEN}} $RAY_ADDRESS" >> {tmp_path}/calls\n',
        "python": f"""#!/bin/bash
if [[ $2 == *secrets* ]]; then printf "%064d" 0; exit; fi
if [[ $2 == *ip_address* ]]; then echo 10.0.0.1; exit; fi
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
    assert all(call.endswith("--num-cpus=4 --num-gpus=0 with 4") for call in (head, worker))
    run = f"semcons run a.yaml --out {out} --resources.ray_address auto --seed 1"
    assert (f"semcons resume {out}" if there else run) in calls
    assert f"token 64 {address}" in calls
