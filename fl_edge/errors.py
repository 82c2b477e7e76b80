"""Everything fl_edge raises on purpose.

::

    FlEdgeError            the root: one line that says what is wrong, where, and what is allowed
     ├─ ConfigError        an unknown key, a value out of range, settings that contradict each other
     ├─ DataError          a data set, folder or partition that cannot be used
     ├─ ReplyError         an answer of a device that must not be applied (shape, NaN, order)
     ├─ TrainingError      the run cannot go on: no devices, no round that ended, a loss that is not a number
     └─ RunFolderError     the run folder cannot be written or resumed

The message *is* the user interface: it is printed alone, without a traceback.
"""


class FlEdgeError(Exception):
    """Root of every error that fl_edge raises on purpose."""


class ConfigError(FlEdgeError):
    """A configuration that cannot be run; raised before anything starts."""


class DataError(FlEdgeError):
    """Data that cannot be loaded or split as asked."""


class ReplyError(FlEdgeError):
    """A device's reply that must not be applied; the device is left out, the run goes on."""


class TrainingError(FlEdgeError):
    """A run that cannot go on; what it wrote until then can be resumed."""


class RunFolderError(FlEdgeError):
    """A run folder that cannot be written, or that holds nothing to resume."""
