"""timm's PyramidVisionTransformerV2: b0 to b5 and the linear b2_li."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch.nn.functional as F
from timm.models.pvt_v2 import Attention, MlpWithDepthwiseConv, PyramidVisionTransformerV2
from torch import Tensor, nn

from upvits.toolchain.structure.groups import ChannelGroup, MaskPoint, Slice
from upvits.toolchain.structure.layers import mlp_ratio
from upvits.toolchain.structure.segments import Segment


class NarrowAttention(Attention):  # type: ignore[misc]
    """PVTv2 attention whose heads don't fill the stage width, or whose q·k and v dims per head differ.

    timm's own reshapes the heads' output to the stage width, which only works while
    `num_heads * head_dim == dim`. Parameters have the same names and meaning; the rows of `kv` are
    num_heads * qk_dim for k, then num_heads * v_dim for v.
    """

    def __init__(
        self, dim: int, num_heads: int, qk_dim: int, v_dim: int, sr_ratio: int, linear_attn: bool, qkv_bias: bool
    ) -> None:
        super().__init__(dim, num_heads=1, sr_ratio=sr_ratio, linear_attn=linear_attn, qkv_bias=qkv_bias)
        self.num_heads, self.head_dim, self.v_dim, self.scale = num_heads, qk_dim, v_dim, qk_dim**-0.5
        self.q = nn.Linear(dim, num_heads * qk_dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, num_heads * (qk_dim + v_dim), bias=qkv_bias)
        self.proj = nn.Linear(num_heads * v_dim, dim)

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        """Attend within a feature map; x is [B, H * W, dim], feat_size (H, W)."""
        batch, tokens, _ = x.shape
        kv = self.kv(self._reduce(x, feat_size))
        k_part, v_part = kv.split([self.num_heads * self.head_dim, self.num_heads * self.v_dim], dim=-1)
        q = self.q(x).reshape(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
        k = k_part.reshape(batch, -1, self.num_heads, self.head_dim).transpose(1, 2)
        v = v_part.reshape(batch, -1, self.num_heads, self.v_dim).transpose(1, 2)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            out = self.attn_drop(((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        out = out.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.v_dim)
        return cast(Tensor, self.proj_drop(self.proj(out)))

    def _reduce(self, x: Tensor, feat_size: list[int]) -> Tensor:
        """Spatially reduced tokens that keys and values read, [B, M, dim]."""
        if self.sr is None:
            return x
        feature_map = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], feat_size[0], feat_size[1])
        if self.pool is not None:
            feature_map = self.pool(feature_map)
        tokens = self.norm(self.sr(feature_map).flatten(2).transpose(1, 2))
        return cast(Tensor, tokens if self.act is None else self.act(tokens))


def matches(model: nn.Module) -> bool:
    """Whether `model` is a timm PVTv2."""
    return isinstance(model, PyramidVisionTransformerV2)


def unsupported(model: nn.Module) -> str | None:
    """The first part of this PVTv2 that the adapter cannot prune, or None."""
    if type(model) is not PyramidVisionTransformerV2:
        return f"a forward of its own ({type(model).__name__})"
    pvt: Any = model
    if not isinstance(pvt.head, (nn.Linear, nn.Identity)):
        return "a head of several layers (`upvits.save` makes one of dropout and a linear layer: load that)"
    for stage in pvt.stages:
        for block in stage.blocks:
            if type(block.attn) not in (Attention, NarrowAttention) or type(block.mlp) is not MlpWithDepthwiseConv:
                return "custom attention or FFN modules"
            if not isinstance(block.norm1, nn.LayerNorm):
                return "norms that are not LayerNorm"
    return None


def groups(model: nn.Module) -> tuple[ChannelGroup, ...]:
    """A width group per stage; attention dims, heads and FFN units per block."""
    pvt: Any = model
    names = {name for name, _ in pvt.named_parameters()}
    result = []
    for index in range(len(pvt.stages)):
        result.append(_stage_group(pvt, index, names))
        for block_index, block in enumerate(pvt.stages[index].blocks):
            result += _block_groups(f"stages.{index}.blocks.{block_index}", block, index, names)
    return tuple(result)


def _stage_group(pvt: Any, index: int, names: set[str]) -> ChannelGroup:
    stage = f"stages.{index}"
    embed = "patch_embed" if index == 0 else f"{stage}.downsample"
    axes = [(f"{embed}.proj.weight", 0), (f"{embed}.proj.bias", 0)]
    norms = [f"{embed}.norm", f"{stage}.norm"]
    for block_index in range(len(pvt.stages[index].blocks)):
        block = f"{stage}.blocks.{block_index}"
        norms += [f"{block}.norm1", f"{block}.norm2", f"{block}.attn.norm"]
        axes += [(f"{block}.attn.sr.weight", 1), (f"{block}.attn.sr.weight", 0), (f"{block}.attn.sr.bias", 0)]
        axes += [(f"{block}.{reader}.weight", 1) for reader in ("attn.q", "attn.kv", "mlp.fc1")]
        axes += [(f"{block}.{writer}.{kind}", 0) for writer in ("attn.proj", "mlp.fc2") for kind in ("weight", "bias")]
    last = index + 1 == len(pvt.stages)
    axes.append(("head.weight" if last else f"stages.{index + 1}.downsample.proj.weight", 1))
    axes += [(f"{norm}.{kind}", 0) for norm in norms for kind in ("weight", "bias")]
    return ChannelGroup(
        name=stage,
        kind="embed",
        size=(pvt.patch_embed if index == 0 else pvt.stages[index].downsample).proj.out_channels,
        slices=tuple(Slice(name, axis) for name, axis in axes if name in names),
        masks=tuple(MaskPoint(norm, "norm") for norm in norms if f"{norm}.weight" in names),
        stage=index,
    )


def _block_groups(name: str, block: Any, stage: int, names: set[str]) -> list[ChannelGroup]:
    ffn = {"fc1.weight": 0, "fc1.bias": 0, "dwconv.weight": 0, "dwconv.bias": 0, "fc2.weight": 1}
    mlp = ChannelGroup(
        name=f"{name}.mlp",
        kind="ffn",
        size=block.mlp.fc1.out_features,
        slices=tuple(Slice(f"{name}.mlp.{key}", axis) for key, axis in ffn.items()),
        masks=(MaskPoint(f"{name}.mlp.fc2", "input"),),
        stage=stage,
    )
    return [*_attention_groups(f"{name}.attn", block.attn, stage, names), mlp]


def _attention_groups(name: str, attn: Any, stage: int, names: set[str]) -> list[ChannelGroup]:
    queries = tuple(q for q in (f"{name}.q.weight", f"{name}.q.bias") if q in names)
    values = tuple(kv for kv in (f"{name}.kv.weight", f"{name}.kv.bias") if kv in names)
    proj, heads, qk, v = f"{name}.proj.weight", attn.num_heads, attn.q.out_features, attn.proj.in_features
    separate = [
        ChannelGroup(
            name=f"{name}.qk",
            kind="qk",
            size=qk,
            slices=tuple(Slice(parameter, 0) for parameter in queries + values),
            masks=(MaskPoint(f"{name}.q", "output"),),
            stage=stage,
            num_heads=heads,
            queries=queries,
        ),
        ChannelGroup(
            name=f"{name}.v",
            kind="v",
            size=v,
            slices=(*(Slice(kv, 0, start=qk) for kv in values), Slice(proj, 1)),
            masks=(MaskPoint(f"{name}.kv", "output", start=qk),),
            stage=stage,
            num_heads=heads,
        ),
    ]
    if qk != v:
        return separate

    def slices(unit: int) -> tuple[Slice, ...]:
        return (
            *(Slice(q, 0, unit=unit) for q in queries),
            *(Slice(kv, 0, repeat=2, unit=unit) for kv in values),
            Slice(proj, 1, unit=unit),
        )

    return [
        ChannelGroup(
            name=name,
            kind="attention",
            size=v,
            slices=slices(1),
            masks=(MaskPoint(f"{name}.q", "output"), MaskPoint(f"{name}.kv", "output", (0, 1))),
            stage=stage,
            num_heads=heads,
            queries=queries,
        ),
        ChannelGroup(
            name=f"{name}.heads",
            kind="heads",
            size=heads,
            slices=slices(attn.head_dim),
            masks=(MaskPoint(f"{name}.kv", "output", (0, 1), unit=attn.head_dim),),
            stage=stage,
            num_heads=heads,
        ),
        *separate,
    ]


def segments(model: nn.Module) -> tuple[Segment, ...]:
    """Patch embedding and blocks of every stage, then the head; within a stage the stream is [B, H, W, C].

    A stage's closing norm belongs to what reads it: the next stage's embedding, or the head.
    """
    pvt: Any = model
    result = [Segment("patch_embed", "embed", pvt.patch_embed)]
    for index, stage in enumerate(pvt.stages):
        if index > 0:
            result.append(Segment(f"stages.{index}.downsample", "embed", _downsample(pvt.stages[index - 1], stage)))
        for block_index, block in enumerate(stage.blocks):
            result.append(Segment(f"stages.{index}.blocks.{block_index}", "block", _on_map(block)))

    def head(stream: Tensor) -> Tensor:
        return cast(Tensor, pvt.forward_head(_leave(pvt.stages[-1], stream)))

    return (*result, Segment("head", "head", head))


def _on_map(block: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(stream: Tensor) -> Tensor:
        batch, height, width, channels = stream.shape
        tokens = block(stream.reshape(batch, -1, channels), (height, width))
        return cast(Tensor, tokens.reshape(batch, height, width, channels))

    return run


def _leave(stage: nn.Module, stream: Tensor) -> Tensor:
    """The stage's result [B, C, H, W]."""
    batch, height, width, channels = stream.shape
    tokens = stage.get_submodule("norm")(stream.reshape(batch, -1, channels))
    return cast(Tensor, tokens.reshape(batch, height, width, -1).permute(0, 3, 1, 2).contiguous())


def _downsample(before: nn.Module, stage: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda stream: cast(Tensor, stage.get_submodule("downsample")(_leave(before, stream)))


def block_lists(model: nn.Module) -> dict[str, int]:
    """A list of blocks per stage."""
    pvt: Any = model
    return {f"stages.{index}.blocks": len(stage.blocks) for index, stage in enumerate(pvt.stages)}


def attention(old: nn.Module, dim: int, num_heads: int, qk_dim: int, v_dim: int) -> nn.Module:
    """timm's own attention when the heads fill the stage width, else the small subclass above."""
    timm_old: Any = old
    sr_ratio = timm_old.sr.stride[0] if timm_old.sr is not None else 1
    linear, qkv_bias = timm_old.pool is not None, timm_old.q.bias is not None
    new: Any
    if num_heads * qk_dim == num_heads * v_dim == dim:
        new = Attention(dim, num_heads=num_heads, sr_ratio=sr_ratio, linear_attn=linear, qkv_bias=qkv_bias)
    else:
        new = NarrowAttention(dim, num_heads, qk_dim, v_dim, sr_ratio, linear, qkv_bias)
    new.attn_drop, new.proj_drop, new.fused_attn = timm_old.attn_drop, timm_old.proj_drop, timm_old.fused_attn
    if timm_old.norm is not None:
        new.norm.eps = timm_old.norm.eps
    return cast(nn.Module, new)


def refresh(model: nn.Module) -> None:
    """Set `num_features` and the feature channels to the stage widths, `depths` to the blocks that there are."""
    pvt: Any = model
    dims = _embed_dims(pvt)
    pvt.num_features = pvt.head_hidden_size = dims[-1]
    pvt.depths = [len(stage.blocks) for stage in pvt.stages]
    pvt.feature_info = [{**info, "num_chs": dim} for info, dim in zip(pvt.feature_info, dims, strict=True)]


def _embed_dims(pvt: Any) -> list[int]:
    return [stage.norm.normalized_shape[0] for stage in pvt.stages]


def constructor_args(model: nn.Module) -> dict[str, Any]:
    """Depths and pooling; the architecture name fixes the rest."""
    pvt: Any = model
    return {"depths": list(pvt.depths), "global_pool": pvt.global_pool}


def base_name(model: nn.Module) -> str:
    """B2, which is as wide as any."""
    return "pvt_v2_b2"


def variant_args(model: nn.Module) -> dict[str, Any]:
    """Arguments that an architecture's name usually fixes."""
    pvt: Any = model
    attention = [stage.blocks[0].attn for stage in pvt.stages]
    linear = attention[0].pool is not None
    ratios = [1 if linear or attn.sr is None else attn.sr.stride[0] for attn in attention]
    return {
        "in_chans": pvt.patch_embed.proj.in_channels,
        "linear": linear,
        "qkv_bias": attention[0].q.bias is not None,
        **({} if linear else {"sr_ratios": ratios}),
    }


def uniform_args(model: nn.Module) -> dict[str, Any] | None:
    """`embed_dims`, `num_heads` and `mlp_ratios` when the blocks of each stage agree and heads fill its width."""
    pvt: Any = model
    dims = _embed_dims(pvt)
    num_heads, mlp_ratios = [], []
    for stage, dim in zip(pvt.stages, dims, strict=True):
        shapes = {(b.attn.num_heads, b.attn.head_dim, b.mlp.fc1.out_features) for b in stage.blocks}
        if len(shapes) != 1 or any(type(block.attn) is not Attention for block in stage.blocks):
            return None
        heads, head_dim, hidden = shapes.pop()
        if heads * head_dim != dim:
            return None
        num_heads.append(heads)
        mlp_ratios.append(mlp_ratio(hidden, dim))
    return {"embed_dims": dims, "num_heads": num_heads, "mlp_ratios": mlp_ratios}


def wide_args(model: nn.Module) -> dict[str, Any]:
    """In every stage as many heads and as wide as its largest block."""
    pvt: Any = model
    dims, num_heads, mlp_ratios = [], [], []
    for stage, width in zip(pvt.stages, _embed_dims(pvt), strict=True):
        heads = max(block.attn.num_heads for block in stage.blocks)
        widest = max(max(block.attn.q.out_features, block.attn.proj.in_features) for block in stage.blocks)
        dim = -(-max(width, widest) // heads) * heads
        dims.append(dim)
        num_heads.append(heads)
        mlp_ratios.append(mlp_ratio(max(block.mlp.fc1.out_features for block in stage.blocks), dim))
    return {"embed_dims": dims, "num_heads": num_heads, "mlp_ratios": mlp_ratios}
