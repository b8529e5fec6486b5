"""Several LoRA adapters over the same base weights, chosen row by row.

:func:`attach_adapter` takes a folder of adapters onto a model whose own weights stay as they are. Within :func:`routed` each
row of a batch gets the share of its own adapter; outside, and for rows without one, the model answers as it always did.
"""

import contextlib

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

from ..adapters import SCALE
from ..layers import Linear

__all__ = ["RoutedLinear", "attach_adapter", "routed"]

_active = []  # (name, rows' shares [B, 1, 1] or None for all) of the pass that is running


@contextlib.contextmanager
def routed(names, rows):
    """Within the block, row ``i`` of ``rows`` uses the adapter ``names[i]`` (None: none); ``rows`` None: one name for all."""
    global _active
    before, active = _active, []
    for name in dict.fromkeys(names):
        if name is None:
            continue
        share = None
        if rows is not None:
            share = np.zeros([rows, 1, 1], "float32")
            share[: len(names), 0, 0] = [other == name for other in names]
            share = paddle.to_tensor(share)
        active.append((name, share))
    _active = active
    try:
        yield
    finally:
        _active = before


class RoutedLinear(Linear):
    """A linear layer with any number of adapters, of which a pass uses those that :func:`routed` names."""

    def __init__(self, base):
        nn.Layer.__init__(self)
        self.weight, self.bias, self.name = base.weight, base.bias, None
        self.adapters = {}  # name: (list of A, list of B), no parameters of the model

    def forward(self, x, gelu=False, scale=None, residual=None):
        """As :meth:`Linear.forward`."""
        added = None
        for name, share in _active:
            if name not in self.adapters:
                continue
            parts = [F.linear(F.linear(x, a), b) for a, b in zip(*self.adapters[name])]
            part = SCALE * (parts[0] if len(parts) == 1 else paddle.concat(parts, axis=-1))
            part = part if share is None else part * share.astype(part.dtype)
            added = part if added is None else added + part
        if added is None:
            return super().forward(x, gelu=gelu, scale=scale, residual=residual)
        y = super().forward(x, residual=added)
        if gelu:
            y = F.gelu(y)
        if scale is not None:
            y = y * scale
        return y if residual is None else residual + y


def attach_adapter(model, name, directory):
    """Take the adapters in ``directory`` onto ``model`` under ``name``; returns whether some are of the vision tower.

    Args:
        model: plain, without adapters of its own other than attached ones.
        name: what :func:`routed` calls them.
        directory: as :func:`~..lora.save_adapters` writes it.

    Raises:
        CheckpointError, ConfigError: as :func:`~..lora.load_adapters`.
    """
    from ..lora import LoRALinear, load_adapters

    known = {path: layer for path, layer in model.named_sublayers() if isinstance(layer, RoutedLinear)}
    load_adapters(model, directory)
    vision = model.config.use_backbone_lora > 0
    for path, layer in list(model.named_sublayers()):
        if not isinstance(layer, LoRALinear):
            continue
        *parents, last = path.split(".")
        parent = model
        for step in parents:
            parent = getattr(parent, step)
        plain = known[path] if path in known else RoutedLinear(layer)
        plain.training = layer.training
        plain.adapters[name] = (list(layer.lora_A), list(layer.lora_B))
        setattr(parent, last, plain)
    model.config.use_backbone_lora = model.config.use_llm_lora = 0
    return vision
