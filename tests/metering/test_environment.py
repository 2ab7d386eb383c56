import json
import os
import platform

import psutil
import pytest

from semcons_ray import __version__
from semcons_ray.metering.environment import (
    cpu_model,
    describe_environment,
    memory_limit_bytes,
    package_versions,
    usable_cpus,
)


def test_the_description_is_json_and_about_this_machine():
    described = describe_environment()
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    keys = {"semcons_ray", "python", "packages", "platform", "cpu", "cpu_bf16", "num_cpus", "memory_gib", "gpus"}
    assert set(described) == keys
    assert described["semcons_ray"] == __version__
    assert described["python"] == platform.python_version()
    assert 1 <= described["num_cpus"] <= (os.cpu_count() or 1)
    assert 0 < described["memory_gib"] <= psutil.virtual_memory().total / 2**30 + 0.01
    assert {"torch", "ray", "numpy"} <= set(described["packages"])


def test_packages_that_are_not_installed_are_left_out():
    assert set(package_versions(("numpy", "no-such-package-of-ours"))) == {"numpy"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nmodel name\t: Xeon 8480+\nflags\t\t: sse avx512_bf16 amx_bf16\n", ("Xeon 8480+", True)),
        ("model name\t: EPYC 7763\nflags\t\t: sse avx2\nmodel name\t: other\n", ("EPYC 7763", False)),
    ],
)
def test_cpu_model_and_bf16_come_from_cpuinfo(tmp_path, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_model(tmp_path / "cpuinfo") == expected


def test_an_arm_cpu_has_features_and_no_model_name(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    name, bf16 = cpu_model(tmp_path / "cpuinfo")
    assert name
    assert bf16


def test_without_cpuinfo_bf16_is_not_claimed(tmp_path):
    assert cpu_model(tmp_path / "cpuinfo")[1] is False


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_limits_of_cgroup_version_2_bind_from_any_ancestor(tmp_path):
    membership = tmp_path / "self"
    membership.write_text("0::/slice/job\n")
    write(tmp_path / "slice/cpu.max", "50000 100000\n")
    write(tmp_path / "slice/job/cpu.max", "max 100000\n")
    write(tmp_path / "slice/memory.max", "1073741824\n")
    write(tmp_path / "slice/job/memory.max", "max\n")
    assert usable_cpus(tmp_path, membership) == 1
    assert memory_limit_bytes(tmp_path, membership) == 2**30


def test_limits_of_cgroup_version_1_lie_under_their_controller(tmp_path):
    membership = tmp_path / "self"
    membership.write_text("5:memory:/box\n3:cpu,cpuacct:/box\n")
    write(tmp_path / "cpu/box/cpu.cfs_quota_us", "70000\n")
    write(tmp_path / "cpu/box/cpu.cfs_period_us", "100000\n")
    write(tmp_path / "memory/box/memory.limit_in_bytes", "2147483648\n")
    write(tmp_path / "memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert usable_cpus(tmp_path, membership) == 1
    assert memory_limit_bytes(tmp_path, membership) == 2**31


def test_without_limits_affinity_and_the_machine_decide(tmp_path):
    membership = tmp_path / "self"
    membership.write_text("0::/\n")
    write(tmp_path / "cpu.max", "max 100000\n")
    write(tmp_path / "cpu/cpu.cfs_quota_us", "-1\n")
    assert usable_cpus(tmp_path, membership) == len(os.sched_getaffinity(0))
    assert memory_limit_bytes(tmp_path, tmp_path / "absent") == psutil.virtual_memory().total
