"""The thread that owns the model: jobs come in from the event loop, events go back to it, one batch a turn."""

import gc
import logging
import os
import threading
import time
from pathlib import Path

from paddlemix.errors import ConfigError, UserError

from .embeddings import Embeddings
from .media import Media, MediaRules
from .prompts import reserved_tokens

_log = logging.getLogger("paddlemix.serving")


class Engine:
    """Loads the model in its own thread and turns its loop there.

    Args:
        args: parsed flags of the server.
        metrics: :class:`~.metrics.Metrics`.
        deliver: called in the engine's thread with a list of (job, event) after each turn; event None: the job began to run.
        at_once: as :class:`~paddlemix.models.blocks.decoding.loop.Loop` takes it.

    Attributes:
        ready: set when requests can be served; then ``model``, ``tokenizer``, ``loop`` and ``adapters`` are there, and after
            :meth:`get_ready` ``media``, ``tokens`` (bytes of each id) and ``reserved`` (tokens that nobody may write).
        failure: what loading ended in, or None.
    """

    def __init__(self, args, metrics, deliver, at_once=False):
        self.args, self.metrics, self.deliver, self.at_once = args, metrics, deliver, at_once
        self.ready, self.failure, self.adapters, self.family, self.loop = threading.Event(), None, [], None, None
        self.loaded = threading.Event()
        self.beat = time.monotonic()  # when the loop last turned, for whoever checks that it lives
        self._wake, self._in, self._out, self._stopping = threading.Condition(), [], [], False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def get_ready(self):
        """Prepare what requests are read with, once the model is loaded."""
        from paddlemix.models.blocks.decoding.forms import token_bytes

        args = self.args
        rules = MediaRules(
            tuple(args.allowed_media_domains), args.allow_private_media, args.allowed_local_media_path, args.media_timeout,
            int(args.max_media_mb * 2**20), args.max_num,
        )  # fmt: skip
        self.media = Media(self.family, rules)
        if self.embeds:
            return
        self.tokens = token_bytes(self.tokenizer, special=True)
        self.reserved = reserved_tokens(self.tokenizer)

    def submit(self, jobs):
        """Let jobs wait for their turn; from any thread."""
        with self._wake:
            self._in += jobs
            self._wake.notify()

    def cancel(self, jobs):
        """Forget jobs; from any thread."""
        with self._wake:
            self._out += jobs
            self._wake.notify()

    def stop(self):
        """End the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def _run(self):
        try:
            self._load()
        except UserError as error:
            self.failure = str(error)
        except Exception as error:  # whatever it is, the server has to end in a sentence
            self.failure = f"the model could not be loaded ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
        gc.collect()
        gc.freeze()  # what is loaded stays: the collector need not look through it again and again
        self.loaded.set()
        if self.failure is None:
            self.ready.set()
            if self.embeds:
                self.family.serve(self._beat, lambda: self._stopping)
            else:
                self._serve()

    def _beat(self):
        self.beat = time.monotonic()

    @property
    def embeds(self):
        """Whether the model makes embeddings, and no answers."""
        return isinstance(self.family, Embeddings)

    def _serve(self):
        while True:
            with self._wake:
                while not (self._in or self._out or self._stopping or self.loop.is_busy):
                    self.beat = time.monotonic()
                    self._wake.wait(1)
                if self._stopping:
                    return
                new, self._in, gone, self._out = self._in, [], self._out, []
            for job in new:
                self.loop.add(job)
            for job in gone:
                self.loop.remove(job)
            self.beat = time.monotonic()
            try:
                self._turn()
            except Exception as error:  # one turn's fault must not end the server
                _log.error("a step failed (%s): its requests end", type(error).__name__)
                jobs = [*self.loop.scheduler.running, *self.loop.waiting]
                for job in jobs:
                    self.loop.remove(job)
                self.deliver([(job, error) for job in jobs])

    def _turn(self):
        loop, scheduler, table = self.loop, self.loop.scheduler, self.loop.table
        fresh = [job for job in loop.waiting if job.started is None]
        events = loop.step()
        now = time.monotonic()
        out = []
        for job in fresh:
            if job.served and job.started is None:
                job.started = now
                out.append((job, None))
        out += [(event.job, event) for event in events]
        self.metrics.running.set(len(scheduler.running))
        self.metrics.cache_usage.set(table.used / max(1, table.pages - 1))
        if out:
            self.deliver(out)

    def _load(self):
        args = self.args
        os.environ.setdefault("GLOG_minloglevel", "2")
        import paddle

        from paddlemix import device
        from paddlemix.checkpoints.hub import resolve
        from paddlemix.kernels import cpu as kernels
        from paddlemix.models.blocks.decoding.routing import attach_adapter
        from paddlemix.models.blocks.layers import count_parameters
        from paddlemix.models.blocks.many import suit_threads

        from .families import family_of

        paddle.disable_signal_handler()
        paddle.set_grad_enabled(False)
        device.set_device(args.device)
        if args.threads:
            kernels.set_num_threads(args.threads)
        self.family = family_of(resolve(args.model_name_or_path), args)
        if self.embeds:
            if args.lora_modules or args.load_8bit or args.load_4bit:
                raise ConfigError(
                    "a model that makes embeddings has no --lora_modules, --load_8bit or --load_4bit: leave them out"
                )
            count = count_parameters(self.family.embedder.model)
            self.summary = f"embeddings of {self.family.width} numbers: {count / 1e6:.1f} million parameters"
            return
        engine = args.engine
        if args.lora_modules and (args.load_8bit or args.load_4bit):
            raise ConfigError("--lora_modules needs plain weights: leave out --load_8bit and --load_4bit")
        if args.lora_modules and engine == "inference":
            raise ConfigError("--lora_modules needs plain weights: use --engine eager")
        if args.lora_modules and args.tensor_parallel != 1:
            raise ConfigError(
                "--lora_modules needs whole weights: merge the adapters (paddlemix merge-lora), or leave them out"
            )
        self.family.load("eager" if args.lora_modules else engine)
        model, self.tokenizer = self.family.model, self.family.tokenizer
        if args.lora_modules and model.quantised_layers:
            raise ConfigError("--lora_modules needs plain weights, but the files have them in few bits: take the original")
        self._vision_adapters = []
        for name, folder in args.lora_modules:
            if attach_adapter(model, name, folder):
                self._vision_adapters.append(name)
            self.adapters.append(name)
        if not args.threads:
            suit_threads(model)
        self.model = model
        self._make_room()

    def _make_room(self):
        """The loop with as much cache as flags and memory allow, and what is told of it."""
        from paddlemix.kernels import cpu as kernels
        from paddlemix.models.blocks.decoding.loop import Loop, bytes_per_position

        args, model = self.args, self.model
        longest = min(model.config.llm_config.context_length, args.max_model_len or 1 << 40)
        each = bytes_per_position(model)
        if args.kv_cache_gb:
            positions = int(args.kv_cache_gb * 2**30) // each
        else:
            positions = min(args.max_num_seqs * longest, int(_free_memory() * 0.25) // each)
        if positions < 64:
            raise ConfigError("--kv_cache_gb leaves no room for a conversation: make it larger")
        cached = args.image_cache_mb << 20
        self.loop = Loop(
            model, self.tokenizer, positions, args.max_num_seqs,
            image_cache=cached, vision_adapters=self._vision_adapters, longest=longest, at_once=self.at_once,
        )  # fmt: skip
        longest = self.loop.longest
        at_once = min(args.max_num_seqs, max(1, self.loop.positions // longest))
        size = model.language_model.parameter_count
        self.summary = (
            f"weights: {_size(model.weight_bytes())} (language model: {size / 1e6:.1f} million), "
            f"KV cache: {_size(positions * each)} for {self.loop.positions} tokens, picture cache: {_size(cached)}\n"
            f"largest context: {longest} tokens; {at_once} such at once, "
            f"at most {args.max_num_seqs} requests; cores: {sorted(os.sched_getaffinity(0))}, threads: {kernels.num_threads()}"
        )


def _free_memory():
    lines = Path("/proc/meminfo").read_text().splitlines() if os.path.exists("/proc/meminfo") else []
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable")), None)
    return int(found) * 1024 if found else 4 << 30


def _size(count):
    return f"{count / 2**30:.2f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"
