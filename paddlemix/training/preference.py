"""Mixed preference optimisation (MPO, arXiv 2411.10442): a model learns which of two answers is preferred.

The loss is a weighted sum of preference losses over the log-probabilities that the policy, which learns, and a reference, its
start, give to both answers, and of the cross entropy of the chosen ones. The reference is no second model: what does not learn
is shared, and of what learns a copy of the start is put in its place for the time of the reference's pass.
"""

import contextlib

import numpy as np
import paddle
from paddle.nn import functional as F

from paddlemix.datasets.preference import PairCollator, PreferenceEncoder, encode_preference, parse_preference
from paddlemix.errors import ConfigError
from paddlemix.models.blocks.inputs import pixel_tensor
from paddlemix.models.blocks.layers import take_rows
from paddlemix.models.blocks.lora import merge_lora
from paddlemix.models.blocks.losses import label_losses

from .building import train_mode
from .recipe import ChatRecipe
from .reference_store import ReferenceStore

__all__ = ["LOSS_TYPES", "PreferenceLoss", "PreferenceObjective", "PreferenceRecipe", "Reference", "encode_preference"]

LOSS_TYPES = ("sigmoid", "bco_pair", "hinge", "ipo")


class PreferenceLoss:
    """A weighted sum of preference losses of pairs.

    Args:
        beta: how far the policy may leave the reference; small is far.
        weights: ``{loss type: weight}``, of :data:`LOSS_TYPES`.
        label_smoothing: share of the pairs whose preference is taken to be wrong; for ``sigmoid`` alone.
        total: function that sums a list of numbers over all processes; None where there is one.

    Attributes:
        running_mean, observations: of the rewards that ``bco_pair`` has seen; one observation a call.

    Raises:
        ConfigError: a loss type is not known, or a number makes no sense.
    """

    def __init__(self, beta=0.1, weights=None, label_smoothing=0.0, total=None):
        self.weights = {"sigmoid": 0.8, "bco_pair": 0.2} if weights is None else dict(weights)
        unknown = [name for name in self.weights if name not in LOSS_TYPES]
        if unknown or not self.weights:
            raise ConfigError(f"--loss_type is '{','.join(unknown)}': use one or more of {', '.join(LOSS_TYPES)}")
        if not beta > 0 or not 0 <= label_smoothing < 0.5:
            raise ConfigError(
                f"--beta is {beta} and --label_smoothing {label_smoothing}: they must be above 0, and from 0 to 0.5"
            )
        self.beta, self.label_smoothing = beta, label_smoothing
        self.running_mean, self.observations = 0.0, 0
        self._total = total or (lambda values: values)

    def __call__(self, policy_chosen, policy_rejected, reference_chosen, reference_rejected, lengths=None, update=True):
        """Losses of pairs.

        Args:
            policy_chosen, policy_rejected, reference_chosen, reference_rejected: sums of the answers' log-probabilities,
                float32 tensors ``[n]``, or arrays.
            lengths: ``(chosen, rejected)``, the numbers of tokens ``[n]`` that ``ipo`` divides by; None where the
                log-probabilities are means already.
            update: whether ``bco_pair`` takes note of these rewards first.

        Returns:
            ``(losses, chosen rewards, rejected rewards)``, float32 tensors ``[n]``: weighted sums over the loss types; rewards
            have no gradient.
        """
        given = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
        chosen, rejected, base_chosen, base_rejected = (
            x if isinstance(x, paddle.Tensor) else paddle.to_tensor(np.asarray(x, "float32")) for x in given
        )
        gain_chosen, gain_rejected = _less(chosen, base_chosen), _less(rejected, base_rejected)
        losses = paddle.zeros_like(gain_chosen)
        for name, weight in self.weights.items():
            if name == "ipo" and lengths is not None:
                counts = [paddle.to_tensor(1 / np.asarray(count, "float32")) for count in lengths]
                part = self._ipo(gain_chosen * counts[0], gain_rejected * counts[1])
            else:
                part = getattr(self, f"_{name}")(gain_chosen, gain_rejected, update)
            losses = losses + weight * part
        scale = self.beta * sum(self.weights.values())
        return losses, (scale * gain_chosen).detach(), (scale * gain_rejected).detach()

    def _sigmoid(self, chosen, rejected, update=True):
        margin, smoothing = self.beta * _less(chosen, rejected), self.label_smoothing
        return -(1 - smoothing) * _log_sigmoid(margin) + -smoothing * _log_sigmoid(-1 * margin)

    def _hinge(self, chosen, rejected, update=True):
        short = 1 + -self.beta * _less(chosen, rejected)
        return short * paddle.to_tensor((short.detach().numpy() > 0).astype("float32"))

    def _ipo(self, chosen, rejected, update=True):
        return paddle.square(_less(chosen, rejected) + -1 / (2 * self.beta))

    def _bco_pair(self, chosen, rejected, update=True):
        chosen, rejected = self.beta * chosen, self.beta * rejected
        if update:
            rewards = np.concatenate([x.detach().astype("float32").numpy().reshape(-1) for x in (chosen, rejected)])
            total, count = self._total([float(rewards.astype(np.float64).sum()), len(rewards)])
            if count:
                self.observations += 1
                self.running_mean += (float(total) / float(count) - self.running_mean) / self.observations
        delta = self.running_mean
        return -1 * (_log_sigmoid(chosen + -delta) + _log_sigmoid(-1 * rejected + delta))

    def state(self):
        """What a checkpoint keeps."""
        return {"running_mean": self.running_mean, "observations": self.observations}

    def load_state(self, state):
        """Go on from what :meth:`state` gave."""
        self.running_mean, self.observations = float(state["running_mean"]), int(state["observations"])


def _less(one, other):
    """Their difference, by operators that every device has."""
    return one + -1 * other


def _log_sigmoid(x):
    """Logarithm of the sigmoid of ``x`` [n], by operators that every device has: x against 0."""
    against = paddle.concat([x.reshape([-1, 1]), paddle.zeros_like(x).reshape([-1, 1])], axis=1)
    return F.log_softmax(against, axis=1)[:, 0]


class Reference:
    """The policy as it was at the start of the run.

    Args:
        model: the policy, set up by :func:`~.building.prepare`.
        start: ``{name: array}`` of the parameters that differ between policy and reference; None for copies of those that
            learn, as they are now. New adapters have no effect at the start, which a copy of them keeps.
    """

    def __init__(self, model, start=None):
        self.model = model
        parameters = dict(model.named_parameters())
        if start is None:
            start = {name: parameter for name, parameter in parameters.items() if not parameter.stop_gradient}
        # With the same tower, what it sees is the same, before the projector.
        self.shares_vision = not any(name.startswith("vision_model.") for name in start)
        # With stage 3 an owner alone has a weight, and gives its copy to the others as it gives the weight.
        start = {name: value for name, value in start.items() if parameters[name]._is_initialized()}
        self._parameters = {name: parameters[name] for name in start}
        self._start = {name: _copy(value, parameters[name]) for name, value in start.items()}

    @contextlib.contextmanager
    def in_place(self):
        """Within the block the model is the reference, in evaluation mode and without gradients."""
        own = {}
        for name, parameter in self._parameters.items():  # detach() would follow the parameter to the other values
            own[name] = paddle.zeros([0], parameter.dtype)
            parameter._share_buffer_to(own[name])
        self.model.eval()
        try:
            for name, parameter in self._parameters.items():
                self._start[name]._share_buffer_to(parameter)
            with paddle.no_grad():
                yield
        finally:
            for name, parameter in self._parameters.items():
                own[name]._share_buffer_to(parameter)
            train_mode(self.model)


def _copy(value, parameter):
    if isinstance(value, paddle.Tensor):
        return value.detach() * 1  # a copy, by an operator that every device has
    return paddle.to_tensor(value).astype(parameter.dtype).reshape(parameter.shape)


class PreferenceObjective:
    """The loss of MPO for the trainer: see :class:`~.objective.CausalObjective` for what the trainer asks of one.

    Args:
        loss: a :class:`PreferenceLoss`.
        reference: a :class:`Reference`, or a function from a batch to ``(chosen, rejected)`` log-probabilities, arrays ``[n]``.
        rpo_alpha: weight of the cross entropy of the chosen answers.
        store: a :class:`~.reference_store.ReferenceStore` that keeps what the reference says of the training data; None for
            asking it in every step.
        validates: whether the reference is needed for held-out pairs too.
    """

    holding = staticmethod(contextlib.nullcontext)  # see CausalObjective

    def __init__(self, loss, reference, rpo_alpha=1.0, store=None, validates=False):
        self.preference, self.reference, self.rpo_alpha = loss, reference, rpo_alpha
        self.store, self.validates, self.known, self._idle = store, validates, None, None
        self._noted = {True: [], False: []}  # of training and of validation

    @property
    def moves_weights(self):
        """See :class:`~.objective.CausalObjective`: the reference's, unless all is known of it."""
        return isinstance(self.reference, Reference) and self.known is None

    def weights(self, batch):
        """Pairs, and labelled tokens of the chosen answers."""
        sequence = batch["sequence"]
        return [batch["pairs"], int(((sequence >= 0) & (sequence < batch["pairs"])).sum())]

    def loss(self, model, batch, totals, update=True):
        """This batch's share of the step's loss; ``totals`` are :meth:`weights`, summed over the step and all processes."""
        pairs = batch["pairs"]
        with self._tower_once(model, batch, update) as pixels:
            base = self._reference_logps(model, batch, pixels, update)
            with self.holding():
                logps, counts, head, hidden = log_probabilities(model, batch, pixels)
                logits = self._mean_logits(batch, head, hidden) if pairs else None
        if not pairs:  # all that were drawn are bad; the others' mean counts none of this process's rewards
            self.preference(*[np.zeros(0, "float32")] * 4, update=update)
            return hidden.sum().astype("float32") * 0
        chosen, rejected = logps[:pairs], logps[pairs:]
        lengths = counts[:pairs], counts[pairs:]
        losses, chosen_rewards, rejected_rewards = self.preference(chosen, rejected, *base, lengths, update)
        nll = -1 * chosen.sum()
        rewards = chosen_rewards.numpy(), rejected_rewards.numpy()
        self._noted[update].append(_sums(chosen, rejected, *rewards, logits, float(nll.detach()), counts))
        return losses.sum() * (1 / max(totals[0], 1)) + self.rpo_alpha * nll * (1 / max(totals[1], 1))

    @contextlib.contextmanager
    def _tower_once(self, model, batch, update=True):
        """The pixels as a tensor; within the block a frozen tower looks at them once, for policy and reference alike."""
        pixels = None if "pixel_values" not in batch else pixel_tensor(batch["pixel_values"])
        asked = isinstance(self.reference, Reference) and (self.known is None or not update)
        shares = asked and self.reference.shares_vision
        with model.remembering_patches() if shares and pixels is not None else contextlib.nullcontext():
            yield pixels

    def _reference_logps(self, model, batch, pixels, update=True):
        if self.known is not None and update:
            return tuple(self.known[batch["index"]].T)
        if not isinstance(self.reference, Reference):
            return self.reference(batch)
        with self.reference.in_place(), self.holding():
            logps, _, _, _ = log_probabilities(model, batch, pixels)
        return logps[: batch["pairs"]], logps[batch["pairs"] :]

    def prepare(self, trainer, data):
        """With ``store``: let the reference look at all pairs of the training data, and let go of it."""
        size = trainer.model.config.image_size
        self._idle = PairCollator(blank_tile=True, tile_size=size)([])
        if self.store is None:
            return
        self.known = self.store.fill(self, trainer, data)
        if not self.validates:
            self.reference = None

    def idle(self):
        """See :meth:`~.objective.CausalObjective.idle`: a batch of no pair, which the reference and the policy look at."""
        return self._idle

    @staticmethod
    def _mean_logits(batch, head, hidden):
        """Means of all logits at the chosen and at the rejected answers, two numbers."""
        pairs, order = batch["pairs"], batch["sequence"].reshape(-1)
        with paddle.no_grad():  # the mean of the logits of some positions is the logits of their mean
            flat = hidden.detach().astype("float32").reshape([-1, hidden.shape[-1]]).numpy()
            means = np.stack([flat[(order >= first) & (order < first + pairs)].mean(0) for first in (0, pairs)])
            return head(paddle.to_tensor(means).astype(hidden.dtype)).astype("float32").mean(axis=-1).numpy()

    NAMES = (
        "rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected logits/chosen "
        "logits/rejected"
    ).split()

    def metrics(self, processes, update=True):
        """Means over what was seen since the last call, over all processes."""
        noted = self._noted[update]
        sums = processes.sum(np.sum(noted, axis=0) if noted else np.zeros(len(self.NAMES) + 3))
        self._noted[update] = []
        *totals, pairs, nll, tokens = sums
        values = {name: float(total / max(pairs, 1)) for name, total in zip(self.NAMES, totals)}
        mean = {"running_mean": self.preference.running_mean} if update else {}
        return {**values, "nll_loss": float(nll / max(tokens, 1)), **mean}

    def state(self):
        """What a checkpoint keeps."""
        return self.preference.state()

    def load_state(self, state):
        """Go on from what :meth:`state` gave."""
        self.preference.load_state(state)


def _sums(chosen, rejected, good, bad, logits, nll, counts):
    """Sums over a batch of pairs in the order of :attr:`PreferenceObjective.NAMES`, then pairs, cross entropy and tokens."""
    pairs = len(good)
    totals = [good.sum(), bad.sum(), (good > bad).sum(), (good - bad).sum()]
    totals += [float(chosen.detach().sum()), float(rejected.detach().sum()), logits[0] * pairs, logits[1] * pairs]
    return [*map(float, totals), pairs, nll, float(counts[:pairs].sum())]


def log_probabilities(model, batch, pixels):
    """Sums of the log-probabilities of all answers of a batch of pairs.

    Args:
        model: the chat model, as it shall be asked.
        batch: from :class:`~paddlemix.datasets.preference.PairCollator`.
        pixels: its tiles as a tensor, or None.

    Returns:
        ``(sums [2n], numbers of tokens [2n] as an array, output head, hidden states [B, N, D])``, the chosen answers first.
    """
    features, unused = None, None
    if pixels is not None:
        tiles = model._extract_feature(pixels)
        order, used = batch["tile_order"], np.flatnonzero(batch["image_flags"])
        # Keep every rank's graph the same: a batch without pictures still reaches the vision parameters.
        unused = tiles.sum() * 0 if not used.size else None
        features = take_rows(tiles, order).reshape([-1, tiles.shape[-1]]) if len(order) else None
    keys = ("input_ids", "attention_mask", "position_ids", "segment_ids")
    out = model(visual_features=features, **{key: batch[key] for key in keys if key in batch})
    hidden = out.hidden if unused is None else out.hidden + unused.astype(out.hidden.dtype)
    sequences = 2 * batch["pairs"]
    counts = np.bincount(batch["sequence"][batch["sequence"] >= 0], minlength=sequences)
    labels = np.where(batch["sequence"] >= 0, batch["labels"], -100)
    return -1 * label_losses(out.head, hidden, labels, batch["sequence"], sequences), counts, out.head, hidden


class PreferenceRecipe(ChatRecipe):
    """What differs from fine-tuning: pairs, and their objective.

    Args:
        model_args: :class:`~.arguments.ModelArguments`; its model is the reference unless ``preference`` names another.
        preference: :class:`~.arguments.PreferenceArguments`.

    Raises:
        ConfigError: a loss type is not known, or a number makes no sense.
    """

    encoder, collator = PreferenceEncoder, PairCollator
    parse = staticmethod(parse_preference)
    skip, drawn = True, True

    def __init__(self, model_args, preference):
        self.model_args, self.preference, self._validates = model_args, preference, False
        self._loss(None)  # says at once what is wrong

    def _loss(self, total):
        own = self.preference
        return PreferenceLoss(own.beta, own.weights, own.label_smoothing, total)

    def objective(self, model, resumed, processes):
        """See :meth:`ChatRecipe.objective`. The reference is the start of the run, also after a resume."""
        start, other = None, self.preference.reference_model
        if other and model.quantised_layers:
            raise ConfigError("--reference_model needs weights in all bits: leave it out (the start is it), or --load_4bit")
        if other or resumed:
            start = _start(model, other or self.model_args.model_name_or_path, not other)
        store = None
        if self.preference.precompute_reference:
            store = ReferenceStore(other or self.model_args.model_name_or_path)
        reference = Reference(model, start)
        (differ,) = processes.sum([not reference.shares_vision])  # each process has seen a part of the weights at most
        reference.shares_vision = not differ
        return PreferenceObjective(self._loss(processes.sum), reference, self.preference.rpo_alpha, store, self._validates)

    def validation(self, model, tokenizer, data_args, seed):
        """See :meth:`ChatRecipe.validation`."""
        self._validates = True
        return super().validation(model, tokenizer, data_args, seed)

    def dataset(self, model, tokenizer, data_args, seed):
        """See :meth:`ChatRecipe.dataset`."""
        dataset = super().dataset(model, tokenizer, data_args, seed)
        dataset.same_every_epoch = self.preference.precompute_reference
        return dataset


def _start(model, name, learned_alone):
    """``{parameter: array}`` of the reference in a checkpoint, where it differs from the model that is trained.

    Args:
        model: the prepared policy.
        name: directory or name of the checkpoint; its adapters, if any, are merged.
        learned_alone: whether what does not learn is known to be alike.

    Raises:
        ConfigError: there is none, or it is of another shape.
    """
    if name is None:
        raise ConfigError("the reference of a resumed run is its start, which was put together: name it by --reference_model")
    here = {key for key, parameter in model.named_parameters() if parameter._is_initialized()}  # not all with stage 3
    dtype, ranks = str(model.mlp1["1"].weight.dtype).removeprefix("paddle."), model.group or 1
    bits = {"weight_dtype": model.weight_dtype, "learning": True} if model.quantised_layers else {}
    start = type(model).from_pretrained(name, dtype=dtype, engine="eager", tensor_parallel=ranks, **bits)
    same_adapters = all(
        getattr(start.config, key) == getattr(model.config, key) for key in ("use_llm_lora", "use_backbone_lora")
    )
    if not same_adapters:
        merge_lora(start)
    stored, values = dict(start.named_parameters()), {}
    for key, parameter in model.named_parameters():
        if key not in here or (learned_alone and parameter.stop_gradient):
            continue
        if key in stored:
            if stored[key].shape != parameter.shape:
                raise ConfigError(f"--reference_model {name}: {key} is {stored[key].shape}, not {parameter.shape}")
            if parameter.stop_gradient and bool((stored[key] == parameter).all()):
                continue
            values[key] = stored[key]
        elif ".lora_" in key:  # an adapter that the reference does not have has no effect there
            values[key] = paddle.zeros_like(parameter)
        else:
            raise ConfigError(f"--reference_model {name} has no {key}: take a model of the same kind")
    return values
