"""Parts of an experiment that settings name: algorithms, rules and others, built in, of installed packages, or any
object of one's own by `module:object`."""

from semcons_ray.parts.find import SECRET, build, names, options_of, resolve
from semcons_ray.parts.setting import STORED, PartName
from semcons_ray.parts.table import BUILT_IN, GROUPS, PROTOCOLS, Kind

__all__ = [
    "BUILT_IN",
    "GROUPS",
    "PROTOCOLS",
    "SECRET",
    "STORED",
    "Kind",
    "PartName",
    "build",
    "names",
    "options_of",
    "resolve",
]
