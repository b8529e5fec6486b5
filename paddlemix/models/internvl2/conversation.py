"""Prompt templates of the chat models; what a template is, and how one is encoded, is in ``blocks/conversation.py``."""

from paddlemix.errors import PromptError
from paddlemix.models.blocks.conversation import (
    IGNORE_INDEX,
    IMAGE_PLACEHOLDER,
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
    Template,
    encode_conversations,
    insert_image_tokens,
)

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_PLACEHOLDER",
    "IMG_CONTEXT",
    "IMG_END",
    "IMG_START",
    "Template",
    "encode_conversations",
    "get_template",
    "insert_image_tokens",
]

_SYSTEM_V2 = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
_SYSTEM_V2_5 = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"

# The date is part of the template.
_SYSTEM_GPT_OSS = (
    "You are InternVL, a large language model trained by Shanghai AI Laboratory.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2025-08-06\n\nReasoning: low\n\n# Valid channels: final. Channel must be included for every message."
)


def _chatml(name, system_message, end="<|im_end|>", strip=False):
    return Template(
        name,
        system_message,
        system="<|im_start|>system\n{}" + end,
        user=("<|im_start|>user\n", end),
        assistant="<|im_start|>assistant\n",
        end=end,
        strip=strip,
    )


_TEMPLATES = {
    template.name: template
    for template in (
        _chatml("Hermes-2", _SYSTEM_V2),
        _chatml("internlm2-chat", _SYSTEM_V2, strip=True),
        _chatml("internvl2_5", _SYSTEM_V2_5, end="<|im_end|>\n"),
        Template(
            "phi3-chat",
            _SYSTEM_V2,
            system="<|system|>\n{}<|end|>",
            user=("<|user|>\n", "<|end|>"),
            assistant="<|assistant|>\n",
            end="<|end|>",
        ),
        Template(
            "internvl3_5_gpt_oss",
            _SYSTEM_GPT_OSS,
            system="<|start|>system<|message|>{}<|end|>",
            user=("<|start|>user<|message|>", "<|end|>"),
            assistant="<|start|>assistant",
            end="<|end|>",
            last_end="<|return|>",
            channels=True,
        ),
        Template("internvl_zh", "", system="{} ", user=("<human>: ", " "), assistant="<bot>:", end="</s>", lead=" "),
    )
}


def get_template(name):
    """The template of that name.

    Raises:
        PromptError: there is none.
    """
    if name not in _TEMPLATES:
        raise PromptError(f"conversation template '{name}' is not known: use one of {', '.join(_TEMPLATES)}")
    return _TEMPLATES[name]
