import json
import os

import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image

from sda_fast.adapter import PRESETS, SemanticAdapter
from sda_fast.encoders import ImageEncoder
from sda_fast.hierarchy import Hierarchy
from sda_fast.images import to_tensor
from sda_fast.qformer import QFormer
from tests.tiny_encoders import SIZE, tiny_vision_model

FEATURES = 32 + 24


def tiny_adapter(**options):
    config = {"tokens_per_node": (4, 2), "in_features": FEATURES, "width": 32, "num_layers": 2}
    config |= {"num_heads": 2, "out_features": 20}
    return SemanticAdapter(**config | options)


def tiny_encoder():
    clip, dino = tiny_vision_model("clip"), tiny_vision_model("dinov2", seed=1)
    return ImageEncoder(clip, dino, size=SIZE)


def pictures(*sizes):
    pixels = [torch.rand(3, height, width) for width, height in sizes]
    return [Image.fromarray((p * 255).byte().permute(1, 2, 0).numpy()) for p in pixels]


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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

    def test_reference_preset(self):
        with torch.device("meta"):
            adapter = SemanticAdapter.from_preset("reference")
        preset = PRESETS["reference"]
        assert (preset.clip, preset.dino, preset.size) == (
            "apple/DFN5B-CLIP-ViT-H-14-378",
            "facebook/dinov2-large",
            378,
        )
        assert len(adapter.qformer.layers) == 12
        shapes = {name: tuple(value.shape) for name, value in adapter.state_dict().items()}
        assert shapes["mlp.0.weight"] == (1024, 1280 + 1024)
        assert shapes["qformer.queries"] == (128, 1024)
        assert shapes["qformer.layers.11.cross_attention.norm_q.weight"] == (1024 // 16,)
        assert shapes["proj_out.weight"] == (4096, 1024)
        with pytest.raises(ValueError, match=r"name must be one of \['reference'\]"):
            SemanticAdapter.from_preset("huge")

    def test_arguments_that_cannot_be_are_named(self):
        with pytest.raises(ValueError, match="a head dim that is a multiple of 16, got 4 and 32"):
            tiny_adapter(num_heads=4)
        with pytest.raises(ValueError, match="a head dim that is a multiple of 1, got 3 and 32"):
            tiny_adapter(num_heads=3, cross_attention_rope=False)
        with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
            tiny_adapter(num_layers=0)
        with pytest.raises(ValueError, match="out_features must be at least 1"):
            tiny_adapter(out_features=0)
        with pytest.raises(ValueError, match="pooled_features must be None or at least 1"):
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
        with pytest.raises(ValueError, match="noise must not be negative"):
            adapter.grow(Hierarchy((4, 2, 1)), noise=-1)
        assert adapter.tree == Hierarchy((4, 2))


class TestFiles:
    def test_round_trip(self, tmp_path):
        adapter = tiny_adapter(pooled_features=5, cross_attention_every=2, self_attention_rope=True)
        adapter.pooled.normal_()
        adapter.save_pretrained(tmp_path / "a")
        assert sorted(os.listdir(tmp_path / "a")) == [
            "config.json",
            "diffusion_pytorch_model.safetensors",
        ]
        loaded = SemanticAdapter.from_pretrained(tmp_path / "a")
        assert same_state(loaded, adapter)
        assert not loaded.training
        features = torch.randn(1, 12, FEATURES)
        assert torch.equal(loaded(features, (3, 4)), adapter(features, (3, 4)))
        loaded.save_pretrained(tmp_path / "b")
        for name in os.listdir(tmp_path / "a"):
            first, second = (tmp_path / folder / name for folder in "ab")
            if name.endswith(".json"):
                configs = [json.loads(path.read_text()) for path in (first, second)]
                assert str(tmp_path) not in second.read_text()
                configs[1].pop("_name_or_path")
                assert configs[0] == configs[1]
            else:
                assert first.read_bytes() == second.read_bytes()

    @pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_loads_in_bf16(self, tmp_path, argument, low_cpu_mem_usage):
        adapter = tiny_adapter(pooled_features=5)
        adapter.pooled.normal_()
        adapter.save_pretrained(tmp_path)
        loaded = SemanticAdapter.from_pretrained(
            tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, **{argument: torch.bfloat16}
        )
        assert same_state(loaded, adapter.to(torch.bfloat16))
        assert torch.get_default_dtype() == torch.float32

    def test_loads_from_a_subfolder(self, tmp_path):
        adapter = tiny_adapter()
        adapter.save_pretrained(tmp_path / "adapter")
        assert same_state(SemanticAdapter.from_pretrained(tmp_path, subfolder="adapter"), adapter)

    def test_opened_encoder_layers_travel_with_the_adapter(self, tmp_path):
        adapter = tiny_adapter()
        adapter.set_encoder(tiny_encoder())
        adapter.encoder.unfreeze_last(1)
        with torch.no_grad():
            for parameter in adapter.encoder.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.5)
        adapter.save_pretrained(tmp_path / "a")
        (image,) = pictures((32, 32))
        wanted = adapter.encode(image).tokens

        loaded = SemanticAdapter.from_pretrained(tmp_path / "a")
        loaded.save_pretrained(tmp_path / "b")  # with no encoder at hand
        again = SemanticAdapter.from_pretrained(tmp_path / "b")
        again.set_encoder(tiny_encoder())
        assert torch.equal(again.encode(image).tokens, wanted)
        again.save_pretrained(tmp_path / "c")
        name = "encoder_layers.safetensors"
        contents = {(tmp_path / folder / name).read_bytes() for folder in "abc"}
        assert len(contents) == 1

        tiny_adapter().save_pretrained(tmp_path / "a")  # nothing open: no stale file stays
        assert not (tmp_path / "a" / name).exists()

    def test_refuses_another_models_config(self, tmp_path):
        tiny_adapter().save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"_class_name": FluxTransformer2DModel.__name__}))
        with pytest.raises(ValueError, match="a SemanticAdapter, got the config of 'FluxTrans"):
            SemanticAdapter.from_pretrained(tmp_path)
        path.write_text("{")
        with pytest.raises(ValueError, match=r"config\.json is not JSON"):
            SemanticAdapter.from_pretrained(tmp_path)
        path.unlink()
        with pytest.raises(FileNotFoundError, match=r"without config\.json"):
            SemanticAdapter.from_pretrained(tmp_path)

    def test_refuses_weights_it_cannot_trust(self, tmp_path):
        tiny_adapter().save_pretrained(tmp_path)
        weights = tmp_path / "diffusion_pytorch_model.safetensors"
        whole = weights.read_bytes()
        for torn in (whole[:-8], whole[:20], b"", b"<html>not weights</html>"):
            weights.write_bytes(torn)
            with pytest.raises(ValueError, match=r"model\.safetensors is truncated or no safetens"):
                SemanticAdapter.from_pretrained(tmp_path)
        weights.rename(weights.with_suffix(".bin"))
        with pytest.raises(ValueError, match=r"pickled weights diffusion_pytorch_model\.bin"):
            SemanticAdapter.from_pretrained(tmp_path)
        weights.with_suffix(".bin").unlink()
        with pytest.raises(FileNotFoundError, match=r"adapter must hold \*\.safetensors"):
            SemanticAdapter.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="safe_serialization must stay True"):
            tiny_adapter().save_pretrained(tmp_path / "new", safe_serialization=False)
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_refuses_weights_that_do_not_fit_the_config(self, tmp_path, low_cpu_mem_usage):
        tiny_adapter(num_layers=1).save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        for change in ({"num_layers": 2}, {"width": 64}, {"pooled_features": 3}):
            tiny_adapter(num_layers=1).save_pretrained(tmp_path)
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
            with pytest.raises(
                ValueError, match=r"adapter: .* holds weights that do not fit its config"
            ):
                SemanticAdapter.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)

    def test_names_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"adapter must be a folder, got .*gone"):
            SemanticAdapter.from_pretrained(tmp_path / "gone")
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError, match="adapter must be a folder, got the file"):
            SemanticAdapter.from_pretrained(tmp_path / "file")
        with pytest.raises(ValueError, match="must be a folder or a hub id, got None"):
            SemanticAdapter.from_pretrained(None)
        with pytest.raises(
            OSError, match="adapter must be a folder or a hub id, got 'no-one/none'"
        ):
            SemanticAdapter.from_pretrained("no-one/none", local_files_only=True)
