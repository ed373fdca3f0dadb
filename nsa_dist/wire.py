"""Bytes of training steps as the ledger counts them, for those who count at the interfaces."""

import torch

from nsa_dist.check_gpus import random_batch
from nsa_dist.config import Config
from nsa_dist.parallel.mesh import Mesh
from nsa_dist.parallel.parameters import clip_gradients
from nsa_dist.train import build, forward_backward


def training_bytes(mesh: Mesh, tokens: int, exchange: str, steps: int) -> tuple[int, int]:
    """Trains a small model on random bytes; what this rank's ledger says it sent and received, of all kinds."""
    device = torch.device(mesh.parameters.device_type)
    config = Config()
    config.model.layers, config.model.width, config.model.heads, config.model.ffn = 2, 32, 2, 64
    config.model.kv_heads, config.model.head_dim = 2, 64
    # Few parameters: gloo may reduce-scatter their gradients with more bytes than the ledger's ring.
    config.nsa.compression = "mean"
    config.data.seq_len, config.parallel.cp, config.parallel.exchange = tokens, mesh.cp.size, exchange
    model, optimizer = build(config, 256, mesh, device)
    batch = random_batch(mesh, tokens, config.parallel.layout, device, packed=False)
    mesh.ledger.take()
    for _ in range(steps):
        forward_backward(config, model, [batch], mesh)
        clip_gradients(model.parameters(), mesh, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    totals = mesh.ledger.take().values()
    return sum(t.sent_bytes for t in totals), sum(t.received_bytes for t in totals)
