"""Checks of arguments, and parts of their error messages."""
import math
from collections.abc import Iterable
from difflib import get_close_matches


def check_number(field: str,
                 value: float,
                 least: float | None = None,
                 most: float | None = None,
                 above: float | None = None,
                 whole: bool = False) -> float:
    """Returns ``value`` if it is a finite number within the bounds, else raises ``ValueError``."""
    kind = int if whole else (int, float)
    fits = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    if not (fits and (least is None or value >= least) and (most is None or value <= most)
            and (above is None or value > above)):
        bounds = [f'{sign} {bound}' for sign, bound in (('>=', least), ('>', above), ('<=', most))
                  if bound is not None]
        raise ValueError(f'{field} must be a {"whole" if whole else "finite"} number '
                         f'{" and ".join(bounds)}, got {value!r}')
    return value


def check_dict(field: str, value: dict) -> dict:
    """Returns ``value`` if it is a dict, else raises ``ValueError``."""
    if not isinstance(value, dict):
        raise ValueError(f'{field} must be a dict, got {value!r}')
    return value


def type_name(kind: str | type | None) -> str:
    """Returns the name of the class that ``type`` in a config means: a class, its name, or its name with a path."""
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition('.')[2]


def closest(name: str, names: Iterable[str]) -> str:
    """Returns the end of an error message about an unknown name: the closest known names."""
    names = list(names)
    matches = get_close_matches(str(name), names, n=5, cutoff=0.4) or names[:10]
    return f'the closest are: {", ".join(matches)}' if matches else 'there are none'
