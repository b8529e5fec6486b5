"""One visitor's conversation with an OpenAI-compatible server: what is sent, what comes back, what is shown."""

import asyncio
import base64
import mimetypes
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from .texts import TEXTS, harmless

__all__ = ["Conversation", "Server", "Settings"]

_MOMENT = 0.05  # seconds between two looks of a growing answer


@dataclass(frozen=True)
class Settings:
    """What the sliders say."""

    model: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 1024
    max_tiles: int = 12


class Server:
    """An OpenAI-compatible server at ``url``."""

    def __init__(self, url, key):
        import httpx
        import openai

        self.url = url
        timeout = httpx.Timeout(300, connect=10)
        self.client = openai.AsyncOpenAI(base_url=url, api_key=key or "none", max_retries=0, timeout=timeout)

    async def models(self):
        """(names of its models, whether it is ours: then it knows fields that OpenAI does not)."""
        found = (await self.client.models.list()).data
        return [model.id for model in found], bool(found) and all(model.owned_by == "paddlemix" for model in found)


@dataclass
class Turn:
    """A question with its files, and its answer as it grows."""

    text: str
    files: list
    answer: str = ""
    drawing: str | None = None  # a picture with the answer's boxes in it
    error: str | None = None
    stopped: bool = False


@dataclass
class Conversation:
    """Turns in order.

    Attributes:
        language: of :data:`~.texts.TEXTS`.
        turns: :class:`Turn`, failed ones included, which are shown but not sent again.
        busy: an answer is being written.
        failed: a turn whose question is to be put back for another try, or None.
    """

    language: str = "en"
    turns: list = field(default_factory=list)
    busy: bool = False
    failed: Turn | None = None
    _stop: asyncio.Event | None = None

    def say(self, name, *values):
        """A text of the page."""
        return TEXTS[self.language][name].format(*values)

    def stop(self):
        """End the answer that is being written."""
        if self._stop is not None:
            self._stop.set()

    def clear(self):
        """Begin anew."""
        self.stop()
        self.turns, self.failed = [], None

    async def ask(self, server, text, files, settings):
        """Ask, and give whenever there is something new to show.

        Args:
            server: a :class:`Server`.
            text: the question.
            files: paths of pictures and clips.
            settings: :class:`Settings`.
        """
        import openai

        turn = Turn(text, list(files))
        self.turns.append(turn)
        self.busy, self.failed, self._stop = True, None, asyncio.Event()
        try:
            yield
            async for _ in self._answers(server, turn, settings):
                yield
            if turn.answer:
                turn.drawing = await asyncio.to_thread(self._drawing, turn)
        except openai.APIStatusError as error:
            body = error.body if isinstance(error.body, dict) else {}
            turn.error = self.say("refused", body.get("message") or f"{error.status_code}")
        except openai.APIConnectionError:
            turn.error = self.say("broken") if turn.answer else self.say("unreachable", server.url)
        except openai.APIError as error:
            turn.error = self.say("refused", error.message)
        except _Unusable as error:
            turn.error = str(error)
        except Exception as error:  # httpx's, of a stream that breaks off, and of servers that answer no JSON
            turn.error = f"{self.say('broken')} ({type(error).__name__})"
        finally:
            self.busy = False
            if turn.error and turn in self.turns:
                self.failed = turn
        yield

    async def _answers(self, server, turn, settings):
        asking = asyncio.create_task(self._request(server, settings))
        if not await self._unless_stopped(asking, turn):
            return
        stream = asking.result()
        try:
            chunks, shown = aiter(stream), 0.0
            clock = asyncio.get_running_loop().time
            while True:
                coming = asyncio.ensure_future(anext(chunks, None))
                if not await self._unless_stopped(coming, turn):
                    return
                chunk = coming.result()
                if chunk is None:
                    return
                turn.answer += (chunk.choices[0].delta.content or "") if chunk.choices else ""
                if clock() - shown > _MOMENT:
                    shown = clock()
                    yield
        finally:
            await stream.close()

    async def _unless_stopped(self, task, turn):
        """Wait for ``task``; False if the visitor had enough before."""
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
            turn.stopped = not task.done()
            return task.done()
        finally:
            stopping.cancel()
            if not task.done():
                task.cancel()

    async def _request(self, server, settings):
        names, ours = await server.models()
        fields, more = {}, {}
        if ours:
            more = {"repetition_penalty": settings.repetition_penalty, "skip_special_tokens": False}
        messages = await asyncio.to_thread(self._messages, settings.max_tiles if ours else None)
        model = settings.model if settings.model in names else names[0] if names else settings.model or "default"
        return await server.client.chat.completions.create(
            model=model, messages=messages, stream=True, temperature=settings.temperature, top_p=settings.top_p,
            max_tokens=int(settings.max_new_tokens), extra_body=more or None, **fields,
        )  # fmt: skip

    def _messages(self, max_tiles):
        messages = []
        for turn in self.turns:
            if turn.error and turn is not self.turns[-1]:
                continue
            parts = [self._part(path, max_tiles) for path in turn.files]
            content = [*parts, {"type": "text", "text": turn.text}] if parts else turn.text
            messages.append({"role": "user", "content": content})
            if turn is not self.turns[-1]:
                messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def _part(self, path, max_tiles):
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        if not kind.startswith(("image/", "video/")):
            raise _Unusable(self.say("neither", Path(path).name))
        try:
            data = base64.b64encode(Path(path).read_bytes()).decode()
        except OSError:
            raise _Unusable(self.say("unreadable", Path(path).name)) from None
        name = "image_url" if kind.startswith("image/") else "video_url"
        more = {"max_dynamic_patch": int(max_tiles)} if max_tiles and name == "image_url" else {}
        return {"type": name, name: {"url": f"data:{kind};base64,{data}", **more}}

    def _drawing(self, turn):
        """The newest picture with the answer's boxes in it, a file; None where the answer has none."""
        from PIL import Image, ImageOps

        from paddlemix.boxes import draw_boxes, parse_boxes

        files = [path for earlier in self.turns if not earlier.error for path in earlier.files]
        pictures = [path for path in files if (mimetypes.guess_type(path)[0] or "").startswith("image/")]
        if not pictures or "[" not in turn.answer:
            return None
        try:
            with Image.open(pictures[-1]) as opened:
                picture = ImageOps.exif_transpose(opened).convert("RGB")
        except Exception:  # what the server can read and Pillow here cannot is shown without boxes
            return None
        picture.thumbnail((1600, 1600))
        boxes = parse_boxes(turn.answer, *picture.size)
        if not boxes:
            return None
        descriptor, path = tempfile.mkstemp(suffix=".png", prefix="boxes-", dir=os.environ.get("GRADIO_TEMP_DIR"))
        with os.fdopen(descriptor, "wb") as file:
            draw_boxes(picture, boxes).save(file, "PNG")
        return path

    def shown(self):
        """The conversation as Gradio's chatbot takes it."""
        found = []
        for turn in self.turns:
            found += [{"role": "user", "content": {"path": path}} for path in turn.files]
            if turn.text:
                found.append({"role": "user", "content": harmless(turn.text)})
            over = not (self.busy and turn is self.turns[-1])
            text = harmless(turn.answer.strip())
            if over and turn.stopped:
                text = f"{text} {self.say('stopped')}".strip()
            if over and not text and not turn.error:
                text = self.say("empty")
            if text:
                found.append({"role": "assistant", "content": text})
            if turn.drawing:
                found.append({"role": "assistant", "content": {"path": turn.drawing}})
            if turn.error:
                found.append({"role": "assistant", "content": f"⚠️ {harmless(turn.error)}"})
        return found


class _Unusable(Exception):
    """A file that no server would take."""
