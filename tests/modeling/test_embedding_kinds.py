"""Embedding models of several kinds, tiny and random: what is taken, and what is refused with the setting's name."""

import json
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer, models
from transformers import AutoConfig, AutoModel

from semcons_ray.errors import ModelError
from semcons_ray.modeling.embedding import Embedder
from tests.tiny import train_tokenizer, write_embedder, write_model

TEXTS = ["one", "", "which is more, one or two? " * 20]


def write_bert(folder: Path, *, positions: int, longest: int | None = None) -> str:
    """One that says it takes `longest` tokens, or, as most do, as many as it has positions."""
    tokenizer = train_tokenizer()
    config = AutoConfig.for_model(
        "bert", vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=positions, pad_token_id=0,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = SentenceTransformer(modules=[models.Transformer(str(folder / "base")), models.Pooling(16)], device="cpu")
    model.save(str(folder / "whole"))
    if longest:
        file = folder / "whole" / "sentence_bert_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "max_seq_length": longest}))
    return str(folder / "whole")


def vectors(folder: str) -> torch.Tensor:
    return Embedder(folder, batch_size=2).embed(TEXTS)


def test_a_static_embedding_is_taken(tmp_path: Path) -> None:
    folder = write_embedder(tmp_path)
    plain = SentenceTransformer(folder, device="cpu").encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True)
    found = vectors(folder)
    torch.testing.assert_close(found, plain)
    assert found.shape == (3, 8)
    assert not torch.allclose(found[0], found[2])


@pytest.mark.parametrize("positions", [8, 24, 64])
def test_texts_are_cut_to_the_positions_there_are(positions: int, tmp_path: Path) -> None:
    folder = write_bert(tmp_path, positions=positions)
    plain = SentenceTransformer(folder, device="cpu").encode(
        [TEXTS[0], TEXTS[2]], batch_size=1, convert_to_tensor=True, normalize_embeddings=True
    )
    torch.testing.assert_close(vectors(folder)[[0, 2]], plain, rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_read_as_long_texts_as_it_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^cannot load server\.embedding_model [^\n]+$") as caught:
        Embedder(write_bert(tmp_path, positions=64, longest=256), batch_size=2)
    assert "it has 64 positions and says that it takes 256 tokens; lower max_seq_length" in str(caught.value)
    Embedder(write_bert(tmp_path / "shorter", positions=64, longest=32), batch_size=2)


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_is_no_embedder_is_named(there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    if there:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=rf"^cannot load server\.embedding_model {folder}: [^\n]+$"):
        Embedder(str(folder))


def test_vectors_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    folder = write_bert(tmp_path, positions=64)
    model = SentenceTransformer(folder, device="cpu")
    model[0].auto_model.embeddings.word_embeddings.weight.data.fill_(float("nan"))
    model.save(folder)
    with pytest.raises(ModelError, match=r"server\.embedding_model .* gives vectors that are not finite"):
        Embedder(folder)


def test_a_language_model_is_taken_as_an_embedder(tmp_path: Path) -> None:
    """sentence-transformers takes the mean of its hidden vectors."""
    assert Embedder(str(write_model(tmp_path, "llama")), batch_size=2).dimension == 32
