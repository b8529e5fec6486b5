"""What a step of training makes small: for the trainer an object with ``weights``, ``loss``, ``metrics`` and a state.

A step's loss must not depend on how its samples are dealt over batches and processes, so an objective says of each batch what
it weighs, and gets the sums over the whole step when the loss is computed.
"""

import contextlib


class CausalObjective:
    """Mean cross entropy over the labelled tokens of a step.

    Attributes:
        holding: makes a context in which all weights can be used, not in the model's forward pass alone; the trainer sets it.
        moves_weights: whether a step puts others in the place of the model's weights, so that none may be on its way.
    """

    holding = staticmethod(contextlib.nullcontext)
    moves_weights = False

    def prepare(self, trainer, data):
        """Called once before the first step, by all processes."""

    def weights(self, batch):
        """What a batch weighs, a list of numbers: here the sum of the weights of its labels."""
        labelled = batch["labels"][:, 1:] >= 0  # the first token of a row is predicted from nothing
        weights = batch.get("loss_weight")
        return [float(labelled.sum() if weights is None else weights[:, 1:][labelled].astype("float64").sum())]

    def loss(self, model, batch, totals, update=True):
        """This batch's share of the step's loss, a scalar; ``totals`` are the weights of all batches of all processes."""
        inputs = {key: value for key, value in batch.items() if key not in ("names", "bad")}
        return model(**inputs).loss * (self.weights(batch)[0] / (totals[0] or 1.0))  # 0: no sample of the step can be used

    def idle(self):
        """What a process evaluates that has no batch left while others have, where weights are divided over all of them; None
        where one forward pass of the model is all that a batch takes."""
        return None

    def metrics(self, processes, update=True):
        """Further values for the log, since the last call, of training or (not ``update``) of validation; all call this."""
        return {}

    def state(self):
        """What a checkpoint keeps, as for JSON; None for nothing."""
        return None

    def load_state(self, state):
        """Go on from what :meth:`state` gave."""


class BatchObjective(CausalObjective):
    """Any loss that is a mean over a batch, where the batches of all processes are of one size.

    Args:
        loss: called with the model and a batch's arguments by name; the loss.
    """

    def __init__(self, loss):
        self._of = loss

    def weights(self, batch):
        """Every batch weighs alike."""
        return [1.0]

    def loss(self, model, batch, totals, update=True):
        """See :meth:`CausalObjective.loss`."""
        inputs = {name: value for name, value in batch.items() if name != "names"}
        return self._of(model, **inputs) * (1 / totals[0])
