"""The page: Gradio's widgets around a :class:`~.conversation.Conversation`."""

import asyncio

import gradio as gr

from .conversation import Conversation, Settings
from .texts import LANGUAGES, TEXTS, preferred

__all__ = ["CSS", "THEME", "make_page"]

# Fonts of the reader's system: the default theme would fetch its own.
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif"]
THEME = gr.themes.Default(font=_FONTS, font_mono=["ui-monospace", "Consolas", "monospace"])
CSS = """
footer { display: none !important; }
.gradio-container { width: 100%; max-width: 960px !important; margin: auto; overflow-wrap: anywhere; }
#chat { height: 62vh !important; }
#about p { margin: 0; }
#chat button[aria-label="Share"], #chat button[title="Share"] { display: none; }  /* it would send to another host */
@media (max-width: 600px) {
  #about { min-width: 100%; }
  .gradio-container { padding: 6px !important; }
  #chat { height: 55vh !important; }
}
"""
_NOTHING = {"text": "", "files": []}


def make_page(server):
    """The Gradio Blocks that ask a :class:`~.conversation.Server`."""
    visitors = {}  # conversations, by the session of each open tab
    english = TEXTS["en"]

    def of(request):
        return visitors.setdefault(request.session_hash, Conversation())

    with gr.Blocks(title="InternVL", analytics_enabled=False, delete_cache=(600, 86400)) as page:
        with gr.Row():
            about = gr.Markdown(english["about"], elem_id="about")
            language = gr.Radio(list(LANGUAGES), value=english["name"], show_label=False, container=False,
                                elem_id="language", min_width=220, scale=0)  # fmt: skip
        chat = gr.Chatbot(
            elem_id="chat", show_label=False, buttons=["copy"], feedback_options=None, allow_tags=False, sanitize_html=True
        )
        question = gr.MultimodalTextbox(
            elem_id="question", show_label=False, placeholder=english["question"], file_types=["image", "video"],
            file_count="multiple", max_plain_text_length=10**7, autofocus=True, lines=1, max_lines=8,
        )  # fmt: skip
        with gr.Row():
            stop = gr.Button(english["stop"], elem_id="stop", variant="stop", visible=False, size="sm")
            new = gr.Button(english["new"], elem_id="new", variant="secondary", size="sm")
        with gr.Accordion(english["settings"], open=False, elem_id="settings") as settings:
            model = gr.Dropdown([], label=english["model"], elem_id="model", visible=False)
            sliders = [  # the original demo's
                gr.Slider(0, 1, 0, step=0.05, label=english["temperature"], elem_id="temperature"),
                gr.Slider(0.05, 1, 1, step=0.05, label=english["top_p"], elem_id="top_p"),
                gr.Slider(1, 1.5, 1, step=0.02, label=english["repetition_penalty"], elem_id="repetition_penalty"),
                gr.Slider(16, 4096, 1024, step=16, label=english["max_new_tokens"], elem_id="max_new_tokens"),
                gr.Slider(1, 24, 12, step=1, label=english["max_tiles"], elem_id="max_tiles"),
            ]
        names = ("temperature", "top_p", "repetition_penalty", "max_new_tokens", "max_tiles")
        told = [about, question, stop, new, settings, model, *sliders]

        def speak(talk):
            say = talk.say
            return [
                gr.update(value=say("about")),
                gr.update(placeholder=say("question")),
                *(gr.update(value=say(name)) for name in ("stop", "new")),
                *(gr.update(label=say(name)) for name in ("settings", "model", *names)),
            ]

        def choose(chosen, request: gr.Request):
            talk = of(request)
            talk.language = LANGUAGES.get(chosen, "en")
            return [*speak(talk), talk.shown()]

        async def begin(request: gr.Request):
            talk = of(request)
            talk.language = preferred(request.headers.get("accept-language"))
            try:
                found, _ = await server.models()
            except Exception:  # said when a question is asked
                found = []
            several = gr.update(choices=found, value=found[0] if found else None, visible=len(found) > 1)
            return [talk.say("name"), several]

        async def converse(talk, asked, values):
            wished = Settings(values[0], *values[1:])
            text, files = asked["text"].strip(), asked["files"]
            async for _ in talk.ask(server, text, files, wished):
                yield talk.shown(), gr.skip(), gr.update(visible=talk.busy)

        async def ask(request: gr.Request, asked, *values):
            talk = of(request)
            if talk.busy:
                gr.Info(talk.say("wait"))
                yield gr.skip(), gr.skip(), gr.skip()
                return
            if not (asked and (asked["text"].strip() or asked["files"])):
                yield gr.skip(), gr.skip(), gr.skip()
                return
            first = True
            async for chatted, _, stopping in converse(talk, asked, values):
                yield chatted, _NOTHING if first else gr.skip(), stopping
                first = False

        async def again(request: gr.Request, *values):
            talk = of(request)
            if talk.busy or not talk.turns:
                yield gr.skip(), gr.skip(), gr.skip()
                return
            last = talk.turns.pop()
            async for shown in converse(talk, {"text": last.text, "files": last.files}, values):
                yield shown

        def restore(asked, request: gr.Request):
            """The question of a turn that failed, before what was written meanwhile."""
            talk = of(request)
            failed, talk.failed = talk.failed, None
            if failed is None:
                return gr.skip()
            asked = asked or _NOTHING
            if (asked["text"], asked["files"]) == (failed.text, failed.files):
                return gr.skip()
            text = "\n".join(filter(None, (failed.text, asked["text"])))
            return {"text": text, "files": [*failed.files, *(f for f in asked["files"] if f not in failed.files)]}

        def halt(request: gr.Request):
            of(request).stop()

        def clear(request: gr.Request):
            talk = of(request)
            talk.clear()
            return []

        async def stay(request: gr.Request):
            """Lasts as long as the tab, so that the stream of its events stays open: Gradio closes it after the last event that
            it knows of, and the answer to what is asked at that moment would never be shown."""
            of(request)
            while request.session_hash in visitors:
                await asyncio.sleep(5)

        def leave(request: gr.Request):
            talk = visitors.pop(request.session_hash, None)
            if talk is not None:
                talk.stop()

        outputs, hidden = [chat, question, stop], {"show_progress": "hidden", "api_visibility": "private"}
        many = {"concurrency_limit": None, **hidden}
        for event in (
            question.submit(ask, [question, model, *sliders], outputs, trigger_mode="multiple", **many),
            chat.retry(again, [model, *sliders], outputs, **many),
        ):
            event.then(restore, question, question, **many)
        stop.click(halt, queue=False, **hidden)
        new.click(clear, None, chat, queue=False, **hidden)
        chat.clear(clear, None, chat, queue=False, **hidden)
        language.change(choose, language, [*told, chat], queue=False, **hidden)
        page.load(begin, None, [language, model], **hidden)
        page.load(stay, None, None, **many)
        page.unload(leave)
    page.queue(default_concurrency_limit=None)
    return page
