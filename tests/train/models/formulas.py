"""The models' formulas, written plainly over a state dict: no module of the package is in here."""

from __future__ import annotations

import torch
import torch.nn.functional as F

State = dict[str, torch.Tensor]


def intern_vit(state: State, x: torch.Tensor, heads: int, target: str, norm: str) -> torch.Tensor:
    """Logits of InternViT in eval mode, in the dtype of ``x``; every sum is over all its terms."""
    width = state['pos_embed'].shape[-1]
    x = F.conv2d(x, state['patch_embed.proj.weight'], state['patch_embed.proj.bias'], stride=14)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state['cls_token'].expand(len(x), 1, width), x], 1) + state['pos_embed']
    depth = 1 + max(int(name.split('.')[1]) for name in state if name.startswith('blocks.'))
    for index in range(depth):
        own = part(state, f'blocks.{index}.')
        y = normed(part(own, 'norm1.'), x, norm)
        q, k, v = (y @ own['attn.qkv.weight'].T + own.get('attn.qkv.bias', 0.0)).split(width, -1)
        if 'attn.q_norm.weight' in own:
            q = normed(part(own, 'attn.q_norm.'), q, norm)
            k = normed(part(own, 'attn.k_norm.'), k, norm)
        y = attention(q, k, v, heads) @ own['attn.proj.weight'].T + own['attn.proj.bias']
        x = x + y * own.get('ls1.gamma', 1.0)
        y = normed(part(own, 'norm2.'), x, norm)
        y = F.gelu(y @ own['mlp.fc1.weight'].T + own['mlp.fc1.bias'])
        x = x + (y @ own['mlp.fc2.weight'].T + own['mlp.fc2.bias']) * own.get('ls2.gamma', 1.0)
    return classified(state, x, heads, target)


def clip_vit(state: State, x: torch.Tensor, heads: int, target: str) -> torch.Tensor:
    """Logits on CLIP's image tower, as `intern_vit`."""
    own = part(state, 'model.embeddings.')
    x = F.conv2d(x, own['patch_embedding.weight'], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([own['class_embedding'].expand(len(x), 1, -1), x], 1)
    x = normed(part(state, 'model.pre_layrnorm.'), x + own['position_embedding.weight'], 'clip')
    layers = part(state, 'model.encoder.layers.')
    for index in range(1 + max(int(name.split('.')[0]) for name in layers)):
        own = part(layers, f'{index}.')
        y = normed(part(own, 'layer_norm1.'), x, 'clip')
        q, k, v = (linear(part(own, f'self_attn.{name}_proj.'), y) for name in 'qkv')
        x = x + linear(part(own, 'self_attn.out_proj.'), attention(q, k, v, heads))
        y = linear(part(own, 'mlp.fc1.'), normed(part(own, 'layer_norm2.'), x, 'clip'))
        x = x + linear(part(own, 'mlp.fc2.'), y / (1 + torch.exp(-1.702 * y)))
    return classified(state, x, heads, target)


def classified(state: State, x: torch.Tensor, heads: int, target: str) -> torch.Tensor:
    """The head: pooled tokens, normalized by the running statistics, to logits."""
    if target == 'cls_patch_concat':
        x = torch.cat([x[:, 0], x[:, 1:].mean(1)], -1)
    elif target == 'attention_pooling':
        x = pooled(part(state, 'attn_pooling.'), x, heads)
    else:
        x = pooled(part(state, 'clip_projector.'), x, 16)
    mean, var = state['norm.running_mean'], state['norm.running_var']
    x = (x - mean) / (var + 1e-6).sqrt() * state['norm.weight'] + state['norm.bias']
    return linear(part(state, 'head.'), x)


def pooled(own: State, x: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention pooling."""
    cross = part(own, 'cross_attn.')
    mean = x.mean(1, keepdim=True)
    q = normed(part(own, 'norm1_q.'), mean, 'clip') @ cross['q.weight'].T + cross['q_bias']
    k = normed(part(own, 'norm1_k.'), x, 'clip') @ cross['k.weight'].T + cross['k_bias']
    v = normed(part(own, 'norm1_v.'), x, 'clip') @ cross['v.weight'].T + cross['v_bias']
    return linear(part(cross, 'proj.'), attention(q, k, v, heads))[:, 0]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q k / sqrt(width of a head)) v, head by head."""
    out, size = [], q.shape[-1] // heads
    for head in range(heads):
        a, b, c = (t[..., head * size : (head + 1) * size] for t in (q, k, v))
        out.append((a @ b.transpose(1, 2) / size**0.5).softmax(-1) @ c)
    return torch.cat(out, -1)


def normed(own: State, x: torch.Tensor, kind: str) -> torch.Tensor:
    """RMS norm, or layer norm: of InternViT (eps 1e-6), or of CLIP (1e-5)."""
    if kind == 'rms':
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * own['weight']
    x = x - x.mean(-1, keepdim=True)
    eps = 1e-6 if kind == 'ln' else 1e-5
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * own['weight'] + own['bias']


def linear(own: State, x: torch.Tensor) -> torch.Tensor:
    """A linear layer."""
    return x @ own['weight'].T + own['bias']


def part(state: State, prefix: str) -> State:
    """What stands under a prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
