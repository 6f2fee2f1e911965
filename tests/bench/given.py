"""What benchmarks run on where they are given nothing: what lies beside the repository, else the bundled model."""

from pathlib import Path
from typing import Final

SHARED: Final = Path(__file__).parents[3] / "shared"
TEXTS: Final = SHARED / "data" / "text"
TRACES: Final = SHARED / "data" / "traces"
_BASE: Final = SHARED / "models" / "tinymoe-base"
_BUNDLED: Final = Path(__file__).parents[2] / "examples" / "models" / "tinymoe-demo"
MODEL: Final = _BASE if _BASE.is_dir() else _BUNDLED
