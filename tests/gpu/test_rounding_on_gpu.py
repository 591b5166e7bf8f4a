"""GPTQ's loops on a GPU: the objective that they reach on a CPU, within what summing in another order makes."""

import pytest
import torch
from megalith.rlhf.gptq_algorithm import GptqOptions, quantize_matrix

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("given", [{}, {"static_groups": False, "sym": False}, {"num_beams": 1, "descent_passes": 0}])
def test_a_matrix_is_quantised_as_on_a_cpu(given):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 320, generator=generator) @ torch.randn(320, 320, generator=generator)
    weight, hessian = 0.05 * torch.randn(320, 200, generator=generator), 2 / len(x) * x.T @ x
    found = [quantize_matrix(weight.to(d), hessian.to(d), GptqOptions(**given)) for d in ("cpu", "cuda")]
    sums = [result.objective.sum().item() for result in found]
    assert sums[1] == pytest.approx(sums[0], rel=0.02)
    torch.testing.assert_close(found[1].rounded_objective.cpu(), found[0].rounded_objective, rtol=1e-3, atol=1e-5)
