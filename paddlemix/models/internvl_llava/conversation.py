"""Prompt templates of LLaVA, which are FastChat's; what a template is, is in ``blocks/conversation.py``."""

from dataclasses import dataclass

from paddlemix.errors import PromptError
from paddlemix.models.blocks.conversation import Template

__all__ = ["TEMPLATES", "LlavaTemplate", "build_prompt", "get_template"]

_POLITE = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
_USER = "A chat between a curious user and an artificial intelligence assistant. " + _POLITE.format("user")
_HUMAN = "A chat between a curious human and an artificial intelligence assistant. " + _POLITE.format("human")
_MARKED = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAVA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  Your "
    "answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure "
    "that your responses are socially unbiased and positive in nature.\n\nIf a question does not make any sense, or is not "
    "factually coherent, explain why instead of answering something not correct. If you don't know the answer to a question, "
    "please don't share false information."
)
# The round that Vicuna's first version was shown before every conversation.
_EXAMPLE = (
    "###Human: What are the key differences between renewable and non-renewable energy sources?###Assistant: Renewable energy "
    "sources are those that can be replenished naturally in a relatively short amount of time, such as solar, wind, hydro, "
    "geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and will eventually be depleted, "
    "such as coal, oil, and natural gas. Here are some key differences between renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are finite and "
    "will eventually run out.\n2. Environmental impact: Renewable energy sources have a much lower environmental impact than "
    "non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower operational "
    "costs than non-renewable sources.\n4. Reliability: Renewable energy sources are often more reliable and can be used in "
    "more remote locations than non-renewable sources.\n5. Flexibility: Renewable energy sources are often more flexible and "
    "can be adapted to different situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources are "
    "not, and their depletion can lead to economic and social instability.\n"
)


@dataclass(frozen=True)
class LlavaTemplate(Template):
    """A template whose answers end in ``</s>``, or in a text of its own.

    Attributes:
        version: what training calls the kind.
        stop_strings: texts that end an answer beside the token.
    """

    version: str = "v1"
    stop_strings: tuple = ()

    # A stop text ends the answer, but is only taken away from its end, as in the original.
    cuts_at_stop = False

    @property
    def stop(self):
        """The token that ends an answer."""
        return "</s>"


def _two(name, system_message, version="v1"):
    return LlavaTemplate(name, system_message, "{} ", ("USER: ", " "), "ASSISTANT:", end="</s>", lead=" ", version=version)


def _single(name, system_message, example="", version="v0"):
    return LlavaTemplate(
        name,
        system_message,
        "{}" + (example or "") + "###",
        ("Human: ", "###"),
        "Assistant:",
        end="###",
        lead=" ",
        version=version,
        stop_strings=("###",),
    )


def _llama_2(name, system_message):
    return LlavaTemplate(
        name,
        system_message,
        "[INST] <<SYS>>\n{}\n<</SYS>>\n\n",
        ("", " [/INST]"),
        "",
        end=" </s>",
        lead=" ",
        again="<s>[INST] ",
        version="llama_2",
    )


_TEMPLATES = {
    template.name: template
    for template in (
        _two("vicuna_v1", _USER),
        _two("v1", _USER),
        _two("llava_v1", _HUMAN),
        _two("v1_mmtag", _MARKED, "v1_mmtag"),
        _single("llava_v0", _HUMAN),
        _single("v0", _HUMAN, _EXAMPLE),
        _single("v0_mmtag", _MARKED, version="v0_mmtag"),
        LlavaTemplate("plain", "", "{}", ("", "\n"), "", end="\n", version="plain", stop_strings=("\n",)),
        _llama_2("llava_llama_2", _LLAVA_2),
        _llama_2("llama_2", _LLAMA_2),
    )
}
_TEMPLATES["default"] = _TEMPLATES["v0"]
TEMPLATES = tuple(_TEMPLATES)


def get_template(name):
    """The template of that name.

    Raises:
        PromptError: there is none.
    """
    if name not in _TEMPLATES:
        raise PromptError(f"conversation template '{name}' is not known: use one of {', '.join(_TEMPLATES)}")
    return _TEMPLATES[name]


def build_prompt(template, messages):
    """The text of a conversation, with ``<image>`` where pictures go.

    Args:
        template: name of a template, or one.
        messages: texts of the user, the assistant, the user, ... in turn. After the user's the assistant is to speak.

    Raises:
        PromptError: there is no such template, or no message.
    """
    template = get_template(template) if isinstance(template, str) else template
    turns = [(messages[i], messages[i + 1] if i + 1 < len(messages) else None) for i in range(0, len(messages), 2)]
    if not turns:
        raise PromptError("there is no message: give the user's question first")
    return "".join(before + (answer or "") for before, answer in template.rounds(turns))
