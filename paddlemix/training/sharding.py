"""ZeRO stage 3 (arXiv 1910.02054): weights that are divided over processes while they are not at work.

Every parameter, frozen or not, is kept by its owner alone. A transformer block has all its weights during its forward pass
and, being recomputed, once more during its backward pass, at whose end its gradients go to their owners; the last block keeps
them from the one to the other. What is outside the blocks (embeddings, projector, final norm, output head) is whole from the
start of the model's forward pass to the end of the backward pass.

Collectives must come in the same order in all processes, however their batches differ. The blocks run in the same order
everywhere, and each once: tiles of a frozen tower are cut into groups inside a block rather than around the tower.
"""

import contextlib
import functools
import sys

import paddle

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
        counts = {name: (p.size, not p.stop_gradient) for name, p in self.parameters.items()}
        self.owners = deal(counts if optimizer.divided is None else optimizer.divided.counts, optimizer.world)
        assert optimizer.owners.items() <= self.owners.items()
        names = {id(p): name for name, p in self.parameters.items()}
        tower, decoder = model.vision_model.encoder.layers, model.language_model.model.layers
        select, group = model.config.select_layer, model.vision_batch
        model.vision_batch = sys.maxsize
        for layer in tower:
            layer.forward = _in_groups(layer.forward, group)
        blocks = {layer: [names[id(p)] for p in layer.parameters()] for layer in (*tower, *decoder)}
        self._ahead, self._next = {}, {}  # blocks whose weights are on their way, and which comes after which
        for layer, inside in blocks.items():
            layer.forward = self._with_weights(layer.forward, inside)
            self._collect_after_backward([name for name in inside if name in optimizer.parameters])
        used = tower[: select if select >= 0 else len(tower) + 1 + select]
        self._used = [blocks[layer] for layer in (*used, *decoder)]
        again = [*(used if model.vision_model.training else ()), *decoder]  # those that are computed again, last first
        order = [(layer, False) for layer in (*used, *decoder)] + [(layer, True) for layer in reversed(again)]
        keys = [(blocks[layer][0], backward) for layer, backward in order]
        self._next = dict(zip(keys, keys[1:])) if optimizer.group.overlaps else {}
        self._blocks = {inside[0]: inside for inside in blocks.values()}
        self._first, self._last = keys[0][0], blocks[decoder[-1]][0]
        self._seen = set()  # blocks that this pass has computed
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
    def _gather(self, names, later=False):
        pending = []
        for name in names:
            p, owner = self.parameters[name], self.owners[name]
            if owner != self.rank:
                paddle.empty(p.shape, p.dtype)._share_buffer_to(p)
            pending.append(self.optimizer.group.broadcast_later(p, owner))
        if later:
            return pending
        for sent in pending:
            sent.result()

    def _fetch(self, first):
        """Have the weights of the block that begins with the parameter ``first``, and those of the next on their way.

        Returns whether this pass has computed it before. Which is next is the same in every process; where it turns out to be
        another, those that came are dropped.
        """
        backward = first in self._seen
        self._seen.add(first)
        pending = self._ahead.pop(first, None)
        if pending is None:
            self._drop_ahead()
            self._gather(self._blocks[first])
        else:
            for sent in pending:
                sent.result()
        following = self._next.get((first, backward))
        if following is not None and (paddle.is_grad_enabled() or not following[1]) and following[0] != first:
            self._begin(following[0])
        return backward

    def _begin(self, first):
        self._ahead[first] = self._gather(self._blocks[first], later=True)

    def _drop_ahead(self):
        for first, pending in self._ahead.items():
            for sent in pending:
                sent.result()
            self._release(self._blocks[first])
        self._ahead = {}

    def _release(self, names):
        for name in names:
            if self.owners[name] != self.rank:
                self.parameters[name]._clear_data()

    def _with_weights(self, forward, names):
        def gathered(*inputs, **more):
            again = self._fetch(names[0])
            try:
                return forward(*inputs, **more)
            finally:
                if names[0] == self._last and not again and paddle.is_grad_enabled():
                    self._ahead[names[0]] = []  # here already: the backward pass begins with it
                else:
                    self._release(names)

        return gathered

    def _from_here_on(self, forward):
        def gathered(**inputs):
            self._begin_pass()
            pending = [] if self._held else self._gather(self._outside, later=True)
            if self._next:
                self._begin(self._first)
            for sent in pending:
                sent.result()
            output = forward(**inputs)
            if not (self._held or paddle.is_grad_enabled()):
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

    def _begin_pass(self):
        self._drop_ahead()
        self._seen = set()

    def end_backward(self):
        """Call after every backward pass."""
        self._begin_pass()
        self._release(self._outside)

    def attend(self):
        """Take part in a forward pass of the others, without one's own and without gradients."""
        self._begin_pass()
        for names in (self._outside, *self._used):
            self._gather(names)
            self._release(names)

    def whole(self, here):
        """``{name: array}`` of all weights in the host's memory where ``here`` is true, else None; all call this."""
        arrays = {}
        self._begin_pass()
        for name, p in self.parameters.items():
            self._gather([name])
            if here:
                arrays[name] = p.numpy()
            self._release([name])
        return arrays if here else None


def _in_groups(forward, size):
    def grouped(x):
        if paddle.is_grad_enabled() or x.shape[0] <= size:
            return forward(x)
        return paddle.concat([forward(x[at : at + size]) for at in range(0, x.shape[0], size)])

    return grouped
