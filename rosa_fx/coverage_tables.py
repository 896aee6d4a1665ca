"""What `coverage_models` shrinks, in which order architectures run, and which ones need a correction."""

from __future__ import annotations

from typing import Any

# The task classes of transformers by the family that the table shows; a model type counts once, where it comes first.
FAMILIES: tuple[tuple[str, str], ...] = (
    ("seq2seq", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    ("speech", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    ("masked", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    ("causal", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("audio", "MODEL_FOR_CTC_MAPPING_NAMES"),
    ("audio", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES"),
    ("vision", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    ("vision", "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES"),
    ("vision", "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES"),
    ("video", "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES"),
    ("multimodal", "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    ("multimodal", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    ("detection", "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES"),
    ("other", "MODEL_MAPPING_NAMES"),
)

# Diverse ones first, so that a run which is cut short says something about every family.
_FIRST = """
llama gpt2 gpt_neox opt bloom falcon mistral qwen2 gemma phi mamba rwkv t5 bart bert roberta albert distilbert electra
deberta-v2 xlnet vit swin convnext clip wav2vec2 whisper mixtral qwen2_moe deepseek_v3 jamba mamba2 gptj codegen mpt
gpt_neo dbrx gpt_oss deit dinov2 beit phi3 gpt_bigcode esm funnel squeezebert mobilebert fnet modernbert roformer
segformer resnet mobilevit siglip hubert audio-spectrogram-transformer pegasus m2m_100 longt5 led perceiver canine ctrl
recurrent_gemma zamba2 bamba nemotron_h lfm2 qwen3_next minimax switch_transformers nllb-moe speech_to_text videomae
timesformer patchtst time_series_transformer llama4_text qwen3_moe olmoe longformer big_bird convbert ibert detr gemma2
cohere granite glm4 stablelm nemotron gemma3_text qwen3 olmo olmo2 phimoe granitemoe starcoder2 glm mbart marian mt5
blenderbot swinv2 poolformer wavlm blip layoutlm mpnet camembert xlm-roberta falcon_mamba zamba arctic xglm biogpt umt5
speecht5 moonshine vivit flaubert xlm openai-gpt ernie nystromformer yoso rembert megatron-bert deepseek_v2 cohere2
smollm3 ernie4_5 hunyuan_v1_dense persimmon fuyu git trocr autoformer informer
"""
FIRST = tuple(_FIRST.split())

RULES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|^n_words$|^num_embeddings$", 128),
    (r"first_k_dense_replace|num_nextn_predict_layers|^n_group$|^topk_group$", 1),
    (r"experts_per_tok|_topk$|^top_k|num_experts_per_token|^moe_top_?k|^index_topk$", 2),
    (r"(num|n)_(\w+_)?experts$", 4),
    (r"^num_feat_extract_layers$|^qk_head_dim$", 1024),  # follow from other attributes
    (r"(^|_)(num|n)_(\w+_)?(layers?|blocks)$|_layers$|^depth$", 2),
    (r"key_value_heads$|^num_kv_heads$|linear_num_key_heads|^multi_query_group_num$", 2),
    (r"(^|_)(num|n)_(\w+_)?heads?$|_attention_heads$", 4),
    (r"head_dim$|^d_kv$|head_size$|^rotary_dim$", 8),
    (r"lora_(rank|dim)$", 16),
    (r"ffn_dim$|intermediate_(size|dim)$|^d_ff$|^n_inner$|mlp_dim$|^ffn_hidden_size$|ffn_size$", 64),
    (
        r"(^|_)hidden_(size|dim)$|^d_model$|^n_embd$|^(model_|inner_)?dim$|embed_dim$|^embedding_(size|dim)$|^word_embed_proj_dim$"
        r"|projection_dim$|^emb_dim$|^decoder_output_dim$|attention_hidden_size$|^d_inner$|^lru_width$|^d_embed$|^out_hidden_size$",
        32,
    ),
    (r"state_size$|d_state$|^ssm_state", 8),
    (r"^(mamba_)?chunk_size$", 8),
    (r"^(mamba_)?dt_rank$|^time_step_rank$", 4),
    (r"max_(\w+_)?positions?(_embeddings)?$|^n_positions$|^n_ctx$|^max_seq_len|^max_length$", 64),
    (r"^image_size$|^pretrain_image_size$", 64),
    (r"^num_queries$|^num_latents$", 8),
    (r"^num_conv_pos_embeddings$", 16),
    (r"^num_conv_pos_embedding_groups$", 4),
    (r"^sliding_window$|^attention_window$|^local_attention$|^attention_window_size$", 8),
)
LIGHT = 6  # how many of the rules are applied where the small sizes do not fit together

LISTS: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r"^(hidden_sizes|embed_dims?|encoder_hidden_sizes)$", (16, 32, 64, 128)),
    (r"^num_(attention_)?heads$", (1, 2, 4, 8)),
    (r"^depths$|^num_blocks$", (2, 2, 2, 2)),
    (r"^conv_dim$|^tdnn_dim$", (32,) * 16),
)

FIXES: dict[str, dict[str, Any]] = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "swin": {"embed_dim": 16, "num_heads": [2, 2, 4, 4], "window_size": 2, "image_size": 64},
    "swinv2": {"embed_dim": 16, "num_heads": [2, 2, 4, 4], "window_size": 2, "image_size": 64},
    "donut-swin": {"embed_dim": 16, "num_heads": [2, 2, 4, 4], "window_size": 2, "image_size": 64},
    "whisper": {"max_source_positions": 32, "num_mel_bins": 16},
    "wav2vec2": {"conv_dim": (32,) * 7},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 8},
    "xlnet": {"d_head": 8},
    "funnel": {"block_sizes": [1, 1, 1], "d_head": 8},
    "reformer": {"axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "mobilebert": {"hidden_size": 64, "embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "fnet": {"tpu_short_seq_length": 16},
    "longformer": {"attention_window": [4, 4]},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "n_mamba_heads": 2},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "ctrl": {"dff": 64},
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 3},
    "perceiver": {"num_self_attends_per_block": 2, "d_latents": 32, "d_model": 32, "num_latents": 8},
    "nemotron_h": {"n_groups": 1},
    "zamba2": {
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "time_series_transformer": {"prediction_length": 8},
    "autoformer": {"prediction_length": 8},
    "informer": {"prediction_length": 8},
    "audio-spectrogram-transformer": {"num_mel_bins": 32, "max_length": 64, "patch_size": 16},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "convbert": {"num_groups": 1},
    "nemotron": {"num_key_value_heads": 2},
    "poolformer": {"num_encoder_blocks": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
}
