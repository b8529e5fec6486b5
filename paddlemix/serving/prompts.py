"""Messages to a prompt: roles in turn, marks where pictures go, reserved tokens refused."""

from paddlemix.errors import PromptError
from paddlemix.models.blocks import thinking
from paddlemix.models.blocks.conversation import IMAGE_PLACEHOLDER

from .protocol import RequestError

__all__ = ["Conversation", "reserved_tokens"]

_WRITABLE = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")


def reserved_tokens(tokenizer):
    """Special tokens that nobody may write."""
    return [token for token in tokenizer.all_special_tokens if token not in _WRITABLE]


class Conversation:
    """A request's messages: ``system`` (None for the model's own), ``turns`` ``[(question, answer or None), ...]``, and of all
    marks in order the ``pictures``, ``(digest, tiles)``, and their ``extras``, what else the family needs.

    Args:
        messages: of a :class:`~.protocol.ChatRequest`.
        media: a :class:`~.media.Media`.
        reserved: tokens that texts must not hold.
        max_images: most pictures and frames.
        template: the model's.
    """

    def __init__(self, messages, media, reserved, max_images, template):
        self._template = template
        self.system, self.turns, self.pictures, self.extras = None, [], [], []
        self._reserved = reserved
        parts = [self._split(m) for m in messages]
        count = sum(len(images) + len(videos) for _, images, videos in parts)
        if count > max_images:
            raise RequestError(f"the request has {count} pictures and clips; this server takes {max_images}", param="messages")
        total, seen, before = sum(len(images) for _, images, _ in parts), 0, None
        for message, (text, images, videos) in zip(messages, parts):
            role = "system" if message.role == "developer" else message.role
            if role != "user" and (images or videos):
                raise RequestError(f"a message of role {message.role} cannot have pictures", param="messages")
            if role == "user":
                found = [media.picture(*image) for image in images]
                labels = [f"Image-{seen + i + 1}: " if total > 1 else "" for i in range(len(images))]
                seen += len(images)
                for video in videos:
                    frames = media.frames(video)
                    found += frames
                    labels += [f"Frame{i + 1}: " for i in range(len(frames))]
                text = self._marked(text, labels)
                self.pictures += [(digest, tiles) for digest, tiles, _ in found]
                self.extras += [extra for *_, extra in found]
            elif role == "assistant":
                text = thinking.remembered(template, self._allowed(message.thought).strip(), text)
            self._add(role, text, before)
            before = role if role != "system" else before

    def _split(self, message):
        """(text, arguments of its pictures, urls of its clips)."""
        content = message.content or ""
        if isinstance(content, str):
            return self._allowed(content), [], []
        text = "".join(part.text for part in content if part.type == "text")
        images, videos = [], []
        for part in content:
            if part.type == "image_url":
                url = part.image_url
                most = getattr(url, "max_dynamic_patch", None) or part.max_dynamic_patch
                images.append((getattr(url, "url", url), getattr(url, "detail", None), most))
            elif part.type == "video_url":
                videos.append(getattr(part.video_url, "url", part.video_url))
        return self._allowed(text), images, videos

    def _allowed(self, text):
        for token in self._reserved:
            if token in text:
                raise RequestError(f"a message contains the reserved token {token}: leave it out", param="messages")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError("a message contains half a surrogate pair: repair the text", param="messages") from None
        return text

    @staticmethod
    def _marked(text, labels):
        marks = text.count(IMAGE_PLACEHOLDER)
        if marks not in (0, len(labels)):
            raise RequestError(
                f"a message has {marks} {IMAGE_PLACEHOLDER} mark(s) but {len(labels)} picture(s): write one for each, or none",
                param="messages",
            )
        if marks:
            return text
        return "".join(f"{label}{IMAGE_PLACEHOLDER}\n" for label in labels) + text

    def _add(self, role, text, before):
        if role == "system":
            self.system = text if self.system is None else f"{self.system}\n{text}"
        elif role == "user":
            if before == "user":
                self.turns[-1] = (f"{self.turns[-1][0]}\n{text}", None)
            else:
                self.turns.append((text, None))
        elif before == "assistant":
            self.turns[-1] = (self.turns[-1][0], f"{self.turns[-1][1]}\n{text}")
        elif not self.turns:  # somebody who greets first
            self.turns.append(("", text))
        else:
            self.turns[-1] = (self.turns[-1][0], text)

    def ids(self, model, tokenizer, thinks=False):
        """Ids of the prompt; with ``thinks`` one that asks for a thought first, unless the request has a system message.

        Raises:
            RequestError: marks and pictures do not fit.
        """
        template = self._template.with_system_message(self.system)
        if thinks and self.system is None and not template.channels:
            template = template.with_system_message(thinking.SYSTEM_MESSAGE)
        counts = [len(tiles) * model.config.num_image_token for _, tiles in self.pictures]
        try:
            return model.prompt_ids(tokenizer, template, self.turns, counts)
        except PromptError as error:
            raise RequestError(str(error), param="messages") from None
