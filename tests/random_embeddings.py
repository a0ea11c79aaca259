"""Random embeddings of 8 channels, and whether two are the same bit for bit."""

import torch

from sda_fast.embedding import SemanticEmbedding
from sda_fast.hierarchy import Hierarchy

TREE = Hierarchy((3, 2, 1))


def make(seed=0, batch=2, tree=TREE, dtype=torch.float32, pooled=5):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, tree.num_tokens, 8, generator=generator).to(dtype)
    vector = torch.randn(batch, pooled, generator=generator).to(dtype) if pooled else None
    return SemanticEmbedding(tokens, tree, vector)


def same(a, b):
    pooled = a.pooled is b.pooled or torch.equal(a.pooled, b.pooled)
    return a.tree == b.tree and torch.equal(a.tokens, b.tokens) and pooled
