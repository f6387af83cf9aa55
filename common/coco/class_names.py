"""Class names of different sources: equal up to `_` in place of a space."""

from collections.abc import Sequence


def spelled_as(names: Sequence[str], reference: Sequence[str]) -> tuple[str, ...]:
    """Return class names in the spelling of a reference, from which they may differ by `_`.

    MMDetection wrote `traffic_light` until April 2020. A name that the reference has stays, and so
    does one for which the reference has none or several.
    """
    spellings: dict[str, list[str]] = {}
    for name in reference:
        if name not in names:
            spellings.setdefault(name.replace("_", " "), []).append(name)
    spelled = []
    for name in names:
        candidates = spellings.get(name.replace("_", " "), [])
        if name not in reference and len(candidates) == 1:
            spelled.append(candidates[0])
        else:
            spelled.append(name)
    return tuple(spelled)
