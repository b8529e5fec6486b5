"""ZeRO stage 3 (arXiv 1910.02054): weights that are divided over processes while they are not at work.

Every parameter, frozen or not, is kept by its owner alone. A transformer block has all its weights during its forward pass
and, being recomputed, once more during its backward pass, at whose end its gradients go to their owners. What is outside the
blocks (embeddings, projector, final norm, output head) is whole from the start of the model's forward pass to the end of the
backward pass.

Collectives must come in the same order in all processes, however their batches differ. The blocks run in the same order
everywhere, and each once: tiles of a frozen tower are cut into groups inside a block rather than around the tower.
"""

import contextlib
import functools
import sys

import paddle
import paddle.distributed as dist

from .plan import deal


class ShardedWeights:
    """Takes over the weights of a model: those that this process does not own are without memory from now on.

    Args:
        model: :class:`InternVLChatModel`, with recompute.
        optimizer: :class:`~.optimizer.Optimizer` of what is trained.
    """

    def __init__(self, model, optimizer):
        self.model, self.optimizer, self.rank = model, optimizer, optimizer.rank
        self.parameters = dict(model.named_parameters())
        self.owners = deal({name: (p.size, not p.stop_gradient) for name, p in self.parameters.items()}, optimizer.world)
        assert optimizer.owners.items() <= self.owners.items()
        names = {id(p): name for name, p in self.parameters.items()}
        tower, decoder = model.vision_model.encoder.layers, model.language_model.model.layers
        select, group = model.config.select_layer, model.vision_batch
        model.vision_batch = sys.maxsize
        for layer in tower:
            layer.forward = _in_groups(layer.forward, group)
        blocks = {layer: [names[id(p)] for p in layer.parameters()] for layer in (*tower, *decoder)}
        for layer, inside in blocks.items():
            layer.forward = self._with_weights(layer.forward, inside)
            self._collect_after_backward([name for name in inside if name in optimizer.parameters])
        used = tower[: select if select >= 0 else len(tower) + 1 + select]
        self._used = [blocks[layer] for layer in (*used, *decoder)]
        inside = {name for block in blocks.values() for name in block}
        self._outside = [name for name in self.parameters if name not in inside]
        self._held = False
        model.forward = self._from_here_on(model.forward)
        self._release(self.parameters)

    @contextlib.contextmanager
    def hold(self):
        """Within the block what is outside the transformer blocks is whole, not in the model's forward pass alone."""
        self._gather(self._outside)
        self._held = True
        try:
            yield
        finally:
            self._held = False
            if not paddle.is_grad_enabled():  # with gradients the backward pass needs it
                self._release(self._outside)

    @paddle.no_grad()
    def _gather(self, names):
        for name in names:
            p, owner = self.parameters[name], self.owners[name]
            if owner != self.rank:
                paddle.empty(p.shape, p.dtype)._share_buffer_to(p)
            dist.broadcast(p, src=owner)

    def _release(self, names):
        for name in names:
            if self.owners[name] != self.rank:
                self.parameters[name]._clear_data()

    def _with_weights(self, forward, names):
        def gathered(*inputs):
            self._gather(names)
            try:
                return forward(*inputs)
            finally:
                self._release(names)

        return gathered

    def _from_here_on(self, forward):
        def gathered(**inputs):
            if self._held:
                return forward(**inputs)
            self._gather(self._outside)
            output = forward(**inputs)
            if not paddle.is_grad_enabled():
                self._release(self._outside)
            return output

        return gathered

    def _collect_after_backward(self, names):
        """Have the optimiser collect the gradients of ``names`` once the last of them is there."""
        waiting = set(names)

        def done(name):
            waiting.discard(name)
            if not waiting:
                self.optimizer.collect(names)
                waiting.update(names)

        for name in names:
            self.parameters[name]._register_backward_hook(functools.partial(done, name))

    def end_backward(self):
        """Call after every backward pass."""
        self._release(self._outside)

    def attend(self):
        """Take part in a forward pass of the others, without one's own and without gradients."""
        for names in (self._outside, *self._used):
            self._gather(names)
            self._release(names)

    def whole(self):
        """``{name: array}`` of all weights in the first process, in the host's memory; None in the others."""
        arrays = {}
        for name, p in self.parameters.items():
            self._gather([name])
            if self.rank == 0:
                arrays[name] = p.numpy()
            self._release([name])
        return arrays if self.rank == 0 else None


def _in_groups(forward, size):
    def grouped(x):
        if paddle.is_grad_enabled() or x.shape[0] <= size:
            return forward(x)
        return paddle.concat([forward(x[at : at + size]) for at in range(0, x.shape[0], size)])

    return grouped
