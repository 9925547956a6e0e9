import sys
from pathlib import Path

# The example is a package of its own beside its YAML files; nothing installs it.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
