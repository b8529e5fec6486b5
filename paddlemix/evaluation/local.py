"""Models on this machine that answer questions: InternVL's many at a time, others in batches."""

import functools
from itertools import islice
from pathlib import Path

from paddlemix.errors import ConfigError, DataError, UserError
from paddlemix.files import read_json
from paddlemix.processors.kept import Kept

from .media import tiles
from .scorers.open_answers import final_answer
from .tasks import COT, COT_TOKENS

MOST = 64  # questions at once, by default


def load_model(settings, number=0):
    """What answers with the checkpoint that ``settings`` name.

    Args:
        settings: a :class:`~.runner.Settings`.
        number: of this process, which takes the card of that number where there are several.

    Raises:
        UserError: the model cannot be loaded, or has not what was asked for.
    """
    from paddlemix import device as devices
    from paddlemix.checkpoints.hub import resolve
    from paddlemix.models.blocks.many import suit_threads

    devices.set_device(_card(settings.device, number))
    directory = resolve(settings.model)
    from paddlemix.models.internvl_llava.configuration import is_llava

    if is_llava(read_json(Path(directory) / "config.json")):
        from paddlemix.models import internvl_llava

        if settings.adapters or settings.scales:
            raise ConfigError(f"{directory} is an InternVL-Chat-LLaVA model: it is evaluated with its own weights alone")
        names = ("weight_dtype", "quantize_parts", "kv_cache_dtype", "activation_dtype")
        weights = {name: getattr(settings, name) for name in names}
        model = internvl_llava.LlavaForCausalLM.from_pretrained(directory, dtype=settings.dtype, **weights)
        return LlavaModel(model, internvl_llava.load_tokenizer(directory), settings)
    from paddlemix.models.internvl2 import load_tokenizer

    model = _internvl(directory, settings)
    suit_threads(model)
    return (TwoScales if settings.scales else LocalModel)(model, load_tokenizer(directory), settings)


def _card(name, number):
    """The device ``name``, or that of its kind with this ``number`` where there are several."""
    from paddlemix import device as devices

    if ":" in name:
        return name
    kind = devices.set_device(name)
    count = devices.count(kind)
    return f"{kind}:{number % count}" if count > 1 else kind


def _internvl(directory, settings):
    from paddlemix.models.internvl2 import InternVLChatModel

    kind, more = InternVLChatModel, {}
    if settings.scales:
        from paddlemix.models.minimonkey import MiniMonkeyChatModel as kind
    if settings.weight_dtype:
        more = {"weight_dtype": settings.weight_dtype, "quantize_parts": settings.quantize_parts}
    more |= {name: getattr(settings, name) for name in ("kv_cache_dtype", "activation_dtype") if getattr(settings, name)}
    if settings.tensor_parallel != 1:
        if settings.scales or settings.adapters:
            raise ConfigError("--tensor_parallel divides InternVL 1.1 to 3.5 with weights of their own: leave it out here")
        more["tensor_parallel"] = settings.tensor_parallel
    if not settings.adapters:
        model = kind.from_pretrained(directory, dtype=settings.dtype, **more)
        model.end_program_with_ranks()
        return model
    if settings.weight_dtype or settings.tensor_parallel != 1:
        raise ConfigError("--adapter needs plain weights: leave out --load_8bit, or merge the adapters (paddlemix merge-lora)")
    from paddlemix.models.blocks.engine import choose, fuse
    from paddlemix.models.blocks.layers import count_parameters
    from paddlemix.models.blocks.lora import load_adapters, merge_lora

    model = kind.from_pretrained(directory, dtype=settings.dtype, engine="eager", **more)
    engine, dtype = choose("auto", settings.dtype, count_parameters(model))
    for folder in settings.adapters:
        load_adapters(model, folder)
        merge_lora(model)
    model.eval()
    if engine == "inference":
        fuse(model, dtype)
    return model


class LocalModel:
    """A checkpoint that answers batches.

    Args:
        model, tokenizer: loaded.
        settings: a :class:`~.runner.Settings`.
        memory: bytes for keys and values; None for a quarter of what is free, shared with the other processes.
    """

    many = True  # whether it answers by the loop that decodes many, where the model can

    def __init__(self, model, tokenizer, settings, memory=None):
        self.model, self.tokenizer, self.settings, self._memory = model, tokenizer, settings, memory
        self._read = Kept(8)  # tiles of the last pictures: other questions are often about the same

    def batch_size(self, task):
        """Questions at once: what the memory for them holds, ``MOST`` at most."""
        if self.settings.batch_size:
            return self.settings.batch_size
        from paddlemix.models.blocks.many import room_for

        positions = (self._most_tiles(task) + 1) * self.model.config.num_image_token + 256 + min(self._most(task), 1024)
        return min(MOST, room_for(self.model, positions, self.memory()))

    def memory(self):
        """Bytes for keys and values."""
        return _free_memory() // 4 // self.settings.processes if self._memory is None else self._memory

    def _most_tiles(self, task):
        return (self.settings.max_num or task.max_num) if self.settings.dynamic else 1

    def _most(self, task):
        return COT_TOKENS if self.settings.cot else task.max_new_tokens

    def encode(self, task, question):
        """(question, pixels, counts, prompt, pictures with digests, compress), or (question, error).

        ``compress`` tells which positions of the prompt are left out; None: all are kept.
        """
        from paddlemix.models.blocks.chat import digested

        try:
            if question.error:
                return question, question.error
            key = (task.name, question.pictures, str(question.clip)) if question.pictures else None
            found = self._read.get(key)
            if found is None:
                found = self._tiles(question, task)
                found = *found, digested(found[0], found[1])
                if key is not None:
                    self._read.put(key, found, 1)
            pixels, counts, marks, compress, pictures = found
            prompt = marks + question.prompt
            return question, pixels, counts, COT.format(prompt) if self.settings.cot else prompt, pictures, compress
        except UserError as error:
            return question, str(error)

    def _tiles(self, question, task):
        settings = self.settings
        return *tiles(question, task, self.model.config, settings.dynamic, settings.max_num or task.max_num), None

    def answers(self, task, items):
        """Answers to any number of questions, with as many under way as :meth:`batch_size` says.

        Args:
            task: the benchmark.
            items: an iterator of (key, what :meth:`encode` made).

        Yields:
            As answers come, lists of (key, a dictionary with ``question`` and ``answer``, or ``error``).
        """
        if self.settings.num_beams > 1 or not self.many:
            yield from in_groups(self, task, items)
            return
        from paddlemix.models.blocks.chat import end_of_answer, prompt_and_pictures
        from paddlemix.models.blocks.many import answer_many

        model, tokenizer, prompts = self.model, self.tokenizer, {}
        model.set_tokenizer(tokenizer)
        template = model.template().with_system_message(model.system_message)
        config = end_of_answer(self._generation(task), template, tokenizer, model)

        def asked():
            for stream, (key, item) in enumerate(items):
                prompts[key] = item[3] if len(item) > 2 else item[0].prompt
                try:
                    if len(item) == 2:
                        raise DataError(item[1])
                    ids, pictures = prompt_and_pictures(model, tokenizer, template, item[3], item[4])
                    yield key, ids, pictures, key if isinstance(key, int) else stream, item[5]
                except UserError as error:
                    yield key, error

        for ended in answer_many(model, tokenizer, asked(), config, template, self.batch_size(task), self.memory()):
            results = []
            for answer in ended:
                if answer.error is not None:
                    result = {"question": prompts.pop(answer.key), "answer": "", "error": str(answer.error)}
                else:
                    result = self._result(prompts.pop(answer.key), answer.text, answer.reason == "length")
                results.append((answer.key, result))
            yield results

    def _generation(self, task):
        config = {"max_new_tokens": self._most(task), "min_new_tokens": task.min_new_tokens}
        config["num_beams"] = self.settings.num_beams
        if self.settings.temperature > 0:
            config |= {"do_sample": True, "temperature": self.settings.temperature, "seed": self.settings.seed}
        return config

    def _result(self, prompt, answer, cut):
        result = {"question": prompt, "answer": answer}
        if self.settings.cot:
            result |= {"answer": final_answer(answer).strip(), "output": answer}
        return result | {"cut": True} if cut else result

    def answer(self, task, items):
        """Answers to encoded questions: a dictionary for each, with ``answer`` or ``error``."""
        results = [{"question": item[0].prompt, "answer": "", "error": item[1]} if len(item) == 2 else None for item in items]
        good = [i for i, result in enumerate(results) if result is None]
        for i, result in zip(good, self._answer(task, [items[i] for i in good]) if good else []):
            results[i] = result
        return results

    def _answer(self, task, items):
        import numpy as np

        pixels = [item[1] for item in items if item[1] is not None]
        prompts, counts = [item[3] for item in items], [item[2] for item in items]
        pixels = np.concatenate(pixels) if pixels else None
        try:
            answers = self.model.batch_chat(self.tokenizer, pixels, prompts, self._generation(task), counts)
        except UserError as error:
            if len(items) == 1:
                return [{"question": prompts[0], "answer": "", "error": str(error)}]
            return [result for item in items for result in self._answer(task, [item])]
        most = self._most(task)
        return [self._result(p, a, len(self.tokenizer.encode(a)) >= most) for p, a in zip(prompts, answers)]


# ((fewest, most) tiles of the finer scale, of the coarser one) by benchmark, as Mini-Monkey was evaluated (its scripts).
_OTHERS = ((12, 24), (3, 5))
_RANGES = {
    "mme-realworld": _OTHERS,  # another benchmark than mme
    "vqa-chartqa": ((4, 12), (1, 3)),
    "vqa-docvqa": ((1, 24), (1, 8)),
    "vqa-infovqa": ((5, 24), (3, 8)),
    "ocrbench": ((8, 24), (3, 9)),
    "ccbench": ((3, 8), (1, 4)),
    "realworldqa": ((3, 12), (1, 4)),
    "mme": ((3, 9), (1, 4)),
    "pope": ((3, 9), (1, 4)),
    "hallusion": ((3, 9), (1, 4)),
}


def ranges_of(name):
    """Bounds on the tiles of Mini-Monkey's two scales for the benchmark of this name, for ``multi_scale_tiles``."""
    words = name.split("-")
    return _RANGES.get("-".join(words[:2])) or _RANGES.get(words[0]) or _OTHERS


class TwoScales(LocalModel):
    """Mini-Monkey, which looks at one picture at two scales; with ``scm`` it drops half of the finer one's tokens."""

    def _most_tiles(self, task):
        if self.settings.max_num:
            return self.settings.max_num + 8
        (_, fine), (_, coarse) = ranges_of(task.name)
        return fine + coarse + 1

    def _tiles(self, question, task):
        from paddlemix.processors.minimonkey import multi_scale_tiles

        if not question.pictures:
            return None, [], "", None
        if len(question.pictures) > 1 or question.clip:
            raise DataError(f"question {question.id} has several pictures, but Mini-Monkey looks at one: use another model")
        # As published for the benchmark, unless --max_num says otherwise.
        bounds = {"max_num": self.settings.max_num} if self.settings.max_num else {"ranges": ranges_of(task.name)}
        pixels, grid, _ = multi_scale_tiles(question.pictures[0], self.model.config.image_size, **bounds)
        compress = functools.partial(self.model.dropped_of, grid=grid) if self.settings.scales == "scm" else None
        return pixels, [len(pixels)], "", compress


class LlavaModel(LocalModel):
    """An InternVL-Chat-LLaVA checkpoint, whose pictures are one square each."""

    many = False

    def encode(self, task, question):
        """(question, pixels, counts, prompt), or (question, error)."""
        from paddlemix.processors.clip import process_images

        config = self.model.config
        pad = question.record.get("pad")
        aspect = config.image_aspect_ratio if pad is None else "pad" if pad else "square"
        try:
            if question.error:
                return question, question.error
            pixels = process_images(list(question.pictures), config.image_size, aspect) if question.pictures else None
            return question, pixels, [1] * len(question.pictures), question.prompt
        except UserError as error:
            return question, str(error)


def _free_memory():
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 4 << 30


def in_groups(model, task, items):
    """What :meth:`LocalModel.answers` yields, by ``model.answer`` for one batch after the other."""
    while group := list(islice(items, model.batch_size(task))):
        yield list(zip([key for key, _ in group], model.answer(task, [item for _, item in group])))
