"""Numbers from anywhere, as arrays on the host: tensors of any device and dtype, arrays, nested lists."""

import numpy as np

from paddlemix.errors import PromptError


def host_array(value, name):
    """A tensor, an array or nested lists of numbers as an array on the host.

    bfloat16, which NumPy lacks and Paddle hands to it as bits in ``uint16``, comes as float32.

    Raises:
        PromptError: it is not numbers in a regular grid; ``name`` says what.
    """
    try:
        # Told by name, so that neither framework is imported for it: Paddle's, PyTorch's and that of the package ml_dtypes.
        dtype = str(getattr(value, "dtype", ""))
        if dtype == "torch.bfloat16":
            value = value.float()
        elif dtype.endswith("bfloat16"):
            value = value.astype("float32")
        if hasattr(value, "detach"):
            value = value.detach().cpu().numpy()
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PromptError(
            f"{name} cannot be read as an array of numbers ({reason}): give a Paddle tensor or a NumPy array"
        ) from None
    if array.dtype.kind not in "fiub":
        kind = type(value).__name__ if array.dtype.kind == "O" or not array.ndim else f"an array of {array.dtype}"
        raise PromptError(f"{name} must be numbers, not {kind}: give a Paddle tensor or a NumPy array")
    return array
