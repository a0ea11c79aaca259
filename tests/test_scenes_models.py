import numpy as np
import pytest
import torch

from sda_fast.scenes.captions import caption
from sda_fast.scenes.models import (
    WIDTH,
    build_clip,
    build_dino,
    build_flux,
    build_instruction_encoder,
    build_tokenizer,
    token_ids,
)
from sda_fast.scenes.vae import SpaceToDepthVAE
from sda_fast.scenes.world import FULL, SMALL, sample_scenes


def test_the_vae_loses_nothing(tmp_path):
    pictures = torch.rand(2, 3, 8, 12) * 2 - 1
    vae = SpaceToDepthVAE()
    latents = vae.encode(pictures).latent_dist.sample()
    assert latents.shape == (2, 12, 4, 6)
    assert torch.equal(vae.decode(latents).sample, pictures)
    assert torch.equal(vae.decode(vae.encode(pictures, False)[0].mode(), False)[0], pictures)
    vae.save_pretrained(tmp_path)
    again = SpaceToDepthVAE.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert again.config.scaling_factor == vae.config.scaling_factor


@pytest.mark.parametrize("bad", [{"latent_channels": 16}, {"block_out_channels": (1, 2, 3)}])
def test_the_vae_refuses_another_folding(bad):
    with pytest.raises(ValueError, match="latent_channels must be 4"):
        SpaceToDepthVAE(**bad)


@pytest.mark.parametrize("world", [SMALL, FULL])
def test_every_caption_fits_and_has_no_unknown_word(world, tmp_path):
    tokenizer = build_tokenizer(world)
    rng = np.random.default_rng(0)
    captions = [caption(scene, rng) for scene in sample_scenes(world, "train", 5, 300)]
    captions += [caption(s) for s in sample_scenes(world, "held_out_count", 5, 100)]
    ids = token_ids(tokenizer, captions)
    assert ids.shape == (400, world.text_tokens)
    assert not (ids == tokenizer.unk_token_id).any()
    assert ((ids == tokenizer.eos_token_id).sum(1) == 1).all()
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert torch.equal(token_ids(again, captions), ids)


def test_a_caption_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="captions must fit 40 tokens, got 61"):
        token_ids(build_tokenizer(SMALL), ["a red star"] * 2 + ["red " * 60])


def test_words_tell_a_column_from_an_article():
    tokenizer = build_tokenizer(SMALL)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a star at a-11").input_ids)
    assert pieces == ["a", "star", "at", "a-", "11", "</s>"]


@pytest.mark.parametrize(("world", "low", "high"), [(SMALL, 2e6, 3e6), (FULL, 11e6, 15e6)])
def test_the_decoder_has_the_size_of_its_world(world, low, high):
    flux = build_flux(world)
    assert low < sum(p.numel() for p in flux.transformer.parameters()) < high
    assert flux.vae_scale_factor == 2
    assert flux.transformer.config.joint_attention_dim == WIDTH


def test_the_encoders_see_one_patch_grid():
    pictures = torch.rand(1, 3, SMALL.size, SMALL.size)
    for encoder in (build_clip(SMALL), build_dino(SMALL)):
        assert encoder(pictures).last_hidden_state.shape == (1, 65, 96)


def test_instructions_are_read_as_people_write_them():
    tokenizer, _ = build_instruction_encoder(SMALL)
    plain = tokenizer("remove the red circle at g-12 , and one").input_ids
    assert tokenizer("Remove the Red circle at g-12 , and one.").input_ids == plain
    assert tokenizer.unk_token_id not in plain
