"""Weight updates of a model whose output layer is tied to its embeddings."""

from __future__ import annotations

import pytest

from .conftest import MakeEngine, make_tiny_model, requests
from .test_engine import reference_difference


def test_tied_embeddings_follow_an_update_without_lm_head(
    make_engine: MakeEngine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = make_tiny_model(tmp_path_factory.mktemp("tied-model"), tie_word_embeddings=True)
    assert "lm_head.weight" not in model.weights(1)
    engine = make_engine(model, 4)
    # The second update as well: the first one starts from an engine that has computed nothing yet.
    for version in (1, 2):
        engine.update_weights(model.weights(version).items(), version)
        samples = engine.generate(requests(4))
        assert reference_difference(model, version, samples) < 1e-4
    # A copy that could differ is not silently dropped.
    doubled = model.weights(3)
    doubled["lm_head.weight"] = doubled["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match=r"unexpected lm_head\.weight"):
        engine.update_weights(doubled.items(), 3)
