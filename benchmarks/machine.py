"""What a benchmark was run on."""

import os
import platform
from datetime import date


def machine() -> str:
    """Day and kind of machine, as tables name them."""
    return f"{date.today()}, {os.cpu_count()} CPU cores, {platform.machine()}"
