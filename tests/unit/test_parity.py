"""One rank against plain PyTorch, by the relative error of the update."""

import pytest
import torch
from tiny import FAMILIES, update_error
from training import Recipe, reference, train

RECIPES = {
    "plain": Recipe(),
    "unclipped": Recipe(max_grad_norm=None),
    "adam": Recipe(adam=torch.optim.Adam),
    "accumulation": Recipe(accumulation=3),
    "frozen": Recipe(frozen=".1."),
    "checkpoint": Recipe(reentrant_checkpoint=False),
    "reentrant checkpoint": Recipe(reentrant_checkpoint=True),
    "generate": Recipe(generates=True),
}


@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_matches_plain_pytorch(family, placement):
    recipe = Recipe(family=family)
    expected = reference(recipe)
    ours = train(recipe, options={"placement": placement, "max_chunk_numel": 5000})
    assert update_error(ours.initial, ours.final, expected.final) < 2e-6
    assert ours.norms == pytest.approx(expected.norms, rel=1e-5)


@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("family", ["gpt2", "llama_tied", "mixtral"])
def test_every_recipe_matches_plain_pytorch(family, name, placement):
    recipe = RECIPES[name].but(family=family)
    expected = reference(recipe)
    ours = train(recipe, options={"placement": placement})
    assert update_error(ours.initial, ours.final, expected.final) < 2e-6
    assert ours.losses == pytest.approx(expected.losses, abs=3e-6)
    assert ours.generated == expected.generated
