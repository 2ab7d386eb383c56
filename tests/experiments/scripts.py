import importlib.util
from pathlib import Path
from types import ModuleType


def load_script(name: str, file: str = "run.py") -> ModuleType:
    """The module experiments/NAME/FILE."""
    path = Path(__file__).parents[2] / "experiments" / name / file
    spec = importlib.util.spec_from_file_location(f"experiments_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
