"""Where attaching must refuse: each case would otherwise drop or misplace the mask."""

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.models.attention_dispatch import AttentionBackendName

from sda_fast.attachment import HierarchicalFluxAttnProcessor, attach, read_grids

from .attached_flux import (
    TREE,
    assert_as_dense,
    dense,
    make_ids,
    make_inputs,
    make_transformer,
    run,
)
from .tiny_flux import TRANSFORMER, tiny_flux_pipeline


@pytest.fixture
def transformer():
    return make_transformer()


def test_attach_twice(transformer):
    handle = attach(transformer, TREE)
    with pytest.raises(ValueError, match=r"attached already.*'overlap'.*detach"):
        attach(transformer, TREE, "local")
    assert_as_dense(transformer, make_inputs(), dense_of_fresh())
    handle.detach()


@torch.no_grad()
def dense_of_fresh():
    return dense(make_transformer(), make_inputs())


def load_ip_adapter(transformer):
    width, dim = 32, TRANSFORMER["joint_attention_dim"]
    names = ("to_k_ip", "to_v_ip")
    transformer._load_ip_adapter_weights(
        {
            "image_proj": {
                "proj.weight": torch.randn(4 * dim, 8),
                "proj.bias": torch.randn(4 * dim),
                "norm.weight": torch.ones(dim),
                "norm.bias": torch.zeros(dim),
            },
            "ip_adapter": {f"0.{n}.weight": torch.randn(width, dim) for n in names}
            | {f"0.{n}.bias": torch.randn(width) for n in names},
        },
        low_cpu_mem_usage=False,
    )


def test_attach_after_ip_adapter(transformer):
    load_ip_adapter(transformer)
    with pytest.raises(ValueError, match=r"FluxIPAdapterAttnProcessor.*flux_inputs"):
        attach(transformer, TREE)


@torch.no_grad()
def test_ip_adapter_after_attach():
    """Loading it replaces our processors, unloading leaves stock ones: both would drop the mask."""
    pipeline = tiny_flux_pipeline(FluxPipeline)
    transformer, inputs = pipeline.transformer, make_inputs()
    want = dense(transformer, inputs)
    handle = attach(transformer, TREE)
    load_ip_adapter(transformer)
    with pytest.raises(RuntimeError, match="replaced by FluxIPAdapterAttnProcessor"):
        run(transformer, inputs)
    pipeline.unload_ip_adapter()
    with pytest.raises(RuntimeError, match="replaced by FluxAttnProcessor"):
        run(transformer, inputs)
    handle.detach()
    with attach(transformer, TREE):
        assert_as_dense(transformer, inputs, want)


def test_detach_leaves_an_ip_adapter(transformer):
    handle = attach(transformer, TREE)
    load_ip_adapter(transformer)
    handle.detach()
    kinds = {type(p).__name__ for p in transformer.attn_processors.values()}
    assert kinds == {"FluxIPAdapterAttnProcessor", "FluxAttnProcessor"}


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("flash_varlen", "key padding"),
        (AttentionBackendName.SAGE_VARLEN, "key padding"),
        (AttentionBackendName.SAGE, "takes no mask"),
        ("_native_flash", "takes no mask"),
        ("warp_drive", "unknown to diffusers"),
    ],
)
def test_backends_without_a_mask(transformer, backend, message):
    def choose():
        for processor in transformer.attn_processors.values():
            processor._attention_backend = backend

    handle = attach(transformer, TREE)
    choose()
    with pytest.raises(ValueError, match=message):
        run(transformer, make_inputs())
    handle.detach()
    with pytest.raises(ValueError, match=message):
        attach(transformer, TREE)


@torch.no_grad()
def test_context_parallelism(transformer):
    handle = attach(transformer, TREE)
    for processor in transformer.attn_processors.values():
        processor._parallel_config = object()
    with pytest.raises(ValueError, match="context parallelism"):
        run(transformer, make_inputs())
    handle.detach()
    with pytest.raises(ValueError, match="context parallelism"):
        attach(transformer, TREE)


def test_refuses_a_dense_mask_beside_it(transformer):
    mask = TREE.attention_mask(4, 6)[None, None]
    with attach(transformer, TREE), pytest.raises(ValueError, match="attention_mask while"):
        run(transformer, make_inputs(), attention_mask=mask)


def test_refuses_fewer_text_tokens_than_positions(transformer):
    inputs = make_inputs(num_txt=TREE.num_tokens - 1)
    message = f"encoder_hidden_states must hold the {TREE.num_tokens} positions.*got 26 text"
    with attach(transformer, TREE), pytest.raises(ValueError, match=message):
        run(transformer, inputs)


@pytest.mark.parametrize("ids", [{}, {"img_ids": None}])
def test_refuses_a_call_without_ids(transformer, ids):
    inputs = make_inputs()
    del inputs["img_ids"]
    with attach(transformer, TREE), pytest.raises(ValueError, match="img_ids must be given"):
        run(transformer, {**inputs, **ids})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"transformer": torch.nn.Linear(1, 1)}, TypeError, "FluxTransformer2DModel.*got Linear"),
        ({"tree": (3, 2, 1)}, TypeError, "tree must be a Hierarchy, got tuple"),
        ({"rule": "global"}, ValueError, "rule must be one of overlap, local.*'global'"),
        ({"isolate_level": 3}, ValueError, "isolate_level"),
    ],
)
def test_refuses_bad_arguments(transformer, options, error, message):
    with pytest.raises(error, match=message):
        attach(**{"transformer": transformer, "tree": TREE, **options})
    assert not any(
        isinstance(p, HierarchicalFluxAttnProcessor) for p in transformer.attn_processors.values()
    )


def test_a_block_alone_is_refused(transformer):
    """Outside the transformer's forward nobody knows the layout; no mask must not mean all."""
    hidden, text = torch.randn(1, 24, 32), torch.randn(1, TREE.num_tokens, 32)
    with attach(transformer, TREE), pytest.raises(RuntimeError, match="hook"):
        transformer.transformer_blocks[0](hidden, text, torch.randn(1, 32))


def test_processor_holds_no_state(transformer):
    with attach(transformer, TREE):
        run(transformer, make_inputs())
        for processor in transformer.attn_processors.values():
            assert set(vars(processor)) == {"_attention_backend", "_parallel_config"}
            assert type(processor.__class__()) is HierarchicalFluxAttnProcessor


@pytest.mark.parametrize(
    "ids",
    [
        make_ids(3, 4)[:-1],
        make_ids(3, 4).flip(0),
        make_ids(3, 4).view(3, 4, 3).transpose(0, 1).reshape(12, 3),
        torch.cat([make_ids(2, 2), make_ids(2, 2, 1), make_ids(2, 2, 1)]),
        torch.cat([make_ids(2, 2, 1), make_ids(2, 2)]),
        make_ids(2, 2, 2),
        make_ids(2, 2)[:0],
    ],
    ids=["cut", "reversed", "columns", "two sources", "source first", "other", "none"],
)
def test_read_grids_refuses(ids):
    with pytest.raises(ValueError, match="img_ids"):
        read_grids(ids)
