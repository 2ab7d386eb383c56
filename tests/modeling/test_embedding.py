import pytest
import torch
from sentence_transformers import SentenceTransformer

from semcons_ray.errors import ModelError
from semcons_ray.modeling import embedding
from semcons_ray.modeling.embedding import Embedder
from semcons_ray.modeling.packaged import resolve_model

pytestmark = [pytest.mark.real]

TEXTS = ["Paris", "the capital of France", "a much longer answer " * 12, "42", ""]


@pytest.fixture(scope="module")
def folder() -> str:
    return resolve_model("packaged:all-minilm-l6-v2")


@pytest.fixture(scope="module")
def embedder(folder: str) -> Embedder:
    return Embedder(folder, batch_size=4)


def test_vectors_are_those_of_sentence_transformers(embedder: Embedder, folder: str) -> None:
    expected = SentenceTransformer(folder, device="cpu").encode(
        TEXTS, convert_to_tensor=True, normalize_embeddings=True
    )
    torch.testing.assert_close(embedder.embed(TEXTS), expected, rtol=1e-4, atol=1e-5)


def test_a_vector_does_not_depend_on_its_company(embedder: Embedder, folder: str) -> None:
    together = embedder.embed(TEXTS)
    apart = torch.stack([Embedder(folder, batch_size=4).embed([text])[0] for text in TEXTS])
    assert torch.equal(together, apart)


def test_equal_texts_are_computed_once(folder: str) -> None:
    embedder = Embedder(folder, batch_size=4)
    batches: list[int] = []
    embedder.model.register_forward_hook(lambda *_: batches.append(1))
    rows = embedder.embed(["one", "two", "one"] * 5)
    embedder.embed(["two"])
    assert len(batches) == 1
    assert torch.equal(rows[0], rows[2])


def test_the_cache_holds_the_texts_used_last_and_nothing_of_what_they_were_batched_with(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "MAX_CACHED", 3)
    embedder = Embedder(folder, batch_size=4)
    embedder.embed(["one", "two", "three"])
    embedder.embed(["one"])
    assert embedder.embed(["four", "five"]).shape == (2, 384)
    assert list(embedder._cache) == ["one", "four", "five"]
    assert embedder.embed(["one", "two", "three", "four", "five"]).shape == (5, 384)
    assert len(embedder._cache) == 3
    assert {vector.untyped_storage().nbytes() for vector in embedder._cache.values()} == {384 * 4}


def test_nothing_embeds_to_nothing(embedder: Embedder) -> None:
    assert embedder.embed([]).shape == (0, 384)


def test_what_cannot_be_loaded_names_the_setting() -> None:
    with pytest.raises(ModelError, match=r"server\.embedding_model"):
        Embedder("/no/such/folder")
