"""Sizes of the published models, for plans of what they cost."""

import re

from paddlemix.models.internvl2.configuration import InternVLChatConfig

_VIT_300M = dict(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    image_size=448,
    qkv_bias=True,
    qk_normalization=False,
    norm_type="layer_norm",
)
_VIT_6B = dict(num_hidden_layers=45, image_size=448)

# name: (vision tower, language model, hidden, layers, heads, key/value heads, MLP width, vocabulary), from their config.json.
_PUBLISHED = {
    "InternVL2-1B": (_VIT_300M, "Qwen2", 896, 24, 14, 2, 4864, 151655),
    "InternVL2-2B": (_VIT_300M, "InternLM2", 2048, 24, 16, 8, 8192, 92553),
    "InternVL2-4B": (_VIT_300M, "Phi3", 3072, 32, 32, 32, 8192, 32020),
    "InternVL2-8B": (_VIT_300M, "InternLM2", 4096, 32, 32, 8, 14336, 92553),
    "InternVL2-26B": (_VIT_6B, "InternLM2", 6144, 48, 48, 8, 16384, 92553),
    "InternVL2-40B": (_VIT_6B, "Llama", 7168, 60, 56, 8, 20480, 64009),
    "InternVL2-Llama3-76B": (_VIT_6B, "Llama", 8192, 80, 64, 8, 28672, 128265),
    "InternVL2_5-1B": (_VIT_300M, "Qwen2", 896, 24, 14, 2, 4864, 151674),
    "InternVL2_5-2B": (_VIT_300M, "InternLM2", 2048, 24, 16, 8, 8192, 92553),
    "InternVL2_5-4B": (_VIT_300M, "Qwen2", 2048, 36, 16, 2, 11008, 151674),
    "InternVL2_5-8B": (_VIT_300M, "InternLM2", 4096, 32, 32, 8, 14336, 92553),
    "InternVL2_5-26B": (_VIT_6B, "InternLM2", 6144, 48, 48, 8, 16384, 92553),
    "InternVL2_5-38B": (_VIT_6B, "Qwen2", 5120, 64, 40, 8, 27648, 151674),
    "InternVL2_5-78B": (_VIT_6B, "Qwen2", 8192, 80, 64, 8, 29568, 151674),
}
# InternVL3 and 3.5.
_LATER = {
    "InternVL3-1B": (_VIT_300M, "Qwen2", 896, 24, 14, 2, 4864, 151674),
    "InternVL3-2B": (_VIT_300M, "Qwen2", 1536, 28, 12, 2, 8960, 151674),
    "InternVL3-8B": (_VIT_300M, "Qwen2", 3584, 28, 28, 4, 18944, 151674),
    "InternVL3-9B": (_VIT_300M, "InternLM3", 4096, 48, 32, 2, 10240, 128512),
    "InternVL3-14B": (_VIT_300M, "Qwen2", 5120, 48, 40, 8, 13824, 151674),
    "InternVL3-38B": (_VIT_6B, "Qwen2", 5120, 64, 40, 8, 27648, 151674),
    "InternVL3-78B": (_VIT_6B, "Qwen2", 8192, 80, 64, 8, 29568, 151674),
    "InternVL3_5-1B": (_VIT_300M, "Qwen3", 1024, 28, 16, 8, 3072, 151936),
    "InternVL3_5-2B": (_VIT_300M, "Qwen3", 2048, 28, 16, 8, 6144, 151936),
    "InternVL3_5-4B": (_VIT_300M, "Qwen3", 2560, 36, 32, 8, 9728, 151936),
    "InternVL3_5-8B": (_VIT_300M, "Qwen3", 4096, 36, 32, 8, 12288, 151936),
    "InternVL3_5-14B": (_VIT_300M, "Qwen3", 5120, 40, 40, 8, 17408, 151936),
    "InternVL3_5-38B": (_VIT_6B, "Qwen3", 5120, 64, 64, 8, 25600, 151936),
    "InternVL3_5-30B-A3B": (_VIT_300M, "Qwen3Moe", 2048, 48, 32, 4, 6144, 151936),
    "InternVL3_5-241B-A28B": (_VIT_6B, "Qwen3Moe", 4096, 94, 64, 4, 12288, 151936),
    "InternVL3_5-GPT-OSS-20B-A4B-Preview": (_VIT_300M, "GptOss", 2880, 24, 64, 8, 2880, 200028),
}
# What else the shapes depend on.
_MORE = {
    "Qwen3": {"head_dim": 128},
    "Qwen3Moe": {"head_dim": 128, "norm_topk_prob": True},
    "InternLM3": {"head_dim": 128},
    "GptOss": {"head_dim": 64, "num_local_experts": 32},
    "InternVL3_5-30B-A3B": {"moe_intermediate_size": 768},
    "InternVL3_5-241B-A28B": {"moe_intermediate_size": 1536},
}
# Earlier models, and what each is put together from: (vision tower, language model).
_EARLIER = {
    "InternVL-Chat-V1-2": (_VIT_6B, "Llama", 7168, 60, 56, 8, 20480, 64009),
    "InternVL-Chat-V1-5": (_VIT_6B, "InternLM2", 6144, 48, 48, 8, 16384, 92553),
    "Mini-InternVL-Chat-2B-V1-5": (_VIT_300M, "InternLM2", 2048, 24, 16, 8, 8192, 92553),
    "Mini-InternVL-Chat-4B-V1-5": (_VIT_300M, "Phi3", 3072, 32, 32, 32, 8192, 32020),
}
_EARLIER["InternVL-Chat-V1-2-Plus"] = _EARLIER["InternVL-Chat-V1-2"]
# By the name of a language model, or of what a script of theirs writes.
_PARTS = {
    "nous-hermes-2-yi-34b": "InternVL-Chat-V1-2",
    "internlm2-chat-20b": "InternVL-Chat-V1-5",
    "internlm2-chat-1_8b": "Mini-InternVL-Chat-2B-V1-5",
    "phi-3-mini-128k-instruct": "Mini-InternVL-Chat-4B-V1-5",
    "gpt-oss-20b": "InternVL3_5-GPT-OSS-20B-A4B-Preview",
    "internvl_chat_v1_5_hermes2_yi34b_dynamic_res_pretrain": "InternVL-Chat-V1-2",
    "internvl_chat_v1_5_internlm2_20b_dynamic_res_pretrain": "InternVL-Chat-V1-5",
    "internvl_chat_v1_5_internlm2_1_8b_dynamic_res_pretrain": "Mini-InternVL-Chat-2B-V1-5",
    "internvl_chat_v1_5_phi3_3_8b_dynamic_res_pretrain": "Mini-InternVL-Chat-4B-V1-5",
}
# Those of InternVL2.5's language models, and what its stages write: internvl2_5_1b_qwen2_5_0_5b_dynamic_res_stage1.
_PARTS |= {
    f"{llm}-{'chat' if 'internlm' in llm else 'instruct'}": f"InternVL2_5-{size}"
    for size, llm in {
        "1B": "qwen2.5-0.5b",
        "2B": "internlm2_5-1_8b",
        "4B": "qwen2.5-3b",
        "8B": "internlm2_5-7b",
        "26B": "internlm2_5-20b",
        "38B": "qwen2.5-32b",
        "78B": "qwen2.5-72b",
    }.items()
}
_STAGES = re.compile(r"internvl2_5_(\d+b)_\w+_dynamic_res_stage\d(_5)?")
_SIZES = {**_PUBLISHED, **_LATER, **_EARLIER}
PUBLISHED, LATER = tuple(_PUBLISHED), tuple(_LATER)


_ALIKE = re.compile(r"(-(Instruct|Pretrained|MPO))?(-(hf|HF))?$")  # of one shape
_FLASH = re.compile(r"^InternVL3_5-.*-Flash$")  # of the same with a router
_ROUTED = {"flash_mode": True, "flash_relative_threshold": 0.5, "flash_absolute_threshold": 0.5}


def is_known(name):
    """Whether :func:`published_config` knows the name of a model, or of a part that one is put together from."""
    return _plain(name) in _SIZES


def _plain(name):
    """The name of the published model whose sizes another has."""
    name = _ALIKE.sub("", name.removesuffix("-Flash")) if name.startswith("InternVL3") else name
    stage = _STAGES.fullmatch(name)
    if stage:
        return f"InternVL2_5-{stage[1].upper()}"
    if name.startswith("internvl3_5_gpt_oss_20b"):
        return "InternVL3_5-GPT-OSS-20B-A4B-Preview"
    return _PARTS.get(name.lower(), name)


def published_config(name):
    """Sizes of a published model, as a configuration; ``name`` is one of :data:`PUBLISHED`, or another one's."""
    flash = _ROUTED if _FLASH.search(name) else {}
    name = _plain(name)
    vision, family, hidden, layers, heads, kv_heads, mlp, vocabulary = _SIZES[name]
    llm = {
        "architectures": [f"{family}ForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "bias": False,
        **_MORE.get(family, {}),
        **_MORE.get(name, {}),
    }
    return InternVLChatConfig.from_dict(
        {"vision_config": vision, "llm_config": llm, "use_thumbnail": True, "ps_version": "v2", **flash}
    )
