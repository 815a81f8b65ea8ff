"""Options of a trainer among a test's keyword arguments."""

from dataclasses import fields

from lasnn_sj.training import TrainingOptions

NAMES = {one.name for one in fields(TrainingOptions)}


def with_options(arguments):
    """The arguments, with those of TrainingOptions gathered in ``options``."""
    options = {name: value for name, value in arguments.items() if name in NAMES}
    others = {name: value for name, value in arguments.items() if name not in NAMES}
    return others | ({"options": TrainingOptions(**options)} if options else {})
