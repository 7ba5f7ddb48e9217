"""The rest of a forward pass, from the stream in front of any segment to the output, doing no more than it must."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from upvits.toolchain.families import segments_of
from upvits.toolchain.structure.groups import ChannelGroup
from upvits.toolchain.structure.segments import Segment


@dataclass(frozen=True, slots=True)
class Chain:
    """A network as segments, with a shorter way through its last block where the head reads a few tokens only.

    Attributes:
        segments: the forward pass.
        read: leading tokens [B, :read] of the stream that the head reads; None: it reads all of it.
        last: the last block for these tokens only: stream [B, N, C] -> [B, read, C]; None where there is no such way.
        starts: group name -> index of the first segment that one of the group's masks acts in.
    """

    segments: tuple[Segment, ...]
    read: int | None
    last: Callable[[Tensor], Tensor] | None
    starts: Mapping[str, int]

    def run(self, stream: Tensor, start: int) -> Tensor:
        """The network's output from the stream that enters segment `start`; only the norms' masks may be set."""
        *body, head = self.segments[start:]
        if self.last is not None and body:
            for segment in body[:-1]:
                stream = segment.run(stream)
            return head.run(self.last(stream))
        return self.run_all(stream, start)

    def run_all(self, stream: Tensor, start: int) -> Tensor:
        """The same through every module, so that any mask takes effect."""
        for segment in self.segments[start:]:
            stream = segment.run(stream)
        return stream


def chain_of(model: nn.Module, groups: Sequence[ChannelGroup], images: Tensor) -> Chain:
    """The chain of a network in eval mode.

    Args:
        model: a network of a supported family.
        groups: its groups.
        images: at least one image [B, 3, H, W], to watch the network at work.
    """
    segments = segments_of(model)
    entered: dict[str, int] = {}
    names = {point.module for group in groups for point in group.masks}
    index = 0

    def note(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            entered.setdefault(name, index)

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    stream = images
    for index in range(len(segments) - 1):
        stream = segments[index].run(stream)
    index = len(segments) - 1
    read = _tokens_read(segments[-1], stream)
    segments[-1].run(stream)
    for hook in hooks:
        hook.remove()
    starts = {group.name: min(entered[point.module] for point in group.masks) for group in groups}
    last = _narrow_block(model, segments[-2], read) if read is not None else None
    return Chain(segments, read if last is not None else None, last, starts)


def _tokens_read(head: Segment, stream: Tensor) -> int | None:
    """How many leading tokens decide the output (class token, perhaps a distillation token); None: more than two."""
    if stream.ndim != 3:
        return None
    whole = head.run(stream)
    for count in (1, 2):
        unread = torch.full_like(stream[:, count:], torch.nan)
        if torch.equal(head.run(torch.cat([stream[:, :count], unread], dim=1)), whole):
            return count
    return None


def _narrow_block(model: nn.Module, segment: Segment, read: int) -> Callable[[Tensor], Tensor] | None:
    """A ViT block that computes its first `read` tokens: keys and values of all of them, everything else of those."""
    block: Any = model.get_submodule(segment.name)
    attn: Any = block.attn
    if type(attn) is not Attention:
        return None

    def run(stream: Tensor) -> Tensor:
        tokens, dim = block.norm1(stream), attn.attn_dim
        weight, bias = attn.qkv.weight, attn.qkv.bias
        q = F.linear(tokens[:, :read], weight[:dim], None if bias is None else bias[:dim])
        k, v = F.linear(tokens, weight[dim:], None if bias is None else bias[dim:]).chunk(2, dim=2)
        q, k, v = (part.reshape(*part.shape[:2], attn.num_heads, -1).transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=attn.scale).transpose(1, 2).flatten(2)
        stream = stream[:, :read] + block.ls1(attn.proj(mixed))
        return cast(Tensor, stream + block.ls2(block.mlp(block.norm2(stream))))

    return run
