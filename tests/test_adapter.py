from dataclasses import replace

import pytest
import torch
from PIL import Image

from sda_fast.adapter import PRESETS, SemanticAdapter
from sda_fast.hierarchy import Hierarchy
from sda_fast.images import to_tensor
from sda_fast.qformer import QFormer
from tests.tiny_encoders import FEATURES, same_state, tiny_adapter, tiny_encoder


def pictures(*sizes):
    pixels = [torch.rand(3, height, width) for width, height in sizes]
    return [Image.fromarray((p * 255).byte().permute(1, 2, 0).numpy()) for p in pixels]


class TestForward:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"cross_attention_every": 2},
            {"cross_attention_rope": False},
            {"self_attention_rope": True},
            {"tokens_per_node": (0, 3, 1)},
        ],
    )
    @pytest.mark.parametrize("grid", [(4, 4), (3, 7)])
    def test_gives_a_unit_rms_vector_a_position(self, options, grid):
        adapter = tiny_adapter(**options)
        tokens = adapter(torch.randn(2, grid[0] * grid[1], FEATURES), grid)
        assert tokens.shape == (2, adapter.tree.num_tokens, 20)
        rms = tokens.square().mean(-1).sqrt()
        torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=0)

    def test_every_parameter_learns(self):
        adapter = tiny_adapter(cross_attention_every=2)
        target = torch.randn(2, 12, 20)
        (adapter(torch.randn(2, 12, FEATURES), (3, 4)) - target).square().mean().backward()
        for name, parameter in adapter.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name

    def test_a_sample_alone_is_as_in_a_batch(self):
        adapter, features = tiny_adapter(), torch.randn(3, 12, FEATURES)
        together = adapter(features, (3, 4))
        torch.testing.assert_close(adapter(features[1:2], (3, 4)), together[1:2])

    def test_only_the_rotation_knows_the_order_of_patches(self):
        features, order = torch.randn(1, 12, FEATURES), torch.randperm(12)
        assert not torch.equal(order, torch.arange(12))
        flat = tiny_adapter(cross_attention_rope=False)
        torch.testing.assert_close(flat(features[:, order], (3, 4)), flat(features, (3, 4)))
        rotated = tiny_adapter()
        before, after = rotated(features, (3, 4)), rotated(features[:, order], (3, 4))
        assert (before - after).abs().max() > 1e-3

    def test_the_rotation_sees_distances_alone(self):
        qformer = QFormer(3, 32, num_layers=2, num_heads=2, self_attention_rope=True)
        patches, q_coords, k_coords = torch.randn(2, 6, 32), torch.rand(3, 3), torch.rand(6, 3)
        q_coords, k_coords = 8 * q_coords, 8 * k_coords
        before, move = qformer(patches, q_coords, k_coords), torch.tensor([1.0, 5.0, -7.0])
        torch.testing.assert_close(qformer(patches, q_coords + move, k_coords + move), before)
        assert (qformer(patches, q_coords + move, k_coords) - before).abs().max() > 1e-2

    def test_reads_patches_in_every_kth_layer(self):
        qformer = QFormer(3, 32, num_layers=5, num_heads=2, cross_attention_every=2)
        reads = [layer.cross_attention is not None for layer in qformer.layers]
        assert reads == [True, False, True, False, True]

    def test_autocast_and_bf16_weights(self):
        adapter, features = tiny_adapter(), torch.randn(2, 12, FEATURES)
        exact = adapter(features, (3, 4))
        with torch.autocast("cpu", torch.bfloat16):
            cast = adapter(features, (3, 4))
        half = adapter.to(torch.bfloat16)(features, (3, 4))
        assert half.dtype == torch.bfloat16
        for rough in (cast, half):
            assert (rough.float() - exact).square().mean().sqrt() < 0.05

    def test_qformer_compiles_in_one_graph(self):
        qformer = QFormer(3, 32, num_layers=1, num_heads=2, self_attention_rope=True)
        args = torch.randn(2, 6, 32), torch.rand(3, 3), torch.rand(6, 3)
        compiled = torch.compile(qformer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*args), qformer(*args))

    def test_gradient_checkpointing_changes_nothing(self):
        adapter, features = tiny_adapter(), torch.randn(2, 12, FEATURES)
        grads = []
        for enable in (False, True):
            if enable:
                adapter.enable_gradient_checkpointing()
            assert adapter.is_gradient_checkpointing == enable
            adapter.zero_grad()
            adapter(features, (3, 4)).sum(-1).square().mean().backward()
            grads.append([p.grad.clone() for p in adapter.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_reference_preset(self, monkeypatch):
        preset = PRESETS["reference"]
        assert preset.clip == "apple/DFN5B-CLIP-ViT-H-14-378"
        assert preset.dino == "facebook/dinov2-large"
        assert preset.size == 378
        assert preset.config["num_layers"] == 12
        one_layer = replace(preset, config=preset.config | {"num_layers": 1})
        monkeypatch.setitem(PRESETS, "reference", one_layer)  # twelve take seconds
        shapes = {n: tuple(v.shape) for n, v in SemanticAdapter.from_preset().state_dict().items()}
        assert shapes["mlp.0.weight"] == (1024, 1280 + 1024)
        assert shapes["qformer.queries"] == (128, 1024)
        assert shapes["qformer.layers.0.cross_attention.norm_q.weight"] == (1024 // 16,)
        assert shapes["qformer.layers.0.feed_forward.0.weight"] == (4096, 1024)
        assert shapes["proj_out.weight"] == (4096, 1024)
        assert "pooled" not in shapes  # zeros would stand in for the empty prompt
        with pytest.raises(ValueError, match=r"name must be one of \['reference'\]"):
            SemanticAdapter.from_preset("huge")

    def test_arguments_that_cannot_be_are_named(self):
        with pytest.raises(ValueError, match="a head dim that is a multiple of 16, got 4 and 32"):
            tiny_adapter(num_heads=4)
        with pytest.raises(ValueError, match="a head dim that is a multiple of 1, got 3 and 32"):
            tiny_adapter(num_heads=3, cross_attention_rope=False)
        with pytest.raises(ValueError, match="num_layers must be an integer >= 1, got 0"):
            tiny_adapter(num_layers=0)
        with pytest.raises(ValueError, match="out_features must be an integer >= 1, got 0"):
            tiny_adapter(out_features=0)
        with pytest.raises(
            ValueError, match="pooled_features, unless None, must be an integer >= 1"
        ):
            tiny_adapter(pooled_features=0)
        with pytest.raises(ValueError, match="tokens_per_node"):
            tiny_adapter(tokens_per_node=(0,))
        adapter = tiny_adapter()
        with pytest.raises(ValueError, match=r"features must be \[B, S, 56\], got \(1, 12, 55\)"):
            adapter(torch.zeros(1, 12, 55), (3, 4))
        with pytest.raises(ValueError, match="features must hold 3 x 5 patches, got 12"):
            adapter(torch.zeros(1, 12, FEATURES), (3, 5))


class TestEncode:
    def test_mixed_sizes_come_back_in_order(self):
        adapter = tiny_adapter()
        adapter.set_encoder(tiny_encoder())
        images = pictures((40, 30), (32, 32), (40, 30), (16, 64))
        embedding = adapter.encode(images)
        assert embedding.tokens.shape == (4, 12, 20)
        assert embedding.tree == adapter.tree
        assert embedding.pooled is None
        assert not embedding.tokens.requires_grad
        for row, image in enumerate(images):
            alone = adapter.encode(image).tokens
            torch.testing.assert_close(embedding.tokens[row : row + 1], alone)
            features, grid = adapter.encoder(to_tensor(image))
            torch.testing.assert_close(alone, adapter(features, grid))

    def test_files_pictures_and_tensors_are_one(self, tmp_path):
        adapter = tiny_adapter()
        adapter.set_encoder(tiny_encoder())
        (image,) = pictures((20, 30))
        image.save(tmp_path / "a.png")
        wanted = adapter.encode(image).tokens
        assert torch.equal(adapter.encode(tmp_path / "a.png").tokens, wanted)
        assert torch.equal(adapter.encode([str(tmp_path / "a.png")]).tokens, wanted)
        assert torch.equal(adapter.encode(to_tensor(image)).tokens, wanted)

    def test_hands_its_pooled_vector_to_every_sample(self):
        adapter = tiny_adapter(pooled_features=5)
        adapter.set_encoder(tiny_encoder())
        adapter.pooled.copy_(torch.arange(5.0))
        embedding = adapter.encode(torch.rand(2, 3, 32, 32))
        assert torch.equal(embedding.pooled, torch.arange(5.0).expand(2, 5))

    def test_encoder_follows_to_but_stays_outside(self):
        adapter = tiny_adapter()
        names = set(adapter.state_dict())
        adapter.set_encoder(tiny_encoder())
        assert set(adapter.state_dict()) == names
        assert len(list(adapter.modules())) == len(list(tiny_adapter().modules()))
        adapter.to(torch.bfloat16)
        assert adapter.encoder.clip.dtype == torch.bfloat16
        assert adapter.encode(torch.rand(1, 3, 32, 32)).tokens.dtype == torch.bfloat16

    def test_bad_input_is_named(self):
        adapter = tiny_adapter()
        with pytest.raises(ValueError, match="has no encoder"):
            adapter.encode(torch.rand(1, 3, 32, 32))
        with pytest.raises(
            ValueError, match="must give 57 features a patch, got one that gives 56"
        ):
            tiny_adapter(in_features=57).set_encoder(tiny_encoder())
        adapter.set_encoder(tiny_encoder())
        with pytest.raises(ValueError, match="images must hold at least one picture"):
            adapter.encode([])
        adapter.set_encoder(None)
        assert adapter.encoder is None


class TestGrow:
    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ((4,), (6,)),
            ((4,), (4, 2)),
            ((4, 2), (4, 2, 1)),
            ((2, 1), (4, 3, 2)),
            ((0, 2), (3, 2)),
            ((3,), (3, 0, 1)),
        ],
    )
    def test_old_positions_stay_and_new_ones_come_from_their_parents(self, old, new):
        adapter = tiny_adapter(tokens_per_node=old)
        before, tree = adapter.qformer.queries.detach().clone(), adapter.tree
        grown = Hierarchy(new)
        kept = adapter.grow(grown, noise=0.05, seed=3)

        queries = adapter.qformer.queries
        assert isinstance(queries, torch.nn.Parameter)
        assert queries.shape == (grown.num_tokens, 32)
        assert torch.equal(queries[kept], before)
        assert adapter.tree == grown
        assert tuple(adapter.config.tokens_per_node) == new
        assert adapter(torch.randn(1, 12, FEATURES), (3, 4)).shape[1] == grown.num_tokens

        old_queries = {n.path: before[n.start : n.stop] for n in tree.nodes()}
        fresh = torch.ones(grown.num_tokens, dtype=torch.bool)
        fresh[kept] = False
        for node in grown.nodes():
            path = node.path
            while path != "/" and not len(old_queries.get(path, ())):
                path = path.rsplit("/", 1)[0] or "/"
            ancestors = old_queries[path] if len(old_queries[path]) else before
            for position in range(node.start, node.stop):
                if node.path in old_queries and not fresh[position]:
                    index = position - node.start
                    assert torch.equal(queries[position], old_queries[node.path][index])
                else:
                    distance = (queries[position] - ancestors).square().mean(-1).sqrt()
                    assert 0 < distance.min() < 0.1

    def test_old_positions_keep_their_output_while_queries_do_not_mix(self):
        adapter = tiny_adapter(tokens_per_node=(4,))
        for layer in adapter.qformer.layers:  # self-attention is what lets new queries be felt
            torch.nn.init.zeros_(layer.self_attention.to_out.weight)
        features = torch.randn(1, 12, FEATURES)
        before = adapter(features, (3, 4))
        kept = adapter.grow(Hierarchy((4, 2)))
        torch.testing.assert_close(adapter(features, (3, 4))[:, kept], before)

    def test_is_seeded_and_leaves_the_rest_alone(self):
        grown = []
        for seed in (0, 0, 1):
            torch.manual_seed(9)
            adapter = tiny_adapter()
            adapter.qformer.queries.requires_grad_(False)
            rest = {k: v.clone() for k, v in adapter.state_dict().items() if "queries" not in k}
            adapter.grow(Hierarchy((4, 2, 1)), seed=seed)
            assert not adapter.qformer.queries.requires_grad
            assert all(torch.equal(adapter.state_dict()[k], v) for k, v in rest.items())
            grown.append(adapter.qformer.queries)
        assert torch.equal(grown[0], grown[1])
        assert not torch.equal(grown[0], grown[2])

    def test_saves_and_loads_grown(self, tmp_path):
        adapter = tiny_adapter()
        adapter.grow(Hierarchy((4, 2, 1)))
        adapter.save_pretrained(tmp_path)
        assert same_state(SemanticAdapter.from_pretrained(tmp_path), adapter)

    def test_refuses_to_shrink(self):
        adapter = tiny_adapter()
        for smaller in ((4,), (3, 2), (5, 1, 1)):
            with pytest.raises(ValueError, match=r"tree must not shrink any level of \(4, 2\)"):
                adapter.grow(Hierarchy(smaller))
        for noise in (-1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="noise must not be negative and must be finite"):
                adapter.grow(Hierarchy((4, 2, 1)), noise=noise)
        with pytest.raises(ValueError, match=r"tree must be a Hierarchy, got \(4, 2, 1\)"):
            adapter.grow((4, 2, 1))
        assert adapter.tree == Hierarchy((4, 2))


def test_weights_that_hooks_fetch_when_they_are_due():
    """As under sequential offload: between forwards they are on no device at all."""
    accelerate = pytest.importorskip("accelerate")
    adapter, features = tiny_adapter(), torch.randn(2, 12, FEATURES)
    with torch.no_grad():
        want = adapter(features, (3, 4))
        accelerate.cpu_offload(adapter, execution_device="cpu")
        weight = adapter.qformer.layers[0].cross_attention.norm_k.weight
        assert weight.device.type == "meta"
        assert torch.equal(adapter(features, (3, 4)), want)
