"""A training step in half precision through the kernels, as a GPU takes it."""

import pytest
import torch

from tests.pictures import write_pictures
from tests.test_train_flux import build, gradient, tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def step(data, out_dir):
    words = ["precision=bf16", "batch_size=1", "micro_batch=1", "tokens_per_node=2,1"]
    stage = build(tiny(out_dir, data, *words))
    return gradient(stage, next(stage.batches(1)))


def test_a_half_precision_step_is_that_of_the_reference(data, tmp_path, request):
    losses, grads = step(data, tmp_path)
    request.getfixturevalue("kernels")
    by_kernels, kernel_grads = step(data, tmp_path)
    assert by_kernels["loss"].item() == pytest.approx(losses["loss"].item(), rel=2e-2)
    ours, theirs = (
        torch.cat([grad.flatten() for grad in some.values()]) for some in (kernel_grads, grads)
    )
    assert not torch.equal(ours, theirs)
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99
    assert ours.norm().item() == pytest.approx(theirs.norm().item(), rel=0.05)
