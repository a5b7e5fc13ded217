"""A llama in PyTorch, with tied embeddings and names as in GGUF."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.llama_gguf import NORM_EPSILON, Shape

STD = 0.02  # of the initial weights
ROPE_BASE = 10000.0


class Norm(nn.Module):
    """RMS norm."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, NORM_EPSILON)


class Layer(nn.Module):
    """Attention and feed-forward; rotary pairs interleave, as in GGUF's llama."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        n, ff = shape.n_embd, shape.n_ff
        self.n_head = shape.n_head
        self.attn_norm, self.ffn_norm = Norm(n), Norm(n)
        self.attn_qkv = nn.Linear(n, 3 * n, bias=False)
        self.attn_output = nn.Linear(n, n, bias=False)
        self.ffn_gate_up = nn.Linear(n, 2 * ff, bias=False)
        self.ffn_down = nn.Linear(ff, n, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, n = x.shape
        qkv = self.attn_qkv(self.attn_norm(x)).view(b, t, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)

        def rotate(z: Tensor) -> Tensor:
            even, odd = z[..., ::2], z[..., 1::2]
            return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

        q, k = rotate(q).to(v.dtype), rotate(k).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_output(y.transpose(1, 2).reshape(b, t, n))
        gate, up = self.ffn_gate_up(self.ffn_norm(x)).chunk(2, -1)
        return x + self.ffn_down(F.silu(gate) * up)


class Llama(nn.Module):
    """Token ids (n, t) -> logits (n, t, n_vocab). Every head has its own keys and values."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token_embd = nn.Embedding(shape.n_vocab, shape.n_embd)
        self.blk = nn.ModuleList(Layer(shape) for _ in range(shape.n_layer))
        self.output_norm = Norm(shape.n_embd)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=STD)
        for layer in self.blk:
            for p in (layer.attn_output.weight, layer.ffn_down.weight):
                nn.init.normal_(p, std=STD / math.sqrt(2 * shape.n_layer))
        d = shape.n_embd // shape.n_head
        angle = torch.outer(torch.arange(shape.n_ctx), ROPE_BASE ** (-torch.arange(0, d, 2) / d))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embd(ids)
        t = ids.shape[1]
        for layer in self.blk:
            x = layer(x, self.cos[:t], self.sin[:t])
        return F.linear(self.output_norm(x), self.token_embd.weight)
