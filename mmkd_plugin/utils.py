"""Checks of arguments, and parts of their error messages."""
import math
from collections.abc import Iterable
from difflib import get_close_matches

from mmengine.model import is_model_wrapper
from torch import nn


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


def in_words(error: Exception) -> str:
    """Returns the type of an exception, and its message on one line, or the place it was raised at if it has none."""
    message = ' '.join(str(error).split()).rstrip('.')
    if not message:
        trace = error.__traceback__
        while trace and trace.tb_next:
            trace = trace.tb_next
        code = trace.tb_frame.f_code if trace else None
        message = f'in {code.co_name} of {code.co_filename.rpartition("/")[2]}, line {trace.tb_lineno}' if code else ''
    if len(message) > 400:
        message = f'{message[:400]}...'
    return f'{type(error).__name__}: {message}'


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model inside MMEngine's wrapper for several processes, or the model itself."""
    return model.module if is_model_wrapper(model) else model
