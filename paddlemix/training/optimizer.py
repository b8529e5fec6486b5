"""AdamW over one process or many: gradients are summed, states divided, weights kept equal.

Plain ``paddle.distributed`` collectives that every backend has, rather than fleet's wrappers: gloo has no reduce-scatter and
no average, fleet's stages 2 and 3 refuse to run on CPU, and its sharding fixes names and places of states, so that a
checkpoint fits one number of processes only. Here all of it runs, and is tested, on CPU.

ZeRO (arXiv 1910.02054) by whole parameters: each has an owner, which keeps its moments (stage 1) and the sum of its
gradients (stage 2), updates it and sends it to the others. With stage 3 it alone keeps the weight; see ``sharding.py``.
"""

import contextlib
import functools
import math

import numpy as np
import paddle

from paddlemix import device
from paddlemix.kernels import gemm
from paddlemix.models.blocks.chat_model import ChatModel
from paddlemix.parallel.launched import world_group

from .plan import divide

_LAST = ("language_model.model.norm.", "language_model.lm_head.")  # what a chat model uses after all blocks
_BUCKET = 2**25  # numbers that are sent at once
_PIECES = 16  # of all gradients, or of an owner's, so that little is left to send when the backward pass ends
_AWAY = 4  # pieces that are on their way at once from stage 2 on


class Optimizer:
    """AdamW with gradient summing, clipping, loss scaling and float32 master weights.

    Args:
        parameters: ``{name: parameter}`` of all that is trained, in the same order in every process.
        args: :class:`~.arguments.PreTrainingArguments`.
        decays: called with a name; whether weight decay applies. By default not to biases and norms.
        rates: called with a name; what the learning rate of that parameter is multiplied by. 1 for all by default.
        group: the processes that divide the data, or with sharding the states; None for all.
        replicas: the processes that have the same share of the states, where there are several such groups.
        divided: :class:`~.divided.DividedParameters` where layers are divided over ranks.
    """

    def __init__(self, parameters, args, decays=None, rates=None, group=None, divided=None, replicas=None):
        self.parameters, self.divided = parameters, divided
        self.group, self.replicas = group or world_group(), replicas
        self.rank, self.world = self.group.rank, self.group.size
        self.stage = int(args.sharding[-1]) if args.sharding and self.world > 1 else 0
        self.clip = args.max_grad_norm
        self.loss_scale = args.scale_loss if args.fp16 and not device.is_cpu() else 1.0
        self._dynamic, self._good_steps = self.loss_scale != 1.0, 0
        self._float_sums = args.amp_master_grad and any(p.dtype != paddle.float32 for p in parameters.values())
        self._sums, self._collected = {}, set()
        self._sent, self._arriving, self._outside = [], {}, None
        self._order = self._waiting = None
        if args.overlap_communication:
            self.group.overlap()
        sizes = {name: p.size for name, p in parameters.items()}
        if divided is not None:  # the same in every rank, whatever it has of a layer
            sizes = {name: size for name, (size, learns) in divided.counts.items() if learns}
        self.owners = divide(sizes, self.world)
        self.owned = {name: p for name, p in parameters.items() if self.stage == 0 or self.owners[name] == self.rank}
        self._offloads = args.offload_optim
        self._host = device.on_host if args.offload_optim else contextlib.nullcontext
        with self._host():
            self.masters = {
                name: p if p.dtype == paddle.float32 and not args.offload_optim else _float_parameter(p)
                for name, p in self.owned.items()
            }
        decayed = {self.masters[name].name for name in self.owned if (decays or _decays)(name)}
        for name, master in self.masters.items() if rates else ():
            master.optimize_attr = {"learning_rate": rates(name)}
        with self._host():
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

    def watch(self, model):
        """Have gradients leave during the backward pass, and new weights come until they are used, where that is asked for.

        Args:
            model: with the trained parameters; its blocks and what is outside them are used in the order of its parameters.
        """
        self._waiting = None
        if not self.group.overlaps or self.stage == 3:  # whose blocks do it by themselves
            return
        sizes = sum(p.size for p in self.parameters.values())
        bucket = min(_BUCKET, max(1, sizes // (_PIECES * (self.world if self.stage else 1))))
        wide = "float32" if self._float_sums and self.stage < 2 else None
        backward = list(reversed(self.parameters))
        places = {name: place for place, name in enumerate(backward)}
        # In the order in which they are complete: each owner has parameters everywhere.
        self._order = sorted(self._buckets(backward, wide, bucket), key=lambda piece: max(places[name] for name in piece[1]))
        for number, (_, names) in enumerate(self._order):
            for name in names:
                self.parameters[name]._register_backward_hook(functools.partial(self._ready, number, name))
        if self.stage and isinstance(model, ChatModel):
            blocks = [*model.vision_model.encoder.layers, *model.language_model.model.layers]
            names = {id(p): name for name, p in self.parameters.items()}
            inside = [[names[id(p)] for p in block.parameters() if id(p) in names] for block in blocks]
            last = [name for name in self.parameters if name.startswith(_LAST)]
            for layer, own in zip([*blocks, model.language_model.model.norm], [*inside, last]):
                layer.register_forward_pre_hook(lambda *_, own=own: self.arrive(own))
            awaited = {name for own in (*inside, last) for name in own}
            self._outside = [name for name in self.parameters if name not in awaited]

    def begin_backward(self, last):
        """Call before every backward pass; ``last`` says whether it is the last before an update."""
        self._waiting = None
        if self.group.overlaps and self.stage < 3 and (last or self.stage == 2) and self._order is not None:
            self._waiting, self._next = [set(names) for _, names in self._order], 0

    @paddle.no_grad()
    def _ready(self, number, name):
        """The gradient of a parameter is there: what is complete leaves, in the same order in every process."""
        if self._waiting is None:
            return
        self._waiting[number].discard(name)
        while self._next < len(self._order) and not self._waiting[self._next]:
            self._send(*self._order[self._next])
            self._next += 1

    def _send(self, owner, names):
        self._sent.append(self._begun(owner, names))
        self._collected.update(names)
        if self.stage == 2:
            self._take(len(self._sent) - _AWAY)  # what has left must not pile up

    def _take(self, count):
        """Add the oldest ``count`` of the sums that were begun, or all."""
        for _ in range(min(count, len(self._sent))):
            for name, gradient in self._ended(*self._sent.pop(0)):
                self._add(name, gradient)

    @paddle.no_grad()
    def arrive(self, names=None):
        """Wait for the new weights of ``names``, by default of all."""
        for name in list(self._arriving) if names is None else names:
            if (pending := self._arriving.pop(name, None)) is not None:
                pending.result()

    def arrive_outside(self):
        """Wait for the new weights of what comes before the blocks, which wait for their own, as does what comes after them."""
        self.arrive(self._outside or ())

    @paddle.no_grad()
    def accumulate(self):
        """Call after the backward pass of every batch: from stage 2 on, collects all that was not collected during it."""
        self._send_rest()  # here, where every process is at the same place
        if self.stage >= 2:
            self.collect([name for name in self.parameters if name not in self._collected])
            self._take(len(self._sent))
            self._collected.clear()
        elif self._float_sums:
            for name, p in self.parameters.items():
                if p.grad is not None:
                    self._add(name, p.grad.clone())  # whatever shares memory with p.grad loses it in the next line
                    p.grad = None

    @paddle.no_grad()
    def collect(self, names):
        """From stage 2 on: sum the gradients of ``names`` over processes, keep the owner's, and free all others.

        They may still be on their way when this returns, as they do until the next call.
        """
        before = len(self._sent)
        for owner, bucket in self._buckets(names):
            self._send(owner, bucket)
        self._take(before)
        self._collected.update(names)

    def _send_rest(self):
        """Send the buckets that the backward pass has not completed."""
        if self._waiting is not None:
            for bucket in self._order[self._next :]:
                self._send(*bucket)
            self._waiting = None

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
        for owner, names in self._buckets(chosen, "float32" if self._float_sums and self.stage < 2 else None):
            yield from self._ended(*self._begun(owner, names))

    def _begun(self, owner, names):
        """Begin to sum the gradients of ``names`` over processes: what :meth:`_ended` takes."""
        wide, parts = self._float_sums and self.stage < 2, []
        sizes = [self.parameters[name].size for name in names]
        for name, size in zip(names, sizes):
            p = self.parameters[name]
            gradient = p.grad
            if wide:
                earlier = self._sums.pop(name, None)
                gradient = _as_float(gradient) if gradient is not None else None
                gradient = earlier if gradient is None else gradient if earlier is None else earlier + gradient
            if gradient is None:
                gradient = paddle.zeros([size], "float32" if wide else p.dtype)
            parts.append(device.brought(gradient).reshape([-1]))
        flat = paddle.concat(parts)
        for name in names:
            self.parameters[name].grad = None
        pending = self.group.reduce_later(flat, owner) if self.stage else self.group.all_reduce_later(flat)
        return owner, names, sizes, flat, pending

    def _ended(self, owner, names, sizes, flat, pending):
        """Wait for sums that were begun; yield (name, sum), in every process or in the owner with sharding."""
        pending.result()
        if self.stage == 0 or owner == self.rank:
            if self.replicas is not None:
                self.replicas.all_reduce(flat)
            for name, part in zip(names, flat.split(sizes)):
                yield name, part.reshape(self.parameters[name].shape)

    def _buckets(self, chosen, dtype=None, most=_BUCKET):
        """Lists of names that travel together, with their owner: all of one dtype, if not all gradients are of ``dtype``."""
        groups = {}
        for name in chosen:
            p = self.parameters[name]
            groups.setdefault((self.owners[name] if self.stage else 0, dtype or p.dtype), []).append(name)
        for (owner, _), names in groups.items():
            bucket, size = [], 0
            for name in names:
                if bucket and size + self.parameters[name].size > most:
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
        self.arrive()  # what no forward pass has asked for
        if self.world > 1 and self.stage < 2:
            sums = {}
            for sent in self._sent:
                sums.update(self._ended(*sent))
            sums.update(self._reduced([name for name in self.parameters if name not in self._collected]))
            self._sent, self._sums = [], sums
            self._collected.clear()
        gradients = {name: _as_float(self._gradient(name)) for name in self.owned}
        if self.divided is not None:
            gradients = self.divided.summed(gradients)
            square = self.divided.group.all_reduce(self.divided.squares(gradients))
        else:
            square = paddle.zeros([], "float32")
            for gradient in gradients.values():
                square = square + gemm.square(gradient)
        if self.stage:
            self.group.all_reduce(square)
        norm = math.sqrt(float(square)) / self.loss_scale if math.isfinite(float(square)) else math.nan
        if math.isfinite(norm):
            limit = min(1.0, self.clip / (norm + 1e-6)) if self.clip > 0 else 1.0
            factor = limit / self.loss_scale
            for name, master in self.masters.items():
                gradient = gradients[name]
                if factor != 1:
                    gradient.scale_(factor)
                if master.grad is not None and master.grad.data_ptr() == gradient.data_ptr():
                    continue
                master.grad = None  # or the new one is copied into it, wherever it is
                master.grad = gradient.cpu() if self._offloads else gradient
            self._adamw.set_lr(learning_rate)
            with self._host(), paddle.utils.unique_name.guard():  # states are named when first made: alike everywhere
                self._adamw.step()
            self._publish()
        self._adjust_scale(math.isfinite(norm))
        self.clear()
        return norm

    def clear(self):
        """Forget all gradients."""
        self._take(len(self._sent))
        self._sums, self._waiting = {}, None
        self._collected.clear()
        for p in (*self.parameters.values(), *self.masters.values()):
            p.grad = None

    def _publish(self):
        """Give the new weights to every process that keeps them."""
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                with self._host():
                    value = master.astype(self.parameters[name].dtype)
                self.parameters[name].set_value(value)
        if self.stage in (1, 2):
            for name in dict.fromkeys([*(self._outside or ()), *self.parameters]):  # in the order in which they are waited for
                self._arriving[name] = self.group.broadcast_later(self.parameters[name], self.owners[name])
            if self._outside is None:  # nobody waits for them later
                self.arrive()

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
        """Arrays of what this process keeps, named ``parameter/kind``: independent of how many processes there are.

        Ranks that divide layers all call this; the first of them has what they keep together, the others nothing.
        """
        found = self._adamw.state_dict()
        states = {f"{name}/{kind}": found.get(f"{m.name}_{kind}") for name, m in self.masters.items() for kind in self._KINDS}
        halves = [name for name in self.masters if self.parameters[name].dtype != paddle.float32]
        states |= {f"{name}/master": self.masters[name] for name in halves}
        arrays = {}
        if self.divided is None:
            arrays = {key: state.numpy() for key, state in states.items() if state is not None}
        else:
            half = any(p.dtype != paddle.float32 for p in self.parameters.values())
            for name in (name for name, owner in self.owners.items() if self.stage == 0 or owner == self.rank):
                for kind in (*self._KINDS, *["master"] * half):
                    whole = self.divided.whole_state(name, kind, states.get(f"{name}/{kind}"))
                    if whole is not None:
                        arrays[f"{name}/{kind}"] = whole
        arrays["/loss_scale"] = np.array([self.loss_scale, self._good_steps], "float64")
        return arrays

    def load_state(self, arrays):
        """Take back what :meth:`state` of all processes gave, whatever their number.

        Raises:
            KeyError: a state is missing.
        """
        with self._host():
            self._take_states(arrays)
        self.loss_scale, self._good_steps = float(arrays["/loss_scale"][0]), int(arrays["/loss_scale"][1])

    def _take_states(self, arrays):
        states = {}
        for name, master in self.masters.items():
            for kind in self._KINDS:
                states[f"{master.name}_{kind}"] = paddle.to_tensor(self._own(name, arrays[f"{name}/{kind}"]))
            if self.parameters[name].dtype != paddle.float32:
                master.set_value(paddle.to_tensor(self._own(name, arrays[f"{name}/master"])))
            elif master is not self.parameters[name]:
                master.set_value(self.parameters[name])
        self._adamw.set_state_dict(states)

    def _own(self, name, array):
        return array if self.divided is None else self.divided.own(name, array)


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
