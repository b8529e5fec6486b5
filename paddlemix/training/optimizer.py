"""AdamW over one process or many: gradients are summed, states divided, weights kept equal.

Plain ``paddle.distributed`` collectives that every backend has, rather than fleet's wrappers: gloo has no reduce-scatter and
no average, fleet's stages 2 and 3 refuse to run on CPU, and its sharding fixes names and places of states, so that a
checkpoint fits one number of processes only. Here all of it runs, and is tested, on CPU.

ZeRO (arXiv 1910.02054) by whole parameters: each has an owner, which keeps its moments (stage 1) and the sum of its
gradients (stage 2), updates it and sends it to the others. With stage 3 it alone keeps the weight; see ``sharding.py``.
"""

import math

import numpy as np
import paddle
import paddle.distributed as dist

from paddlemix import device

from .plan import divide

_BUCKET = 2**25  # numbers that are sent at once


class Optimizer:
    """AdamW with gradient summing, clipping, loss scaling and float32 master weights.

    Args:
        parameters: ``{name: parameter}`` of all that is trained, in the same order in every process.
        args: :class:`~.arguments.PreTrainingArguments`.
        decays: called with a name; whether weight decay applies. By default not to biases and norms.
        rates: called with a name; what the learning rate of that parameter is multiplied by. 1 for all by default.
    """

    def __init__(self, parameters, args, decays=None, rates=None):
        self.parameters = parameters
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.stage = int(args.sharding[-1]) if args.sharding and self.world > 1 else 0
        self.clip = args.max_grad_norm
        self.loss_scale = args.scale_loss if args.fp16 and not device.is_cpu() else 1.0
        self._dynamic, self._good_steps = self.loss_scale != 1.0, 0
        self._float_sums = args.amp_master_grad and any(p.dtype != paddle.float32 for p in parameters.values())
        self._sums, self._collected = {}, set()
        self.owners = divide({name: p.size for name, p in parameters.items()}, self.world)
        self.owned = {name: p for name, p in parameters.items() if self.stage == 0 or self.owners[name] == self.rank}
        self.masters = {name: p if p.dtype == paddle.float32 else _float_parameter(p) for name, p in self.owned.items()}
        decayed = {self.masters[name].name for name in self.owned if (decays or _decays)(name)}
        for name, master in self.masters.items() if rates else ():
            master.optimize_attr = {"learning_rate": rates(name)}
        self._adamw = paddle.optimizer.AdamW(
            learning_rate=args.learning_rate,
            beta1=args.adam_beta1,
            beta2=args.adam_beta2,
            epsilon=args.adam_epsilon,
            weight_decay=args.weight_decay,
            parameters=list(self.masters.values()) or [_float_parameter(paddle.zeros([1]))],
            apply_decay_param_fun=decayed.__contains__,
        )

    # ------------------------------------------------------------------ gradients

    @paddle.no_grad()
    def accumulate(self):
        """Call after the backward pass of every batch: from stage 2 on, collects all that was not collected during it."""
        if self.stage >= 2:
            self.collect([name for name in self.parameters if name not in self._collected])
            self._collected.clear()
        elif self._float_sums:
            for name, p in self.parameters.items():
                if p.grad is not None:
                    self._add(name, p.grad.clone())  # whatever shares memory with p.grad loses it in the next line
                    p.grad = None

    @paddle.no_grad()
    def collect(self, names):
        """From stage 2 on: sum the gradients of ``names`` over processes, keep the owner's, and free all others."""
        for name, gradient in self._reduced(names):
            self._add(name, gradient)
        self._collected.update(names)

    def _add(self, name, gradient):
        # Not in place: Paddle leaves the result of an operator that falls back to CPU there.
        gradient = _as_float(gradient)
        self._sums[name] = self._sums[name] + gradient if name in self._sums else gradient

    def _gradient(self, name):
        """What came together so far; a parameter that no sample here reached takes part in sums like any other."""
        gradient = self._sums.get(name, self.parameters[name].grad)
        return paddle.zeros_like(self.parameters[name]) if gradient is None else gradient

    def _reduced(self, chosen):
        """Yield (name, sum over processes) of gradients, which are freed: in every process, or in the owner with sharding."""
        wide = self._float_sums and self.stage < 2
        for owner, names in self._buckets(chosen, "float32" if wide else None):
            sizes, parts = [self.parameters[name].size for name in names], []
            for name, size in zip(names, sizes):
                p = self.parameters[name]
                gradient = self._sums.pop(name, None) if wide else p.grad
                if gradient is None:
                    gradient = paddle.zeros([size], "float32" if wide else p.dtype)
                parts.append(device.brought(gradient).reshape([-1]))
            flat = paddle.concat(parts)
            for name in names:
                self.parameters[name].grad = None
            if self.stage:
                dist.reduce(flat, dst=owner)
            else:
                dist.all_reduce(flat)
            if self.stage == 0 or owner == self.rank:
                for name, part in zip(names, flat.split(sizes)):
                    yield name, part.reshape(self.parameters[name].shape)

    def _buckets(self, chosen, dtype=None):
        """Lists of names that travel together, with their owner: all of one dtype, if not all gradients are of ``dtype``."""
        groups = {}
        for name in chosen:
            p = self.parameters[name]
            groups.setdefault((self.owners[name] if self.stage else 0, dtype or p.dtype), []).append(name)
        for (owner, _), names in groups.items():
            bucket, size = [], 0
            for name in names:
                if bucket and size + self.parameters[name].size > _BUCKET:
                    yield owner, bucket
                    bucket, size = [], 0
                bucket.append(name)
                size += self.parameters[name].size
            yield owner, bucket

    # ------------------------------------------------------------------ updates

    @paddle.no_grad()
    def step(self, learning_rate):
        """Update the weights with the gradients so far, and forget these.

        Returns:
            The gradient norm over all processes, before clipping. Where it is not finite nothing was updated; with a
            loss scale that is part of finding it, otherwise something is wrong.
        """
        if self.world > 1 and self.stage < 2:
            self._sums = dict(self._reduced(self.parameters))
        gradients = {name: _as_float(self._gradient(name)) for name in self.owned}
        square = paddle.zeros([], "float32")
        for gradient in gradients.values():
            square = square + gradient.square().sum()
        if self.stage:
            dist.all_reduce(square)
        norm = math.sqrt(float(square)) / self.loss_scale if math.isfinite(float(square)) else math.nan
        if math.isfinite(norm):
            limit = min(1.0, self.clip / (norm + 1e-6)) if self.clip > 0 else 1.0
            factor = limit / self.loss_scale
            for name, master in self.masters.items():
                gradient = gradients[name] * factor
                master.grad = None  # or the new one is copied into it, wherever it is
                master.grad = gradient
            self._adamw.set_lr(learning_rate)
            with paddle.utils.unique_name.guard():  # states are named when first made: alike for every optimiser
                self._adamw.step()
            self._publish()
        self._adjust_scale(math.isfinite(norm))
        self.clear()
        return norm

    def clear(self):
        """Forget all gradients."""
        self._sums = {}
        for p in (*self.parameters.values(), *self.masters.values()):
            p.grad = None

    def _publish(self):
        """Give the new weights to every process that keeps them."""
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                self.parameters[name].set_value(master.astype(self.parameters[name].dtype))
        if self.stage in (1, 2):
            for name, p in self.parameters.items():
                dist.broadcast(p, src=self.owners[name])

    def _adjust_scale(self, good, patience=1000):
        """Half the loss scale after an overflow, twice after many steps without."""
        if not self._dynamic:
            return
        self._good_steps = self._good_steps + 1 if good else 0
        if not good:
            self.loss_scale = max(self.loss_scale / 2, 1.0)
        elif self._good_steps % patience == 0:
            self.loss_scale *= 2

    # ------------------------------------------------------------------ states

    _KINDS = ("moment1_0", "moment2_0", "beta1_pow_acc_0", "beta2_pow_acc_0")

    def state(self):
        """Arrays of what this process keeps, named ``parameter/kind``: independent of how many processes there are."""
        states = self._adamw.state_dict()
        arrays = {}
        for name, master in self.masters.items():
            for kind in self._KINDS:
                if f"{master.name}_{kind}" in states:
                    arrays[f"{name}/{kind}"] = states[f"{master.name}_{kind}"].numpy()
            if master is not self.parameters[name]:
                arrays[f"{name}/master"] = master.numpy()
        arrays["/loss_scale"] = np.array([self.loss_scale, self._good_steps], "float64")
        return arrays

    def load_state(self, arrays):
        """Take back what :meth:`state` of all processes gave, whatever their number.

        Raises:
            KeyError: a state is missing.
        """
        states = {}
        for name, master in self.masters.items():
            for kind in self._KINDS:
                states[f"{master.name}_{kind}"] = paddle.to_tensor(arrays[f"{name}/{kind}"])
            if master is not self.parameters[name]:
                master.set_value(paddle.to_tensor(arrays[f"{name}/master"]))
        self._adamw.set_state_dict(states)
        self.loss_scale, self._good_steps = float(arrays["/loss_scale"][0]), int(arrays["/loss_scale"][1])


def _as_float(gradient):
    gradient = device.brought(gradient)
    return gradient if gradient.dtype == paddle.float32 else gradient.astype("float32")


def _decays(name):
    """Biases, norms and layer scales are left out, as in PaddleNLP."""
    *layer, kind = name.split(".")
    return kind not in ("bias", "ls1", "ls2") and "norm" not in "".join(layer[-1:]) and layer != ["mlp1", "0"]


def _float_parameter(value):
    master = paddle.create_parameter(value.shape, "float32", default_initializer=paddle.nn.initializer.Constant(0.0))
    master.set_value(value.astype("float32"))
    return master
