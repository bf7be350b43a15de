import mmrazor.models  # noqa: F401  registers the classes that configs use from MMRazor

from . import tokens  # noqa: F401  registers the recorder MapOutputs
from .algorithms import *  # noqa: F403
from .area_detectors import *  # noqa: F403
from .backbones import *  # noqa: F403
from .connectors import *  # noqa: F403
from .distillers import *  # noqa: F403
from .losses import *  # noqa: F403
from .refiners import *  # noqa: F403
