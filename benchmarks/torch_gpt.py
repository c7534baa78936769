"""The GPT of `gpu.py` in PyTorch, with `torch.compile`."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self, width, head):
        super().__init__()
        self.head = head
        self.norm_1 = nn.LayerNorm(width, bias=False)
        self.norm_2 = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, -1, self.head).transpose(1, 2)
                   for y in self.qkv(self.norm_1(x)).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).reshape(b, t, -1))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """int64[batch, seq] tokens to [batch, seq, vocab] logits; blocks are checkpointed."""

    def __init__(self, args, head):
        super().__init__()
        self.embed = nn.Embedding(args.vocab, args.width)
        self.norm = nn.LayerNorm(args.width)
        self.blocks = nn.ModuleList(Block(args.width, head) for _ in range(args.layers))
        self.head = nn.Linear(args.width, args.vocab, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


def training(args, head, tokens, adam):
    """Returns a function that runs `args.steps` training steps and waits for the last.

    Args:
      args: the sizes of the model, and `steps`.
      head: the size of an attention head.
      tokens: int32[batch, seq + 1].
      adam: the options of the optimizer, by optax's names.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torch.compile(GPT(args, head).to(device))
    optimizer = torch.optim.Adam(model.parameters(), adam["learning_rate"],
                                 (adam["b1"], adam["b2"]), adam["eps"], fused=device == "cuda")
    tokens = torch.tensor(np.asarray(tokens), dtype=torch.long, device=device)

    def run():
        for _ in range(args.steps):
            with torch.autocast(device, torch.bfloat16):
                logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            # computes the norm, as the other runs do, and clips nothing
            torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()

    run()
    return run
