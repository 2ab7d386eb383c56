import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load_script(name: str, file: str = "run.py") -> ModuleType:
    """The module experiments/NAME/FILE, which may import others of its folder."""
    path = Path(__file__).parents[2] / "experiments" / name / file
    spec = importlib.util.spec_from_file_location(f"experiments_{name}", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        patch.setitem(sys.modules, spec.name, module)  # data classes look for it
        spec.loader.exec_module(module)
    return module
