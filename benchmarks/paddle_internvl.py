"""This package, as one side of ``inference.py`` and ``finetune.py``."""

import statistics
import time

import paddle

from paddlemix import device
from paddlemix.kernels import cpu as kernels
from paddlemix.kernels import gemm
from paddlemix.models.blocks.engine import choose
from paddlemix.models.blocks.flops import parameter_counts
from paddlemix.models.blocks.generation import generate_tokens
from paddlemix.models.internvl2 import GenerationConfig, InternVLChatConfig, InternVLChatModel
from paddlemix.training.arguments import ModelArguments, PreTrainingArguments
from paddlemix.training.building import prepare
from paddlemix.training.processes import Processes
from paddlemix.training.trainer import Trainer


class PaddleInternVL:
    """A published checkpoint on CPU; the methods are those of ``TorchInternVL``."""

    packages = ("paddlepaddle",)

    def __init__(self, directory, dtype, threads, engine, weights=None, activations=None):
        device.set_device("cpu")
        kernels.set_num_threads(threads)
        parameters = sum(parameter_counts(InternVLChatConfig.from_pretrained(directory)).values())
        self.engine, self.dtype = choose(engine, dtype, parameters)  # before the clock starts: it may compile kernels
        start = time.perf_counter()
        few = {"weight_dtype": weights, "activation_dtype": activations} if weights else {}
        few |= {"quantize_parts": "language,projector,vision"} if weights else {}
        self.model = InternVLChatModel.from_pretrained(directory, dtype=self.dtype, engine=self.engine, **few)
        self.load_seconds = time.perf_counter() - start

    def warm_up(self, pixels, ids):
        """Run everything once."""
        self.features(pixels)
        self.generate(ids, 6)

    def features(self, pixels):
        """``[T, 3, H, W]`` array -> ``[T, tokens, D]``."""
        return self.model.extract_feature(pixels)

    @paddle.no_grad()
    def generate(self, ids, steps):
        """Seconds of prefill up to the first token, and the median of ``steps`` decode steps after it."""
        llm = self.model.language_model
        tokens = generate_tokens(llm, llm.embed(paddle.to_tensor(ids)), GenerationConfig(max_new_tokens=steps + 1))
        times = [time.perf_counter()]
        times += [time.perf_counter() for _ in tokens]
        if len(times) != steps + 2:
            raise RuntimeError(f"{len(times) - 2} tokens were decoded instead of {steps}")
        return times[1] - times[0], statistics.median(later - earlier for earlier, later in zip(times[1:], times[2:]))

    def first_token(self, pixels, ids, context_id):
        """The first token after a prompt in which ``context_id`` marks the places of picture features."""
        self.model.img_context_token_id = context_id
        return int(self.model.generate(pixels, ids, max_new_tokens=1).numpy()[0, 0])

    def start_training(self, context_id, recompute, bf16, **settings):
        """Freeze the vision tower and make an optimiser with ``settings``; ``context_id`` marks the places of features.

        ``bf16``: whether products are in bfloat16.
        """
        self.model.img_context_token_id = context_id
        parameters = prepare(self.model, ModelArguments("x", freeze_backbone=True), recompute)
        args = PreTrainingArguments("x", lr_scheduler_type="constant", bf16=bf16, **settings)
        self.trainer = Trainer(self.model, parameters, args, Processes(), 1, decays=lambda name: True)

    def train(self, batch):
        """One step on a batch as the trainer has it; returns the loss before it."""
        return self.trainer.step(0, [batch])[0]

    def matmul(self, size):
        """A function that multiplies two square matrices in the fastest way there is on this side."""
        a, b = (paddle.randn([size, size]) for _ in range(2))
        if self.dtype == "float32":
            return lambda: (gemm.linear if gemm.suits(size**3, a, b) else paddle.matmul)(a, b)
        packed = kernels.PackedLinear(b, None, self.dtype)
        return lambda: packed(a)

    @staticmethod
    def to_numpy(features):
        """Features as a float32 array."""
        return features.astype("float32").numpy()
