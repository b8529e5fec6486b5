"""What is trained, and on which batches: what a family may do in its own way, around the one loop of :mod:`~.trainer`."""

import math
import os

from paddlemix.datasets.internvl2 import (
    BatchLoader,
    Collator,
    DataOptions,
    InternVLDataset,
    PackedBatches,
    Packer,
    SampleEncoder,
    SampleOrder,
    TrainBatchSampler,
    costs,
    measure,
    read_meta,
    rows_per_epoch,
    sequential_batches,
)
from paddlemix.errors import ConfigError

from .building import build_model, prepare
from .checkpoints import save_model
from .objective import CausalObjective
from .plan import count_steps


class SampledBatches:
    """Batches of one sample a row, in steps whose content does not depend on the number of processes."""

    def __init__(self, sampler, loader):
        self.sampler, self.loader = sampler, loader
        self.dataset, self.collate = loader.dataset, loader.collate

    def start(self, step, states):
        """Batches from a step on."""
        self.sampler.resume(step)
        return iter(self.loader)

    def state(self):
        """What resuming needs beside the step."""
        return {"global_batch": self.sampler.global_batch}

    def epoch(self, step):
        """Passes over the data in so many steps, a fraction."""
        return step / self.sampler.steps_per_epoch

    def check(self, state):
        """Raise ConfigError where a run with ``state`` had other steps."""
        if state["global_batch"] != self.sampler.global_batch:
            raise ConfigError(
                f"the checkpoint is of a run with {state['global_batch']} samples a step, not {self.sampler.global_batch}: "
                "keep --per_device_train_batch_size times --gradient_accumulation_steps times processes as it was"
            )


class PackedRows:
    """Batches of packed rows."""

    def __init__(self, batches):
        self.batches = batches
        self.dataset, self.collate = batches.dataset, batches.collator

    def start(self, step, states):
        """Batches from where the ``states`` of all processes were taken on."""
        if states is not None:
            self.batches.load_state_dict(*(state["packed"] for state in states))
        return iter(self.batches)

    def state(self):
        """The position in the data."""
        return {"packed": self.batches.state_dict()}

    def epoch(self, step):
        """Passes over the data so far, a fraction; by the samples that this process took."""
        return self.batches.epoch

    def check(self, state):
        """Raise ConfigError where ``state`` is not of packed rows."""
        if "packed" not in state:
            raise ConfigError("the checkpoint is of a run without --use_packed_ds: leave it out here too")


def data_options(config, data_args, **changes):
    """How records become samples of the model that ``config`` describes."""
    names = "max_seq_length normalize_type multi_scale min_num_frame max_num_frame".split()
    return DataOptions.from_config(config, **{**{name: getattr(data_args, name) for name in names}, **changes})


class ChatRecipe:
    """How a chat model becomes what is trained, and its records samples: what a family may do in its own way."""

    encoder, collator = SampleEncoder, Collator
    parse = None  # what makes a record of a line; None for read_meta's own
    build_model = staticmethod(build_model)
    prepare = staticmethod(prepare)
    save_model = staticmethod(save_model)
    measure, costs = staticmethod(measure), staticmethod(costs)
    # A record that cannot be used: whether nothing takes its place. Where a share of a data set is used: whether it is drawn.
    skip, drawn = False, False
    divides_layers = True  # whether layers may be divided over processes (tensor parallel)
    sized = True  # whether all samples may be measured before, so that processes have as much to do as others

    def dataset(self, model, tokenizer, data_args, seed):
        """The :class:`InternVLDataset` of the training data."""
        changes = {}
        if data_args.use_packed_ds:
            length = min(data_args.max_seq_length, data_args.max_packed_tokens // self.encoder.answers)
            changes = dict(max_seq_length=length, max_tiles=data_args.num_images_expected)
        encoder = self.encoder(tokenizer, data_args.conv_style, data_options(model.config, data_args, **changes))
        domains = data_args.allowed_media_domains
        sources = read_meta(data_args.meta_path, self.parse, domains, seed if self.drawn else None)
        return InternVLDataset(sources, encoder, seed, self.skip)

    def validation(self, model, tokenizer, data_args, seed):
        """The one of the held-out data."""
        options = data_options(model.config, data_args, sampling_method="middle")
        encoder = self.encoder(tokenizer, data_args.conv_style, options)
        sources = read_meta(data_args.eval_meta_path, self.parse, data_args.allowed_media_domains)
        return InternVLDataset(sources, encoder, seed, self.skip)

    def objective(self, model, resumed, processes):
        """What the steps make small; ``resumed`` says whether the model is a checkpoint of this run."""
        return CausalObjective()

    def order(self, dataset, data_args, args, processes):
        """The :class:`SampleOrder` of an epoch."""
        resample, replacement = data_args.use_data_resampling, data_args.replacement
        return SampleOrder(dataset.source_sizes(), args.seed, resample=resample, replacement=replacement)


def training_data(model, tokenizer, data_args, args, processes, recipe=None):
    """The training batches and the number of steps: (:class:`SampledBatches` or :class:`PackedRows`, int).

    Raises:
        UserError: data or arguments cannot be used.
    """
    recipe = recipe or ChatRecipe()
    dataset = processes.first_then_others(lambda: recipe.dataset(model, tokenizer, data_args, args.seed))  # leaves an index
    strict = data_args.use_packed_ds and data_args.strict_mode
    collator = recipe.collator(
        pad_token_id=tokenizer.pad_token_id or 0,
        loss_reduction=data_args.loss_reduction,
        tiles_per_row=data_args.num_images_expected if strict else None,
        blank_tile=args.sharding == "stage3",  # all processes run the vision tower, or none
        tile_size=data_args.force_image_size,
    )
    order = recipe.order(dataset, data_args, args, processes)
    share = dict(rank=processes.rank, world=processes.world)
    cache = os.path.join(args.output_dir, "lengths")
    if data_args.use_packed_ds:
        limits = data_args.max_packed_tokens, data_args.num_images_expected
        packer = Packer(*limits, data_args.max_buffer_size, data_args.allow_overflow)
        batches = PackedBatches(
            dataset,
            order,
            packer,
            collator,
            args.per_device_train_batch_size,
            **share,
            num_workers=args.dataloader_num_workers,
            accumulation=args.gradient_accumulation_steps,
        )
        steps = args.max_steps
        if steps < 1:
            rows = rows_per_epoch(order, Packer(*limits, data_args.max_buffer_size), recipe.costs(dataset))
            at_once = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes.world
            steps = math.ceil(rows * args.num_train_epochs / at_once)
        return PackedRows(batches), steps
    group = recipe.sized and args.group_by_length and args.per_device_train_batch_size > 1
    balance = recipe.sized and processes.world > 1
    tokens = tiles = None
    if group or balance:
        tokens, tiles = processes.first_then_others(lambda: recipe.measure(dataset, cache))
    steps = count_steps(len(dataset), args, processes.world)
    sampler = TrainBatchSampler(
        order,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        **share,
        tokens=tokens if group else None,
        tiles=tiles if balance else None,
        steps=steps,
    )
    return SampledBatches(sampler, BatchLoader(dataset, sampler, collator, args.dataloader_num_workers)), steps


def validation_data(model, tokenizer, data_args, args, processes, recipe=None):
    """This process's share of the held-out batches: a function that gives them anew, or None without --eval_meta_path."""
    if data_args.eval_meta_path is None:
        return None
    recipe = recipe or ChatRecipe()
    dataset = recipe.validation(model, tokenizer, data_args, args.seed)
    batches = sequential_batches(len(dataset), args.per_device_eval_batch_size, processes.rank, processes.world)
    if args.max_evaluate_steps > 0:
        batches = batches[: args.max_evaluate_steps]
    collator = recipe.collator(
        tokenizer.pad_token_id or 0, blank_tile=args.sharding == "stage3", tile_size=data_args.force_image_size
    )
    loader = BatchLoader(dataset, batches, collator, args.dataloader_num_workers)
    return lambda: iter(loader)
