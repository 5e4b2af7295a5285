"""habana_frameworks.torch.utils.experimental"""


def _is_fp16_supported() -> bool:
    """As on Gaudi 2 and later."""
    return True
