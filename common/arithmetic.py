"""Integer arithmetic that has no name in Python."""


def ceil_div(dividend: int, divisor: int) -> int:
    """Return the quotient rounded up: how many groups of `divisor` hold `dividend` things."""
    return -(-dividend // divisor)


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not below `number`."""
    return ceil_div(number, multiple) * multiple


def round_down(number: int, multiple: int) -> int:
    """Return the largest multiple of `multiple` that is not above `number`."""
    return number // multiple * multiple
