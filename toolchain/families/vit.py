"""timm's VisionTransformer with standard attention and MLP: ViT, DeiT, DeiT-III, DINOv2, CLIP image towers."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from timm.layers import Attention, Mlp, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from upvits.toolchain.structure.groups import ChannelGroup, MaskPoint, Slice
from upvits.toolchain.structure.layers import mlp_ratio
from upvits.toolchain.structure.segments import Segment


class UnequalAttention(Attention):  # type: ignore[misc]
    """ViT attention whose q·k dims and v dims per head differ.

    timm's own splits the fused qkv into three equal parts. Here its rows are heads * qk_dim for q, as many for k, and
    heads * v_dim for v. Parameters have the same names and meaning.
    """

    def __init__(
        self, dim: int, num_heads: int, qk_dim: int, v_dim: int, *, qkv_bias: bool, proj_bias: bool, **drops: float
    ) -> None:
        super().__init__(dim, num_heads, attn_head_dim=qk_dim, qkv_bias=qkv_bias, proj_bias=proj_bias, **drops)
        self.v_dim, self.attn_dim = v_dim, num_heads * v_dim
        self.qkv = nn.Linear(dim, num_heads * (2 * qk_dim + v_dim), bias=qkv_bias)
        self.proj = nn.Linear(self.attn_dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend; x is [B, N, dim].

        Raises:
            ValueError: a mask is asked for, which no supported network does.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attention masks are not supported with unequal q·k and v dims")
        batch, tokens, _ = x.shape
        qk = self.num_heads * self.head_dim
        parts = self.qkv(x).split([qk, qk, self.num_heads * self.v_dim], dim=-1)
        q, k, v = (part.reshape(batch, tokens, self.num_heads, -1).transpose(1, 2) for part in parts)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            out = self.attn_drop(((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        out = out.transpose(1, 2).reshape(batch, tokens, self.attn_dim)
        return cast(Tensor, self.proj_drop(self.proj(out)))


def matches(model: nn.Module) -> bool:
    """Whether `model` is a timm VisionTransformer (plain or with a distillation token)."""
    return isinstance(model, VisionTransformer)


def unsupported(model: nn.Module) -> str | None:
    """The first part of this VisionTransformer that the adapter cannot prune, or None."""
    vit: Any = model
    if type(vit) not in (VisionTransformer, VisionTransformerDistilled):
        return f"a forward of its own ({type(vit).__name__})"
    if type(vit.patch_embed) is not PatchEmbed:
        return f"a {type(vit.patch_embed).__name__} patch embedding (hybrid or custom stem)"
    if vit.attn_pool is not None:
        return "attention pooling"
    if not vit.global_pool:
        return "no pooling: its output are tokens"
    if not isinstance(vit.head, (nn.Linear, nn.Identity)):
        return "a head of several layers (`upvits.save` makes one of dropout and a linear layer: load that)"
    norms = (vit.patch_embed.norm, vit.norm_pre, vit.norm, vit.fc_norm)
    if not all(_is_norm_or_none(norm) for norm in norms):
        return "norms that are not LayerNorm"
    for block in vit.blocks:
        reason = _unsupported_block(block)
        if reason is not None:
            return reason
    return None


def _is_norm_or_none(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.LayerNorm) and module.elementwise_affine)


def _unsupported_block(block: Any) -> str | None:
    if type(block) is not Block:
        return f"{type(block).__name__} blocks (parallel, post-norm or custom)"
    attn, mlp = block.attn, block.mlp
    if type(attn) not in (Attention, UnequalAttention):
        return f"{type(attn).__name__} (rotary, differential or custom attention)"
    if not isinstance(attn.q_norm, nn.Identity):
        return "qk-norm"
    if not isinstance(attn.norm, nn.Identity) or getattr(attn, "gate", None) is not None:
        return "normalised or gated attention outputs"
    if type(mlp) is not Mlp:
        return f"{type(mlp).__name__} (gated MLPs)"
    if not isinstance(mlp.norm, nn.Identity):
        return "a norm inside the MLP"
    if not (_is_norm_or_none(block.norm1) and _is_norm_or_none(block.norm2)):
        return "norms that are not LayerNorm"
    return None


def groups(model: nn.Module) -> tuple[ChannelGroup, ...]:
    """One embedding group for the whole network; attention dims, heads and FFN units per block."""
    vit: Any = model
    names = {name for name, _ in vit.named_parameters()}
    result = [_embed_group(vit, names)]
    for index, block in enumerate(vit.blocks):
        result += _block_groups(f"blocks.{index}", block, names)
    return tuple(result)


def _embed_group(vit: Any, names: set[str]) -> ChannelGroup:
    axes = {
        "cls_token": -1,
        "reg_token": -1,
        "dist_token": -1,
        "pos_embed": -1,
        "patch_embed.proj.weight": 0,
        "patch_embed.proj.bias": 0,
        "head.weight": 1,
        "head_dist.weight": 1,
    }
    norms = ["patch_embed.norm", "norm_pre", "norm", "fc_norm"]
    for index in range(len(vit.blocks)):
        block = f"blocks.{index}"
        norms += [f"{block}.norm1", f"{block}.norm2"]
        axes |= {f"{block}.attn.qkv.weight": 1, f"{block}.mlp.fc1.weight": 1}
        for writer in ("attn.proj", "mlp.fc2"):
            axes |= {f"{block}.{writer}.weight": 0, f"{block}.{writer}.bias": 0}
        axes |= {f"{block}.ls1.gamma": 0, f"{block}.ls2.gamma": 0}
    axes |= {f"{norm}.{kind}": 0 for norm in norms for kind in ("weight", "bias")}
    return ChannelGroup(
        name="embed",
        kind="embed",
        size=vit.embed_dim,
        slices=tuple(Slice(name, axis) for name, axis in axes.items() if name in names),
        masks=tuple(MaskPoint(norm, "norm") for norm in norms if f"{norm}.weight" in names),
    )


def _block_groups(name: str, block: Any, names: set[str]) -> list[ChannelGroup]:
    ffn = {f"{name}.mlp.fc1.weight": 0, f"{name}.mlp.fc1.bias": 0, f"{name}.mlp.fc2.weight": 1}
    mlp = ChannelGroup(
        name=f"{name}.mlp",
        kind="ffn",
        size=block.mlp.fc1.out_features,
        slices=tuple(Slice(key, axis) for key, axis in ffn.items() if key in names),
        masks=(MaskPoint(f"{name}.mlp.fc2", "input"),),
    )
    return [*_attention_groups(f"{name}.attn", block.attn, names), mlp]


def _attention_groups(name: str, attn: Any, names: set[str]) -> list[ChannelGroup]:
    qkv, proj = f"{name}.qkv", f"{name}.proj.weight"
    queries = tuple(parameter for parameter in (f"{qkv}.weight", f"{qkv}.bias") if parameter in names)
    heads, v = attn.num_heads, attn.proj.in_features
    qk = (attn.qkv.out_features - v) // 2
    separate = [
        ChannelGroup(
            name=f"{name}.qk",
            kind="qk",
            size=qk,
            slices=tuple(Slice(q, 0, repeat=2) for q in queries),
            masks=(MaskPoint(qkv, "output"),),
            num_heads=heads,
            queries=queries,
        ),
        ChannelGroup(
            name=f"{name}.v",
            kind="v",
            size=v,
            slices=(*(Slice(q, 0, start=2 * qk) for q in queries), Slice(proj, 1)),
            masks=(MaskPoint(qkv, "output", start=2 * qk),),
            num_heads=heads,
        ),
    ]
    if qk != v:
        return separate

    def slices(unit: int) -> tuple[Slice, ...]:
        return (*(Slice(q, 0, repeat=3, unit=unit) for q in queries), Slice(proj, 1, unit=unit))

    return [
        ChannelGroup(
            name=name,
            kind="attention",
            size=v,
            slices=slices(1),
            masks=(MaskPoint(qkv, "output", (1, 0, 1)),),
            num_heads=heads,
            queries=queries,
        ),
        ChannelGroup(
            name=f"{name}.heads",
            kind="heads",
            size=heads,
            slices=slices(attn.head_dim),
            masks=(MaskPoint(qkv, "output", (0, 0, 1), unit=attn.head_dim),),
            num_heads=heads,
        ),
        *separate,
    ]


def segments(model: nn.Module) -> tuple[Segment, ...]:
    """Embedding, blocks, head; between them the stream of tokens [B, N, C]."""
    vit: Any = model

    def embed(images: Tensor) -> Tensor:
        return cast(Tensor, vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))))

    def head(stream: Tensor) -> Tensor:
        return cast(Tensor, vit.forward_head(vit.norm(stream)))

    blocks = (Segment(f"blocks.{index}", "block", block) for index, block in enumerate(vit.blocks))
    return (Segment("embed", "embed", embed), *blocks, Segment("head", "head", head))


def block_lists(model: nn.Module) -> dict[str, int]:
    """One list of blocks."""
    vit: Any = model
    return {"blocks": len(vit.blocks)}


def attention(old: nn.Module, dim: int, num_heads: int, qk_dim: int, v_dim: int) -> nn.Module:
    """timm's own Attention with `attn_head_dim`, which frees the head width from the embedding width; where q·k and v
    dims differ, the small subclass above.
    """
    timm_old: Any = old
    args: dict[str, Any] = {
        "qkv_bias": timm_old.qkv.bias is not None,
        "proj_bias": timm_old.proj.bias is not None,
        "attn_drop": timm_old.attn_drop.p,
        "proj_drop": timm_old.proj_drop.p,
    }
    new: Any
    if qk_dim == v_dim:
        new = Attention(dim, num_heads=num_heads, attn_head_dim=qk_dim, **args)
    else:
        new = UnequalAttention(dim, num_heads, qk_dim, v_dim, **args)
    new.fused_attn = timm_old.fused_attn
    return cast(nn.Module, new)


def refresh(model: nn.Module) -> None:
    """Set `embed_dim`, `num_features` and the feature channels to the width and the depth that there are."""
    vit: Any = model
    dim = vit.patch_embed.proj.out_channels
    vit.embed_dim = vit.num_features = vit.head_hidden_size = dim
    vit.feature_info = [{**info, "num_chs": dim} for info in vit.feature_info[: len(vit.blocks)]]


def constructor_args(model: nn.Module) -> dict[str, Any]:
    """Image size, depth and pooling, which users change most often; the architecture name fixes the rest."""
    vit: Any = model
    args: dict[str, Any] = {"img_size": list(vit.patch_embed.img_size), "depth": len(vit.blocks)}
    if type(vit) is VisionTransformer:
        args["global_pool"] = vit.global_pool
    if vit.dynamic_img_size:
        args["dynamic_img_size"] = True
    return args


_ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh", "ReLU": "relu", "SiLU": "silu", "Swish": "silu"}


def base_name(model: nn.Module) -> str:
    """The distilled one, or a plain one that is as wide."""
    vit: Any = model
    if type(vit) is VisionTransformerDistilled:
        return "deit_tiny_distilled_patch16_224"
    sizes = ((768, "vit_base_patch16_224"), (1024, "vit_large_patch16_224"))
    return next((name for width, name in sizes if vit.embed_dim <= width), "vit_huge_patch14_224")


def variant_args(model: nn.Module) -> dict[str, Any]:
    """Arguments that an architecture's name usually fixes."""
    vit: Any = model
    block, activation = vit.blocks[0], vit.blocks[0].mlp.act
    plain = "gelu_tanh" if getattr(activation, "approximate", "none") == "tanh" else "gelu"
    scale = getattr(block.ls1, "init_values", None)
    return {
        "in_chans": vit.patch_embed.proj.in_channels,
        "patch_size": list(vit.patch_embed.patch_size),
        "act_layer": _ACTIVATIONS.get(type(activation).__name__, plain),
        "class_token": vit.cls_token is not None,
        "reg_tokens": vit.num_reg_tokens,
        "no_embed_class": vit.no_embed_class,
        "pre_norm": not isinstance(vit.norm_pre, nn.Identity),
        "final_norm": not isinstance(vit.norm, nn.Identity) or not isinstance(vit.fc_norm, nn.Identity),
        "fc_norm": not isinstance(vit.fc_norm, nn.Identity),
        "qkv_bias": block.attn.qkv.bias is not None,
        "proj_bias": block.attn.proj.bias is not None,
        "pos_embed": "learn" if vit.pos_embed is not None else "none",
        "init_values": 1e-5 if scale is None and hasattr(block.ls1, "gamma") else scale,
    }


def uniform_args(model: nn.Module) -> dict[str, Any] | None:
    """`embed_dim`, `num_heads` and `mlp_ratio` when all blocks agree and heads fill the embedding."""
    vit: Any = model
    shapes = {(block.attn.num_heads, block.attn.head_dim, block.mlp.fc1.out_features) for block in vit.blocks}
    if len(shapes) != 1 or any(type(block.attn) is not Attention for block in vit.blocks):
        return None
    num_heads, head_dim, hidden = shapes.pop()
    if num_heads * head_dim != vit.embed_dim:
        return None
    return {"embed_dim": vit.embed_dim, "num_heads": num_heads, "mlp_ratio": mlp_ratio(hidden, vit.embed_dim)}


def wide_args(model: nn.Module) -> dict[str, Any]:
    """As many heads and as wide as the largest block."""
    vit: Any = model
    heads = max(block.attn.num_heads for block in vit.blocks)
    v = max(block.attn.proj.in_features for block in vit.blocks)
    qk = max((block.attn.qkv.out_features - block.attn.proj.in_features) // 2 for block in vit.blocks)
    dim = -(-max(vit.embed_dim, qk, v) // heads) * heads
    hidden = max(block.mlp.fc1.out_features for block in vit.blocks)
    return {"embed_dim": dim, "num_heads": heads, "mlp_ratio": mlp_ratio(hidden, dim)}
