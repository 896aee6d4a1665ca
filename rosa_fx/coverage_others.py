"""Tiny models of libraries that are not transformers, and inputs that they take: the rows of `rosa_fx.coverage --others`.

The libraries are the optional extra `others`. Each is imported when its model is built, and a missing one ends its row only.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[], tuple[nn.Module, dict[str, Any]]]


def _tokens() -> Tensor:
    return torch.randint(3, 60, (2, 16))


def _x_transformers() -> tuple[nn.Module, dict[str, Any]]:
    x: Any = import_module("x_transformers")
    layers = x.Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, rotary_pos_emb=True, ff_glu=True)
    return x.TransformerWrapper(num_tokens=64, max_seq_len=32, attn_layers=layers), {"x": _tokens()}


def _x_encoder_decoder() -> tuple[nn.Module, dict[str, Any]]:
    x: Any = import_module("x_transformers")
    common = {"depth": 1, "heads": 4, "attn_dim_head": 8, "num_tokens": 64, "max_seq_len": 32}
    keywords = {f"{side}_{key}": value for side in ("enc", "dec") for key, value in common.items()}
    return x.XTransformer(dim=32, **keywords), {"src": _tokens(), "tgt": _tokens()}


def _mambapy() -> tuple[nn.Module, dict[str, Any]]:
    m: Any = import_module("mambapy.mamba")
    return m.Mamba(m.MambaConfig(d_model=32, n_layers=2, d_state=8)), {"x": torch.randn(2, 16, 32)}


def _perceiver() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"num_latents": 8, "latent_dim": 32, "latent_heads": 4, "cross_dim_head": 8, "latent_dim_head": 8}
    p: Any = import_module("perceiver_pytorch")
    model = p.Perceiver(num_freq_bands=4, depth=2, max_freq=10.0, num_classes=10, weight_tie_layers=True, **sizes)
    return model, {"data": torch.randn(2, 8, 8, 3)}


def _mixer() -> tuple[nn.Module, dict[str, Any]]:
    m: Any = import_module("mlp_mixer_pytorch")
    model = m.MLPMixer(image_size=32, channels=3, patch_size=8, dim=32, depth=2, num_classes=10)
    return model, {"input": torch.randn(2, 3, 32, 32)}


def _graph_transformer() -> tuple[nn.Module, dict[str, Any]]:
    g: Any = import_module("graph_transformer_pytorch")
    model = g.GraphTransformer(dim=32, depth=2, dim_head=8, heads=4, edge_dim=16, with_feedforwards=True)
    return model, {"nodes": torch.randn(2, 6, 32), "edges": torch.randn(2, 6, 6, 16)}


def _geometric() -> tuple[nn.Module, dict[str, Any]]:
    g: Any = import_module("torch_geometric.nn")
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]])
    model = g.TransformerConv(32, 8, heads=4, edge_dim=16, beta=True)
    return model, {"x": torch.randn(6, 32), "edge_index": edges, "edge_attr": torch.randn(8, 16)}


def _linformer() -> tuple[nn.Module, dict[str, Any]]:
    m: Any = import_module("linformer")
    return m.Linformer(dim=32, seq_len=16, depth=2, k=8, heads=4), {"x": torch.randn(2, 16, 32)}


def _conformer() -> tuple[nn.Module, dict[str, Any]]:
    m: Any = import_module("conformer")
    return m.Conformer(32, depth=2, dim_head=8, heads=4, conv_kernel_size=7), {"x": torch.randn(2, 16, 32)}


def _ft_transformer() -> tuple[nn.Module, dict[str, Any]]:
    m: Any = import_module("rtdl_revisiting_models")
    sizes = {
        "d_block": 32,
        "attention_n_heads": 4,
        "attention_dropout": 0.0,
        "ffn_d_hidden_multiplier": 2.0,
        "ffn_dropout": 0.0,
    }
    model = m.FTTransformer(n_cont_features=6, cat_cardinalities=[4, 7], d_out=2, n_blocks=2, residual_dropout=0.0, **sizes)
    return model, {"x_cont": torch.randn(3, 6), "x_cat": torch.randint(0, 4, (3, 2))}


def _esm() -> tuple[nn.Module, dict[str, Any]]:
    m: Any = import_module("esm")
    return m.ESM2(num_layers=2, embed_dim=32, attention_heads=4), {"tokens": torch.randint(4, 24, (2, 16))}


def _unet() -> tuple[nn.Module, dict[str, Any]]:
    m: Any = import_module("diffusers")
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    model = m.UNet2DModel(
        16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=8, **blocks
    )
    return model, {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([3, 7])}


def _dit() -> tuple[nn.Module, dict[str, Any]]:
    m: Any = import_module("diffusers")
    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "sample_size": 8, "norm_num_groups": 4}
    model = m.DiTTransformer2DModel(in_channels=4, num_layers=2, num_embeds_ada_norm=16, **sizes)
    inputs = {"timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}
    return model, {"hidden_states": torch.randn(2, 4, 8, 8), **inputs}


def _xlstm() -> tuple[nn.Module, dict[str, Any]]:
    m: Any = import_module("xlstm")
    block = m.mLSTMBlockConfig(mlstm=m.mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=4))
    config = m.xLSTMBlockStackConfig(mlstm_block=block, context_length=16, num_blocks=2, embedding_dim=32)
    return m.xLSTMBlockStack(config), {"x": torch.randn(2, 16, 32)}


def _monai_vit() -> tuple[nn.Module, dict[str, Any]]:
    m: Any = import_module("monai.networks.nets")
    sizes = {"hidden_size": 32, "mlp_dim": 64, "num_layers": 2, "num_heads": 4}
    model = m.ViT(in_channels=1, img_size=(16, 16), patch_size=(8, 8), spatial_dims=2, classification=True, **sizes)
    return model, {"x": torch.randn(2, 1, 16, 16)}


def _performer() -> tuple[nn.Module, dict[str, Any]]:
    m: Any = import_module("performer_pytorch")
    model = m.Performer(dim=32, depth=2, heads=4, dim_head=8, nb_features=16, auto_check_redraw=False)
    return model, {"x": torch.randn(2, 16, 32)}


def _linear_attention() -> tuple[nn.Module, dict[str, Any]]:
    m: Any = import_module("linear_attention_transformer")
    model = m.LinearAttentionTransformerLM(num_tokens=64, dim=32, heads=4, depth=2, max_seq_len=16, dim_head=8, causal=True)
    return model, {"x": _tokens()}


def _itransformer() -> tuple[nn.Module, dict[str, Any]]:
    m: Any = import_module("iTransformer")
    model = m.iTransformer(num_variates=5, lookback_len=16, depth=2, dim=32, pred_length=8, dim_head=8, heads=4)
    return model, {"x": torch.randn(2, 16, 5)}


# Name of the row: (family, library as the package index calls it, class, how to build it).
OTHERS: dict[str, tuple[str, str, str, Build]] = {
    "x-transformers-decoder": ("language", "x-transformers", "TransformerWrapper", _x_transformers),
    "x-transformers-seq2seq": ("language", "x-transformers", "XTransformer", _x_encoder_decoder),
    "mambapy": ("state-space", "mambapy", "Mamba", _mambapy),
    "xlstm": ("recurrent", "xlstm", "xLSTMBlockStack", _xlstm),
    "perceiver": ("perceiver", "perceiver-pytorch", "Perceiver", _perceiver),
    "mixer": ("vision", "mlp-mixer-pytorch", "MLPMixer", _mixer),
    "itransformer": ("time series", "iTransformer", "iTransformer", _itransformer),
    "monai-vit": ("vision", "monai", "ViT", _monai_vit),
    "graph-transformer": ("graph", "graph-transformer-pytorch", "GraphTransformer", _graph_transformer),
    "geometric": ("graph", "torch_geometric", "TransformerConv", _geometric),
    "unet": ("diffusion", "diffusers", "UNet2DModel", _unet),
    "dit": ("diffusion", "diffusers", "DiTTransformer2DModel", _dit),
    "linformer": ("linear attention", "linformer", "Linformer", _linformer),
    "performer": ("linear attention", "performer-pytorch", "Performer", _performer),
    "linear-attention": (
        "linear attention",
        "linear-attention-transformer",
        "LinearAttentionTransformerLM",
        _linear_attention,
    ),
    "conformer": ("speech", "conformer", "Conformer", _conformer),
    "ft-transformer": ("tabular", "rtdl_revisiting_models", "FTTransformer", _ft_transformer),
    "esm2": ("protein", "fair-esm", "ESM2", _esm),
}


def installed(name: str) -> str | None:
    """The version of the library of a row, None where it is not installed."""
    try:
        return version(OTHERS[name][1])
    except PackageNotFoundError:
        return None


def other_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A random model in eval mode and its inputs by name.

    Raises:
        ImportError: the library, or one that it needs, is not installed.
    """
    torch.manual_seed(0)
    model, inputs = OTHERS[name][3]()
    return model.float().eval(), inputs
