"""Packers of AWQ and GPTQ, written from the descriptions of the formats, that make checkpoints for tests.

AWQ: the gemm form of https://github.com/casper-hansen/AutoAWQ (``awq/modules/linear/gemm.py``): eight outputs in 32 bits,
slot ``i`` holding output ``order[i]`` of each eight. GPTQ: https://github.com/AutoGPTQ/AutoGPTQ (``qlinear``): consecutive
inputs in 32 bits, zeros less one; ``gptq_v2`` (GPTQModel) has the zeros as they are.
"""

import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def random_codes(rng, outputs, inputs, group, bits=4):
    """Codes ``[out, in]``, zeros and scales ``[groups, out]``, group of each input."""
    groups = -(-inputs // group)
    codes = rng.integers(0, 1 << bits, [outputs, inputs])
    zeros = rng.integers(1, 1 << bits, [groups, outputs])
    scales = rng.uniform(0.01, 0.03, [groups, outputs]).astype(np.float16)
    return codes, zeros, scales


def values(codes, zeros, scales, group_of):
    """What they stand for, ``[out, in]`` float32."""
    out = np.empty(codes.shape, np.float32)
    for i in range(codes.shape[1]):
        g = group_of[i]
        out[:, i] = (codes[:, i] - zeros[g]) * scales[g].astype(np.float32)
    return out


def pack_awq(codes, zeros, scales):
    """``{qweight, qzeros, scales}`` of AWQ's gemm form."""

    def pack(rows):  # [n, out] -> [n, out / 8]
        packed = np.zeros([rows.shape[0], rows.shape[1] // 8], np.uint32)
        for column in range(packed.shape[1]):
            for slot, output in enumerate(AWQ_ORDER):
                packed[:, column] |= rows[:, column * 8 + output].astype(np.uint32) << np.uint32(4 * slot)
        return packed.view(np.int32)

    return {"qweight": pack(codes.T), "qzeros": pack(zeros), "scales": scales}


def pack_gptq(codes, zeros, scales, bits=4, group_of=None, v2=False):
    """``{qweight, qzeros, scales}`` of GPTQ, and ``g_idx`` where ``group_of`` is given."""
    each = 32 // bits
    qweight = np.zeros([codes.shape[1] // each, codes.shape[0]], np.uint32)
    for row in range(qweight.shape[0]):
        for slot in range(each):
            qweight[row] |= codes[:, row * each + slot].astype(np.uint32) << np.uint32(bits * slot)
    stored = zeros if v2 else (zeros - 1) % (1 << bits)
    qzeros = np.zeros([zeros.shape[0], zeros.shape[1] // each], np.uint32)
    for column in range(qzeros.shape[1]):
        for slot in range(each):
            qzeros[:, column] |= stored[:, column * each + slot].astype(np.uint32) << np.uint32(bits * slot)
    tensors = {"qweight": qweight.view(np.int32), "qzeros": qzeros.view(np.int32), "scales": scales}
    if group_of is not None:
        tensors["g_idx"] = np.asarray(group_of, np.int32)
    return tensors
