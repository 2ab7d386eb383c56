"""Votes and embeddings on a GPU are those of the CPU."""

from pathlib import Path

import pytest
import torch

from semcons_ray.consensus import Election, Facts, form_consensus
from semcons_ray.modeling.embedding import Embedder
from semcons_ray.parts import BUILT_IN
from tests.gpu import NEEDS_GPU
from tests.modeling.test_embedding_kinds import write_bert
from tests.tiny import examples

pytestmark = NEEDS_GPU


@pytest.mark.parametrize("rule", sorted({*BUILT_IN["rule"]} - {"reference", "own_answer"}))
@pytest.mark.parametrize("chunk_bytes", [None, 1 << 14])
def test_a_gpu_elects_what_the_cpu_elects(rule: str, chunk_bytes: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(60, 25, 48, generator=generator) + 1, dim=2)
    present = torch.rand(60, 25, generator=generator) < 0.8
    present[:2] = False
    weights = torch.rand(25, generator=generator)
    facts = Facts(weights=weights, lengths=torch.randint(1, 100, (60, 25), generator=generator))
    priority = torch.rand(60, 25, generator=generator)
    found = [
        form_consensus(
            embeddings.to(device), present, Election(rule, threshold=0.4), priority, facts, chunk_bytes=chunk_bytes
        )
        for device in ("cpu", "cuda")
    ]
    for name in ("winner", "abstained"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name).cpu())
    for name in ("agreement", "similarity"):
        torch.testing.assert_close(
            getattr(found[0], name), getattr(found[1], name).cpu(), rtol=1e-5, atol=1e-5, equal_nan=True
        )


@pytest.mark.parametrize("shape", [(7, 33, 384), (3, 1, 7), (2, 64, 512), (0, 4, 8)])
@pytest.mark.parametrize("several", [False, True])
def test_whatever_the_shape_similarities_are_those_of_the_cpu(shape: tuple[int, int, int], several: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.nn.functional.normalize(torch.randn(shape, generator=generator) + 0.5, dim=2)
    present = torch.rand(shape[:2], generator=generator) < 0.8
    voters = torch.arange(shape[1]) // 2 if several else None
    priority = torch.rand(shape[:2], generator=generator)
    on_cpu, on_gpu = (
        form_consensus(embeddings.to(device), present, Election(), priority, Facts(voters=voters))
        for device in ("cpu", "cuda")
    )
    assert torch.equal(on_cpu.winner, on_gpu.winner.cpu())
    torch.testing.assert_close(on_cpu.similarity, on_gpu.similarity.cpu(), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_texts_have_the_vectors_of_the_cpu_the_same_each_time(tmp_path: Path) -> None:
    folder = write_bert(tmp_path, positions=64)
    texts = [f"{row['prompt']} {row['response']}" for row in examples()[:100]]
    on_cpu, on_gpu, again = (Embedder(folder, device=device).embed(texts).cpu() for device in ("cpu", "cuda", "cuda"))
    assert (on_cpu * on_gpu).sum(dim=1).min() > 0.999
    assert torch.equal(on_gpu, again)
