import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel

from sda_fast.encoders import ImageEncoder
from tests.tiny_encoders import DEPTH, SIZE, tiny_encoder, tiny_vision_model

CLIPS = ["clip", "siglip", "internvl"]
DINOS = ["dinov2", "dinov2_with_registers"]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dino", DINOS)
def test_features_are_the_penultimate_patch_tokens_side_by_side(clip, dino):
    encoder = tiny_encoder(clip, dino)
    pixels = torch.rand(2, 3, SIZE, SIZE)
    features, grid = encoder(pixels)

    assert grid == (4, 4)
    assert features.shape == (2, 16, 56) == (2, 16, encoder.out_features)
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    statistics = {
        "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        "siglip": ((0.5,) * 3, (0.5,) * 3),
        "internvl": imagenet,
    }
    for model, (mean, std), part in (
        (encoder.clip, statistics[clip], features[..., :32]),
        (encoder.dino, imagenet, features[..., 32:]),
    ):
        normal = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        states = model(normal, output_hidden_states=True).hidden_states
        assert len(states) == DEPTH + 1
        torch.testing.assert_close(part, states[DEPTH - 1][:, -16:])


def test_statistics_can_be_given():
    pixels = torch.rand(1, 3, SIZE, SIZE)
    plain = tiny_encoder(clip_mean=(0.0,) * 3, clip_std=(1.0,) * 3)
    shifted = tiny_encoder(clip_mean=(0.25,) * 3, clip_std=(0.5,) * 3)
    torch.testing.assert_close(shifted(pixels)[0][..., :32], plain(2 * pixels - 0.5)[0][..., :32])


@pytest.mark.parametrize("clip", CLIPS)
def test_a_position_of_the_grid_is_a_place_in_the_picture(clip):
    encoder = tiny_encoder(clip, "dinov2_with_registers")
    for model in (encoder.clip, encoder.dino):  # without positions and attention: patch alone
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "pos" in name or "attn" in name or "attention" in name:
                    parameter.zero_()
    pixels = torch.rand(1, 3, 24, 48)
    before, grid = encoder(pixels)
    assert grid == (3, 6)
    pixels[0, :, 8:16, 32:40] = 0
    changed = (encoder(pixels)[0] - before).abs().amax(-1)[0].view(grid)
    wanted = torch.zeros(grid, dtype=torch.bool)
    wanted[1, 4] = True
    assert torch.equal(changed > 1e-5, wanted)


@pytest.mark.parametrize(
    ("height", "width", "wanted"),
    [
        (378, 378, (27, 27)),
        (720, 1280, (20, 36)),
        (1280, 720, (36, 20)),
        (512, 688, (23, 31)),
        (1, 1, (27, 27)),
        (2000, 1, (729, 1)),
        (1, 900, (1, 729)),
    ],
)
def test_grid_keeps_the_aspect_and_about_the_number_of_patches(height, width, wanted):
    encoder = tiny_encoder()
    encoder.size = 378
    assert encoder.grid(height, width, 14) == wanted
    encoder.squash = True
    assert encoder.grid(height, width, 14) == (27, 27)


def test_squash_squeezes_into_the_square():
    pixels = torch.rand(1, 3, 20, 50)
    features, grid = tiny_encoder(squash=True)(pixels)
    assert grid == (4, 4)
    squeezed = F.interpolate(pixels, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(features, tiny_encoder()(squeezed)[0])


def test_unequal_grids_meet_at_the_finer_one():
    encoder = tiny_encoder(dino_patch=4)
    pixels = torch.rand(1, 3, SIZE, SIZE)
    features, grid = encoder(pixels)
    assert grid == (8, 8)
    coarse, _ = tiny_encoder()(pixels)
    wanted = F.interpolate(coarse[..., :32].mT.view(1, 32, 4, 4), (8, 8), mode="bilinear")
    torch.testing.assert_close(features[..., :32], wanted.flatten(2).mT)


def test_a_picture_alone_is_as_in_a_batch_and_at_any_size():
    encoder = tiny_encoder()
    pixels = torch.rand(3, 3, 37, 91)
    features, grid = encoder(pixels)
    assert features.shape[1] == grid[0] * grid[1]
    torch.testing.assert_close(encoder(pixels[1:2])[0], features[1:2])


def test_frozen_in_evaluation_and_in_the_dtype_of_the_weights():
    encoder = tiny_encoder().to(torch.bfloat16).train()
    assert not any(module.training for module in encoder.modules())
    features, _ = encoder(torch.rand(1, 3, SIZE, SIZE))
    assert features.dtype == torch.bfloat16
    assert not features.requires_grad


def test_unfreeze_last_opens_the_layers_that_reach_the_features():
    encoder = tiny_encoder()
    encoder.unfreeze_last(2)
    features, _ = encoder(torch.rand(1, 3, SIZE, SIZE))
    features.square().sum().backward()
    opened = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert {n.split(".")[3] for n in opened} == {"1", "2"}
    assert all(n.startswith("dino.") for n in opened)
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)
    assert sum(p.grad.abs().sum() > 0 for p in encoder.parameters() if p.requires_grad) > 20
    encoder.unfreeze_last(0)
    assert not any(p.requires_grad for p in encoder.parameters())
    with pytest.raises(ValueError, match="num_layers must be 0 to 3, got 4"):
        encoder.unfreeze_last(DEPTH)


def test_trained_layers_travel_to_another_encoder():
    trained, stock = tiny_encoder(), tiny_encoder()
    pixels = torch.rand(1, 3, SIZE, SIZE)
    assert trained.trained_layers() == {}
    trained.unfreeze_last(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    assert not torch.equal(trained(pixels)[0], stock(pixels)[0])
    state = trained.trained_layers()
    stock.load_trained_layers(state)
    assert torch.equal(trained(pixels)[0], stock(pixels)[0])
    assert stock.trained_layers().keys() == state.keys()
    assert not any(p.requires_grad for p in stock.parameters())

    with pytest.raises(ValueError, match="do not fit dino"):
        stock.load_trained_layers({"dino.layers.1.norm1.weight": torch.zeros(24)})
    with pytest.raises(ValueError, match="there are none"):
        stock.load_trained_layers({})


@pytest.mark.parametrize("clip", CLIPS)
def test_from_pretrained_reads_both_folders(tmp_path, clip):
    encoder = tiny_encoder(clip, "dinov2_with_registers")
    encoder.clip.save_pretrained(tmp_path / "clip")
    encoder.dino.save_pretrained(tmp_path / "dino")
    loaded = ImageEncoder.from_pretrained(tmp_path / "clip", str(tmp_path / "dino"), size=SIZE)
    pixels = torch.rand(1, 3, 40, SIZE)
    assert torch.equal(loaded(pixels)[0], encoder(pixels)[0])
    half = ImageEncoder.from_pretrained(
        tmp_path / "clip", tmp_path / "dino", torch.bfloat16, size=SIZE
    )
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_from_pretrained_takes_the_vision_half_of_a_whole_clip(tmp_path):
    vision = tiny_vision_model("clip")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "vocab_size": 99}
    whole = CLIPModel(CLIPConfig(vision_config=vision.config.to_dict(), text_config=text))
    whole.vision_model.load_state_dict(vision.state_dict())
    whole.save_pretrained(tmp_path / "clip")
    tiny_vision_model("dinov2").save_pretrained(tmp_path / "dino")
    loaded = ImageEncoder.from_pretrained(tmp_path / "clip", tmp_path / "dino", size=SIZE)
    for name, value in vision.state_dict().items():
        assert torch.equal(loaded.clip.state_dict()[name], value)


def test_from_pretrained_names_what_is_wrong(tmp_path):
    clip, dino = tmp_path / "clip", tmp_path / "dino"
    tiny_vision_model("clip").save_pretrained(clip)
    tiny_vision_model("dinov2").save_pretrained(dino)

    with pytest.raises(FileNotFoundError, match=r"dino must be a folder, got .*gone"):
        ImageEncoder.from_pretrained(clip, tmp_path / "gone")
    with pytest.raises(ValueError, match=r"clip must be one of \[.*got a model of 'dinov2'"):
        ImageEncoder.from_pretrained(dino, dino)
    with pytest.raises(OSError, match=r"clip must be a folder or a hub id, got 'no-one/no-clip'"):
        ImageEncoder.from_pretrained("no-one/no-clip", dino, local_files_only=True)

    weights = clip / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        ImageEncoder.from_pretrained(clip, dino)
    weights.rename(clip / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"clip must hold safetensors.*pytorch_model\.bin"):
        ImageEncoder.from_pretrained(clip, dino)


def test_from_pretrained_refuses_weights_that_leave_a_gap(tmp_path):
    dino = tiny_vision_model("dinov2")
    state = dino.state_dict()
    state.pop(next(name for name in state if "layer.2" in name or "layers.2" in name))
    dino.save_pretrained(tmp_path / "dino", state_dict=state)
    tiny_vision_model("clip").save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"dino: the weights in .* do not fit .*missing_keys"):
        ImageEncoder.from_pretrained(tmp_path / "clip", tmp_path / "dino")


def test_arguments_that_cannot_be_are_named():
    clip, dino = tiny_vision_model("clip"), tiny_vision_model("dinov2")
    with pytest.raises(ValueError, match="clip must be one of"):
        ImageEncoder(dino, dino, size=SIZE)
    with pytest.raises(ValueError, match="dino must be one of"):
        ImageEncoder(clip, clip, size=SIZE)
    with pytest.raises(ValueError, match="size must hold a patch of 8, got 7"):
        ImageEncoder(clip, dino, size=7)
    with pytest.raises(ValueError, match="clip_std must be three numbers"):
        ImageEncoder(clip, dino, size=SIZE, clip_std=(1.0, 0.0, 1.0))
    for pixels in (torch.rand(3, 8, 8), torch.rand(1, 1, 8, 8), torch.ones(1, 3, 8, 8).byte()):
        with pytest.raises(ValueError, match=r"pixels must be float \[B, 3, H, W\]"):
            ImageEncoder(clip, dino, size=SIZE)(pixels)
