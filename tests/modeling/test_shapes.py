import pytest

from semcons_ray.modeling.shapes import SHAPES

# Billions of parameters without embeddings, and in all. For Qwen the model cards, for Gemma the tables of the technical
# reports (arXiv:2408.00118 and 2503.19786, of the text part), for the others the card's total, less the embeddings.
PUBLISHED = {
    "llama-3.1-8b": (8.03 - 2 * 128256 * 4096 / 1e9, 8.03),
    "llama-3.1-70b": (70.55 - 2 * 128256 * 8192 / 1e9, 70.55),
    "llama-3.1-405b": (405.85 - 2 * 128256 * 16384 / 1e9, 405.85),
    "llama-3.2-1b": (1.236 - 128256 * 2048 / 1e9, 1.236),
    "llama-3.2-3b": (3.213 - 128256 * 3072 / 1e9, 3.213),
    "qwen2.5-0.5b": (0.36, 0.49),
    "qwen2.5-1.5b": (1.31, 1.54),
    "qwen2.5-3b": (2.77, 3.09),
    "qwen2.5-7b": (6.53, 7.61),
    "qwen2.5-14b": (13.1, 14.7),
    "qwen2.5-32b": (31.0, 32.5),
    "qwen2.5-72b": (70.0, 72.7),
    "qwen3-0.6b": (0.44, 0.6),
    "qwen3-1.7b": (1.4, 1.7),
    "qwen3-4b": (3.6, 4.0),
    "qwen3-8b": (6.95, 8.2),
    "qwen3-14b": (13.2, 14.8),
    "qwen3-32b": (31.2, 32.8),
    "gemma-2-2b": (2.024, 2.024 + 0.590),
    "gemma-2-9b": (8.324, 8.324 + 0.918),
    "gemma-2-27b": (26.047, 26.047 + 1.180),
    "gemma-3-270m": (0.1, 0.27),
    "gemma-3-1b": (0.698, 0.698 + 0.302),
    "gemma-3-4b": (3.209, 3.209 + 0.675),
    "gemma-3-12b": (10.759, 10.759 + 1.012),
    "gemma-3-27b": (25.6, 25.600 + 1.416),
    "mistral-7b": (7.248 - 2 * 32768 * 4096 / 1e9, 7.248),
    "smollm2-135m": (0.1345 - 49152 * 576 / 1e9, 0.1345),
    "smollm2-360m": (0.3618 - 49152 * 960 / 1e9, 0.3618),
    "smollm2-1.7b": (1.711 - 49152 * 2048 / 1e9, 1.711),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_built_in_shape_has_the_published_number_of_parameters(name):
    shape = SHAPES[name]
    without_embeddings, total = PUBLISHED[name]
    parameters = shape.layers * shape.hidden * (2 * shape.queries + 2 * shape.keys + 3 * shape.feed_forward)
    assert parameters / 1e9 == pytest.approx(without_embeddings, rel=0.01)
    assert shape.parameters / 1e9 == pytest.approx(total, rel=0.015)
