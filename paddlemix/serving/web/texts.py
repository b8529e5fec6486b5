"""What the page says, in English and Chinese."""

import re

__all__ = ["LANGUAGES", "TEXTS", "harmless", "preferred"]

TEXTS = {
    "en": {
        "name": "English",
        "about": "Ask about pictures and clips: drop, paste or choose them, write a question, press Enter.",
        "question": "Your question; pictures and clips can be pasted or dropped here",
        "stop": "Stop",
        "new": "New conversation",
        "settings": "Settings",
        "model": "Model",
        "temperature": "Temperature (0: the likeliest answer)",
        "top_p": "Top p",
        "repetition_penalty": "Repetition penalty",
        "max_new_tokens": "Most new tokens",
        "max_tiles": "Most tiles of a picture",
        "wait": "An answer is still being written: your question stays here until it is done or stopped.",
        "refused": "The server did not answer this: {}",
        "unreachable": "The server at {} cannot be reached: check that it runs.",
        "broken": "The connection to the server broke off: try again.",
        "unreadable": "The file {} cannot be read: choose it again.",
        "neither": "{} is neither a picture nor a clip.",
        "empty": "(the answer is empty)",
        "stopped": "(stopped)",
    },
    "zh": {
        "name": "中文",
        "about": "就图片和视频提问：拖入、粘贴或选择文件，写下问题，按回车键发送。",
        "question": "输入问题；可在此粘贴或拖入图片和视频",
        "stop": "停止",
        "new": "新对话",
        "settings": "设置",
        "model": "模型",
        "temperature": "温度（0 表示最可能的回答）",
        "top_p": "Top p",
        "repetition_penalty": "重复惩罚",
        "max_new_tokens": "最多新词元数",
        "max_tiles": "每张图片最多图块数",
        "wait": "回答尚未结束：您的问题保留在输入框中，请等待或停止后再发送。",
        "refused": "服务器没有回答：{}",
        "unreachable": "无法连接服务器 {}：请检查它是否在运行。",
        "broken": "与服务器的连接中断：请重试。",
        "unreadable": "无法读取文件 {}：请重新选择。",
        "neither": "{} 既不是图片也不是视频。",
        "empty": "（回答为空）",
        "stopped": "（已停止）",
    },
}
LANGUAGES = {text["name"]: language for language, text in TEXTS.items()}

_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
_TAG = re.compile(r"<(?=[a-zA-Z/!?])")
_MARKS = re.compile(r"</?(?:ref|box|quad)>")


def preferred(header):
    """The language that a browser's Accept-Language asks for."""
    first = (header or "").split(",")[0].strip().lower()
    return "zh" if first.startswith("zh") else "en"


def harmless(text):
    """Text of a user or a model as Markdown that holds no HTML and no picture.

    What may begin a tag becomes an entity, or within code, where entities are shown as they are written, is kept apart from
    its name by a character without width: no tag is left, whatever a renderer takes for code. Nor can ``![`` load pictures.
    """
    pieces = _CODE.split(_MARKS.sub("", text))
    for i, piece in enumerate(pieces):
        pieces[i] = _TAG.sub("<\u200b" if i % 2 else "&lt;", piece)
    return "".join(pieces).replace("![", "!\u200b[")
