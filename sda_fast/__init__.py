"""Fast attention and modules for semantic diffusion adapters on FLUX.1."""
