"""Where a user's own files live, apart from projects and runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def config_folder() -> Path:
    """`$EDGESTILL_CONFIG`, else `edgestill` in the platform's place for configuration. It need not exist."""
    own = os.environ.get("EDGESTILL_CONFIG")
    if own:
        return Path(own).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("APPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Roaming") / "edgestill"
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "edgestill"


def user_devices() -> Path:
    """The folder of device files that `edgestill devices add` put there."""
    return config_folder() / "devices"
