"""What there is to say of an NVIDIA GPU before its operators are checked."""


def versions():
    """Lines of the table about Paddle and the card."""
    import paddle

    yield "paddle", "pass", f"{paddle.__version__} for CUDA {paddle.version.cuda()}, cuDNN {paddle.version.cudnn()}"
    major, minor = paddle.device.cuda.get_device_capability()
    advice = "" if major >= 8 else ": no bfloat16 and no flash attention, float16 is used"
    yield "card", "pass", f"{paddle.device.cuda.get_device_name()}, compute capability {major}.{minor}{advice}"
