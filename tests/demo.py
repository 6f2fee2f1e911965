"""The demo model that lies in the repository, and text for it."""

from pathlib import Path

_ROOT = Path(__file__).parents[1]
DEMO = _ROOT / "examples" / "models" / "tinymoe-demo"
TEXT = _ROOT / "LICENSE"  # some text that does not change
