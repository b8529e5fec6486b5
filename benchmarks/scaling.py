"""Print how a step of training would scale to hundreds of cards, and what limits it: a model, not a measurement.

  python benchmarks/scaling.py                                           8 to 512 cards of three kinds of nodes
  python benchmarks/scaling.py --model InternVL2-8B --nodes H800 --bandwidth 25 --latency 10
  python benchmarks/scaling.py --measure                                 time a block on the device here, and count with that
  python benchmarks/scaling.py --out docs/scaling.png                    as a picture too

A step is played block by block, in the order in which the trainer computes and sends (paddlemix/training: sharding.py,
optimizer.py): what is computed takes its FLOPs over a share of the device's peak, what is sent its bytes over the bandwidth of
the slowest link of its group, and for each call a latency: what goes from one to all or comes from all to one passes every card
of the group in turn, as in NCCL, and a sum in all goes up and down a tree. One stream computes and one sends, each in order.
Cards have as many samples as the published script gives one, so that the global batch grows with them. Every card has as much
to do as any other, links are idle otherwise, and data is there when it is needed: real runs are slower.
"""

import argparse
import math
import time
from collections import Counter
from dataclasses import dataclass

from paddlemix.models.blocks.flops import decoder_flops, vision_flops
from paddlemix.training.arguments import DataTrainingArguments, ModelArguments, PreTrainingArguments
from paddlemix.training.plan import largest_batch, parameters
from paddlemix.training.published import PUBLISHED, published_config


@dataclass(frozen=True)
class Node:
    """Eight cards by the vendors' figures.

    Attributes:
        tflops: peak of products in bfloat16, TFLOP/s.
        memory: GB/s.
        inside, outside: GB/s of a card in one direction to its neighbours, and to other nodes.
    """

    tflops: float
    memory: float
    inside: float
    outside: float
    cards: int = 8


NODES = {
    "A800": Node(312, 2039, 200, 25),  # eight NVLinks of 50 GB/s in both directions; 200 Gb/s InfiniBand for each card
    "H800": Node(989, 3350, 200, 50),  # the same links; 400 Gb/s
    "910B": Node(313, 1600, 196, 25),  # seven HCCS links of 56 GB/s in both directions; 200 Gb/s Ethernet for each card
}
# Model: stage of ZeRO and samples of a card, of the published scripts for full fine-tuning; the smallest number of cards.
MODELS = {
    "InternVL2-2B": ("stage1", 4, 8),
    "InternVL2-8B": ("stage2", 4, 8),
    "InternVL2-26B": ("stage3", 2, 8),
    "InternVL2-40B": ("stage3", 2, 16),
    "InternVL2-Llama3-76B": ("stage3", 1, 32),
}
CARDS = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Block:
    """A block of one rank, or what is outside all.

    Attributes:
        forward: seconds of its forward pass.
        weights, learned: numbers of its weights, and of those that learn.
        summed: bytes of each of the two sums over the ranks that divide it.
        calls: parameters, each of which is sent by itself.
    """

    forward: float
    weights: int
    learned: int
    summed: int = 0
    calls: int = 1


@dataclass(frozen=True)
class Step:
    """What a card does in a step.

    Attributes:
        vision, decoder: lists of :class:`Block`, in order.
        outside: the :class:`Block` of all else.
        stage: of ZeRO, 0 to 3.
        vision_learns: whether gradients pass through the tower.
        recompute: whether blocks are computed again in the backward pass.
    """

    vision: tuple
    decoder: tuple
    outside: Block
    stage: int
    vision_learns: bool = False
    recompute: bool = True


@dataclass(frozen=True)
class Link:
    """How a group of ``size`` cards sends: GB/s, and microseconds of a call along all of them, or up a tree of them."""

    size: int
    bandwidth: float
    ring: float = 0.0
    tree: float = 0.0

    def one(self, size, calls=1):
        """Seconds in which ``size`` bytes go from one to all, or come together in one."""
        return 0.0 if self.size == 1 or not size else size / self.bandwidth / 1e9 + calls * self.ring / 1e6

    def all(self, size, calls=1):
        """Seconds of a sum that all have in the end."""
        if self.size == 1 or not size:
            return 0.0
        return 2 * (self.size - 1) / self.size * size / self.bandwidth / 1e9 + 2 * calls * self.tree / 1e6


def link(node, size, neighbours, latency=5.0, inside=2.0, bandwidth=None):
    """The :class:`Link` of a group of cards.

    Args:
        node: :class:`Node`.
        size: cards of the group.
        neighbours: how many of them are in one node; across nodes they use the network of all of these.
        latency, inside: microseconds from one card to the next, of another node and of the same.
        bandwidth: GB/s of a card to other nodes, instead of the node's own.
    """
    neighbours = min(neighbours, size)
    nodes = size // neighbours
    slowest = node.inside if nodes == 1 else min(node.inside, (bandwidth or node.outside) * neighbours)
    ring = (size - nodes) * inside + (nodes - 1) * latency
    return Link(size, slowest, ring, math.log2(neighbours) * inside + math.log2(nodes) * latency)


class _Timeline:
    """One stream that computes and one that sends; ``waited`` says how long computing stood still, by what it waited for."""

    def __init__(self, overlaps):
        self.now, self.free, self.overlaps = 0.0, 0.0, overlaps
        self.waited, self.sent = Counter(), Counter()

    def compute(self, seconds):
        self.now += seconds

    def begin(self, kind, seconds, size=0):
        """Send; returns when it will have ended."""
        self.sent[kind] += size
        self.free = max(self.free, self.now) + seconds
        if not self.overlaps:
            self.wait(kind, self.free)
        return self.free

    def wait(self, kind, until):
        if until > self.now:
            self.waited[kind] += until - self.now
            self.now = until

    def summed(self, seconds, size):
        """A sum over the ranks that divide a layer, on links of their own, which everything waits for."""
        self.sent["layers"] += size
        self.waited["layers"] += seconds
        self.now += seconds


ALONE = Link(1, 1.0)
_BUCKET = 2**25  # numbers that are summed in one call


def simulate(step, data, tensor=ALONE, replicas=ALONE, overlaps=True, update=0.0, element=2):
    """Play two steps, and tell of the second.

    Args:
        step: :class:`Step`.
        data, tensor, replicas: :class:`Link` of the processes that divide states (or data alone), of those that divide layers,
            and of those that have the same share of the states.
        overlaps: whether something is sent while something is computed.
        update: seconds of the optimiser.
        element: bytes of a number that is sent.

    Returns:
        (seconds of a step, ``{kind: seconds that computing waited}``, ``{kind: bytes sent}``); kinds are ``layers``,
        ``gradients`` and ``weights``.
    """
    line, arriving = _Timeline(overlaps), {}
    for _ in range(2):  # the second begins with what the first has left on its way
        line.waited.clear()
        line.sent.clear()
        began = line.now
        _play(step, data, tensor, replicas, line, arriving, update, element)
    return line.now - began, dict(line.waited), dict(line.sent)


def _play(step, data, tensor, replicas, line, arriving, update, element):
    def gather(block):
        return line.begin("weights", data.one(element * block.weights, block.calls), element * block.weights)

    def leave(block):
        size = element * block.learned
        if step.stage:
            return line.begin("gradients", data.one(size, block.calls), size)
        return line.begin("gradients", data.all(size, math.ceil(block.learned / _BUCKET)), size)

    def sums(block, passes=1):
        for _ in range(2 * passes):
            line.summed(tensor.all(block.summed), block.summed)

    forward = [*step.vision, *step.decoder]
    backward = [*reversed(step.decoder), *(reversed(step.vision) if step.vision_learns else ())]
    order, left = [*forward, *backward], []
    if step.stage == 3:
        outside, ahead = gather(step.outside), gather(order[0])
        line.wait("weights", outside)
    elif id(step.outside) in arriving:
        line.wait("weights", arriving.pop(id(step.outside)))
    for place, block in enumerate(order):
        if step.stage == 3:
            line.wait("weights", ahead)
            if place + 1 < len(order) and order[place + 1] is not block:  # which the last block has, going back
                ahead = gather(order[place + 1])
        elif (key := (id(block), place)) in arriving:
            line.wait("weights", arriving.pop(key))
        if place < len(forward):
            line.compute(block.forward)
            sums(block)
            if place == len(forward) - 1:
                line.compute(3 * step.outside.forward)  # with the loss, and its gradients at once
        else:
            line.compute((3 if step.recompute else 2) * block.forward)
            sums(block, 2 if step.recompute else 1)
            left.append(leave(block))
    left.append(leave(step.outside))
    for until in left:
        line.wait("gradients", until)
    if step.stage and replicas.size > 1:  # each card its share
        learned = sum(block.learned for block in (*forward, step.outside)) / data.size
        size = element * learned
        line.wait("gradients", line.begin("gradients", replicas.all(size, math.ceil(learned / _BUCKET)), size))
    line.compute(update)
    if step.stage in (1, 2):
        for key, block in [(id(step.outside), step.outside), *(((id(b), i), b) for i, b in enumerate(forward))]:
            if block.learned:
                size = element * block.learned
                arriving[key] = line.begin("weights", data.one(size, block.calls), size)


# ---------------------------------------------------------------------- a published model


def published_step(name, node, efficiency, stage=None, rows=None, ranks=1):
    """(:class:`Step` of full fine-tuning of a published model, seconds of it without any sending, seconds of the optimiser).

    Args:
        name: of :data:`~paddlemix.training.published.PUBLISHED`.
        node: :class:`Node`.
        efficiency: share of its peak that products reach.
        stage, rows: of ZeRO, and samples of a card; None for the script's.
        ranks: how many cards divide every layer.
    """
    own_stage, own_rows, _ = MODELS.get(name, ("stage1", 4, 8))
    stage, rows = own_stage if stage is None else stage, rows or own_rows
    config = published_config(name)
    data_args = DataTrainingArguments(
        max_seq_length=4096, dynamic_image_size=True, use_thumbnail=True, max_dynamic_patch=6, force_image_size=448
    )
    train_args = PreTrainingArguments(output_dir=".", per_device_train_batch_size=rows)
    batch = largest_batch(config, data_args, train_args)
    counts = parameters(config, ModelArguments(name, freeze_backbone=True))
    speed = node.tflops * 1e12 * efficiency * ranks
    llm, depths = config.llm_config, (config.vision_config.num_hidden_layers, config.llm_config.num_hidden_layers)
    all_flops = rows * decoder_flops(config, batch.tokens, logits=0), vision_flops(config, batch.tiles)
    widths = llm.hidden_size, config.vision_config.hidden_size
    places = rows * batch.tokens, batch.tiles * (1 + (448 // config.vision_config.patch_size) ** 2)

    def blocks(prefix, which):
        sizes = [0] * depths[which == 0]
        learned, calls = [0] * len(sizes), [0] * len(sizes)
        for parameter, (size, learns) in counts.items():
            if parameter.startswith(prefix):
                number = int(parameter[len(prefix) :].split(".")[0])
                sizes[number] += size
                learned[number] += size * learns
                calls[number] += 1
        seconds = all_flops[which] / len(sizes) / speed
        summed = 2 * widths[which] * places[which] if ranks > 1 else 0
        return tuple(
            Block(seconds, size // ranks, learn // ranks, summed, many) for size, learn, many in zip(sizes, learned, calls)
        )

    decoder, vision = blocks("language_model.model.layers.", 0), blocks("vision_model.encoder.layers.", 1)
    total = sum(size for size, _ in counts.values()) // ranks
    trained = sum(size for size, learns in counts.values() if learns) // ranks
    inside = sum(block.weights for block in (*vision, *decoder)), sum(block.learned for block in (*vision, *decoder))
    head = 2 * places[0] * llm.hidden_size * llm.vocab_size / speed
    outside = Block(head, total - inside[0], trained - inside[1], 0, 12)
    step = Step(vision, decoder, outside, int(stage[-1]) if stage else 0)
    # AdamW reads gradient, master, two moments, and writes the last three and the weight.
    return step, alone(step), 30 * trained / (node.memory * 1e9)


def alone(step):
    """Seconds of a step that computes alone, without its optimiser."""
    passes = 4 if step.recompute else 3
    vision = sum(block.forward for block in step.vision) * (passes if step.vision_learns else 1)
    return vision + passes * sum(block.forward for block in step.decoder) + 3 * step.outside.forward


def expected(name, node, cards, options):
    """(seconds of a step, share of it that computes, {kind: share of it that computing waited}) on so many cards."""
    ranks = options.tensor_parallel
    step, compute, update = published_step(name, node, options.efficiency, options.sharding, options.rows, ranks)
    more = options.latency, options.latency_inside, options.bandwidth
    own, beside = cards // ranks, max(1, node.cards // ranks)
    shards = own if not step.stage else min(own, options.sharding_parallel_degree or own)
    data, tensor = link(node, shards, beside, *more), link(node, ranks, node.cards, *more)
    replicas = link(node, own // shards, max(1, beside // shards), *more)
    update /= shards if step.stage else 1
    seconds, waited, _ = simulate(step, data, tensor, replicas, not options.no_overlap, update)
    waited["optimiser"] = update
    return seconds, compute / seconds, {kind: value / seconds for kind, value in waited.items()}


def measured(name, tokens):
    """Share of its peak that the device here reaches in a block of the model's decoder, forward and backward.

    Args:
        name: of a published model.
        tokens: of one row.
    """
    import paddle

    from paddlemix import device
    from paddlemix.models.blocks.language import Decoder
    from paddlemix.models.blocks.layers import AttentionMask
    from paddlemix.training.log import peak_flops

    dtype = "float32" if device.is_cpu(device.set_device("auto")) else "bfloat16"
    config = published_config(name)
    config.llm_config.num_hidden_layers, config.llm_config.vocab_size = 1, 16
    block = Decoder(config.llm_config)
    block.to(dtype=dtype)
    x = paddle.randn([1, tokens, config.llm_config.hidden_size]).astype(dtype)
    positions, best = paddle.arange(tokens).unsqueeze(0), math.inf
    for _ in range(4):
        device.synchronize()
        began = time.perf_counter()
        block(x, positions.numpy(), AttentionMask()).astype("float32").sum().backward()
        device.synchronize()
        best = min(best, time.perf_counter() - began)
        block.clear_gradients()
    flops = 3 * decoder_flops(config, tokens, logits=0)
    print(f"a block of {name}, {tokens} tokens, {dtype} on {device.current()}: {best:.3f} s forward and backward")
    return flops / best / peak_flops(dtype)


def table(options):
    """(lines of Markdown, ``{kind of nodes: {model: [(cards, efficiency)]}}``)."""
    lines, curves = (
        ["| nodes | model | cards | step, s | efficiency | limited by |", "| --- | --- | --: | --: | --: | --- |"],
        {},
    )
    for kind in options.nodes:
        for name in options.model:
            least = options.tensor_parallel if name not in MODELS else max(MODELS[name][2], options.tensor_parallel)
            for cards in (count for count in options.cards if count >= least):
                seconds, share, waits = expected(name, NODES[kind], cards, options)
                curves.setdefault(kind, {}).setdefault(name, []).append((cards, share))
                worst = max(waits, key=waits.get)
                limit = f"{WORDS[worst]} ({waits[worst]:.0%})" if waits[worst] >= 0.005 else "computing"
                lines.append(f"| {kind} | {name} | {cards} | {seconds:.2f} | {share:.0%} | {limit} |")
    return lines, curves


WORDS = {
    "layers": "sums of divided layers",
    "gradients": "gradients",
    "weights": "new weights",
    "optimiser": "the optimiser",
}


def draw(curves, without, path):
    """The efficiencies as a picture; those ``without`` sending meanwhile as dashed lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.4), sharey=True, squeeze=False)
    for axis, (kind, models) in zip(axes[0], curves.items()):
        for name, points in models.items():
            (line,) = axis.plot(*zip(*points), "o-", label=name, markersize=3)
            axis.plot(*zip(*without[kind][name]), "--", color=line.get_color(), linewidth=0.8)
            counts = sorted({cards for own in models.values() for cards, _ in own})
        axis.set(title=kind, xlabel="cards", ylim=(0, 1.02))
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, counts)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of a step that computes")
    axes[0][0].legend(fontsize=7, loc="lower left")
    figure.suptitle("A model, not a measurement (dashed: nothing is sent while something is computed)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def make_parser():
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", default=list(MODELS), choices=PUBLISHED, help="published models (default: five sizes)")
    add("--nodes", nargs="+", default=list(NODES), choices=NODES, help="kinds of nodes (default: all)")
    add("--cards", nargs="+", type=int, default=CARDS, help="how many cards (default: 8 to 512)")
    add("--efficiency", type=float, default=0.5, help="share of its peak that a block reaches (default: %(default)s)")
    add("--measure", action="store_true", help="measure that share on the device here, with a block of the first model")
    add("--bandwidth", type=float, help="GB/s of a card to other nodes (default: the nodes' own)")
    add("--latency", type=float, default=5.0, help="microseconds from a node to the next (default: %(default)s)")
    add("--latency_inside", type=float, default=2.0, help="the same from a card to the next of its node (default: %(default)s)")
    add("--sharding", choices=("", "stage1", "stage2", "stage3"), help="stage of ZeRO (default: the script's)")
    add("--sharding_parallel_degree", type=int, help="cards that divide states, next to each other (default: all)")
    add("--rows", type=int, help="samples of a card in a step (default: the script's)")
    add("--tensor_parallel", type=int, default=1, help="cards that divide every layer (default: %(default)s)")
    add("--no_overlap", action="store_true", help="nothing is sent while something is computed")
    add("--out", help="write a picture here")
    return parser


def main(argv=None):
    """Print the table."""
    options = make_parser().parse_args(argv)
    if options.measure:
        options.efficiency = measured(options.model[0], 1024)
        print(f"which is {options.efficiency:.0%} of its peak\n")
    print(
        f"Full fine-tuning by the published scripts, samples of 1,792 tokens from pictures and 512 of text; blocks reach "
        f"{options.efficiency:.0%} of the cards' peak. A model, not a measurement.\n"
    )
    lines, curves = table(options)
    print("\n".join(lines))
    if options.out:
        options.no_overlap = True
        draw(curves, table(options)[1], options.out)


if __name__ == "__main__":
    main()
