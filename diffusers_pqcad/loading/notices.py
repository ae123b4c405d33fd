"""Lines of other libraries that tell our users nothing."""

import logging

# torchao, which diffusers imports where it is installed, warns of each library of its own that it cannot load: those
# are for GPUs and other releases of torch, and nothing of ours takes them.
OF_LIBRARIES = ("Failed to load ", "Skipping import of cpp extensions")


def is_of_interest(record: logging.LogRecord) -> bool:
    """Return whether a line of torchao is about anything but the libraries that it cannot load."""
    return not record.getMessage().startswith(OF_LIBRARIES)


def quieten_torchao_() -> None:
    """Leave out torchao's lines about libraries that it cannot load, from its import on."""
    logging.getLogger("torchao").addFilter(is_of_interest)
