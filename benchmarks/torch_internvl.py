"""InternVL in transformers + torch, to compare with: its native InternViT and language models, in their fastest settings.

Fused attention (sdpa), logits of the last position only, inference mode, and no ``generate()`` around the decode steps.
The cache is the growing one or the static one, and tiles go through one by one or together: whichever the warm-up found
faster. Nothing is compiled. A training step is the models' own loss and torch's fused AdamW.
"""

import json
import re
import statistics
import time
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.internvl.modeling_internvl import InternVLVisionModel

# Names of the published vision weights -> names in transformers; q, k and v are apart there.
_VISION_NAMES = (
    (r"embeddings\.class_embedding", "embeddings.cls_token"),
    (r"embeddings\.patch_embedding", "embeddings.patch_embeddings.projection"),
    (r"embeddings\.position_embedding", "embeddings.position_embeddings"),
    (r"encoder\.layers", "encoder.layer"),
    (r"attn\.proj", "attention.projection_layer"),
    (r"attn\.", "attention."),
    (r"\.ls([12])", r".lambda_\1"),
    (r"norm1", "layernorm_before"),
    (r"norm2", "layernorm_after"),
)


def _rename_vision(weights, depth):
    for name, value in weights.items():
        block = re.search(r"layers\.(\d+)\.", name)
        if block and int(block[1]) >= depth:
            continue  # behind the layer whose output is used
        for old, new in _VISION_NAMES:
            name = re.sub(old, new, name)
        if ".qkv." in name:
            for part, piece in zip("qkv", value.chunk(3)):
                yield name.replace("qkv", f"{part}_proj"), piece
        else:
            yield name, value


class TorchInternVL:
    """A published checkpoint in safetensors, on CPU; the methods are those of ``PaddleInternVL``."""

    packages = ("torch", "transformers")
    engine = "eager"

    def __init__(self, directory, dtype, threads):
        torch.set_num_threads(threads)
        self.dtype = dtype
        self.torch_dtype = getattr(torch, dtype)
        config = json.loads(Path(directory, "config.json").read_text(encoding="utf-8"))
        vision, llm = config["vision_config"], config["llm_config"]
        family = llm["architectures"][0]
        if not hasattr(transformers, family):
            raise SystemExit(f"error: transformers has no {family}")
        start = time.perf_counter()
        weights = {}
        for path in sorted(Path(directory).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                weights.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dictionary)
        self.factor, self.transposed = config["downsample_ratio"], config["ps_version"] == "v2"
        select, depth = config.get("select_layer", -1), vision["num_hidden_layers"]
        vision["num_hidden_layers"] = select if select >= 0 else depth + 1 + select
        renamed = InternVLVisionConfig(
            **{k: v for k, v in vision.items() if k not in ("architectures", "model_type")},
            attention_bias=vision.get("qkv_bias", False),
            use_qk_norm=vision.get("qk_normalization", True),
        )
        parts = {
            part: {k.removeprefix(part): v for k, v in weights.items() if k.startswith(part)}
            for part in ("vision_model.", "language_model.", "mlp1.")
        }
        del weights
        vision_weights = dict(_rename_vision(parts.pop("vision_model."), vision["num_hidden_layers"]))
        self.vision = self._load(InternVLVisionModel, renamed, vision_weights)
        self.llm_config = getattr(transformers, family).config_class(**llm)
        self.llm = self._load(getattr(transformers, family), self.llm_config, parts.pop("language_model."))
        projector = parts.pop("mlp1.")
        size_in, size_out = projector["0.weight"].shape[0], projector["1.weight"].shape[0]
        linear = torch.nn.Linear
        self.projector = torch.nn.Sequential(
            torch.nn.LayerNorm(size_in), linear(size_in, size_out), torch.nn.GELU(), linear(size_out, size_out)
        ).to(self.torch_dtype)
        self.projector.load_state_dict(projector)
        self.load_seconds = time.perf_counter() - start
        self.tile_batch, self.static_cache = None, False

    def _load(self, kind, config, weights):
        model, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=self.torch_dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
        faults = {kind: names for kind, names in report.items() if names}
        if faults:
            raise SystemExit(f"error: the weights do not fit transformers' {kind.__name__}: {faults}")
        return model.eval()

    def warm_up(self, pixels, ids):
        """Run everything once, and keep the faster way where there are two."""
        self.features(pixels)
        times = {}
        for batch in (1, None):
            self.tile_batch, start = batch, time.perf_counter()
            self.features(pixels)
            times[time.perf_counter() - start] = batch
        self.tile_batch, times = times[min(times)], {}
        for static in (False, True):
            self.static_cache = static
            self.generate(ids[:, :32], 2)
            times[self.generate(ids, 6)[1]] = static
        self.static_cache = times[min(times)]

    @torch.inference_mode()
    def features(self, pixels):
        """``[T, 3, H, W]`` array -> ``[T, tokens, D]``."""
        pixels = torch.from_numpy(pixels).to(self.torch_dtype)
        return torch.cat([self._features(part) for part in pixels.split(self.tile_batch or len(pixels))])

    def _features(self, pixels):
        return self.projector(self.patches(pixels))

    def patches(self, pixels):
        """``[T, 3, H, W]`` -> ``[T, tokens, width]``, what the projector takes."""
        x = self.vision(pixels).last_hidden_state[:, 1:]
        tiles, tokens, width = x.shape
        side, factor = int(tokens**0.5), self.factor
        small, deep = int(side * factor), int(width / factor)
        x = x.reshape(tiles, side, small, deep).transpose(1, 2).reshape(tiles, small, small, int(deep / factor))
        x = x.transpose(1, 2) if self.transposed else x
        return x.reshape(tiles, small * small, -1)

    def _prefill(self, embeds, steps):
        length = embeds.shape[1] + steps
        cache = (
            StaticCache(config=self.llm_config, max_cache_len=length)
            if self.static_cache
            else DynamicCache(config=self.llm_config)
        )
        return self._step(cache, inputs_embeds=embeds), cache

    def _step(self, cache, **inputs):
        logits = self.llm(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        token.tolist()  # generation looks at each token
        return token

    @torch.inference_mode()
    def generate(self, ids, steps):
        """Seconds of prefill up to the first token, and the median of ``steps`` decode steps after it."""
        embeds = self.llm.get_input_embeddings()(torch.from_numpy(ids))
        start = time.perf_counter()
        token, cache = self._prefill(embeds, steps)
        times = [time.perf_counter()]
        for _ in range(steps):
            token = self._step(cache, input_ids=token)
            times.append(time.perf_counter())
        return times[0] - start, statistics.median(later - earlier for earlier, later in zip(times, times[1:]))

    @torch.inference_mode()
    def first_token(self, pixels, ids, context_id):
        """The first token after a prompt in which ``context_id`` marks the places of picture features."""
        features = self.features(pixels)
        ids = torch.from_numpy(ids)
        embeds = self.llm.get_input_embeddings()(ids)
        embeds[ids == context_id] = features.reshape(-1, features.shape[-1])
        return int(self._prefill(embeds, 1)[0])

    def start_training(self, context_id, recompute, bf16, learning_rate, weight_decay, max_grad_norm):
        """Freeze the vision tower and make an optimiser; ``context_id`` marks the places of features.

        ``bf16``: whether the forward pass is under autocast.
        """
        self.context_id, self.max_grad_norm, self.bf16 = context_id, max_grad_norm, bf16
        self.llm.train()
        self.projector.train()
        if recompute:
            self.llm.gradient_checkpointing_enable({"use_reentrant": False})
        self.trained = [*self.projector.parameters(), *self.llm.parameters()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=learning_rate, weight_decay=weight_decay, fused=True)

    def train(self, batch):
        """One step on a batch of arrays ``input_ids``, ``labels`` and ``pixel_values``; returns the loss before it."""
        pixels, ids, labels = (torch.from_numpy(batch[key]) for key in ("pixel_values", "input_ids", "labels"))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            with torch.no_grad():
                patches = torch.cat([self.patches(part) for part in pixels.split(1)])
            features = self.projector(patches)
            embeds = self.llm.get_input_embeddings()(ids)
            places = (ids == self.context_id).unsqueeze(-1).expand_as(embeds)
            embeds = embeds.masked_scatter(places, features.to(embeds.dtype))
            loss = self.llm(inputs_embeds=embeds, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @torch.inference_mode()
    def matmul(self, size):
        """A function that multiplies two square matrices."""
        a, b = (torch.randn(size, size).to(self.torch_dtype) for _ in range(2))
        return lambda: torch.nn.functional.linear(a, b)

    @staticmethod
    def to_numpy(features):
        """Features as a float32 array."""
        return features.float().numpy()
