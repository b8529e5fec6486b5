"""What a model costs: parameters, floating-point operations and bytes read, from its configuration alone.

A multiplication and an addition are two FLOPs. Matrix products and attention are counted; norms, activations and biases,
below one percent together, are not. ``T`` tiles, ``P`` patches of a tile, ``D`` width in the comments below.
"""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def vision_flops(config, tiles):
    """FLOPs of the features of ``tiles``: the vision tower up to the layer in use, and the projector.

    Args:
        config: :class:`~.configuration.InternVLChatConfig`.
        tiles: number of tiles of ``config.image_size`` pixels a side.
    """
    vision, width = config.vision_config, config.vision_config.hidden_size
    patches = (config.image_size // vision.patch_size) ** 2
    tokens = patches + 1  # and the class token
    embed = patches * vision.num_channels * vision.patch_size**2 * width
    products = tokens * (4 * width**2 + 2 * width * vision.intermediate_size)  # qkv and output, MLP
    attention = 2 * tokens**2 * width  # scores and weighted values, all heads
    size_in, size_out = _projector_sizes(config)
    projector = config.num_image_token * (size_in * size_out + size_out**2)
    return 2 * tiles * (embed + _vision_depth(config) * (products + attention) + projector)


def decoder_flops(config, tokens, context=0, logits=1):
    """FLOPs of one row of new tokens through the language model.

    Attention is counted for the pairs that the causal order lets see each other.

    Args:
        config: :class:`~.configuration.InternVLChatConfig`.
        tokens: new tokens: the prompt's length in prefill, 1 in a decode step.
        context: earlier positions, whose keys and values are in the cache.
        logits: positions that go through the output head: 1 in generation, ``tokens`` in training.
    """
    llm = config.llm_config
    weights = attention = 0
    for i in range(llm.num_hidden_layers):
        weights += _layer_weights(llm, i, active=True)
        attention += 2 * _pairs(tokens, context, llm.window(i)) * llm.num_attention_heads * llm.head_dim
    return 2 * (tokens * weights + attention + logits * llm.hidden_size * llm.vocab_size)


def parameter_counts(config):
    """Parameters of each part, by name: ``vision``, ``projector``, ``embedding``, ``decoder``, ``head``.

    Args:
        config: :class:`~.configuration.InternVLChatConfig`.
    """
    vision, llm = config.vision_config, config.llm_config
    width, hidden = vision.hidden_size, vision.intermediate_size
    positions = 1 + (vision.image_size // vision.patch_size) ** 2
    norms = 2 * width * (2 if vision.norm_type == "layer_norm" else 1) + (2 * width if vision.qk_normalization else 0)
    attention = 4 * width**2 + width + (3 * width if vision.qkv_bias else 0)
    mlp = 2 * width * hidden + hidden + width
    embed = vision.num_channels * vision.patch_size**2 * width + width + width + positions * width
    size_in, size_out = _projector_sizes(config)
    decoder = sum(_layer_weights(llm, i) + _layer_vectors(llm, i) for i in range(llm.num_hidden_layers))
    router = {}
    if getattr(config, "has_router", False):  # of the Flash models
        coarse, wide = width * round(1 / config.downsample_ratio) ** 4, llm.hidden_size
        compact = 2 * coarse + 2 * wide * (coarse + 1) + 2 * wide * (2 * wide + 1) + wide * (2 * wide + 1)
        pooling = width + 4 * (4 * width**2 + 6 * width)
        gate = 4 * (8 * width**2 + 7 * width) + 4 * width + 2
        router = {"router": compact + pooling + gate}
    return {
        **router,
        "vision": embed + vision.num_hidden_layers * (norms + attention + mlp + 2 * width),
        "projector": 2 * size_in + size_in * size_out + size_out + size_out**2 + size_out,
        "embedding": llm.vocab_size * llm.hidden_size,
        "decoder": decoder + llm.hidden_size,
        "head": 0 if llm.tie_word_embeddings else llm.vocab_size * llm.hidden_size,
    }


def parameter_bytes(config, dtype, parts=None):
    """Bytes of the weights in ``dtype``.

    Args:
        config: :class:`~.configuration.InternVLChatConfig`.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        parts: names from :func:`parameter_counts`; None for all.
    """
    counts = parameter_counts(config)
    return BYTES[dtype] * sum(counts[part] for part in (counts if parts is None else parts))


def decode_bytes(config, context, dtype):
    """Bytes that a decode step has to read: weights of blocks and head, and the keys and values of ``context`` positions.

    Of a mixture of experts those alone count that a token goes through.

    Of the embedding table one row is read, which is left out.
    """
    llm = config.llm_config
    idle = sum(_layer_weights(llm, i) - _layer_weights(llm, i, active=True) for i in range(llm.num_hidden_layers))
    seen = sum(min(context, llm.window(i) or context) for i in range(llm.num_hidden_layers))
    cache = 2 * llm.num_key_value_heads * llm.head_dim * seen
    read = parameter_bytes(config, dtype, ("decoder", "embedding" if llm.tie_word_embeddings else "head"))
    return read + BYTES[dtype] * (cache - idle)


def _vision_depth(config):
    """Blocks that run: those after the layer whose output is used do not."""
    depth, chosen = config.vision_config.num_hidden_layers, config.select_layer
    return chosen if chosen >= 0 else depth + 1 + chosen


def _projector_sizes(config):
    """Width of the projector's input and output."""
    return config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2, config.llm_config.hidden_size


def _pairs(tokens, context, window):
    """Pairs of a new token and one that it sees, itself included."""
    growing = tokens if window is None else min(tokens, max(window - context, 0))  # the others see a whole window
    return growing * context + growing * (growing + 1) // 2 + (tokens - growing) * (window or 0)


def _layer_weights(llm, layer, active=False):
    """Weights of the products of one block: qkv, output, and MLP or router and experts, of these the active ones alone."""
    attention = 2 * (llm.num_attention_heads + llm.num_key_value_heads) * llm.head_dim
    experts = llm.experts
    if not llm.is_sparse(layer):
        return llm.hidden_size * (attention + 3 * llm.intermediate_size)
    at_work = experts.active if active else experts.count
    return llm.hidden_size * (attention + experts.count + 3 * at_work * experts.width)


def _layer_vectors(llm, layer):
    """Biases, norms and sinks of one block."""
    width, head, heads, kv_heads = llm.hidden_size, llm.head_dim, llm.num_attention_heads, llm.num_key_value_heads
    count = 2 * width + (heads + 2 * kv_heads) * head * llm.qkv_bias + width * llm.o_bias
    count += 2 * head * llm.qk_norm + heads * llm.sinks
    if llm.is_sparse(layer):
        experts = llm.experts
        return count + experts.bias * experts.count * (1 + 2 * experts.width + width)
    return count + (2 * llm.intermediate_size + width) * llm.mlp_bias
